"""What viewer and server say to each other on ``/v1/realtime/video``.

Text messages are JSON objects with a ``type``; binary messages are frames: a header of 32 bytes,
then a JPEG or WebP picture, or a fragment of an H.264 stream. The verbs ``session.start``,
``session.prompt_update``, ``session.stop``, ``video.start``, ``session.done`` and ``error`` are
those of vllm-omni's endpoint of the same path; the others are ours. An unknown field is an error,
not ignored.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import numpy as np
from PIL import Image
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from streamvid.printing import printable
from streamvid.students.script import BLEND_CHUNKS, DEFAULT_MODE, Mode

Encoding = Literal["jpeg", "webp", "h264"]
Container = Literal["mp4", "webm", "gif"]
LARGEST_SEED = 2**53 - 1
"""The largest whole number that every JSON reader keeps exactly."""
LONGEST_NAME = 40  # of a field, in an error
QUALITY = 92  # of JPEG and WebP, 1 to 100


def _check_text(text: str) -> str:
    """Refuse a prompt with characters that do not print."""
    if not text.isprintable():
        raise ValueError("the prompt has control characters; write it in one line")
    return text


Prompt = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=10_000),
    AfterValidator(_check_text),
]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED, strict=True)]
Steps = Annotated[int, Field(ge=1, le=1000, strict=True)]
Rate = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
Side = Annotated[int, Field(ge=1, le=8192, strict=True)]
Count = Annotated[int, Field(ge=0, le=2**32 - 1, strict=True)]
StartId = Annotated[str, StringConstraints(pattern=r"^start_[0-9a-f]{32}$")]
SnapshotId = Annotated[str, StringConstraints(pattern=r"^snapshot_[0-9a-f]{32}$")]
SAID_BY_SNAPSHOT = ("prompt", "seed", "steps", "height", "width", "start")
"""Fields of ``session.start`` that contradict a snapshot."""


class Message(BaseModel):
    """One JSON object; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


# ---------------------------------------------------------------- from the viewer


class SessionStart(Message):
    """Begin a stream from noise, from frames or from a snapshot, or wait for a place."""

    type: Literal["session.start"] = "session.start"
    prompt: Prompt | None = None
    """None only with a snapshot, which has one."""
    model: str | None = Field(None, max_length=200)
    """None, or the name that ``/v1/info`` gives."""
    seed: Seed = 0
    steps: Steps | None = Field(None, validation_alias=AliasChoices("steps", "num_inference_steps"))
    """Denoising steps per chunk; None is the student's own number."""
    height: Side | None = None
    width: Side | None = None
    fps: Rate | None = None
    """Frames per second of playback; None is the server's."""
    num_frames: int | None = Field(None, ge=1, le=10_000_000, strict=True)
    """Ends after the chunk that reaches so many frames; None never ends."""
    format: Encoding = "jpeg"
    quality: int = Field(QUALITY, ge=1, le=100, strict=True)
    acks: bool = False
    """The viewer confirms frames as it shows them, and gets fewer when it falls behind."""
    hold_rate: bool = False
    """Choose the steps per chunk so that ``fps`` is held."""
    start: StartId | None = None
    """The frames that the stream goes on from, as ``POST /v1/starts`` named them."""
    snapshot: SnapshotId | None = None
    """The stream that goes on, as ``snapshot.made`` named it."""

    @model_validator(mode="after")
    def _check_beginning(self) -> SessionStart:
        if self.snapshot is None and self.prompt is None:
            raise ValueError("prompt: a stream needs one, or a snapshot")
        for name in SAID_BY_SNAPSHOT if self.snapshot is not None else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: the snapshot says it; leave the field out")
        return self


class Planned(Message):
    """What takes effect at a chunk."""

    at: Count | None = None
    """Number of the first chunk that has it, not one that is made already; None is the next."""


class PromptUpdate(Planned):
    """A new prompt."""

    type: Literal["session.prompt_update"] = "session.prompt_update"
    prompt: Prompt
    mode: Mode = DEFAULT_MODE
    blend_chunks: int = Field(BLEND_CHUNKS, ge=1, le=64, strict=True)
    """Chunks over which ``blend`` goes from the old prompt to the new one."""
    keep_sink: bool = True
    """Whether ``recache`` leaves the first frames of the window as they are."""


class SessionUpdate(Planned):
    """Other settings; None leaves one as it is."""

    type: Literal["session.update"] = "session.update"
    steps: Steps | None = None
    seed: Seed | None = None
    fps: Rate | None = None
    hold_rate: bool | None = None


class SessionPause(Message):
    """Hold the stream after the chunk under way."""

    type: Literal["session.pause"] = "session.pause"


class SessionResume(Message):
    """Go on from where the stream was held."""

    type: Literal["session.resume"] = "session.resume"


class SessionReset(Message):
    """Start again from nothing, with the settings in force or those given."""

    type: Literal["session.reset"] = "session.reset"
    prompt: Prompt | None = None
    seed: Seed | None = None
    steps: Steps | None = None


class SessionBookmark(Planned):
    """Keep the moment before a chunk, to return to it with ``session.branch``."""

    type: Literal["session.bookmark"] = "session.bookmark"
    automatic: bool = False
    """It makes room before those that are not."""


class SessionBranch(Message):
    """Go on from a bookmark; the bookmark stays."""

    type: Literal["session.branch"] = "session.branch"
    bookmark: Count


class SessionSnapshot(Message):
    """Keep the stream on the server's disk, to go on from here with ``session.start``."""

    type: Literal["session.snapshot"] = "session.snapshot"


class RecordStart(Message):
    """Record on the server from the next chunk on."""

    type: Literal["record.start"] = "record.start"
    format: Container = "mp4"


class RecordStop(Message):
    """Finish the recording."""

    type: Literal["record.stop"] = "record.stop"


class ScriptGet(Message):
    """Ask for the changes made so far, as a script that makes the same stream again."""

    type: Literal["script.get"] = "script.get"


class Ack(Message):
    """The viewer has shown all frames up to this one."""

    type: Literal["ack"] = "ack"
    sequence: Count


class SessionStop(Message):
    """End the stream."""

    type: Literal["session.stop"] = "session.stop"


ViewerMessage = Annotated[
    SessionStart
    | PromptUpdate
    | SessionUpdate
    | SessionPause
    | SessionResume
    | SessionReset
    | SessionBookmark
    | SessionBranch
    | SessionSnapshot
    | RecordStart
    | RecordStop
    | ScriptGet
    | Ack
    | SessionStop,
    Field(discriminator="type"),
]
_VIEWER = TypeAdapter(ViewerMessage)


def parse_viewer_message(text: str | bytes) -> Message:
    """Read a message of a viewer.

    Raises:
        ValueError: in one line, without what the viewer wrote.
    """
    try:
        return _VIEWER.validate_json(text)
    except ValidationError as error:
        raise ValueError(describe_errors(error)) from None


def describe_errors(error: ValidationError) -> str:
    """The first error of a validation in one line, without the value that was given."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"].startswith("union_tag"):
        return "expected a JSON object with a known type; see the protocol table of the server"
    names = [str(part) for part in first["loc"] if not str(part).count(".")][-1:]
    reason = first["msg"].removeprefix("Value error, ")
    if not names:
        return reason
    name = printable(names[0][:LONGEST_NAME])  # of an unknown field: the client's own words
    return f"{name}: {reason}"


# ---------------------------------------------------------------- from the server


class SessionQueued(Message):
    """All places are taken; the stream begins when ``position`` falls below 1."""

    type: Literal["session.queued"] = "session.queued"
    position: int


class VideoStart(Message):
    """The stream begins; frames follow."""

    type: Literal["video.start"] = "video.start"
    session_id: str
    model: str
    height: int
    width: int
    fps: float
    format: Encoding
    prompt: str
    seed: int
    steps: int
    chunk: int = 0
    """Of the first frame; those before are of the start or of the snapshot."""
    codec: str | None = None
    """Of H.264: the codec of the source buffer, such as ``avc1.64000a``."""


class VideoChunk(Message):
    """What the next frames are; comes before them."""

    type: Literal["video.chunk"] = "video.chunk"
    chunk: int
    """Number of the chunk in its stream; goes back on reset and branch."""
    sequence: int
    """Number of its first frame on this connection; never goes back."""
    frames: int
    prompt_id: int
    seed: int
    steps: int
    compute_ms: float
    """Time that the model took."""
    late_ms: float
    """How long a viewer without a buffer waited for it; 0 if it came in time."""
    dropped: int
    """Frames so far that were not sent because the viewer is slow."""


class PromptApplied(Message):
    """The next chunk is the first of a new prompt."""

    type: Literal["prompt.applied"] = "prompt.applied"
    prompt_id: int
    prompt: str
    mode: Mode
    chunk: int
    sequence: int
    latency_ms: float
    """From the arrival of the prompt to the first frame made of it."""


class SettingsApplied(Message):
    """Settings in force from a chunk on."""

    type: Literal["settings.applied"] = "settings.applied"
    chunk: int
    seed: int
    steps: int
    fps: float
    hold_rate: bool


class SessionPaused(Message):
    """The stream is held."""

    type: Literal["session.paused"] = "session.paused"


class SessionResumed(Message):
    """The stream goes on."""

    type: Literal["session.resumed"] = "session.resumed"


class SessionRestarted(Message):
    """The stream began again, or went on from a bookmark."""

    type: Literal["session.restarted"] = "session.restarted"
    bookmark: int | None = None
    prompt: str
    prompt_id: int
    seed: int
    steps: int
    chunk: int


class BookmarkMade(Message):
    """A moment to which ``session.branch`` returns."""

    type: Literal["bookmark.made"] = "bookmark.made"
    bookmark: int
    chunk: int
    """The chunk that follows it."""
    sequence: int
    automatic: bool
    kept: list[int]
    """All bookmarks that there are now."""


class SnapshotMade(Message):
    """The stream is kept; ``session.start`` with this id goes on from ``chunk``."""

    type: Literal["snapshot.made"] = "snapshot.made"
    id: str
    chunk: int
    sequence: int
    autosave: bool
    """The server made it by itself; the next one replaces it, under the same id."""


class RecordStarted(Message):
    """The recording begins with the next chunk."""

    type: Literal["record.started"] = "record.started"
    id: str


class RecordDone(Message):
    """A recording is complete and can be fetched."""

    type: Literal["record.done"] = "record.done"
    id: str
    url: str
    frames: int
    format: Container
    first_chunk: int
    script: str
    command: str
    """Makes the same clip from the script: the stream from ``first_chunk`` on."""
    start_url: str | None = None
    """The file that the command names with ``--start``, of a stream that began from frames."""


class ScriptText(Message):
    """The stream so far as a script in YAML, and the command that makes a clip of it."""

    type: Literal["script"] = "script"
    script: str
    command: str


class Levels(Message):
    """How well the stream is served, over the last chunks; about once per second."""

    type: Literal["session.metrics"] = "session.metrics"
    chunks: int
    first_chunk_ms: float
    compute_p50_ms: float
    compute_p95_ms: float
    interval_p50_ms: float
    interval_p95_ms: float
    interval_p99_ms: float
    deadlines_met: float
    """Share of chunks that came before the one before had been played."""
    stall_ms: float
    """Time that a viewer without a buffer waited in all."""
    frames_per_second: float
    """That the model can make at this rate of work."""
    dropped: int
    sessions: int
    memory_mb: float | None
    """Memory of the device in use; None on a CPU."""


class SessionDone(Message):
    """The stream is over; another ``session.start`` may follow."""

    type: Literal["session.done"] = "session.done"
    session_id: str
    reason: Literal["stopped", "finished", "idle", "time_limit", "server_stopping", "error"]
    chunks: int
    frames: int
    stopped: bool


class Error(Message):
    """What went wrong, in one line."""

    type: Literal["error"] = "error"
    code: str
    message: str
    retryable: bool = False


ServerMessage = Annotated[
    SessionQueued
    | VideoStart
    | VideoChunk
    | PromptApplied
    | SettingsApplied
    | SessionPaused
    | SessionResumed
    | SessionRestarted
    | BookmarkMade
    | SnapshotMade
    | RecordStarted
    | RecordDone
    | ScriptText
    | Levels
    | SessionDone
    | Error,
    Field(discriminator="type"),
]
_SERVER = TypeAdapter(ServerMessage)


def parse_server_message(text: str | bytes) -> Message:
    """Read a message of a server, for clients in Python."""
    return _SERVER.validate_json(text)


# ---------------------------------------------------------------- frames

MAGIC = b"SVF1"
HEADER = struct.Struct("<4sBBHIIIIQ")
"""Magic, version, encoding, flags, sequence, chunk, prompt id, server time, capture time."""
VERSION = 1
ENCODINGS = {encoding: number for number, encoding in enumerate(get_args(Encoding), 1)}
FIRST_OF_CHUNK = 1
FIRST_OF_PROMPT = 2
INITIALISATION = 4
"""Of H.264: no frame, but what a decoder has to read first."""
KEY_FRAME = 8
"""Of H.264: the frame needs no earlier one."""


@dataclass(frozen=True)
class FrameHeader:
    """What precedes a picture; 32 bytes, little-endian."""

    sequence: int
    """Number of the frame on its connection; a gap is a frame that was dropped."""
    chunk: int
    prompt_id: int
    server_us: int
    """Microseconds that the server took for the frame's chunk."""
    captured_us: int
    """When the chunk was finished, in microseconds since 1970."""
    encoding: Encoding = "jpeg"
    flags: int = 0


def pack_frame(header: FrameHeader, picture: bytes) -> bytes:
    """A binary message: the header, then the picture or the fragment."""
    head = HEADER.pack(
        MAGIC,
        VERSION,
        ENCODINGS[header.encoding],
        header.flags,
        header.sequence,
        header.chunk,
        header.prompt_id,
        min(header.server_us, 2**32 - 1),
        header.captured_us,
    )
    return head + picture


def unpack_frame(message: bytes) -> tuple[FrameHeader, bytes]:
    """The header and the picture of a binary message.

    Raises:
        ValueError: if it is no frame of this version.
    """
    if len(message) < HEADER.size or message[:4] != MAGIC:
        raise ValueError(f"no frame: expected {HEADER.size} bytes of header that begin with SVF1")
    _, version, code, flags, sequence, chunk, prompt_id, server_us, captured_us = (
        HEADER.unpack_from(message)
    )
    names = {number: name for name, number in ENCODINGS.items()}
    if version != VERSION or code not in names:
        raise ValueError(f"frame version {version}, encoding {code}: not known here")
    header = FrameHeader(sequence, chunk, prompt_id, server_us, captured_us, names[code], flags)
    return header, message[HEADER.size :]


def encode_picture(image: np.ndarray, encoding: Encoding, quality: int = QUALITY) -> bytes:
    """RGB bytes ``[H, W, 3]`` as JPEG (full colour resolution) or WebP.

    Args:
        encoding: "jpeg" or "webp".
    """
    buffer = io.BytesIO()
    picture = Image.fromarray(image)
    if encoding == "jpeg":
        picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    else:
        picture.save(buffer, "WEBP", quality=quality, method=0)
    return buffer.getvalue()


def decode_picture(picture: bytes) -> np.ndarray:
    """RGB bytes ``[H, W, 3]`` of a picture, for clients in Python."""
    with Image.open(io.BytesIO(picture), formats=("JPEG", "WEBP")) as image:
        return np.asarray(image.convert("RGB"))
