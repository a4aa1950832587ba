"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), in one convention for the whole
repository.

Distillation by score differences asks three times how much guidance there is: in the teacher's
prediction, in the fake score's where the two are compared, and in the fake score's while it is
fitted. ``GuidanceSpec`` answers all three. For two Gaussians of equal width the student's mean then
settles at

    real * fake_train / fake        times the prompt's own offset from the unconditional mean,

so guiding both sides equally cancels, and taking the text from the fake score alone is guidance in
disguise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from streamvid.core.process import as_work, expand_time


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """``uncond + scale (cond - uncond)``: 1 is the conditional prediction, above 1 is away from the
    other.

    It applies to velocities, data predictions and scores alike, which are affine in one another.
    ``scale`` is a number or ``[B]``. Others write ``cond + w (cond - uncond)``: their w is our
    scale less 1 (Self-Forcing, CausVid, DiagDistill, LCM, TDD).
    """
    cond, uncond = as_work(cond), as_work(uncond)
    return uncond + expand_time(scale, cond) * (cond - uncond)


@dataclass(frozen=True)
class GuidanceSpec:
    """How much guidance each score has in a distillation by score differences.

    Raises:
        ValueError: if the bounds of a range are not in order, or ``shared`` has no range.
    """

    real: float | tuple[float, float] = 1.0
    """Scale of the teacher; a pair is the range of a uniform law, drawn anew for each sample."""
    fake: float = 1.0
    """Scale of the fake score where it is compared with the teacher; 0 is its unconditional
    prediction."""
    fake_train: float = 1.0
    """Scale of the combination of the fake score that is fitted to the student's samples."""
    shared: bool = False
    """Use the drawn scale of the teacher for the fake score too."""

    def __post_init__(self) -> None:
        if isinstance(self.real, tuple) and not self.real[0] <= self.real[1]:
            raise ValueError(f"real={self.real}, expected (lowest, highest)")
        if self.shared and not isinstance(self.real, tuple):
            raise ValueError(
                f"shared=True is for a drawn scale; real={self.real} is a number, give fake the"
                " same"
            )

    def draw(
        self, batch_size: int, uniform: Callable[[], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The scales of the teacher and of the compared fake score, ``[B]`` each.

        Args:
            uniform: draws ``[B]`` in [0, 1) where the scale is a range; a fixed one draws nothing.
        """
        fake = torch.full((batch_size,), float(self.fake))
        if not isinstance(self.real, tuple):
            return torch.full((batch_size,), float(self.real)), fake
        low, high = self.real
        u = torch.rand(batch_size) if uniform is None else uniform()
        real = low + (high - low) * u
        return real, real.clone() if self.shared else fake


def dmd(scale: float) -> GuidanceSpec:
    """DMD and DMD2 (arXiv 2405.14867): a guided teacher, a plain fake score."""
    return GuidanceSpec(real=scale)


def vsd(scale: float) -> GuidanceSpec:
    """SwiftBrush (arXiv 2312.05239): one scale for both; it cancels where the prompts' Gaussians
    are of one width.
    """
    return GuidanceSpec(real=scale, fake=scale)


def long_short(scale: float) -> GuidanceSpec:
    """SiD-LSG (arXiv 2406.01561), long and short: one scale for both, and the fake score is fitted
    with it too.
    """
    return GuidanceSpec(real=scale, fake=scale, fake_train=scale)


def random_scale(low: float = 0.5, high: float = 4.0) -> GuidanceSpec:
    """SNOOPI's PG-SB (arXiv 2412.02687): a scale a sample, for both; (0.5, 4) for Stable Diffusion,
    (0.5, 3) for PixArt.
    """
    return GuidanceSpec(real=(low, high), shared=True)


def zero_guidance() -> GuidanceSpec:
    """Zero-CFG of few-step SiD (arXiv 2505.12674): a plain teacher, a fake score without the
    prompt.
    """
    return GuidanceSpec(fake=0.0)
