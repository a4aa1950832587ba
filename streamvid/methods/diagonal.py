"""Diagonal distillation: many steps early in a stream, few later, and motion matched as well as
frames.

DiagDistill, arXiv 2603.09488, on top of distribution matching (``methods.matching``). Three parts:

    diagonal denoising  a table of steps, 4-3-2-2-..: ``stream.step_table``; a chunk leans on what is before it
    diagonal forcing    the context keeps the noise of the last step, so that a chunk is not told that its past is exact:
                        ``stream.commit: reuse`` keeps the keys of that step, which saves the pass
                        that writes context; ``stream.context_t: c`` writes the chunk noised to c;
                        ``clean`` is neither
    flow matching       L_DMD + gamma 1/2 mean h (d(x) - sg(d(x) - g_m))^2,
                        g_m = (d(x0_fake) - d(x0_real)) / mean |d(x) - d(x0_real)|,   d(x)_f = F(x_{f+1} - x_f)

The first two are how a student is streamed, and a chunk takes all its steps before it becomes
context (``methods.matching``), so training does what streaming will. ``d(x)`` carries gradient: in
the released code it does not, and the term is a constant. With ``motion: difference`` F is the
identity; then the term does not see what is the same in all frames, and leaves DMD's fixed point
where it is. With ``motion: learned`` F is a small residual network on the differences, trained to
tell the motion of a noised clip (network "motion"):

    motion:             minimise mean |P(F(x_t,{f+1} - x_t,f)) - (x_{f+1} - x_f)|^2 over rollouts, P a linear map

Departures: the exit of a turn is at the same fraction of each chunk's list (``methods.matching``),
where one shared index means nothing; frame weights h are the paper's code's, off by default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from streamvid.core.inject import dmd_gradient, surrogate, temporal_difference
from streamvid.methods.matching import Decision, DistributionMatching, Judged, MatchingConfig
from streamvid.rollout.schedule import StreamConfig
from streamvid.teachers.base import Teacher
from streamvid.training.method import as_floats


@dataclass
class Config(MatchingConfig):
    """Settings of diagonal distillation; the step table and the context's noise are the
    stream's.
    """

    motion_weight: float = 0.2
    """gamma, of the flow term; 0 leaves it out."""
    motion: Literal["difference", "learned"] = "difference"
    """Of what distributions are matched: temporal differences, or learned features of them."""
    frame_weights: Literal["even", "growing"] = "even"
    """h: all frames alike, or more on later frames, where errors have added up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.motion_weight < 0:
            raise ValueError(f"motion_weight={self.motion_weight}, expected at least 0")
        for name, choices in (
            ("motion", ("difference", "learned")),
            ("frame_weights", ("even", "growing")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected one of {choices}")


class Diagonal(DistributionMatching):
    """The method; the parts are those of ``DistributionMatching``."""

    def __init__(
        self,
        config: Config,
        student: nn.Module,
        teacher: Teacher,
        stream: StreamConfig,
        latent_shape: tuple[int, int, int],
        fake_score: nn.Module | None = None,
        seed: int = 0,
        as_image: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(config, student, teacher, stream, latent_shape, fake_score, seed, as_image)
        if config.motion_weight and config.num_chunks * stream.chunk_frames < 2:
            raise ValueError(
                "clips of one latent frame have no motion; raise num_chunks, or set motion_weight=0"
            )
        learned = config.motion_weight > 0 and config.motion == "learned"
        self.motion = MotionFeature(self.latent_shape[0], seed=seed) if learned else None

    def networks(self) -> dict[str, nn.Module]:
        learned = {} if self.motion is None else {"motion": self.motion}
        return {**super().networks(), **learned}

    def turns(self, step: int) -> tuple[str, ...]:
        """The motion feature, where there is one, follows the fake score."""
        first, *rest = super().turns(step)
        return (first, *([] if self.motion is None else ["motion"]), *rest)

    def loss(self, turn: str, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, float]]:
        """Batches hold ``cond [B, L, D]`` and ``keys``."""
        if turn == "motion" and self.motion is not None:
            return self._motion_loss(batch, self.decide(turn, step, batch.get("micro", 0)))
        return super().loss(turn, batch, step)

    def student_terms(
        self, judged: Judged, batch: dict[str, Any], decision: Decision
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, numbers = super().student_terms(judged, batch, decision)
        if self.config.motion_weight == 0:
            return loss, numbers
        moving = self._features(judged.x)
        with torch.no_grad():
            fake, real = self._features(judged.x0_fake), self._features(judged.x0_real)
            g = dmd_gradient(moving, fake, real, self.config.normalizer)
            weight = frame_weights(self.config.frame_weights, fake - real)
        counts = self.counted_frames(judged.x, decision)
        flow = surrogate(
            moving,
            g,
            weight=weight,
            mask=None if counts is None else counts[:, 1:] * counts[:, :-1],
        )
        numbers["flow"], numbers["motion_rms"] = (
            flow.detach(),
            moving.detach().square().mean().sqrt(),
        )
        return loss + self.config.motion_weight * flow, numbers

    def _motion_loss(
        self, batch: dict[str, Any], decision: Decision
    ) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            x = self._roll_out(batch, self.stream_of(decision), decision)
            x_t, _, _ = self._noised(x, batch["keys"], decision)
            seen, truth = temporal_difference(x_t), temporal_difference(x)
        loss = (self.motion.predict(seen) - truth).square().mean()
        return loss, as_floats({"loss": loss})

    def _features(self, x: Tensor) -> Tensor:
        moving = temporal_difference(x)
        return moving if self.motion is None else self.motion(moving)


class MotionFeature(nn.Module):
    """F: a residual network on temporal differences ``[B, C, T - 1, h, w]``, frame by frame.

    Args:
        channels: C.
        hidden: its width, a multiple of 8.
        seed: of its first weights; it begins as the identity.
    """

    def __init__(self, channels: int, hidden: int = 64, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(channels, hidden, 3, padding=1),
                nn.GroupNorm(8, hidden),
                nn.SiLU(),
                nn.Conv2d(hidden, hidden, 3, padding=1),
                nn.GroupNorm(8, hidden),
                nn.SiLU(),
                nn.Conv2d(hidden, channels, 1),
            )
            self.head = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, moving: Tensor) -> Tensor:
        """The features, of the shape of ``moving``."""
        frames = moving.transpose(1, 2)
        return (
            frames + self.layers(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        ).transpose(1, 2)

    def predict(self, moving: Tensor) -> Tensor:
        """The linear map of the features that is fitted to the clean differences."""
        frames = self(moving).transpose(1, 2)
        return self.head(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


def frame_weights(kind: str, gap: Tensor) -> Tensor:
    """h ``[B, T - 1]``, with mean about 1, from ``gap [B, C, T - 1, h, w]``, the difference that
    drives the term.

    "growing": .7 of the accumulated share of the mean absolute gap, plus .3 of a factor 1.2 a frame
    (the form of the released code, each part divided by its mean).
    """
    size = gap.abs().mean(dim=(1, 3, 4))
    if kind == "even":
        return torch.ones_like(size)
    accumulated = 1 + size.cumsum(1) / size.sum(1, keepdim=True).clamp_min(1e-12)
    powers = 1.2 ** torch.arange(size.shape[1], device=size.device, dtype=size.dtype)
    return 0.7 * accumulated / accumulated.mean(1, keepdim=True) + 0.3 * powers / powers.mean()


Method = Diagonal
