"""Streams into files: what `streamvid sample` does for each prompt or script."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from streamvid.codecs.base import VideoCodec
from streamvid.printing import one_line, printable
from streamvid.rollout.sampler import stream
from streamvid.rollout.schedule import Cost, StreamConfig, build_schedule, cost_of
from streamvid.students.contexts import digest_frames, first_chunk_frames
from streamvid.students.folder import Student
from streamvid.students.play import play_script
from streamvid.students.script import Script
from streamvid.video import VideoWriter, read_video, suffix_of

IMAGES = (".png", ".jpg", ".jpeg", ".bmp")


@dataclass(frozen=True)
class Exported:
    """What was written and what it took."""

    num_frames: int
    num_chunks: int
    seconds: float
    first_frame_s: float
    cost: Cost | None = None  # of the chunks that were finished; None of a script


def name_outs(out: str, num: int, listed: bool = False) -> list[str]:
    """A path for each of ``num`` clips: ``out`` itself for one, a pattern with ``{}``, or .mp4
    files in a folder.

    Args:
        listed: the clips are of a list, which may have one entry: a folder holds .mp4 files then
            too, not PNGs.

    Raises:
        ValueError: if ``out`` is one file for several clips.
    """
    if "{}" in out:
        return [out.replace("{}", f"{index:03d}") for index in range(num)]
    if num == 1 and (suffix_of(out) or not listed):
        return [out]
    if suffix_of(out):
        raise ValueError(
            f"{out} is one file for {num} prompts; name a folder, or a pattern such as"
            " clips/{}.gif"
        )
    return [str(Path(out) / f"{index:03d}.mp4") for index in range(num)]


def read_start(path: str | Path, height: int, width: int) -> Tensor:
    """The frames ``[T, 3, H, W]`` in [0, 1] of an image, a clip or a folder of PNGs that a stream
    is to go on from; T = 1 for an image.

    Raises:
        ValueError: one line, if it can't be read, or its frames are of another size.
    """
    try:
        frames = _read_image(path) if suffix_of(path) in IMAGES else read_video(path)[0]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # of Pillow
        raise ValueError(f"start {path}: {one_line(error)}") from error
    if tuple(frames.shape[2:]) != (height, width):
        given = "x".join(str(side) for side in frames.shape[2:])
        raise ValueError(
            f"start {path}: its frames are {given}, the stream's {height}x{width}; resize or crop"
            " them"
        )
    return frames


def _read_image(path: str | Path) -> Tensor:
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1)[None].float() / 255


def export_clip(
    model: Any,
    codec: VideoCodec,
    cond: Tensor,
    config: StreamConfig,
    path: str,
    *,
    seed: int,
    size: tuple[int, int],
    num_frames: int | None,
    fps: float,
    live: bool = False,
) -> Exported:
    """Stream one clip into its file, frames as they come.

    Args:
        cond: of one prompt ``[1, L, D]``.
        path: see ``video.VideoWriter``.
        size: height and width in pixels.
        num_frames: None streams until Ctrl-C.
        live: PNGs are there as soon as each is complete, and Ctrl-C ends the clip instead of
            dropping it.

    Raises:
        ValueError: before anything is written, for a size, a length or a path that can't be, or
            damaged weights.
    """
    height, width = size
    chunks = stream(
        model,
        codec,
        cond,
        config,
        seeds=[seed],
        height=height,
        width=width,
        num_frames=num_frames,
    )
    made = _write((chunk.frames[0] for chunk in chunks), path, num_frames, fps, live)
    schedule = build_schedule(config, made.num_chunks)
    return replace(made, cost=cost_of(schedule, config.chunk_frames, config.commit))


def export_script(
    student: Student,
    script: Script,
    path: str,
    *,
    num_frames: int | None,
    fps: float,
    first_chunk: int = 0,
    start: Tensor | None = None,
    live: bool = False,
) -> Exported:
    """Play a script into a file, frames as they come, those of the live stream bit for bit.

    Args:
        path, fps, live: as for ``export_clip``.
        num_frames: most frames that are written; None is as many as the script says.
        first_chunk: the first chunk that is written, as the script counts them.
        start: the frames that the stream goes on from, ``read_start``; an image is repeated to the
            length of the student's first chunk.

    Raises:
        ValueError: before anything is written, for what ``play_script`` refuses, or a script that
            ends before ``first_chunk``.
    """
    if script.num_chunks is not None and first_chunk >= script.num_chunks:
        raise ValueError(
            f"first_chunk={first_chunk} of a script of num_chunks={script.num_chunks}; chunks are"
            " counted from 0"
        )
    if start is not None and len(start) == 1:
        start = start.expand(first_chunk_frames(student), -1, -1, -1)
    if start is not None and script.start is None:  # written by hand
        script = replace(script, start=digest_frames(start))

    def frames() -> Iterator[Tensor]:
        left = num_frames
        for chunk in play_script(student, script, start=start):
            if chunk.index < first_chunk:
                continue
            yield chunk.frames[0, :left]
            if left is not None:
                left -= chunk.frames.shape[1]
                if left <= 0:
                    return

    return _write(frames(), path, num_frames, fps, live)


def _write(
    chunks: Iterator[Tensor], path: str, num_frames: int | None, fps: float, live: bool
) -> Exported:
    """Write chunks of frames ``[T, 3, H, W]`` as they are made."""
    started, first_frame_s, num_chunks = time.perf_counter(), 0.0, 0
    writer = VideoWriter(path, fps, live)
    # one that can't be made leaves what is at the path as it is
    chunks = itertools.chain([next(chunks)], chunks)
    with writer, tqdm(total=num_frames, unit="frame", desc=printable(path)) as bar:
        try:
            for num_chunks, frames in enumerate(chunks, 1):  # noqa: B007 (read below)
                first_frame_s = first_frame_s or time.perf_counter() - started
                writer.append(frames)
                bar.update(len(frames))
        except KeyboardInterrupt:
            if not live or not writer.num_frames:
                raise
    return Exported(writer.num_frames, num_chunks, time.perf_counter() - started, first_frame_s)
