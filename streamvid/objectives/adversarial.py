"""Objectives in which a discriminator says what is wrong: on noised features, on clean samples, on
pairs of Euler steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from streamvid.core.adversary import (
    AdversaryKind,
    discriminator_loss,
    euler_pair,
    generator_loss,
)
from streamvid.core.flowmap import distance
from streamvid.core.guidance import GuidanceSpec
from streamvid.core.inject import surrogate
from streamvid.core.process import add_noise, x0_from_v
from streamvid.core.times import TimeLaw
from streamvid.objectives.base import Distillation, Loss, ScoreMatching, Step, require
from streamvid.objectives.score import gan_term, penalty


def tell_apart(
    step: Step, kind: AdversaryKind, fake: Tensor, t: Tensor, real: Tensor, t_real: Tensor
) -> Tensor:
    """The discriminator's loss on two sets of samples, each at its own time with its own noise."""
    fake_logits = step.logits(step.noised(fake, t), t)
    real_logits = step.logits(step.noised(real, t_real), t_real)
    return discriminator_loss(kind, fake_logits, real_logits)


@dataclass
class LADD(Distillation):
    """LADD: a hinge game on the frozen teacher's features of re-noised samples; the reals are the
    teacher's own.
    """

    name = "ladd"
    paper = "2403.12015"
    needs = frozenset({"features", "pairs", "clips"})
    heads = "film"
    rate = 0.3

    def student(self, step: Step) -> Loss:
        t = step.times(high=0.5)
        return gan_term(step, step.sample().x, "hinge", t)

    def discriminator(self, step: Step) -> Loss:
        """Student samples against the teacher's, with R1 on data and R2."""
        with torch.no_grad():
            fake = step.sample().x
        _, real = step.pairs()
        t = step.times(high=0.5)
        t_real = step.times(high=0.5)
        game = tell_apart(step, "hinge", fake, t, real, t_real)
        r1 = penalty(step, step.data(), 0.01, 0.1)
        with torch.no_grad():
            x = step.sample().x
        return game + r1 + penalty(step, x, 0.01, 0.1)


@dataclass
class NitroFusion(LADD):
    """NitroFusion, in part: LADD's game with one head per layer, all of them used, of which a
    hundredth per step is made anew.

    The paper has a pool of heads for each layer, of which a step uses some, and a refreshed one
    begins with no optimiser state (``core.adversary.HeadPool``). Here there is no choice among
    heads, and the optimiser keeps its state. A pool of 48 with both measured no better: 5.24 times
    the floor on the ring, against 4.82.
    """

    name = "nitrofusion"
    paper = "2412.02030"

    refresh: float = 0.01
    """Share of the heads that is made anew after each update of the student, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, refresh=(0, 1))

    @property
    def note(self) -> str:
        return (
            "a head per layer is the whole pool: one made anew is a third of the discriminator;"
            " LADD is this without"
        )

    def after_student(self, step: Step) -> None:
        step.refresh_heads(self.refresh)


@dataclass
class GDD(Distillation):
    """GDD: data only. A logistic game on features of clean samples with R1; no teacher's score, no
    regression.
    """

    name = "gdd"
    paper = "2405.20750"
    needs = frozenset({"features", "clips"})

    @property
    def guidance(self) -> GuidanceSpec:
        return GuidanceSpec()

    @property
    def note(self) -> str:
        return "data only: ignores guidance" if self.guidance_scale != 1 else ""

    def student(self, step: Step) -> Loss:
        t = step.times(low=0.0, high=0.05)
        return gan_term(step, step.sample().x, t=t)

    def discriminator(self, step: Step) -> Loss:
        """Student samples against data, nearly clean, with R1."""
        with torch.no_grad():
            fake = step.sample().x
        real = step.data()
        t = step.times(low=0.0, high=0.05)
        t_real = step.times(low=0.0, high=0.05)
        game = tell_apart(step, "ns", fake, t, real, t_real)
        return game + penalty(step, step.data(), 0.01, 0.05)


@dataclass
class ADM(ScoreMatching):
    """ADM: which of two Euler steps of dt is the teacher's and which the fake score's; the gradient
    passes through the latter.

    The paper's dt is 1/64, with a discriminator as large as the teacher; small heads need the
    longer step to see a difference.
    """

    name = "adm"
    paper = "2507.18569"
    needs = frozenset({"score", "features"})
    heads = "film"
    covers = True

    dt: float = 1 / 8
    """Length of the two Euler steps, in time; 0.001 to 0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, dt=(0.001, 0.5))

    def step_both(
        self, step: Step, x: Tensor, law: TimeLaw | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where the teacher and the fake score take noised samples, and the time there."""
        t = step.times(law, low=self.dt + 0.02)
        x_t = add_noise(x, step.noise(), t)
        real, fake = euler_pair(x_t, t, self.dt, step.real(x_t, t), step.fake(x_t, t))
        return real, fake, t - self.dt

    def student(self, step: Step) -> Loss:
        _, fake, t = self.step_both(step, step.sample().x, "cubic")
        return generator_loss("hinge", step.logits(fake, t))

    def discriminator(self, step: Step) -> Loss:
        """The fake score's steps against the teacher's."""
        with torch.no_grad():
            real, fake, t = self.step_both(step, step.sample().x)
        return discriminator_loss("hinge", step.logits(fake, t), step.logits(real, t))


@dataclass
class DMDX(ADM):
    """DMDX: adversarial pre-training on the teacher's pairs of noise and sample (ADP), then ADM."""

    name = "dmdx"
    needs = frozenset({"score", "features", "pairs"})

    share: float = 0.4
    """Of the run that is pre-training, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, share=(0, 1))

    @property
    def note(self) -> str:
        return "ADM's part has 60 % of the updates"

    def land(self, step: Step) -> tuple[Tensor, Tensor]:
        """Jumps from the straight lines between stored noises and samples, and these samples."""
        noise, real = step.pairs()
        t = step.times(low=0.5, high=1.0)
        return step.jump(add_noise(real, noise, t), t), real

    def student(self, step: Step) -> Loss:
        if step.progress >= self.share:
            return super().student(step)
        fake, _ = self.land(step)
        return gan_term(step, fake, "hinge")

    def discriminator(self, step: Step) -> Loss:
        """Jumps against the teacher's samples; then as ADM's."""
        if step.progress >= self.share:
            return super().discriminator(step)
        with torch.no_grad():
            fake, real = self.land(step)
        t = step.times()
        t_real = step.times()
        return tell_apart(step, "hinge", fake, t, real, t_real)


@dataclass
class TADSR(Distillation):
    """TAD-SR's high-frequency score distillation beside a time-aware game: what the teacher changes
    in the student's sample less what it changes in its own, at low noise, where its bias cancels.
    """

    name = "tad_sr"
    paper = "2408.07476"
    needs = frozenset({"score", "features", "pairs"})
    heads = "film"

    gan: float = 0.3
    """Weight of the game, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, gan=(0, math.inf))

    def student(self, step: Step) -> Loss:
        noise, real = step.pairs()
        x = step.jump(noise, step.full(1.0))
        eps = step.noise()
        t = step.times(high=0.3)
        with torch.no_grad():
            direction = teacher_change(step, x, eps, t) - teacher_change(step, real, eps, t)
        high_frequency = surrogate(x, direction)
        regression = 0.5 * distance(x, real).mean()

        t = step.times()
        game = gan_term(step, step.sample().x, t=t)
        return high_frequency + regression + self.gan * game

    def discriminator(self, step: Step) -> Loss:
        """Student samples against the teacher's."""
        with torch.no_grad():
            fake = step.sample().x
        _, real = step.pairs()
        t = step.times()
        t_real = step.times()
        return tell_apart(step, "ns", fake, t, real, t_real)


def teacher_change(step: Step, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the teacher takes from samples noised with ``eps`` to ``t``: ``x - x0_real``."""
    x_t = add_noise(x, eps, t)
    return x - x0_from_v(x_t, step.real(x_t, t), t)
