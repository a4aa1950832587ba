"""Finished clips on disk with their prompts: any container, codec, size and frame rate.

A folder is captioned as Hugging Face's video folders are, by ``metadata.jsonl`` or ``metadata.csv`` with the fields
``file_name`` and ``text``; without these, by a text file beside each clip (``cat.mp4`` and ``cat.txt``). A clip is read
at the times 0, 1 / fps, 2 / fps, ..., each time by the frame that begins nearest to it, so that speeds stay true; then
the largest centred part of the right shape is cut out and resized. Only the frames that are wanted are held.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor
from torch.nn.functional import interpolate

CLIP_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg", ".gif")
FIELDS = ("file_name", "text")
FRAMES_AT_ONCE = 16  # that are held at the size of the file


@dataclass
class ClipFormat:
    """What clips are brought to, before the student's codec."""

    fps: float = 16.0
    """Frames a second at which the student will be watched."""
    num_frames: int = 33
    """Frames from the beginning of each clip, as the codec takes them: 1 + 4k with Wan's and the tiny one."""
    height: int = 64
    """Pixels, a multiple of the codec's."""
    width: int = 64
    """Pixels, a multiple of the codec's."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if not self.fps > 0:
            raise ValueError(f"fps={self.fps}, expected a positive number of frames a second")


# ---- captions -----------------------------------------------------------------------------------------


def read_captions(folder: str | Path) -> list[tuple[Path, str]]:
    """The clips of a folder and its subfolders, in the order of their names, each with its caption.

    With a ``metadata`` file, the clips that it names; without one, all that have a suffix of ``CLIP_SUFFIXES``.

    Raises:
        ValueError: if there is no folder, no clip, a clip without a caption, or a text that is not UTF-8.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder of clips at {folder}")
    tables = [folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()]
    clips = _table_captions(tables[0]) if tables else _sidecar_captions(folder)
    if not clips:
        raise ValueError(f"{folder} holds no clip; put clips there ({', '.join(CLIP_SUFFIXES)}), each with its caption")
    for path, caption in clips:
        if not caption.strip():
            raise ValueError(f"the caption of {path} is empty; write one, or remove the clip")
    return sorted((path, " ".join(caption.split())) for path, caption in clips)


def _sidecar_captions(folder: Path) -> list[tuple[Path, str]]:
    inner = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in CLIP_SUFFIXES]
    clips = [folder / path for path in inner if not any(part.startswith(".") for part in path.parts)]
    for clip in clips:
        if not clip.with_suffix(".txt").is_file():
            raise ValueError(
                f"{clip} has no caption; write it to {clip.with_suffix('.txt').name} beside it, or all captions to "
                f"metadata.jsonl with the fields {' and '.join(FIELDS)}"
            )
    return [(clip, _read_text(clip.with_suffix(".txt"))) for clip in clips]


def _table_captions(table: Path) -> list[tuple[Path, str]]:
    text = _read_text(table)
    rows = _json_lines(table, text) if table.suffix == ".jsonl" else list(csv.DictReader(io.StringIO(text, newline="")))
    clips = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in FIELDS):
            found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{table}: entry {number} has {found}; expected the texts {' and '.join(FIELDS)}")
        clip = table.parent / row["file_name"]
        if not clip.is_file():
            raise ValueError(f"{table}: entry {number} names {row['file_name']}, which is not there")
        clips.append((clip, row["text"]))
    return clips


def _json_lines(table: Path, text: str) -> list:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{table}: line {number} is no JSON: {error}") from error
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


# ---- frames -------------------------------------------------------------------------------------------


def read_clip(path: str | Path, form: ClipFormat) -> Tensor:
    """The clip as ``form`` asks: frames ``[num_frames, 3, height, width]`` in [0, 1].

    Raises:
        ValueError: if it is missing, unreadable or too short.
    """
    path = Path(path)
    starts, read = _open(path)
    indices = nearest_frames(path, starts, form)
    try:
        parts = [indices[i : i + FRAMES_AT_ONCE] for i in range(0, len(indices), FRAMES_AT_ONCE)]
        pieces = [fit_size(_as_frames(read(part)), form.height, form.width) for part in parts]
    except Exception as error:  # each backend has its own kinds
        raise _unreadable(path, error) from error
    return torch.cat(pieces)


def check_clip(path: str | Path, form: ClipFormat) -> None:
    """A ValueError if a clip can't be opened or is too short; its frames are not decoded."""
    starts, _ = _open(Path(path))
    nearest_frames(path, starts, form)


def nearest_frames(path: str | Path, starts: Sequence[float], form: ClipFormat) -> list[int]:
    """For each wanted time the number of the frame that begins nearest to it; the earlier one of two.

    Args:
        path: for the error.
        starts: when each frame begins, in seconds, rising.

    Raises:
        ValueError: if the clip ends before the last wanted time.
    """
    times = np.asarray(starts, dtype=np.float64) - starts[0]
    wanted = np.arange(form.num_frames) / form.fps
    each = times[-1] / (len(times) - 1) if len(times) > 1 else 0.0
    if wanted[-1] > times[-1] + each / 2 + 1e-3:
        needed, there = wanted[-1] + 1 / form.fps, times[-1] + each
        raise ValueError(
            f"{path} is too short: {there:.2f} s, where {form.num_frames} frames at {form.fps:g} a second take "
            f"{needed:.2f} s; remove it, or lower num_frames"
        )
    return np.abs(times[None] - wanted[:, None]).round(4).argmin(axis=1).tolist()


def fit_size(frames: Tensor, height: int, width: int) -> Tensor:
    """Frames ``[T, 3, H, W]`` in [0, 1] to ``[T, 3, height, width]``: the largest centred part of that shape, resized.

    Frames of that size already are not touched.
    """
    h, w = frames.shape[2:]
    scale = min(h / height, w / width)
    crop_h, crop_w = max(1, round(scale * height)), max(1, round(scale * width))
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    cut = frames[:, :, top : top + crop_h, left : left + crop_w]
    if (crop_h, crop_w) == (height, width):
        return cut
    return interpolate(cut, (height, width), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


Read = Callable[[Sequence[int]], Iterable[np.ndarray]]


def _open(path: Path) -> tuple[Sequence[float], Read]:
    """When each frame begins, in seconds, and what reads frames ``[H, W, 3]`` by rising numbers."""
    if not path.is_file():
        raise ValueError(f"no clip at {path}")
    ways = (_open_gif,) if path.suffix.lower() == ".gif" else (_open_decord, _open_imageio)
    for way in ways:
        try:
            starts, read = way(path)
            if len(starts):
                return starts, read
            error: Exception = ValueError("it has no frames")
        except Exception as problem:  # decord is not installed everywhere, nor knows every codec
            error = problem
    raise _unreadable(path, error) from error


def _open_decord(path: Path) -> tuple[Sequence[float], Read]:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    starts = np.asarray(reader.get_frame_timestamp(range(len(reader))))[:, 0]
    return starts, lambda numbers: reader.get_batch(list(numbers)).asnumpy()


def _open_imageio(path: Path) -> tuple[Sequence[float], Read]:
    with imageio.get_reader(path) as reader:
        fps, count = float(reader.get_meta_data()["fps"]), sum(1 for _ in reader.iter_data())

    def read(numbers: Sequence[int]) -> list[np.ndarray]:
        wanted, found = set(numbers), {}
        with imageio.get_reader(path) as reader:
            for number, frame in enumerate(reader.iter_data()):
                if number in wanted:
                    found[number] = np.asarray(frame)
                if number >= max(wanted):
                    break
        return [found[number] for number in numbers]

    return np.arange(count) / fps, read


def _open_gif(path: Path) -> tuple[Sequence[float], Read]:
    frames = [(np.asarray(f.convert("RGB")), f.info.get("duration") or 100) for f in ImageSequence.Iterator(Image.open(path))]
    starts = np.cumsum([0.0, *(duration / 1000 for _, duration in frames[:-1])])
    return starts, lambda numbers: [frames[number][0] for number in numbers]


def _as_frames(images: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack([image[..., :3] for image in images])).permute(0, 3, 1, 2).float() / 255


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[-120:]
    return ValueError(f"{path} can't be read as a video ({reason}); remove it with its caption, or convert it")
