"""Streams into files: what `streamvid sample` does for each prompt."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from streamvid.codecs.base import VideoCodec
from streamvid.printing import printable
from streamvid.rollout.sampler import stream
from streamvid.rollout.schedule import Cost, StreamConfig, build_schedule, cost_of
from streamvid.video import VideoWriter, suffix_of


@dataclass(frozen=True)
class Exported:
    """What was written and what it took."""

    num_frames: int
    seconds: float
    first_frame_s: float
    cost: Cost  # of the chunks that were finished


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


def export_clip(
    model: Any,
    codec: VideoCodec,
    embedding: Tensor,
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
        embedding: of one prompt ``[1, L, D]``.
        path: see ``video.VideoWriter``.
        size: height and width in pixels.
        num_frames: None streams until Ctrl-C.
        live: PNGs are there as soon as each is complete, and Ctrl-C ends the clip instead of
            dropping it.

    Raises:
        ValueError: before anything is written, for a size, a length or a path that can't be, or
            damaged weights.
    """
    started, first_frame_s, num_chunks = time.perf_counter(), 0.0, 0
    height, width = size
    chunks = stream(
        model,
        codec,
        embedding,
        config,
        seeds=[seed],
        height=height,
        width=width,
        num_frames=num_frames,
    )
    writer = VideoWriter(path, fps, live)
    # one that can't be made leaves what is at the path as it is
    chunks = itertools.chain([next(chunks)], chunks)
    with writer, tqdm(total=num_frames, unit="frame", desc=printable(path)) as bar:
        try:
            for num_chunks, chunk in enumerate(chunks, 1):  # noqa: B007 (read below)
                first_frame_s = first_frame_s or time.perf_counter() - started
                writer.append(chunk.frames[0])
                bar.update(chunk.frames.shape[1])
        except KeyboardInterrupt:
            if not live or not writer.num_frames:
                raise
    cost = cost_of(build_schedule(config, num_chunks), config.chunk_frames, config.commit)
    return Exported(writer.num_frames, time.perf_counter() - started, first_frame_s, cost)
