"""Diagonal distillation: many steps early in a stream, few later, and motion matched as well as
frames.

DiagDistill, arXiv 2603.09488, on top of distribution matching. Three parts:

    diagonal denoising  a table of steps, 4-3-2-2-..: ``stream.step_table``; a chunk leans on what
                        is before it
    diagonal forcing    the context keeps the noise of the last step, so that a chunk is not told
                        that its past is exact: ``stream.commit: reuse`` keeps the keys of that
                        step, which saves the pass that writes context; ``stream.context_t: c``
                        writes the chunk noised to c; ``clean`` is neither
    flow matching       L_DMD + gamma 1/2 mean h (d(x) - sg(d(x) - g_m))^2,
                        g_m = (d(x0_fake) - d(x0_real)) / mean |d(x) - d(x0_real)|,
                        d(x)_f = F(x_{f+1} - x_f)

The first two are how a student is streamed, and a chunk takes all its steps before it becomes
context, so training does what streaming will. ``d(x)`` carries gradient: in the released code it
does not, and the term is a constant. With ``motion_feature: difference`` F is the identity; then
the term does not see what is the same in all frames, and leaves DMD's fixed point where it is. With
``learned`` F is a small residual network on the differences, trained to tell the motion of a noised
clip (network "motion"):

    motion:  minimise mean |P(F(x_t,{f+1} - x_t,f)) - (x_{f+1} - x_f)|^2 over rollouts, P linear

Departures: the exit of a turn is at the same fraction of each chunk's list, where one shared index
means nothing; frame weights h are the paper's code's, off by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from streamvid.core.inject import dmd_gradient, surrogate, temporal_difference
from streamvid.objectives.base import Step
from streamvid.objectives.dmd import DMD, matching_terms


@dataclass
class Diagonal(DMD):
    """DMD, and DMD on what moves; the step table and the context's noise are the stream's."""

    name: ClassVar[str] = "diagonal"
    paper: ClassVar[str] = "2603.09488"
    on_points: ClassVar[bool] = False

    motion_weight: float = 0.2
    """gamma, of the flow term; 0 leaves it out."""
    motion_feature: Literal["difference", "learned"] = "difference"
    """Of what distributions are matched: temporal differences, or learned features of them."""
    frame_weights: Literal["even", "growing"] = "even"
    """h: all frames alike, or more on later frames, where errors have added up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.motion_weight < 0:
            raise ValueError(f"motion_weight={self.motion_weight}, expected at least 0")
        choices_of = {
            "motion_feature": ("difference", "learned"),
            "frame_weights": ("even", "growing"),
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected one of {choices}")

    @property
    def learns_motion(self) -> bool:
        """Whether there is a motion feature to train."""
        return self.motion_weight > 0 and self.motion_feature == "learned"

    def new_networks(
        self,
        networks: Mapping[str, nn.Module],
        latent_shape: tuple[int, int, int],
        stream: Any,
        seed: int,
    ) -> dict[str, nn.Module]:
        return {"motion": MotionFeature(latent_shape[0], seed=seed)} if self.learns_motion else {}

    def check_stream(self, stream: Any, num_chunks: int) -> None:
        if self.motion_weight and num_chunks * stream.chunk_frames < 2:
            raise ValueError(
                "clips of one latent frame have no motion; raise rollout.num_chunks, or set"
                " motion_weight=0"
            )

    def turns(self, step: int) -> tuple[str, ...]:
        """The motion feature, where there is one, follows the fake score in every step."""
        rest = [name for name in super().turns(step) if name not in ("fake_score", "motion")]
        return ("fake_score", *(["motion"] if self.learns_motion else []), *rest)

    def student(self, step: Step) -> Tensor:
        x = step.sample().x
        terms = matching_terms(step, x, self.normalizer)
        if self.motion_weight == 0:
            return terms.loss
        moving = self._motion_of(step, x)
        with torch.no_grad():
            fake, real = self._motion_of(step, terms.fake), self._motion_of(step, terms.real)
            g = dmd_gradient(moving, fake, real, self.normalizer)
            weight = frame_weights(self.frame_weights, fake - real)
        counts = step.counted_frames(x)
        mask = None if counts is None else counts[:, 1:] * counts[:, :-1]
        flow = surrogate(moving, g, weight=weight, mask=mask)
        step.record(flow=flow, motion_rms=moving.square().mean().sqrt())
        return terms.loss + self.motion_weight * flow

    def motion(self, step: Step) -> Tensor:
        """The motion feature tells the clean differences of a noised clip."""
        with torch.no_grad():
            x = step.sample().x
            seen = temporal_difference(step.noised(x, step.times()))
            truth = temporal_difference(x)
        return (step.network("motion").predict(seen) - truth).square().mean()

    def _motion_of(self, step: Step, x: Tensor) -> Tensor:
        moving = temporal_difference(x)
        return step.network("motion")(moving) if self.learns_motion else moving


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
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, moving: Tensor) -> Tensor:
        """The features, of the shape of ``moving``."""
        frames = moving.transpose(1, 2)
        change = self.layers(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return (frames + change).transpose(1, 2)

    def predict(self, moving: Tensor) -> Tensor:
        """The linear map of the features that is fitted to the clean differences."""
        frames = self(moving).transpose(1, 2)
        return self.head(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


def frame_weights(kind: str, gap: Tensor) -> Tensor:
    """h ``[B, T - 1]``, with mean about 1, from ``gap [B, C, T - 1, h, w]``, the difference that
    drives the term.

    "growing": .7 of the accumulated share of the mean absolute gap, plus .3 of a factor 1.2 per
    frame (the form of the released code, each part divided by its mean).
    """
    size = gap.abs().mean(dim=(1, 3, 4))
    if kind == "even":
        return torch.ones_like(size)
    accumulated = 1 + size.cumsum(1) / size.sum(1, keepdim=True).clamp_min(1e-12)
    powers = 1.2 ** torch.arange(size.shape[1], device=size.device, dtype=size.dtype)
    return 0.7 * accumulated / accumulated.mean(1, keepdim=True) + 0.3 * powers / powers.mean()
