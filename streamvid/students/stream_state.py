"""The state of a live stream between two chunks, and what it implies for the next one.

A state is a value: its tensors are never written to, a change makes another state. So a session can
be branched, saved, and asked again for a chunk that failed.

Shapes: B = 1, L text tokens, D embedding size, C channels, f latent frames per chunk, h w latent
size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streamvid.rollout.loop import ChunkResult, context_input
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.schedule import Denoise, StreamConfig, build_schedule
from streamvid.students.folder import Student, deployed
from streamvid.students.script import INTERPOLATIONS, Change, Interpolation


@dataclass(frozen=True)
class Context:
    """What the commit of a chunk ran over, kept to be committed again."""

    latents: Tensor  # [1, C, f, h, w]
    t: float


@dataclass(frozen=True)
class Blend:
    """An embedding on its way from one prompt to the next."""

    origin: Tensor  # [1, L, D]
    num_chunks: int
    done: int  # chunks that were made on the way
    interpolation: Interpolation

    def at(self, target: Tensor) -> Tensor:
        """The embedding of the next chunk."""
        share = (self.done + 1) / self.num_chunks
        return target if share >= 1 else mix(self.origin, target, share, self.interpolation)


@dataclass(frozen=True)
class StreamState:
    """What changes from chunk to chunk, the cache apart; its tensors are never written to."""

    index: int  # of the next chunk
    scene: int  # index of the scene's first chunk
    seed: int
    prompt: str
    cond: Tensor  # [1, L, D] of the prompt
    blend: Blend | None
    config: StreamConfig  # as it is steered
    # of the scene's chunks under the sink, and of those of the last window
    contexts: tuple[Context, ...]
    decoder: Any

    @property
    def scene_index(self) -> int:
        """The next chunk's place in its scene."""
        return self.index - self.scene


def check_student(student: Student) -> None:
    """A ValueError unless a session can steer the student: chunk after chunk, over a context."""
    config = student.stream
    if config.order != "autoregressive":
        raise ValueError(
            f"a session makes a stream chunk after chunk, not in order={config.order!r}; use"
            " 'autoregressive'"
        )
    if config.commit == "none":
        raise ValueError("a session needs a context, this student has commit='none'; set 'clean'")


def mix(origin: Tensor, target: Tensor, share: float, interpolation: Interpolation) -> Tensor:
    """The embedding ``share`` of the way from ``origin`` to ``target``, both ``[1, L, D]``.

    "linear" is ``(1 - s) a + s b``. "spherical" goes along the arc between the two directions, per
    token, and the length changes linearly (Shoemake, SIGGRAPH 1985); where a token is zero, as
    padding is, or both point the same way or in opposite ways, it is linear.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r}, expected one of {INTERPOLATIONS}")
    straight = (1 - share) * origin + share * target
    if interpolation == "linear":
        return straight
    lengths = [x.norm(dim=-1, keepdim=True) for x in (origin, target)]
    unit = [x / length.clamp(min=1e-12) for x, length in zip((origin, target), lengths)]
    cosine = (unit[0] * unit[1]).sum(dim=-1, keepdim=True).clamp(-1, 1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    along = torch.sin((1 - share) * angle) * unit[0] + torch.sin(share * angle) * unit[1]
    length = (1 - share) * lengths[0] + share * lengths[1]
    curved = along / sine.clamp(min=1e-12) * length
    has_arc = (sine > 1e-2) & (lengths[0] > 0) & (lengths[1] > 0)
    return torch.where(has_arc, curved, straight)


def next_events(state: StreamState) -> list[Denoise]:
    """The passes of the next chunk, those that ``build_schedule`` has at its place in the scene."""
    # from here on all chunks are alike
    last_other = max(1, len(state.config.step_table) - 1)
    place = min(state.scene_index, last_other)
    events = (e for e in build_schedule(state.config, place + 1) if e.chunks == (place,))
    return [replace(event, chunks=(state.index,)) for event in events]


def steer_state(student: Student, state: StreamState, change: Change | None) -> StreamState:
    """The state with the change's steps or times.

    Raises:
        ValueError: what ``StreamConfig`` refuses.
    """
    if change is None or (change.steps is None and change.times is None):
        return state
    if change.steps is not None:
        return replace(state, config=deployed(student.stream, steps=change.steps))
    if not change.times:
        return replace(state, config=student.stream)
    config = replace(student.stream, step_table=(change.times,), first_steps=None)
    return replace(state, config=config)


def advance_blend(blend: Blend | None) -> Blend | None:
    """A blend after one more chunk; None when it has arrived."""
    if blend is None or blend.done + 1 >= blend.num_chunks:
        return None
    return replace(blend, done=blend.done + 1)


def context_of(state: StreamState, result: ChunkResult, last_input: Context) -> Context:
    """What the commit of a chunk runs over: the chunk, or what its last pass ran over."""
    if state.config.commit == "reuse":
        return last_input
    t, noise = state.config.context_t, KeyedNoise([state.seed])
    return Context(context_input(result.latents, result.index, noise, t), t)


def keep_contexts(contexts: tuple[Context, ...], config: StreamConfig) -> tuple[Context, ...]:
    """Those under the sink and those of the last window, which may be committed again."""
    num_sink, num_recent = context_counts(config)
    if num_recent is None or len(contexts) <= num_sink + num_recent:
        return contexts
    return (*contexts[:num_sink], *contexts[-num_recent:])


def context_counts(config: StreamConfig) -> tuple[int, int | None]:
    """Chunks under the sink, and those that the rest of the window holds a part of; None is all."""
    num_sink = -(-config.sink_frames // config.chunk_frames)
    if config.window_frames is None:
        return num_sink, None
    return num_sink, -(-(config.window_frames - config.sink_frames) // config.chunk_frames)
