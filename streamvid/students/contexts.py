"""Contexts that a session commits by itself, apart from the rollout: the frames that a stream
begins from, and a window that is committed again under a new prompt.

Shapes: B = 1, L text tokens, D embedding size, C channels, f latent frames per chunk, h w latent
size, T pixel frames, H W pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from streamvid.rollout.loop import context_input
from streamvid.rollout.noise import KeyedNoise
from streamvid.students.folder import Student
from streamvid.students.stream_state import (
    Context,
    StreamState,
    context_counts,
    keep_contexts,
    next_events,
)


def commit_context(transformer: Any, context: Context, cond: Tensor, cache: Any) -> None:
    """Write a chunk's keys and values into a cache, under an embedding ``[1, L, D]``."""
    dtype = torch.promote_types(cond.dtype, torch.float32)
    timestep = 1000 * torch.full((1,), context.t, dtype=dtype, device=cond.device)
    transformer.commit(context.latents, timestep, cond, cache)


@torch.no_grad()
def recommit_window(
    transformer: Any, state: StreamState, cache: Any, cond: Tensor, keep_sink: bool
) -> Any:
    """A copy of a cache, its last window committed again under an embedding ``[1, L, D]``, at its
    old positions.

    Args:
        keep_sink: whether the sink's keys stay those of the old prompt.
    """
    cache, chunk_frames = cache.clone(), state.config.chunk_frames
    num_sink, _ = context_counts(state.config)
    under_sink, recent = state.contexts[:num_sink], state.contexts[num_sink:]
    resume_at = (state.scene_index - len(recent)) * chunk_frames
    if keep_sink:
        first = sum(i < len(under_sink) * chunk_frames for i in cache.stored_frames())
    else:
        cache.rewind(0)
        for context in under_sink:
            commit_context(transformer, context, cond, cache)
        first = cache.num_frames
    # a long stream has left all but the sink of its first chunks
    cache.rewind(resume_at, first if first == resume_at else cache.sink_frames)
    for context in recent:
        commit_context(transformer, context, cond, cache)
    return cache


@torch.no_grad()
def commit_start(
    student: Student, state: StreamState, cache: Any, frames: Tensor, height: int, width: int
) -> StreamState:
    """Encode the frames ``[T, 3, H, W]`` in [0, 1] that a stream begins from and commit them to its
    empty cache. The state's decoder is brought to their end.

    Raises:
        ValueError: see ``start_chunks``, and if the latents are not finite.
    """
    codec = student.codec
    num_chunks = start_chunks(frames, student, height, width)
    chunk_frames = state.config.chunk_frames
    num_frames = 1 + codec.temporal_ratio * (num_chunks * chunk_frames - 1)
    clip = frames[-num_frames:].to(state.cond.device, torch.float32)[None]
    latents = codec.encode_frames(clip).to(torch.float32)
    if not latents.isfinite().all():
        raise ValueError("start gives latents that are not finite; give frames in [0, 1]")
    noise = KeyedNoise([state.seed])
    for index, chunk in enumerate(latents.split(chunk_frames, dim=2)):
        # as the student knows its context: with "reuse" that of a chunk's last pass
        reused = state.config.commit == "reuse"
        t = next_events(state)[-1].t[0] if reused else state.config.context_t
        context = Context(context_input(chunk.contiguous(), index, noise, t), t)
        commit_context(student.transformer, context, state.cond, cache)
        _, decoder = codec.decode_chunk(chunk.contiguous(), state.decoder)
        contexts = keep_contexts((*state.contexts, context), state.config)
        state = replace(state, index=index + 1, contexts=contexts, decoder=decoder)
    return state


def start_chunks(frames: Tensor, student: Student, height: int, width: int) -> int:
    """How many whole chunks the frames ``[T, 3, H, W]`` hold; of n chunks of f latent frames the
    last ``1 + r (n f - 1)`` frames are used.

    Raises:
        ValueError: one line, if they are of another size, or fewer than a chunk's.
    """
    if frames.ndim != 4 or tuple(frames.shape[1:]) != (3, height, width):
        raise ValueError(
            f"start is {list(frames.shape)}, expected frames [T, 3, {height}, {width}]; resize or"
            " crop them"
        )
    ratio, chunk_frames = student.codec.temporal_ratio, student.stream.chunk_frames
    latent_frames = 1 + (len(frames) - 1) // ratio if len(frames) else 0
    if latent_frames < chunk_frames:
        least = first_chunk_frames(student)
        raise ValueError(
            f"start has {len(frames)} frames, this student's first chunk {least}; give at least"
            f" {least}, or repeat an image: image.expand({least}, -1, -1, -1)"
        )
    return latent_frames // chunk_frames


def first_chunk_frames(student: Student) -> int:
    """Pixel frames of a student's first chunk."""
    return 1 + student.codec.temporal_ratio * (student.stream.chunk_frames - 1)


def digest_frames(frames: Tensor) -> str:
    """A name for frames, by their numbers in float32."""
    numbers = frames.detach().float().cpu().contiguous()
    said = f"{tuple(frames.shape)}".encode() + numbers.numpy().tobytes()
    return hashlib.blake2b(said, digest_size=16).hexdigest()
