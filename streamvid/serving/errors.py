"""What clients are told of an error."""

from __future__ import annotations

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
