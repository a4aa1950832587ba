"""Distribution matching distillation: samples move along the difference of two scores.

DMD, arXiv 2311.18828, and DMD2, arXiv 2405.14867; on self-forced rollouts Self-Forcing, arXiv
2506.08009. With a sample x of the student, noised to x_t = (1 - t) x + t eps,

    student:     x <- x - g,   g = (x0_fake(x_t) - x0_real(x_t)) / mean |x - x0_real|
    fake_score:  minimise mean |v_fake(x_t, t) - (eps - x)|^2 over samples of its own, detached

at one t per sample. x0_real is the guided teacher, x0_fake has no guidance. Every step updates the
fake score; every ``fake_updates_per_student``-th step then updates the student too, which so meets
a score that has just followed it. With 5, a run of 1000 steps has 1000 updates of the fake score
and 200 of the student, as Self-Forcing counts.

Departures from the released code: no regression on pairs; the time law is truncated to [low, high],
not clamped; times are continuous; clean context is exactly clean in training too; guidance is ``u +
s (c - u)``, so that its 3.0 is our 4.0; a NaN is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from streamvid.core.inject import Normalizer, dmd_gradient, surrogate
from streamvid.objectives.base import ScoreMatching, Step


@dataclass
class DMD(ScoreMatching):
    """Distribution matching alone."""

    name: ClassVar[str] = "dmd"
    paper: ClassVar[str] = "2311.18828"

    normalizer: Literal["sample", "none"] = "sample"
    """"sample" divides a sample's gradient by its mean |x - x0_real|, "none" leaves it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalizer not in ("sample", "none"):
            raise ValueError(f"normalizer={self.normalizer!r}, expected 'sample' or 'none'")

    def student(self, step: Step) -> Tensor:
        return matching_terms(step, step.sample().x, self.normalizer).loss


@dataclass(frozen=True)
class MatchingTerms:
    """DMD's loss on samples ``[B, ...]``, and what the scores said of them; all but it detached."""

    loss: Tensor
    fake: Tensor  # data predictions at one noising of the samples
    real: Tensor


@torch.no_grad()
def compare(
    step: Step, x: Tensor, t: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noise samples, and ask fake score and teacher what they were.

    Returns:
        ``x_t``, ``t`` and the data predictions of fake score and teacher.
    """
    if t is None:
        t = step.times()
    x_t = step.noised(x, t)
    fake, real = step.predictions(x_t, t)
    return x_t, t, fake, real


def matching_terms(
    step: Step,
    x: Tensor,
    normalizer: Normalizer = "sample",
    weight: Tensor | float = 1.0,
    t: Tensor | None = None,
) -> MatchingTerms:
    """DMD at a fresh noising of ``x``.

    Args:
        normalizer: of the gradient, see ``core.inject.dmd_gradient``.
        weight: of a sample, ``[B]``.
        t: times ``[B]``; None draws them.
    """
    _, _, fake, real = compare(step, x, t)
    group = step.group if normalizer == "group" else None
    with torch.no_grad():
        g = dmd_gradient(x, fake, real, normalizer, group)
        step.record(
            gradient_rms=g.square().mean().sqrt(),
            fake_real_gap=(fake - real).abs().mean(),
            student_real_gap=(x - real).abs().mean(),  # the normaliser
        )
    loss = surrogate(x, g, weight=weight, mask=step.counted_frames(x))
    return MatchingTerms(loss, fake, real)
