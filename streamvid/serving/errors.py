"""What clients are told of an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from streamvid.command_line import is_out_of_memory
from streamvid.printing import one_line


class Busy(Exception):
    """There is no place, not even to wait."""


class ViewerGone(Exception):
    """Raised inside a chunk that nobody waits for any more."""


def explain(error: Exception) -> tuple[str, str]:
    """A code and one line for a client; of errors that are ours it says no more than that."""
    if is_out_of_memory(error):
        return "out_of_memory", "there is not enough memory; try a smaller size, or later"
    if isinstance(error, ValueError):
        return "bad_request", one_line(error)
    return "internal", "the model failed on this stream; start it again"


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """An error, as OpenAI's clients read it."""

    error: ErrorDetail


def refusals(words: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """What a route may answer besides success, for its OpenAPI: by status, in words; with what
    ``guard`` refuses.
    """
    always = {401: "A token is needed.", 403: "The host or the origin is not allowed."}
    answers = sorted({**always, **words}.items())
    return {status: {"model": ErrorBody, "description": text} for status, text in answers}
