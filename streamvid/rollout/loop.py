"""The chunk x step loop. There is one: training, streaming and export consume this generator.

For each event of a schedule: cut the chunks' states together, run the student once, turn its
velocity into data predictions, and step every chunk to its next noise level. A chunk that reaches 0
is yielded, and is committed to the cache as context just before the next event, so a viewer never
waits for a commit and the last one never runs.

Gradient: a tapped prediction has the consumer's grad mode, everything else runs without. No
gradient passes from step to step (arXiv 2506.08009), nor from chunk to chunk: states and context
are detached. Nothing is yielded inside a ``no_grad`` block, which would turn gradients off for the
consumer.

A student with ``takes_target``, a flow map, is told with each state where its chunk is to land: the
next level under "jump", 0 under "renoise", which needs data, and the state's own level, i.e. the
velocity, under "euler". A data prediction is x_t - t u, whatever the target of u was, so that a
jump is the Euler step along u. Other students are told nothing, and "jump" is "euler" for them.

Shapes: B batch, C channels, f latent frames a chunk, T = f times the chunks of an event, h w latent
size. States are float32 (float64 if the prompts are); the student may cast them and return lower
precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from streamvid.core.process import add_noise, euler_step, renoise_step, v_from_x0, x0_from_v
from streamvid.rollout.noise import CONTEXT_EVENT, INITIAL_EVENT, Noise
from streamvid.rollout.schedule import Commit, Denoise, Stepper

ChunkHook = Callable[[int, float, Tensor], Tensor]


@dataclass(frozen=True)
class ChunkResult:
    """A finished chunk."""

    index: int
    latents: Tensor  # [B, C, f, h, w], its last data prediction; detached
    # the data prediction of its last tapped step, with gradient; ``latents`` if none was
    prediction: Tensor
    t: float  # noise level of the state that ``prediction`` was made from
    nfe: int  # student forwards that this chunk was part of


def rollout(
    student: Any,
    cond: Tensor,
    schedule: Iterable[Denoise],
    noise: Noise,
    *,
    latent_shape: tuple[int, int, int],
    chunk_frames: int,
    cache: Any = None,
    commit: Commit = "clean",
    context_t: float = 0.0,
    stepper: Stepper = "renoise",
    commit_last: bool = False,
    before_step: ChunkHook | None = None,
    after_x0: ChunkHook | None = None,
) -> Iterator[ChunkResult]:
    """Run a schedule; yields each chunk as soon as it is finished, in order.

    Args:
        student: ``models.causal_wan`` or anything with its call and its ``commit``.
        cond: the prompts ``[B, L, D]``, on the student's device.
        schedule: from ``rollout.schedule``; may be endless.
        noise: one sample per prompt.
        latent_shape: (C, h, w).
        chunk_frames: f.
        cache: from ``student.new_cache``; None for a model without context, with ``commit="none"``.
        commit: "clean" runs the student over the finished chunk at ``context_t``, "reuse" keeps the
            keys and values of its last denoising pass, "none" keeps nothing.
        context_t: noise level in [0, 1) of clean commits; fresh noise is added if it is not 0.
        stepper: "renoise" puts fresh noise on the data prediction, "euler" follows the flow, "jump"
            goes where a student that takes a target says that the flow arrives.
        commit_last: also commit what the schedule's last event finished, so that a later rollout
            over the same cache, with a schedule that begins at the next chunk, continues the
            stream.
        before_step: (chunk, t, x_t) to the ``x_t`` to use instead, ``[B, C, f, h, w]``.
        after_x0: (chunk, t, x0) to the data prediction to use instead; x0 = x_t - t u, which under
            "jump" is data at a chunk's last step only.

    Raises:
        ValueError: if the arguments contradict each other, or, while running, on a schedule that
            does not finish chunks in order or leaves some unfinished, or a hook that changes a
            chunk's shape.
    """
    if stepper not in _STEPPERS:
        raise ValueError(f"stepper={stepper!r}, expected one of {tuple(_STEPPERS)}")
    if commit not in ("clean", "reuse", "none"):
        raise ValueError(f"commit={commit!r}, expected 'clean', 'reuse' or 'none'")
    if commit != "none" and cache is None:
        raise ValueError(
            f"commit={commit!r} needs a cache; pass student.new_cache(...), or set commit='none'"
        )
    if not 0 <= context_t < 1:
        raise ValueError(f"context_t={context_t}, expected a noise level in [0, 1)")
    if context_t and commit != "clean":
        raise ValueError(
            f"context_t={context_t} is the level of clean commits; with commit={commit!r} set it"
            " to 0"
        )
    batch = cond.shape[0]
    if len(noise) != batch:
        raise ValueError(f"{len(noise)} noise seeds for {batch} prompts; give one a prompt")
    channels, height, width = latent_shape
    run = _Run(
        student=student,
        cond=cond,
        noise=noise,
        chunk_shape=(channels, chunk_frames, height, width),
        cache=cache,
        commit=commit,
        context_t=context_t,
        step=_STEPPERS[stepper],
        target=_TARGETS[stepper] if _takes_target(student) else None,
        before_step=before_step or _unchanged,
        after_x0=after_x0 or _unchanged,
    )
    return run.results(schedule, commit_last)


def _takes_target(student: Any) -> bool:
    """Whether a student is a flow map; one that does not say so is called without a target."""
    return getattr(student, "takes_target", False)


def context_input(latents: Tensor, index: int, noise: Noise, context_t: float) -> Tensor:
    """What a clean commit runs over: the finished chunk ``[B, C, f, h, w]`` with fresh noise at
    level ``context_t``; at 0 the chunk itself.
    """
    if context_t == 0:
        return latents
    shape = tuple(latents.shape[1:])
    eps = noise.draw(index, CONTEXT_EVENT, shape, latents.device, latents.dtype)
    return add_noise(latents, eps, context_t)


@dataclass
class _Chunk:
    """A chunk on its way from noise to data."""

    x_t: Tensor
    t: float
    prediction: Tensor | None = None
    prediction_t: float = 0.0
    tapped: bool = False
    nfe: int = 0


@dataclass
class _Run:
    """All that stays the same during a rollout, and the parts of a step."""

    student: Any
    cond: Tensor
    noise: Noise
    chunk_shape: tuple[int, int, int, int]
    cache: Any
    commit: Commit
    context_t: float
    step: Callable[..., Tensor]
    target: Callable[[Denoise], tuple[float, ...]] | None  # None for a student that is not told
    before_step: ChunkHook
    after_x0: ChunkHook

    def results(self, schedule: Iterable[Denoise], commit_last: bool) -> Iterator[ChunkResult]:
        chunks: dict[int, _Chunk] = {}  # under way
        finished: list[ChunkResult] = []  # by the last event, and not committed yet
        kv, oldest = None, None  # the oldest unfinished chunk; where to begin is the schedule's say
        for event in schedule:
            oldest = event.chunks[0] if oldest is None else oldest
            self.write_context(finished, kv)
            self.admit(event, chunks, oldest)
            kv = self.denoise(event, chunks)
            finished = [
                _finish(i, chunks.pop(i)) for i, t in zip(event.chunks, event.t_next) if t == 0
            ]
            oldest += len(finished)
            yield from finished
        if chunks:
            raise ValueError(
                f"the schedule ends with chunks {tuple(chunks)} unfinished; end each at t_next=0"
            )
        if commit_last:
            self.write_context(finished, kv)

    def admit(self, event: Denoise, chunks: dict[int, _Chunk], oldest: int) -> None:
        """Begin an event's new chunks as noise, and check that the event continues what is under
        way.

        The student places the frames that it is given right behind its context, hence the order.
        """
        expected = tuple(range(oldest, oldest + len(event.chunks)))
        if event.chunks != expected:
            raise ValueError(
                f"an event over chunks {event.chunks} where {expected} follow the finished ones"
            )
        for chunk, t in zip(event.chunks, event.t):
            if chunk not in chunks:
                chunks[chunk] = _Chunk(self.draw(chunk, INITIAL_EVENT), t)
            if chunks[chunk].t != t:
                raise ValueError(
                    f"chunk {chunk} is at t={chunks[chunk].t}, the schedule continues from t={t}"
                )
        leaving = [t_next == 0 for t_next in event.t_next]
        if leaving != sorted(leaving, reverse=True):
            raise ValueError(
                f"chunks {event.chunks} go to {event.t_next}; an older chunk must finish first"
            )
        if self.commit == "reuse" and any(leaving) and not all(leaving):
            raise ValueError(
                "commit='reuse' keeps the keys of a whole forward, but only some of its chunks"
                " finish; use commit='clean' with a rolling schedule"
            )

    def denoise(self, event: Denoise, chunks: dict[int, _Chunk]) -> Any:
        """One forward over the chunks of an event, and their steps; returns the keys and values to
        reuse.
        """
        states = [chunks[i] for i in event.chunks]
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(event.tap)):
            x_t = [
                _hooked("before_step", self.before_step, i, s.t, s.x_t)
                for i, s in zip(event.chunks, states)
            ]
            v, kv = self.predict(torch.cat(x_t, dim=2), event)
            v = v.split(self.chunk_shape[1], dim=2)
            x0 = [
                _hooked("after_x0", self.after_x0, i, t, x0_from_v(x, dx, t))
                for i, t, x, dx in zip(event.chunks, event.t, x_t, v)
            ]
        for i, chunk in enumerate(event.chunks):
            self.advance(chunk, states[i], x_t[i], x0[i], event.t_next[i], event.tap[i])
        return kv

    def predict(self, x_t: Tensor, event: Denoise) -> tuple[Tensor, Any]:
        """The student's velocity ``[B, C, T, h, w]`` and, if they are reused, its keys and
        values.
        """
        timestep, options = self.timestep(event.t), {"cache": self.cache}
        if self.target is not None:
            options["target_timestep"] = self.timestep(self.target(event))
        if self.commit != "reuse":
            return self.student(x_t, timestep, self.cond, **options).sample, None
        output = self.student(x_t, timestep, self.cond, return_kv=True, **options)
        return output.sample, _detached(output.kv)  # sg

    def advance(
        self, chunk: int, state: _Chunk, x_t: Tensor, x0: Tensor, t_next: float, tap: bool
    ) -> None:
        """Take a chunk to its next noise level, and keep its prediction."""
        if tap or not state.tapped:
            state.prediction, state.prediction_t = (x0 if tap else x0.detach()), state.t
        state.tapped = state.tapped or tap
        state.nfe += 1
        x_t, x0 = x_t.detach(), x0.detach()  # sg, sg
        state.x_t = (
            x0
            if t_next == 0
            else self.step(x_t, x0, state.t, t_next, partial(self.draw, chunk, state.nfe))
        )
        state.t = t_next

    @torch.no_grad()
    def write_context(self, finished: list[ChunkResult], kv: Any) -> None:
        """Commit what the last event finished."""
        if self.commit == "none" or not finished:
            return
        if self.commit == "reuse":
            self.cache.append(kv)
            return
        for result in finished:
            latents = context_input(result.latents, result.index, self.noise, self.context_t)
            self.student.commit(latents, self.timestep((self.context_t,)), self.cond, self.cache)

    def draw(self, chunk: int, event: int) -> Tensor:
        """Noise ``[B, C, f, h, w]``, in the precision of the states."""
        dtype = torch.promote_types(self.cond.dtype, torch.float32)
        return self.noise.draw(chunk, event, self.chunk_shape, self.cond.device, dtype)

    def timestep(self, t: tuple[float, ...]) -> Tensor:
        """The backbone's native time, 0 to 1000: ``[B]`` where all chunks share it, else ``[B,
        T]``.
        """
        dtype = torch.promote_types(self.cond.dtype, torch.float32)
        batch, frames = self.cond.shape[0], self.chunk_shape[1]
        fill = lambda level, *shape: (
            1000 * torch.full(shape, level, dtype=dtype, device=self.cond.device)
        )
        if len(set(t)) == 1:
            # filled where it is used: a copy from the host would wait for the device
            return fill(t[0], batch)
        return torch.cat([fill(level, batch, frames) for level in t], dim=1)


def _renoise(
    x_t: Tensor, x0: Tensor, t: float, t_next: float, draw: Callable[[], Tensor]
) -> Tensor:
    return renoise_step(x0, draw(), t_next)


def _euler(x_t: Tensor, x0: Tensor, t: float, t_next: float, draw: Callable[[], Tensor]) -> Tensor:
    # from x0, which a hook may have changed
    return euler_step(x_t, v_from_x0(x_t, x0, t), t, t_next)


# a jump is an Euler step along the mean velocity of its way
_STEPPERS = {"renoise": _renoise, "euler": _euler, "jump": _euler}

_TARGETS = {
    "renoise": lambda event: (0.0,) * len(event.chunks),
    "euler": lambda event: event.t,
    "jump": lambda event: event.t_next,
}


def _finish(index: int, chunk: _Chunk) -> ChunkResult:
    assert chunk.prediction is not None, "a chunk has been denoised before it is finished"
    return ChunkResult(index, chunk.x_t, chunk.prediction, chunk.prediction_t, chunk.nfe)


def _detached(kv: Any) -> Any:
    """Keys and values, a tensor or nested tuples and lists of them, without their graph."""
    return kv.detach() if isinstance(kv, Tensor) else tuple(_detached(part) for part in kv)


def _hooked(name: str, hook: ChunkHook, chunk: int, t: float, x: Tensor) -> Tensor:
    """A hook's version of a chunk; a ValueError unless it has its shape."""
    changed = hook(chunk, t, x)
    if not isinstance(changed, Tensor) or changed.shape != x.shape:
        came = list(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        raise ValueError(
            f"{name} gave {came} for chunk {chunk}, expected a tensor {list(x.shape)} as it was"
            " given"
        )
    return changed


def _unchanged(chunk: int, t: float, x: Tensor) -> Tensor:
    return x
