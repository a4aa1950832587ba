"""Regression on a teacher's trajectories: the start of a few-step causal student.

CausVid, arXiv 2412.07772 (ODE initialisation, also Self-Forcing's); the teacher-forced form is
Causal-Forcing's, arXiv 2602.02214. The teacher's probability flow is solved once for many prompts
and its states x_t are kept at the student's own times. The student, block-causal, is to say from a
state where its trajectory ends:

    minimise mean |x0_hat(x_t, t) - x_0|^2 over the entries with t > 0,  x0_hat = x_t - t v

``mode`` chooses what a chunk sees of the chunks before it:

- ``diffusion_forcing``: their states, each at its own time of the student's list or at 0 (data), as
  CausVid; with ``level: clip`` all at one time of the list;
- ``teacher_forcing``: their ends, clean, as the student will see its own finished chunks.

Departure from CausVid: the last chunk is never at 0, as no later one would learn from it.

Shapes: B batch, K stored times, C channels, T latent frames, h w latent size, n chunks of f frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor

from streamvid.core.process import expand_time, x0_from_v
from streamvid.data.trajectories import SAME_TIME, check_falling, time_indices
from streamvid.objectives.base import ClipStep, Objective
from streamvid.rollout.sampler import GuidedModel, stream_latents
from streamvid.rollout.schedule import StreamConfig, chunk_times
from streamvid.seeding import keyed_generator
from streamvid.teachers.base import Teacher


@dataclass
class TrajectoryRegression(Objective):
    """Regression on stored trajectories of the teacher."""

    name: ClassVar[str] = "trajectory"
    paper: ClassVar[str] = "2412.07772"
    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})
    role: ClassVar[Literal["complete", "add-on", "baseline", "start"]] = "start"
    on_points: ClassVar[bool] = False

    mode: Literal["diffusion_forcing", "teacher_forcing"] = "diffusion_forcing"
    """What a chunk sees of the chunks before it."""
    level: Literal["chunk", "clip"] = "chunk"
    """Whether each chunk has its own step of the list (CausVid) or all have the same
    (Causal-Forcing)."""

    def __post_init__(self) -> None:
        choices_of = {
            "mode": ("diffusion_forcing", "teacher_forcing"),
            "level": ("chunk", "clip"),
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected one of {choices}")

    def choices(self, step: Any) -> None:
        """All steps cost the same."""

    def student(self, step: ClipStep) -> Tensor:  # type: ignore[override]
        """Batches hold ``states [B, n, C, T, h, w]``, ``times [B, n]``, ``cond [B, L, D]`` and
        ``keys``.

        Raises:
            ValueError: if a time of the student's list is not stored, or the chunks do not fit the
                clips.
        """
        states, times = step.batch["states"], step.batch["times"][0]
        chunk_frames = step.stream.chunk_frames
        num_chunks = self._num_chunks(states.shape[3], chunk_frames)
        levels = self._draw_levels(step, times.tolist(), num_chunks)
        x_t = select_states(states, levels.to(states.device), chunk_frames)
        t = times[levels.to(times.device)].repeat_interleave(chunk_frames, dim=1)  # [B, T]
        t = t.to(states.device)
        x0 = states[:, time_indices(times.tolist(), [0.0])[0]]
        clean = x0 if self.mode == "teacher_forcing" else None
        v = step.velocity(x_t, t, None, chunk_frames, clean)
        error = (x0_from_v(x_t, v, t) - x0).square()
        counts = torch.as_tensor(expand_time((t > SAME_TIME).float(), error)).expand_as(error)
        return (error * counts).sum() / counts.sum()

    def _draw_levels(self, step: ClipStep, stored: list[float], num_chunks: int) -> Tensor:
        """Which stored time each chunk of each sample is at, ``[B, n]``."""
        steps = [time_indices(stored, times) for times in chunk_times(step.stream, num_chunks)]
        shared = self.level == "clip"
        if self.mode == "diffusion_forcing" and not shared:
            steps = [*(indices + time_indices(stored, [0.0]) for indices in steps[:-1]), steps[-1]]
        longest = max(len(indices) for indices in steps)
        rows = []
        for key in step.keys:
            draws = torch.rand(
                num_chunks, generator=keyed_generator(step.seed, "level", key), dtype=torch.float64
            )
            if shared:  # a chunk with a shorter list stays at its last step
                place = int(draws[0] * longest)
                rows.append([indices[min(place, len(indices) - 1)] for indices in steps])
            else:
                rows.append([indices[int(u * len(indices))] for u, indices in zip(draws, steps)])
        return torch.tensor(rows)

    def _num_chunks(self, frames: int, chunk_frames: int) -> int:
        if frames % chunk_frames:
            raise ValueError(
                f"chunk_frames={chunk_frames} does not divide the trajectories' {frames} latent"
                " frames"
            )
        return frames // chunk_frames


def select_states(states: Tensor, levels: Tensor, chunk_frames: int) -> Tensor:
    """``[B, K, C, T, h, w]``, each chunk at its own of the K times, ``levels [B, n]``, to ``[B, C,
    T, h, w]``.
    """
    chunks = rearrange(states, "b k c (n f) h w -> b n k c f h w", f=chunk_frames)
    b, n = torch.meshgrid(
        *(torch.arange(size, device=states.device) for size in levels.shape), indexing="ij"
    )
    return rearrange(chunks[b, n, levels], "b n c f h w -> b c (n f) h w")


# ---- making the trajectories ---------------------------------------------------------------------


def grid_through(times: Sequence[float], grid: Sequence[float]) -> tuple[float, ...]:
    """The times of an Euler sampler with more of them, so that ``times`` are on it exactly and
    nothing has to be interpolated; one that is there already costs no step.
    """
    between = [t for t in grid if all(abs(t - kept) > SAME_TIME for kept in times)]
    return tuple(sorted({*times, *between} - {0.0}, reverse=True))


def solve_trajectories(
    teacher: Teacher,
    cond: Tensor,
    seeds: list[int],
    *,
    times: Sequence[float],
    grid: Sequence[float],
    guidance_scale: float,
    latent_shape: tuple[int, int, int],
    latent_frames: int,
) -> Tensor:
    """The teacher's Euler solution from keyed noise, at ``times``: ``[B, K, C, T, h, w]``.

    The sampler's own loop does it: a clip is a stream of one chunk, all frames jointly.

    Args:
        teacher: gives the velocity.
        cond: prompts ``[B, L, D]``, on the device where the states are to be.
        seeds: one a prompt.
        times: falling, the last one 0.
        grid: the sampler's times, without 0, through ``times``, see ``grid_through``.
        guidance_scale: of the teacher.
        latent_shape: (C, h, w).
        latent_frames: T.

    Raises:
        ValueError: if ``times`` do not fall to 0 or are not on the grid.
    """
    kept: dict[float, Tensor] = {}

    def keep(chunk: int, t: float, x_t: Tensor) -> Tensor:
        if t in times:
            kept[t] = x_t.clone()
        return x_t

    missing = set(check_falling(times)) - {*grid, 0.0}
    if missing:
        raise ValueError(
            f"the sampler's grid does not pass t={sorted(missing)}; make it with grid_through"
        )
    sampler = StreamConfig(
        step_table=(tuple(grid),), chunk_frames=latent_frames, commit="none", stepper="euler"
    )
    uncond = None if teacher.uncond is None else teacher.uncond.to(cond).expand(len(cond), -1, -1)
    model = GuidedModel(teacher.predict, uncond, guidance_scale)
    results = stream_latents(
        model, cond, sampler, seeds=seeds, latent_shape=latent_shape, num_chunks=1, before_step=keep
    )
    (clip,) = results
    return torch.stack([*(kept[t] for t in times[:-1]), clip.latents], dim=1)
