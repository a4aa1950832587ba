"""Decodes what a stranger has uploaded, in a process that may use little memory and time.

    python -m streamvid.serving.decoding '{"source": ..., "target": ..., ...}'

The server starts it per file (``starts.decode_file``). It binds itself with ``setrlimit`` before it
looks at the file, brings the pictures to the stream's size and rate, writes them without loss (PNG,
or FFV1 in Matroska), and prints one line of JSON. Neither torch nor the web server is imported, so
that it begins at once.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from streamvid import frames as frames_of_files
from streamvid.frames import Frame, clip_frames, clip_starts
from streamvid.printing import one_line

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}
"""What Pillow decodes; PyAV decodes the rest."""
MEDIA_TYPES = (
    "image/png",
    "image/jpeg",
    "image/webp",
    "image/gif",
    "video/mp4",
    "video/quicktime",
    "video/webm",
    "video/x-matroska",
)
QUICKTIME = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
"""Boxes with which .mp4 and .mov files begin."""
LARGEST_FILE = 2**30  # bytes that may be written
UNSAID_S = 0.1  # how long browsers show a picture whose duration is 0


@dataclass(frozen=True)
class Job:
    """What to decode, and the bounds of it; see ``Limits`` for the units."""

    source: str
    """The file, with the suffix of its content."""
    target: str
    """The file to write, without its suffix."""
    height: int
    """Of the frames to make, in pixels; so is ``width``."""
    width: int
    fps: float
    only_first: bool
    """Take the first picture, whatever follows."""
    max_frames: int
    max_seconds: float
    max_pixels: int
    memory_bytes: int
    cpu_seconds: float


@dataclass(frozen=True)
class Decoded:
    """What was written."""

    suffix: str
    """``.png`` of one frame, ``.mkv`` of several."""
    num_frames: int


def suffix_of_content(head: bytes) -> str | None:
    """The suffix of a file that begins with these 16 bytes; None for what is not read here."""
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return ".png"
    if head[:3] == b"\xff\xd8\xff":
        return ".jpg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return ".gif"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return ".mkv"
    return ".mp4" if head[4:8] in QUICKTIME else None


def decode(job: Job) -> Decoded:
    """Write the frames of a file, as a stream begins from them.

    Raises:
        ValueError: one line, if it has none, or too many or too large ones.
    """
    kept: deque[np.ndarray] = deque(maxlen=job.max_frames)
    last_place = None if job.only_first else last_frame_place(job)
    frames = read_frames(job)
    if job.only_first:
        frames = iter([next(frames)])
    for frame, place, count in resample(frames, job.fps):
        if last_place is None or place + count > last_place + 1 - job.max_frames:
            image = fit(frame, job.height, job.width)
            kept.extend([image] * min(count, job.max_frames))
    if not kept:
        raise ValueError("it has no frames")
    if len(kept) == 1:
        Image.fromarray(kept[0]).save(f"{job.target}.png")
        return Decoded(".png", 1)
    write_lossless(kept, f"{job.target}.mkv", job.fps)
    return Decoded(".mkv", len(kept))


def last_frame_place(job: Job) -> int | None:
    """The place of a clip's last frame at the stream's rate, from its index, so that frames which
    are not kept need not be converted; None of what Pillow reads.

    Raises:
        ValueError: if the clip is too long.
    """
    if Path(job.source).suffix in PICTURES:
        return None
    starts = clip_starts(job.source, job.max_seconds)
    check_length(starts[-1] - starts[0], job.max_seconds)
    return round((starts[-1] - starts[0]) * job.fps)


def read_frames(job: Job) -> Iterator[Frame]:
    """The frames of a file, one at a time."""
    kind = PICTURES.get(Path(job.source).suffix)
    frames = clip_frames(job.source) if kind is None else read_pictures(job.source, kind)
    first = None
    for frame in frames:
        first = frame.start if first is None else first
        check_length(frame.start - first, job.max_seconds)
        yield frame


def check_length(seconds: float, most: float) -> None:
    """Refuse a clip that is too long."""
    if seconds > most:
        raise ValueError(f"it is longer than {most:g} seconds; cut it")


def read_pictures(path: str, kind: str) -> Iterator[Frame]:
    """The pictures of a file that Pillow reads, upright, transparent parts over black."""
    with Image.open(path, formats=(kind,)) as image:
        start = 0.0
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            picture = to_rgb(ImageOps.exif_transpose(image))
            yield Frame(start, lambda picture=picture: picture)
            start += image.info.get("duration", 0) / 1000 or UNSAID_S


def to_rgb(image: Image.Image) -> np.ndarray:
    """RGB bytes ``[H, W, 3]`` of a picture of any mode, transparent parts over black."""
    if image.mode.startswith("I"):  # grey of 16 bits
        grey = np.asarray(image).astype(np.float64) / 257
        return np.repeat(grey.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    over = image.convert("RGBA")
    black = Image.new("RGBA", over.size, (0, 0, 0, 255))
    return np.asarray(Image.alpha_composite(black, over).convert("RGB"))


def resample(frames: Iterator[Frame], fps: float) -> Iterator[tuple[Frame, int, int]]:
    """Frames at a rate: each with its place, counted from 0, and for how many places it is shown.

    A frame's place is the tick nearest to its beginning; of several with one place the last is
    shown.
    """
    before: tuple[Frame, int] | None = None
    begun = 0.0
    for frame in frames:
        if before is None:
            begun, place = frame.start, 0
        else:
            place = round((frame.start - begun) * fps)
            if place > before[1]:
                yield (*before, place - before[1])
        before = frame, place
    if before is not None:
        yield (*before, 1)


def fit(frame: Frame, height: int, width: int) -> np.ndarray:
    """RGB bytes ``[height, width, 3]``: the picture, scaled to cover them, cut off evenly."""
    picture = Image.fromarray(np.ascontiguousarray(frame.picture()))
    shown_width = picture.width * frame.pixel_aspect
    scale = max(width / shown_width, height / picture.height)
    cut_width = width / scale / frame.pixel_aspect
    cut_height = height / scale
    left = max(0.0, (picture.width - cut_width) / 2)
    top = max(0.0, (picture.height - cut_height) / 2)
    box = (
        left,
        top,
        min(left + cut_width, picture.width),
        min(top + cut_height, picture.height),
    )
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))


def write_lossless(images: deque[np.ndarray], path: str, fps: float) -> None:
    """Write RGB bytes ``[H, W, 3]`` so that reading gives the very same."""
    import av

    with av.open(path, "w") as target:
        stream = target.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "bgr0"
        for image in images:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="bgr0")
            target.mux(stream.encode(frame))
        target.mux(stream.encode())


def bind_process(memory_bytes: int, cpu_seconds: float) -> None:
    """Bound memory, time and what is written; there is no way back."""
    seconds = max(1, round(cpu_seconds))
    bounds = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: LARGEST_FILE,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (bound, bound))


def explain(error: BaseException) -> str:
    """Why a file could not be decoded, in one line without a path of the server."""
    if isinstance(error, MemoryError):
        return "it needs too much memory; give a smaller one"
    cause = error.__cause__ or error
    reason = getattr(cause, "strerror", None) or one_line(cause)
    if type(cause) is ValueError:  # those of libav are of subclasses
        return reason
    if isinstance(cause, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"its pictures have more than {Image.MAX_IMAGE_PIXELS:,} pixels; give smaller ones"
    return f"it is damaged or cut off ({reason.partition(chr(39))[0].strip()})"


def main() -> None:
    """Do the job of the command line; print what was written, or why nothing was."""
    job = Job(**json.loads(sys.argv[1]))
    bind_process(job.memory_bytes, job.cpu_seconds)
    Image.MAX_IMAGE_PIXELS = frames_of_files.MAX_PIXELS = job.max_pixels
    # Pillow's error is of twice as many
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        said = asdict(decode(job))
    except Exception as error:  # libraries have their own kinds
        said = {"error": explain(error)}
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
