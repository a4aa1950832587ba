"""What ``tools/bench.py`` measures: how a student streams, and what each term of the loss core costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from streamvid.evaluation.bench import measure
from streamvid.rollout.loop import rollout
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.sampler import StreamChunk, new_cache, stream
from streamvid.rollout.schedule import StreamConfig, autoregressive

Row = dict[str, Any]


# ---- streaming ----------------------------------------------------------------------------------------


def streams(
    student: Any, steps: Sequence[int], num_frames: int, size: tuple[int, int], device: torch.device, repeats: int
) -> list[Row]:
    """A row for each number of steps a chunk: latencies, frames a second, and the bytes of the cache.

    Args:
        student: of ``serving.student.load_student``.
        num_frames: of a stream; it should have some chunks after the window is full.
        size: height and width of the frames.
    """
    embedding = student.prompts.encode(["a red circle moves to the right"]).to(device, _dtype(student))
    return [_stream_row(student, _with_steps(student.stream, n), n, num_frames, size, embedding, repeats) for n in steps]


def _dtype(student: Any) -> torch.dtype:
    return next(student.transformer.parameters()).dtype


def _with_steps(config: StreamConfig, num_steps: int) -> StreamConfig:
    return config if num_steps == config.num_steps else replace(config, num_steps=num_steps, step_table=())


def _stream_row(
    student: Any, config: StreamConfig, num_steps: int, num_frames: int, size: tuple[int, int], embedding: Tensor,
    repeats: int,
) -> Row:
    runs = [_stream_once(student, config, num_frames, size, embedding) for _ in range(repeats + 1)][1:]
    chunks = [chunk for run in runs for chunk in run[1:]]  # the first is reported apart
    if not chunks:
        raise ValueError(f"{num_frames} frames are one chunk; a stream to measure has at least two, use --num-frames 129")
    denoise_s, decode_s = (statistics.median(getattr(chunk, name) for chunk in chunks) for name in ("denoise_s", "decode_s"))
    return {
        "": f"{num_steps} steps a chunk",
        "first frame ms": 1000 * statistics.median(run[0].denoise_s + run[0].decode_s for run in runs),
        "chunk ms": 1000 * (denoise_s + decode_s),
        "denoise ms": 1000 * denoise_s,
        "decode ms": 1000 * decode_s,
        "frames/s": chunks[0].frames.shape[1] / (denoise_s + decode_s),
        "cache MiB": _cache_bytes(student, config, size, embedding) / 2**20,
    }


def _stream_once(
    student: Any, config: StreamConfig, num_frames: int, size: tuple[int, int], embedding: Tensor
) -> list[StreamChunk]:
    height, width = size
    return list(
        stream(
            student.transformer, student.codec, embedding, config, seeds=[0], height=height, width=width,
            num_frames=num_frames,
        )
    )


def _cache_bytes(student: Any, config: StreamConfig, size: tuple[int, int], embedding: Tensor) -> int:
    """Bytes of a cache whose window is full, after as many chunks at one step each."""
    shape = (student.codec.latent_channels, *(side // student.codec.spatial_ratio for side in size))
    cache = new_cache(student.transformer, config, 1, shape)
    if cache is None:
        return 0
    num_chunks = -(-(config.window_frames or 7 * config.chunk_frames) // config.chunk_frames)
    events = autoregressive((1.0,), num_chunks)
    with torch.no_grad():
        for _ in rollout(
            student.transformer, embedding, events, KeyedNoise([0]), latent_shape=shape,
            chunk_frames=config.chunk_frames, cache=cache, commit=config.commit, commit_last=True,
        ):
            pass
    return cache.memory_bytes()
