"""``/v1/videos``: clips are asked for, made in the background, and fetched, in OpenAI's shapes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from streamvid.serving.errors import Busy, refusals
from streamvid.serving.limits import Limits
from streamvid.serving.models import ServedModels
from streamvid.serving.protocol import LARGEST_SEED, Container, Prompt, describe_errors
from streamvid.serving.realtime import Defaults
from streamvid.serving.recording import MEDIA_TYPES, Clip, ClipStore
from streamvid.serving.starts import START_TYPES
from streamvid.serving.worker import Worker

SECONDS = 4  # of a clip whose client says nothing


class ClipRequest(BaseModel):
    """A clip to be made."""

    model_config = ConfigDict(extra="forbid")

    prompt: Prompt
    model: str | None = Field(None, max_length=200)
    seconds: float | None = Field(None, gt=0, le=86_400, allow_inf_nan=False)
    size: str | None = Field(None, pattern=r"^[1-9]\d{0,3}x[1-9]\d{0,3}$")
    """Width x height."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    steps: int | None = Field(None, ge=1, le=1000)
    fps: float | None = Field(None, gt=0, le=1000, allow_inf_nan=False)
    num_frames: int | None = Field(None, ge=1, le=10_000_000)
    format: Container = "mp4"


class ClipError(BaseModel):
    """Why a clip was not made."""

    code: str
    message: str


class ClipStatus(BaseModel):
    """A clip, as OpenAI's clients read it."""

    id: str
    object: str = "video"
    status: str
    """``queued``, ``in_progress``, ``completed`` or ``failed``."""
    progress: int
    model: str
    prompt: str
    size: str
    seconds: str
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    error: ClipError | None = None
    remixed_from_video_id: str | None = None
    seed: int
    format: str
    script: str = ""


class ClipList(BaseModel):
    """Clips, newest first."""

    object: str = "list"
    data: list[ClipStatus]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ClipDeleted(BaseModel):
    """A clip that is no more."""

    id: str
    object: str = "video.deleted"
    deleted: bool = True


REFUSALS = refusals(
    {
        400: "The request can't be read, or asks for too much.",
        404: "There is no such clip.",
        409: "The clip is not complete yet.",
        413: "The body is too large.",
        429: "Too many clips wait.",
    }
)
BODY = {
    "required": True,
    "content": {
        kind: {"schema": ClipRequest.model_json_schema()}
        for kind in ("application/json", "multipart/form-data")
    },
}


def clip_routes(worker: Worker, store: ClipStore, limits: Limits, defaults: Defaults) -> APIRouter:
    """The routes of ``/v1/videos``."""
    router = APIRouter(prefix="/v1/videos", tags=["clips"], responses=REFUSALS)

    def find(clip_id: str) -> Clip:
        clip = store.get(clip_id)
        if clip is None:
            raise HTTPException(404, "there is no such clip")
        return clip

    @router.post("", response_model=ClipStatus, openapi_extra={"requestBody": BODY})
    async def create(request: Request) -> ClipStatus:
        """Ask for a clip; it is made in the background."""
        asked = await read_request(request)
        try:
            clip = plan_clip(asked, limits, defaults, worker.models)
            worker.add_clip(clip)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except Busy as error:
            raise HTTPException(429, str(error)) from None
        return describe_clip(clip)

    @router.get("", response_model=ClipList)
    async def list_clips(
        after: Annotated[str | None, Query(max_length=100)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
    ) -> ClipList:
        """Clips and recordings, newest first."""
        clips = store.newest_first()
        if order == "asc":
            clips.reverse()
        ids = [clip.id for clip in clips]
        begin = ids.index(after) + 1 if after in ids else 0
        page = clips[begin : begin + limit]
        return ClipList(
            data=[describe_clip(clip) for clip in page],
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=begin + limit < len(clips),
        )

    @router.get("/{clip_id}", response_model=ClipStatus)
    async def retrieve(clip_id: str) -> ClipStatus:
        """How far a clip is."""
        return describe_clip(find(clip_id))

    @router.get("/{clip_id}/content", response_class=FileResponse)
    async def content(clip_id: str) -> FileResponse:
        """The file of a complete clip."""
        clip = find(clip_id)
        if clip.status != "completed":
            raise HTTPException(409, f"the clip is {clip.status.replace('_', ' ')}")
        path = store.path(clip)
        if not path.is_file():
            raise HTTPException(404, "the file of the clip is gone")
        return FileResponse(
            path, media_type=MEDIA_TYPES[clip.format], filename=f"{clip.id}.{clip.format}"
        )

    @router.get("/{clip_id}/start", response_class=FileResponse)
    async def start(clip_id: str) -> FileResponse:
        """The frames that a recorded stream began from, which the recording's command names."""
        clip = find(clip_id)
        if clip.start is None or not store.start_path(clip).is_file():
            raise HTTPException(404, "the clip did not begin from frames")
        path = store.start_path(clip)
        return FileResponse(path, media_type=START_TYPES[path.suffix], filename=clip.start)

    @router.delete("/{clip_id}", response_model=ClipDeleted)
    async def delete(clip_id: str) -> ClipDeleted:
        """Forget a clip and its file; one under way is given up."""
        clip = find(clip_id)
        store.remove(clip)
        worker.wake()
        return ClipDeleted(id=clip.id)

    return router


async def read_request(request: Request) -> ClipRequest:
    """A body of JSON, or a form, which is what OpenAI's client sends."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            form = await request.form(max_files=1, max_fields=20)
            fields: Any = dict(form)
        else:
            fields = from_json(await request.body())  # deep nesting is a ValueError too
    except ValueError:
        raise HTTPException(400, "the body is neither JSON nor a form") from None
    if isinstance(fields, dict) and any(
        field in fields for field in ("input_reference", "image_reference")
    ):
        raise HTTPException(
            400, "input_reference: a clip starts from a prompt alone; a stream takes /v1/starts"
        )
    try:
        return ClipRequest.model_validate(fields)
    except ValidationError as error:
        raise HTTPException(400, describe_errors(error)) from None


def plan_clip(asked: ClipRequest, limits: Limits, defaults: Defaults, models: ServedModels) -> Clip:
    """A clip within the server's limits and the model's.

    Raises:
        ValueError: for what is beyond them.
    """
    limits.check_prompt(asked.prompt)
    limits.check_steps(asked.steps)
    limits.check_fps(asked.fps)
    model = models.find(asked.model)
    width, height = (
        map(int, asked.size.split("x")) if asked.size else (defaults.width, defaults.height)
    )
    limits.check_size(height, width)
    fps = asked.fps or defaults.fps
    num_frames = asked.num_frames
    if num_frames is None and (model.num_frames is None or asked.seconds is not None):
        num_frames = max(1, round((asked.seconds or SECONDS) * fps))
    model.check_clip(asked.steps, num_frames)
    num_frames = model.num_frames or num_frames
    if num_frames > limits.clip_seconds * fps:
        raise ValueError(
            f"{num_frames} frames at {fps:g} per second are longer than"
            f" {limits.clip_seconds:g} seconds; ask for fewer"
        )
    return Clip(
        prompt=asked.prompt,
        model=model.id,
        height=height,
        width=width,
        fps=fps,
        format=asked.format,
        seed=asked.seed,
        steps=asked.steps,
        num_frames=num_frames,
    )


def describe_clip(clip: Clip) -> ClipStatus:
    """What a client is told of a clip."""
    return ClipStatus(
        id=clip.id,
        status=clip.status,
        progress=clip.progress,
        model=clip.model,
        prompt=clip.prompt,
        size=f"{clip.width}x{clip.height}",
        seconds=f"{clip.num_frames / clip.fps:g}",
        created_at=clip.created_at,
        completed_at=clip.completed_at,
        error=ClipError(code="failed", message=clip.error) if clip.error else None,
        seed=clip.seed,
        format=clip.format,
        script=clip.script,
    )
