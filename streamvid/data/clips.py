"""Finished clips on disk with their prompts: any container, codec, size and frame rate.

A folder is captioned as Hugging Face's video folders are, by ``metadata.jsonl`` or ``metadata.csv``
with the fields ``file_name`` and ``text``; without these, by a text file beside each clip
(``cat.mp4`` and ``cat.txt``). A clip is read at the times 0, 1 / fps, 2 / fps, ..., each time by
the frame that begins nearest to it, so that speeds stay true; then the largest centred part of the
right shape is cut out and resized. Only the frames that are wanted are held.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from streamvid.frames import Frame, clip_frames, clip_starts, unreadable

CLIP_SUFFIXES = (
    ".mp4",
    ".webm",
    ".mov",
    ".mkv",
    ".avi",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".ts",
    ".m2ts",
    ".mts",
    ".3gp",
    ".flv",
    ".ogv",
    ".gif",
    ".webp",
)
FIELDS = ("file_name", "text")


@dataclass
class ClipFormat:
    """What clips are brought to, before the student's codec."""

    fps: float = 16.0
    """Frames a second at which the student will be watched."""
    num_frames: int = 33
    """Frames from the beginning of each clip, as the codec takes them: 1 + 4k with Wan's and the
    tiny one."""
    height: int = 64
    """Pixels, a multiple of the codec's."""
    width: int = 64
    """Pixels, a multiple of the codec's."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if not 0 < self.fps < math.inf:
            raise ValueError(f"fps={self.fps}, expected a positive number of frames per second")


# ---- captions ------------------------------------------------------------------------------------


def read_captions(folder: str | Path) -> list[tuple[Path, str]]:
    """The clips of a folder and its subfolders, in the order of their names, each with its caption.

    With a ``metadata`` file, the clips that it names; without one, all that have a suffix of
    ``CLIP_SUFFIXES``.

    Raises:
        ValueError: if there is no folder, no clip, a clip without a caption, or a text that is not
            UTF-8.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder of clips at {folder}")
    tables = [
        folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()
    ]
    clips = _table_captions(tables[0]) if tables else _sidecar_captions(folder)
    if not clips:
        raise ValueError(
            f"{folder} holds no clip; put clips there ({', '.join(CLIP_SUFFIXES)}), each with its"
            " caption"
        )
    for path, caption in clips:
        if not caption.strip():
            raise ValueError(f"the caption of {path} is empty; write one, or remove the clip")
    return sorted((path, " ".join(caption.split())) for path, caption in clips)


def _sidecar_captions(folder: Path) -> list[tuple[Path, str]]:
    inner = [path.relative_to(folder) for path in folder.rglob("*")]
    entries = [
        folder / path for path in inner if not any(part.startswith(".") for part in path.parts)
    ]
    _ensure_files(entry for entry in entries if entry.suffix.lower() in CLIP_SUFFIXES)
    files = [entry for entry in entries if entry.is_file()]
    clips = [file for file in files if file.suffix.lower() in CLIP_SUFFIXES]
    _ensure_no_other_clips(files, clips)
    for clip in clips:
        if not clip.with_suffix(".txt").is_file():
            raise ValueError(
                f"{clip} has no caption; write it to {clip.with_suffix('.txt').name} beside it, or"
                f" all captions to metadata.jsonl with the fields {' and '.join(FIELDS)}"
            )
    return [(clip, _read_text(clip.with_suffix(".txt"))) for clip in clips]


def _ensure_files(clips: Iterable[Path]) -> None:
    """A ValueError if what has a clip's name is no file, such as a folder, a pipe or a link to
    nothing.
    """
    for clip in clips:
        if not clip.is_file():
            raise ValueError(
                f"{clip} is named like a clip but is no file, or a link to none; remove it"
            )


def _ensure_no_other_clips(files: list[Path], clips: list[Path]) -> None:
    """A ValueError if a caption belongs to a file that is not taken for a clip."""
    captioned = {clip.with_suffix("") for clip in clips}
    captions = {file.with_suffix("") for file in files if file.suffix == ".txt"} - captioned
    for file in files:
        if file.suffix != ".txt" and file.with_suffix("") in captions:
            raise ValueError(
                f"{file} has a caption, but is of no kind that is read"
                f" ({', '.join(CLIP_SUFFIXES)}); convert it, or remove the two"
            )


def _table_captions(table: Path) -> list[tuple[Path, str]]:
    text = _read_text(table)
    rows = _json_lines(table, text) if table.suffix == ".jsonl" else _csv_rows(table, text)
    clips = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not all(
            isinstance(row.get(field), str) for field in FIELDS
        ):
            found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"{table}: entry {number} has {found}; expected the texts {' and '.join(FIELDS)}"
            )
        name = Path(row["file_name"])
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(
                f"{table}: entry {number} names {name}, which is outside of the folder; move the"
                " clip into the folder and give its name from there"
            )
        clip = table.parent / name
        if not clip.is_file():
            raise ValueError(
                f"{table}: entry {number} names {row['file_name']}, which is not there"
            )
        clips.append((clip, row["text"]))
    return clips


def _json_lines(table: Path, text: str) -> list:
    rows = []
    # splitlines() would split captions at U+2028
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{table}: line {number} is no JSON: {error}") from error
    return rows


def _csv_rows(table: Path, text: str) -> list[dict]:
    before = csv.field_size_limit(len(text) + 1)
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ValueError(f"{table} is no CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error


# ---- frames --------------------------------------------------------------------------------------


def read_clip(path: str | Path, form: ClipFormat) -> Tensor:
    """The clip as ``form`` asks: frames ``[num_frames, 3, height, width]`` in [0, 1].

    Raises:
        ValueError: if it is missing, unreadable, damaged before its last wanted frame, or too
            short.
    """
    clip = torch.empty(form.num_frames, 3, form.height, form.width)
    # at a low rate a frame is taken several times
    fit = lru_cache(maxsize=2)(partial(_fitted, form))
    done, starts, before = 0, [], None
    with closing(clip_frames(path)) as frames:
        for frame in frames:
            starts.append(frame.start)
            while done < form.num_frames and (time := starts[0] + done / form.fps) <= frame.start:
                clip[done] = fit(nearest(time, before, frame))
                done += 1
            if done == form.num_frames:
                return clip
            before = frame
    ensure_long_enough(path, starts, form)
    clip[done:] = fit(before)  # these times lie after its beginning
    return clip


def check_clip(path: str | Path, form: ClipFormat) -> None:
    """A ValueError if a clip can't be opened or is too short; no frame but the first is decoded."""
    ensure_long_enough(path, clip_starts(path, form.num_frames / form.fps), form)


def nearest(time: float, before: Frame | None, after: Frame) -> Frame:
    """The frame that begins nearest to a time; the earlier one of two."""
    if before is None:
        return after
    return (
        before if round(abs(time - before.start), 4) <= round(abs(after.start - time), 4) else after
    )


def ensure_long_enough(path: str | Path, starts: Sequence[float], form: ClipFormat) -> None:
    """A ValueError if a clip whose frames begin at ``starts`` (rising) ends before the last wanted
    time.
    """
    if not len(starts):
        raise unreadable(Path(path), "it has no frames")
    last, wanted = starts[-1] - starts[0], (form.num_frames - 1) / form.fps
    each = last / (len(starts) - 1) if len(starts) > 1 else 0.0
    if wanted > last + each / 2 + 1e-3:
        raise ValueError(
            f"{path} is too short: {last + each:.2f} s, where {form.num_frames} frames at"
            f" {form.fps:g} a second take {wanted + 1 / form.fps:.2f} s; remove it, or lower"
            " num_frames"
        )


def fit_size(frames: Tensor, height: int, width: int, pixel_aspect: float = 1.0) -> Tensor:
    """Frames ``[T, 3, H, W]``, in [0, 1] or bytes, to ``[T, 3, height, width]``: the largest
    centred part of that shape, resized. Frames of that size already are not touched.

    Args:
        pixel_aspect: width of a pixel of ``frames`` over its height; those of the result are
            square.
    """
    h, w = frames.shape[2:]
    scale = min(h / height, w * pixel_aspect / width)
    crop_h, crop_w = max(1, round(scale * height)), max(1, round(scale * width / pixel_aspect))
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    cut = frames[:, :, top : top + crop_h, left : left + crop_w]
    if (crop_h, crop_w) == (height, width):
        return cut
    resized = interpolate(
        cut, (height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return resized if frames.dtype == torch.uint8 else resized.clamp(0, 1)


def _fitted(form: ClipFormat, frame: Frame) -> Tensor:
    """``[3, height, width]``. Resized as bytes, which is 50 times as fast on 4K as in float32 and
    as good to half a level.
    """
    picture = torch.from_numpy(np.ascontiguousarray(frame.picture())).permute(2, 0, 1)[None]
    return fit_size(picture, form.height, form.width, frame.pixel_aspect)[0].float() / 255
