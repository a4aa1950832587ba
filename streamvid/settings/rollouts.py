"""How a student's samples are made in training: rollouts, streamed as it will be.

The student rolls out a clip x over its own committed chunks (Self-Forcing, arXiv 2506.08009). A
turn draws one exit, a random step of the student's list, the same for all processes: x is made of
the exits' predictions, only they carry gradient, and no gradient passes from chunk to chunk. Where
chunks have lists of different lengths, each exits at the same fraction of its own. A chunk takes
all its steps before it becomes context (``context: streamed``), so that the keys and values over
which later chunks are denoised are written from the states and at the times at which a stream
writes them. Self-Forcing's code commits the exit's prediction (``context: exit``), which costs
fewer forwards, but is a context that no stream has.

Long rollouts (``rollout_chunks``; after Self-Forcing++, arXiv 2510.02283): the student goes on past
the teacher's clip length, over the window and sink that it streams with, and a part as long as the
teacher's clips is judged. A video codec's first latent frame is an image, so that the teacher knows
no clip that begins with another: as in Self-Forcing's code the part's first frame is decoded and
encoded as an image, and its first chunk carries no gradient. That makes the part a clip of the
codec, not one of the prompt, which tells how a clip begins: where the teacher still is outside its
law, at high noise, ``window_high`` leaves the comparison out.

Shapes: B batch, C channels, T latent frames of a clip, h w latent size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import repeat
from torch import Tensor

from streamvid.rollout.schedule import (
    Denoise,
    StreamConfig,
    build_schedule,
    chunk_times,
    move_tap,
    truncate,
)

MOST_CHUNKS = 10_000  # of a rollout, which is kept in memory


@dataclass
class RolloutConfig:
    """How the student's samples are made in training; how it is streamed is the stream's say."""

    num_chunks: int = 7
    """Chunks of the clips that are judged; times the stream's chunk_frames, the teacher's clip
    length."""
    exit: Literal["random", "last"] = "random"
    """Which step of a chunk carries gradient: any, or always the last."""
    context: Literal["streamed", "exit"] = "streamed"
    """What chunks become context from: all their steps, as in a stream, or the exit's prediction,
    as in Self-Forcing's code."""
    rollout_chunks: int | None = None
    """Chunks of the longest rollout; null is ``num_chunks``. Gradient and loss are on
    ``num_chunks`` of them."""
    window: Literal["random", "last"] = "random"
    """Where in a longer rollout those are: anywhere, the rollout then ending with them, or at its
    end."""
    window_high: float | None = None
    """Greatest time at which a part from the middle of a rollout is judged; null is the
    objective's ``high``."""
    fake_knows_steps: bool = False
    """Whether the fake score is told which step of how many ended a rollout, by a vector on its
    time embedding. It sees clips that ended at different steps, as one mixture, and a mixture may
    be right while each step's clips are wrong."""
    group_size: int = 1
    """Samples per prompt, of objectives that compare these; 1 to 24."""

    def __post_init__(self) -> None:
        for name in ("num_chunks", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        for name in ("num_chunks", "rollout_chunks"):
            if (getattr(self, name) or 0) > MOST_CHUNKS:
                raise ValueError(f"{name}={getattr(self, name)} must be at most {MOST_CHUNKS:,}")
        if self.rollout_chunks is not None and self.rollout_chunks < self.num_chunks:
            raise ValueError(
                f"rollout_chunks={self.rollout_chunks} is shorter than the"
                f" num_chunks={self.num_chunks} that are judged"
            )
        if self.rollout_chunks is not None and self.rollout_chunks > self.num_chunks == 1:
            raise ValueError(
                "num_chunks=1: the first chunk of a part from the middle carries no gradient; judge"
                " at least 2"
            )
        if self.window_high is not None and not 0 < self.window_high <= 1:
            raise ValueError(f"window_high={self.window_high}, expected a time in (0, 1]")
        choices_of = {
            "exit": ("random", "last"),
            "window": ("random", "last"),
            "context": ("streamed", "exit"),
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected one of {choices}")

    @property
    def judges_cuts(self) -> bool:
        """Whether clips from the middle of a longer rollout are judged."""
        return (self.rollout_chunks or 0) > self.num_chunks


@dataclass(frozen=True)
class Decision:
    """What all samples and all processes share in a turn's rollout."""

    exit_index: int  # steps before the one that carries gradient, of the chunk with most
    exit_place: float  # in [0, 1): of m steps, the one numbered int(m * place) carries gradient
    first_chunk: int  # of the part that is judged
    num_steps: int | None = None  # per chunk, where an objective says it; None is the stream's
    first_place: float | None = None  # the exit's place in chunk 0's list; None is exit_place
    ends_at_exit: bool = False  # whether a chunk's exit is its last step and so its context

    def exit_step(self, chunk: int, num_steps: int) -> int:
        """Steps that a chunk of ``num_steps`` takes before its exit."""
        place = self.exit_place
        if chunk == 0 and self.first_place is not None:
            place = self.first_place
        return int(place * num_steps)


def with_exits(stream: StreamConfig, decision: Decision, num_chunks: int) -> Iterator[Denoise]:
    """The schedule of a rollout, tapped at its exits."""
    steps = [len(times) for times in chunk_times(stream, num_chunks)]
    schedule = build_schedule(stream, num_chunks)

    def exit_of(chunk: int) -> int:
        return decision.exit_step(chunk, steps[chunk])

    if decision.ends_at_exit:
        return truncate(schedule, exit_of)
    last = num_chunks - 1  # is nobody's context, so that its exit ends it
    return truncate(
        move_tap(schedule, exit_of),
        lambda chunk: exit_of(chunk) if chunk == last else steps[chunk],
    )


def tapped_from(first_chunk: int, schedule: Iterator[Denoise]) -> Iterator[Denoise]:
    """The same schedule, without gradient before ``first_chunk``."""
    for event in schedule:
        yield replace(
            event, tap=tuple(t and i >= first_chunk for i, t in zip(event.chunks, event.tap))
        )


def frame_shape(x: Tensor) -> tuple[int, int, int]:
    """(C, h, w) of clips ``[B, C, T, h, w]``."""
    _, channels, _, height, width = x.shape
    return channels, height, width


def patch_weights(
    r: Tensor, sizes: tuple[int, int, int], patch: tuple[int, int, int], chunk_frames: int
) -> Tensor:
    """r of each token ``[B, J]`` for its patch, ``[K B, 1, f, h, w]``.

    Args:
        sizes: (T, h, w) of the clips.
        patch: frames, height and width of a token's patch.
        chunk_frames: f.
    """
    of_patches = r.unflatten(1, [size // p for size, p in zip(sizes, patch)])
    p, q, s = patch
    places = repeat(of_patches, "n t h w -> n 1 (t p) (h q) (w s)", p=p, q=q, s=s)
    return torch.cat(places.split(chunk_frames, dim=2))


def latent_statistics(x: Tensor) -> dict[str, Tensor]:
    """What tells the usual failures of a student from its latents ``[B, C, T, h, w]``, which have
    unit variance.

    ``latent_rms`` and ``latent_max`` grow with over-saturation, ``drift`` (rms of the last frame
    over that of the first) with errors that add up, and ``motion`` (mean absolute difference of
    neighbouring frames) falls when a student freezes.
    """
    rms = x.square().mean(dim=(0, 1, 3, 4)).sqrt()  # [T]
    moves = (x[:, :, 1:] - x[:, :, :-1]).abs()
    return {
        "latent_rms": x.square().mean().sqrt(),
        "latent_max": x.abs().max(),
        "drift": rms[-1] / rms[0].clamp_min(1e-8),
        "motion": moves.mean() if moves.numel() else x.new_zeros(()),
    }
