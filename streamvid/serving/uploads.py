"""``/v1/starts``: images and clips are uploaded, for streams to begin from."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from starlette.datastructures import FormData, UploadFile

from streamvid.serving.decoding import MEDIA_TYPES, suffix_of_content
from streamvid.serving.errors import refusals
from streamvid.serving.limits import Limits
from streamvid.serving.protocol import describe_errors
from streamvid.serving.realtime import Defaults
from streamvid.serving.starts import (
    START_TYPES,
    Start,
    StartStore,
    decode_file,
    plan_job,
    remove_decoded,
)

FORM_BYTES = 65_536
"""What a form may have beside the file."""
SideText = Annotated[str, StringConstraints(pattern=r"^[1-9]\d{0,3}$")]


class StartFields(BaseModel):
    """The fields of the form beside the file."""

    model_config = ConfigDict(extra="forbid")

    height: SideText | None = None
    width: SideText | None = None
    kind: Literal["image", "clip"] | None = None
    """``image`` takes the first picture only."""


class StartStatus(BaseModel):
    """What a stream may begin from: ``session.start`` with ``start: id``."""

    id: str
    kind: Literal["image", "clip"]
    num_frames: int
    width: int
    height: int
    expires_at: int


class StartDeleted(BaseModel):
    """A start that is no more."""

    id: str
    deleted: bool = True


REFUSALS = refusals(
    {
        400: "The file can't be decoded, or is too long or too large in pixels.",
        404: "There is no such start.",
        408: "The file takes too long to arrive.",
        413: "The file has too many bytes.",
        415: "Files of this kind are not read.",
        429: "Too many files are being read.",
        507: "The server has no room for the file.",
    }
)
BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    **StartFields.model_json_schema()["properties"],
                },
            }
        }
    },
}


def start_routes(starts: StartStore, limits: Limits, defaults: Defaults) -> APIRouter:
    """The routes of ``/v1/starts``."""
    router = APIRouter(prefix="/v1/starts", tags=["live"], responses=REFUSALS)
    decoders = asyncio.Semaphore(limits.starts_decoded)
    reading = 0

    def find(start_id: str) -> Start:
        start = starts.get(start_id)
        if start is None:
            raise HTTPException(404, "there is no such start, or its time is over")
        return start

    @router.post("", response_model=StartStatus, openapi_extra={"requestBody": BODY})
    async def create(request: Request) -> StartStatus:
        """Upload an image or a clip; it is brought to the stream's size and rate."""
        nonlocal reading
        if reading >= limits.starts_decoded + limits.starts_waiting:
            raise HTTPException(429, "too many files are being read; try again later")
        reading += 1
        try:
            form = await receive_form(request, limits.start_upload_seconds)
            try:
                async with decoders:
                    return describe_start(await asyncio.to_thread(add_start, dict(form)))
            finally:
                await form.close()
        finally:
            reading -= 1

    def add_start(form: dict[str, Any]) -> Start:
        file, fields = read_form(form)
        height = int(fields.height or defaults.height)
        width = int(fields.width or defaults.width)
        start_id = starts.new_id()
        target = starts.folder / start_id
        try:
            limits.check_size(height, width)
            with upload(file.file, limits) as source:
                job = plan_job(source, target, height, width, defaults.fps, fields.kind, limits)
                decoded = decode_file(job)
        except ValueError as error:
            remove_decoded(target)
            raise HTTPException(400, str(error)) from None
        except OSError:  # of the server's disk
            remove_decoded(target)
            raise HTTPException(507, "the server has no room for the file; try later") from None
        return starts.add(start_id, decoded, height, width)

    @router.get("/{start_id}", response_model=StartStatus)
    async def retrieve(start_id: str) -> StartStatus:
        """A start."""
        return describe_start(find(start_id))

    @router.get("/{start_id}/content", response_class=FileResponse)
    async def content(start_id: str) -> FileResponse:
        """The frames as a stream begins from them, without loss."""
        file = find(start_id).file
        return FileResponse(file.path, media_type=START_TYPES[file.path.suffix], filename=file.name)

    @router.delete("/{start_id}", response_model=StartDeleted)
    async def delete(start_id: str) -> StartDeleted:
        """Forget a start; a stream that began from it goes on."""
        find(start_id)
        starts.remove(start_id)
        return StartDeleted(id=start_id)

    return router


def describe_start(start: Start) -> StartStatus:
    """What a client is told of a start."""
    return StartStatus(
        id=start.id,
        kind=start.kind,
        num_frames=start.num_frames,
        width=start.width,
        height=start.height,
        expires_at=start.expires_at,
    )


async def receive_form(request: Request, seconds: float) -> FormData:
    """The form of a request, whose file lies on the disk."""
    try:
        reading = asyncio.ensure_future(request.form(max_files=1, max_fields=8))
        return await asyncio.wait_for(reading, seconds)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the file did not arrive within {seconds:g} seconds") from None


def read_form(form: dict[str, Any]) -> tuple[UploadFile, StartFields]:
    """The file and the other fields of a form."""
    file = form.pop("file", None)
    if not isinstance(file, UploadFile):
        raise HTTPException(400, "expected a form (multipart/form-data) with one file, named file")
    try:
        return file, StartFields.model_validate(form)
    except ValidationError as error:
        raise HTTPException(400, describe_errors(error)) from None


@contextmanager
def upload(file: BinaryIO, limits: Limits) -> Iterator[Path]:
    """What was uploaded as a file, whose suffix says what is in it; gone afterwards."""
    head = file.read(16)
    suffix = suffix_of_content(head)
    if not head:
        raise HTTPException(400, "the file is empty")
    if suffix is None:
        raise HTTPException(415, f"the file is none of these: {', '.join(MEDIA_TYPES)}")
    size = file.seek(0, 2)
    if size > limits.start_bytes:
        raise HTTPException(413, f"the file has more than {limits.start_bytes} bytes")
    file.seek(0)
    with tempfile.TemporaryDirectory(prefix="streamvid-upload-") as folder:
        path = Path(folder) / f"upload{suffix}"
        with path.open("wb") as copy:
            shutil.copyfileobj(file, copy)
        yield path
