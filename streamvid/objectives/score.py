"""Objectives that move the student along a difference of scores: the DMD and the SiD families, and
what is near them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from streamvid.core import guidance as specs
from streamvid.core.adversary import (
    AdversaryKind,
    approximate_penalty,
    discriminator_loss,
    generator_loss,
)
from streamvid.core.fitting import loss_weight
from streamvid.core.flowmap import distance
from streamvid.core.guidance import GuidanceSpec
from streamvid.core.inject import (
    Divergence,
    Normalizer,
    dmd_gradient,
    f_weight,
    residual_gradient,
    sid_loss,
    surrogate,
)
from streamvid.core.process import add_noise, euler_step, expand_time, velocity, x0_from_v
from streamvid.objectives.base import (
    Distillation,
    Loss,
    ScoreMatching,
    Step,
    fit_fake_score,
    require,
)
from streamvid.objectives.dmd import compare, matching_terms

# ---- pieces --------------------------------------------------------------------------------------


def dmd_term(
    step: Step,
    x: Tensor,
    weight: Tensor | float = 1.0,
    normalizer: Normalizer = "sample",
    t: Tensor | None = None,
) -> Tensor:
    """DMD's surrogate at a fresh noising of ``x``."""
    return matching_terms(step, x, normalizer, weight, t).loss


def residual_term(step: Step, x: Tensor, weigh: bool = False) -> Tensor:
    """Score distillation's surrogate; with ``weigh``, 1 - t times it."""
    with torch.no_grad():
        t = step.times()
        x_t = step.noised(x, t)
        residual = residual_gradient(x, x0_from_v(x_t, step.real(x_t, t), t))
    return surrogate(x, residual, weight=1 - t if weigh else 1.0)


def sid_term(step: Step, x: Tensor, alpha: float) -> Tensor:
    """SiD's loss, gradients through both scores' inputs included."""
    t = step.times(high=0.96)
    x_t = add_noise(x, step.noise(), t)
    fake, real = step.predictions(x_t, t)
    return sid_loss(x, fake, real, alpha)


def gan_term(step: Step, x: Tensor, kind: AdversaryKind = "ns", t: Tensor | None = None) -> Tensor:
    """The student's side of a game on noised samples."""
    if t is None:
        t = step.times()
    x_t = add_noise(x, step.noise(), t)
    return generator_loss(kind, step.logits(x_t, t))


def play(
    step: Step,
    kind: AdversaryKind = "ns",
    shared: bool = False,
    high: float | None = None,
    exit_index: int | None = None,
) -> Tensor:
    """The discriminator's side: student samples against data.

    Args:
        shared: give both the same noise and time.
        high: the greatest time; None is the objective's own.
        exit_index: the step that the samples end with, see ``Step.sample``.
    """
    with torch.no_grad():
        fake = step.sample(exit_index).x
    real = step.data()
    t = step.times(high=high)
    eps = step.noise()
    t_real = t if shared else step.times(high=high)
    eps_real = eps if shared else step.noise()
    fake_logits = step.logits(add_noise(fake, eps, t), t)
    real_logits = step.logits(add_noise(real, eps_real, t_real), t_real)
    return discriminator_loss(kind, fake_logits, real_logits)


def penalty(step: Step, x: Tensor, weight: float, sigma: float) -> Tensor:
    """An approximate gradient penalty of the discriminator on clean points: R1 on data, R2 on
    samples.
    """
    t = step.full(0.02)
    change = approximate_penalty(lambda x: step.logits(x, t), x.detach(), step.noise(), sigma)
    return weight / sigma**2 * change


# ---- distribution matching -----------------------------------------------------------------------


@dataclass
class SDS(Distillation):
    """Score distillation sampling: the residual alone. It collapses to modes, whatever its
    weight.
    """

    name = "sds"
    paper = "2209.14988"
    needs = frozenset({"score"})
    role = "baseline"

    @property
    def note(self) -> str:
        return "no fake score: spread collapses"

    def student(self, step: Step) -> Loss:
        return residual_term(step, step.sample().x)


@dataclass
class DMD2(ScoreMatching):
    """DMD2: DMD and a non-saturating game on noised samples against data, two steps by backward
    simulation.
    """

    name = "dmd2"
    paper = "2405.14867"
    needs = frozenset({"score", "features", "clips"})
    num_steps = 2
    covers = True

    gan: float = 0.03
    """Weight of the game, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, gan=(0, math.inf))

    def student(self, step: Step) -> Loss:
        x = step.sample().x
        return dmd_term(step, x) + self.gan * gan_term(step, x)

    def discriminator(self, step: Step) -> Loss:
        """Student samples against data."""
        return play(step)


@dataclass
class FDistill(ScoreMatching):
    """f-distill: DMD2's direction times h(r), r from the discriminator's logit."""

    name = "f_distill"
    paper = "2502.15681"
    needs = frozenset({"score", "features", "clips"})

    gan: float = 0.03
    """Weight of the game, at least 0."""
    divergence: Divergence = "js"
    """Between teacher and student, see ``core.inject.f_weight``; "rkl" is DMD2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, gan=(0, math.inf))
        f_weight(torch.zeros(1), self.divergence)  # refuses an unknown one

    def student(self, step: Step) -> Loss:
        x = step.sample().x
        x_t, t, fake, real = compare(step, x)
        with torch.no_grad():
            h = f_weight(step.logits(x_t, t).mean(1), self.divergence)
        matching = surrogate(x, dmd_gradient(x, fake, real), weight=h / h.mean())
        return matching + self.gan * gan_term(step, x)

    def discriminator(self, step: Step) -> Loss:
        """Student samples against data."""
        return play(step)


@dataclass
class SwiftBrush(ScoreMatching):
    """SwiftBrush: no normaliser, the weight of variance-preserving noise, one guidance for both
    scores.
    """

    name = "swiftbrush"
    paper = "2312.05239"

    @property
    def guidance(self) -> GuidanceSpec:
        return specs.vsd(self.guidance_scale)

    @property
    def note(self) -> str:
        return "guides both scores: settles at the plain prompt"

    def student(self, step: Step) -> Loss:
        t = step.times()
        x = step.sample().x
        weight = t * (1 - t) / (t**2 + (1 - t) ** 2)
        return dmd_term(step, x, weight, "none", t)

    def fake_score(self, step: Step) -> Loss:
        """Flow matching with SwiftBrush's weight."""
        return fit_fake_score(step, weight=lambda t: loss_weight("swiftbrush", t))


@dataclass
class SNOOPI(SwiftBrush):
    """SNOOPI's PG-SB: a random scale per sample, the same for both scores. (Its NASA is a hook in
    attention.)
    """

    name = "snoopi"
    paper = "2412.02687"

    @property
    def guidance(self) -> GuidanceSpec:
        return specs.random_scale(0.5, max(self.guidance_scale, 0.5) * 2)


@dataclass
class UniDAD(ScoreMatching):
    """Uni-DAD: two teachers, one fake score, one game. Here the target's teacher is the unguided
    one.
    """

    name = "uni_dad"
    paper = "2511.18281"
    needs = frozenset({"score", "features", "clips"})
    num_steps = 2

    source: float = 0.5
    """Weight of the guided teacher, at least 0."""
    target: float = 0.5
    """Weight of the unguided teacher, at least 0."""
    gan: float = 0.03
    """Weight of the game, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, source=(0, math.inf), target=(0, math.inf), gan=(0, math.inf))

    @property
    def note(self) -> str:
        return "between the two teachers' laws" if self.guidance_scale != 1 else ""

    def student(self, step: Step) -> Loss:
        x = step.sample().x
        x_t, t, fake, real = compare(step, x)
        with torch.no_grad():
            plain = x0_from_v(x_t, step.real(x_t, t, 1.0), t)
            to_source = dmd_gradient(x, fake, real)
            to_target = dmd_gradient(x, fake, plain)
        matching = surrogate(x, self.source * to_source + self.target * to_target)
        return matching + self.gan * gan_term(step, x)

    def discriminator(self, step: Step) -> Loss:
        """Student samples against data."""
        return play(step)


@dataclass
class FlashDMD(ScoreMatching):
    """Flash-DMD: the high-noise steps learn from DMD, the last one from the game; the fake score is
    pulled along (IDA).
    """

    name = "flash_dmd"
    paper = "2511.20549"
    needs = frozenset({"score", "features", "clips"})
    num_steps = 2

    gan: float = 0.3
    """Weight of the game, at least 0."""
    keep: float = 0.97
    """What the fake score keeps of itself after each update of the student, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, gan=(0, math.inf), keep=(0, 1))

    def student(self, step: Step) -> Loss:
        sample = step.sample()
        if sample.index < step.num_steps - 1:
            return dmd_term(step, sample.x)
        matching = dmd_term(step, step.sample(0).x)
        return matching + self.gan * gan_term(step, sample.x, t=step.times(high=0.5))

    def discriminator(self, step: Step) -> Loss:
        """What the last step makes, against data, at low noise."""
        return play(step, high=0.5, exit_index=step.num_steps - 1)

    def after_student(self, step: Step) -> None:
        step.pull_fake_score(self.keep)


@dataclass
class GNDM(ScoreMatching):
    """GNDM: the normaliser is the mean over the samples of a prompt, so that their proportions in t
    stay.
    """

    name = "gndm"
    paper = "2603.28460"
    needs = frozenset({"score", "group"})

    @property
    def note(self) -> str:
        return "the group form is our reading of an abstract"

    def student(self, step: Step) -> Loss:
        return dmd_term(step, step.sample().x, normalizer="group")


@dataclass
class EMD(ScoreMatching):
    """EM distillation: Langevin steps on (eps, z) towards the teacher's posterior, then regression
    to where they led.

    The noises that were injected are cancelled from the residual, as in the paper, and its scale is
    such that one step with z held would be DMD's direction, times (1 - t)^2.
    """

    name = "emd"
    paper = "2405.16852"
    covers = True

    num_langevin: int = 4
    """Langevin steps, at least 1; the paper takes up to 16."""
    gamma: float = 0.1
    """Size of a Langevin step, 0.001 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, num_langevin=(1, math.inf), gamma=(0.001, 1))

    def student(self, step: Step) -> Loss:
        t = step.times(low=0.05, high=0.95)
        one = torch.ones_like(t)
        z = step.noise()
        eps = step.noise()
        a = 1 - expand_time(t, z)
        b = expand_time(t, z)
        gamma = self.gamma
        gamma_z = gamma * b**2  # the pull on z grows as 1 / t^2
        led = torch.zeros_like(eps)

        for _ in range(self.num_langevin):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                x = step.jump(z, one)
            with torch.no_grad():
                x_t = a * x + b * eps
                fake, real = step.predictions(x_t, t)
                d = a / b**2 * (real - fake)  # the teacher's score less the fake one
            (pull,) = torch.autograd.grad(x, z, a * d)
            with torch.no_grad():
                led = (1 - gamma) * led + gamma * b * d
                eps = (1 - gamma) * eps + gamma * b * d + math.sqrt(2 * gamma) * step.noise()
                z = (1 - gamma_z) * z + gamma_z * pull + (2 * gamma_z) ** 0.5 * step.noise()

        direction = -b / a * led / (gamma * self.num_langevin)
        return surrogate(step.jump(z, one), direction, weight=(1 - t) ** 2, form="dot")


@dataclass
class ADD(Distillation):
    """ADD: a hinge game and the teacher's residual, which would collapse without the game."""

    name = "add"
    paper = "2311.17042"
    needs = frozenset({"score", "features", "clips"})
    rate = 0.3

    residual: float = 0.02
    """Weight of the residual, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, residual=(0, math.inf))

    @property
    def note(self) -> str:
        return "the residual narrows the modes"

    def student(self, step: Step) -> Loss:
        x = step.sample().x
        residual = residual_term(step, x, weigh=True)
        game = gan_term(step, x, "hinge", step.times(high=0.5))
        return game + self.residual * residual

    def discriminator(self, step: Step) -> Loss:
        """Student samples against data, with R1 and R2."""
        game = play(step, "hinge", high=0.5)
        r1 = penalty(step, step.data(), 0.01, 0.1)
        with torch.no_grad():
            x = step.sample().x
        return game + r1 + penalty(step, x, 0.01, 0.1)


@dataclass
class MSD(DMD2):
    """MSD: DMD2 for each part of the prompts' space, after a warm-up on the teacher's velocity
    (TSM). Here one part.
    """

    name = "msd"
    paper = "2410.23274"
    needs = frozenset({"score", "features", "clips", "jumps"})
    num_steps = 1
    covers = False

    warm_up: float = 0.2
    """Share of the run that the student spends on the teacher's velocity, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, warm_up=(0, 1))

    def student(self, step: Step) -> Loss:
        if step.progress >= self.warm_up:
            return super().student(step)
        x = step.data()
        t = step.times()
        x_t = add_noise(x, step.noise(), t)
        v = step.real(x_t, t).detach()  # sg
        return distance(step.flow_map()(x_t, t, t), v).mean()


@dataclass
class TDM(ScoreMatching):
    """TDM: DMD on the noise levels between this step of the student and the next, in the sign-like
    Huber form.
    """

    name = "tdm"
    paper = "2503.06674"
    num_steps = 4

    @property
    def note(self) -> str:
        return "each of four steps gets a quarter of the updates"

    def student(self, step: Step) -> Loss:
        sample = step.sample()
        low = max(step.step_time(sample.index + 1), self.low)
        high = sample.t.clamp(max=self.high)
        t = low + (high - low) * step.uniform()
        _, _, fake, real = compare(step, sample.x, t)
        direction = dmd_gradient(sample.x, fake, real)
        return surrogate(sample.x, direction, form="huber", huber_width=0.5)


# ---- score identity ------------------------------------------------------------------------------


@dataclass
class SiD(ScoreMatching):
    """SiD: one step, gradients through teacher and fake score, updates one to one."""

    name = "sid"
    paper = "2404.04057"

    alpha: float = 1.2
    """1/2 is the Fisher divergence's gradient, 1 to 1.2 trains well; 0 to 2."""
    fake_updates_per_student: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, alpha=(0, 2))

    @property
    def note(self) -> str:
        return "alpha above 1 keeps it moving: 1.8 and 2.5 at half the updates"

    def student(self, step: Step) -> Loss:
        return sid_term(step, step.sample().x, self.alpha)


@dataclass
class SiDLSG(ScoreMatching):
    """SiD-LSG: alpha 1 and one guidance for the teacher, for the fake score and for its fit."""

    name = "sid_lsg"
    paper = "2406.01561"

    fake_updates_per_student: int = 1

    @property
    def guidance(self) -> GuidanceSpec:
        return specs.long_short(self.guidance_scale)

    def student(self, step: Step) -> Loss:
        return sid_term(step, step.sample().x, alpha=1.0)


@dataclass
class FewStepSiD(ScoreMatching):
    """Few-step SiD: every step of the student by its own, one fake score for their mixture;
    Zero-CFG where guided.
    """

    name = "few_step_sid"
    paper = "2505.12674"
    num_steps = 4

    fake_updates_per_student: int = 1

    @property
    def guidance(self) -> GuidanceSpec:
        return GuidanceSpec() if self.guidance_scale == 1 else specs.zero_guidance()

    @property
    def note(self) -> str:
        return "each of four steps gets a quarter of the updates"

    def student(self, step: Step) -> Loss:
        return sid_term(step, step.sample().x, alpha=1.0)


@dataclass
class SiDA(ScoreMatching):
    """SiDA: SiD and a game in which real and fake share time and noise."""

    name = "sida"
    paper = "2410.14919"
    needs = frozenset({"score", "features", "clips"})
    covers = True

    gan: float = 0.03
    """Weight of the game, at least 0."""
    fake_updates_per_student: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, gan=(0, math.inf))

    def student(self, step: Step) -> Loss:
        x = step.sample().x
        identity = sid_term(step, x, alpha=1.0)
        return 0.5 * (identity + self.gan * gan_term(step, x))

    def discriminator(self, step: Step) -> Loss:
        """Student samples against data, at one time and noise."""
        return play(step, shared=True)


# ---- one network for all -------------------------------------------------------------------------


@dataclass
class TwinFlow(Distillation):
    """TwinFlow: the student is its own fake score at negative times. Four equal parts of a batch
    each have their loss.
    """

    name = "twinflow"
    paper = "2512.05150"
    needs = frozenset({"score", "clips", "jumps"})

    short_step: float = 0.01
    """Of the teacher, at the beginning of a secant, in time; 0.001 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, short_step=(0.001, 1))

    @property
    def note(self) -> str:
        return "one network; no teacher's score where unguided"

    def student(self, step: Step) -> Loss:
        u = step.flow_map()
        t = step.times(low=0.05, high=1.0)
        eps = step.noise()
        data = step.data()
        x_t = add_noise(data, eps, t)
        if self.guidance_scale == 1:
            v = velocity(data, eps)
        else:
            v = step.real(x_t, t).detach()  # sg
        matching = distance(u(x_t, t, t), v).mean()
        secant = self._secant(step, x_t, t, v)

        # the fake flow, at (-t, -t), against the real one, at (t, t)
        z = step.noise()
        one = torch.ones_like(t)
        zero = torch.zeros_like(t)
        v_one = u(z, one, zero)
        x = euler_step(z, v_one, one, zero)
        with torch.no_grad():
            x_t = step.noised(x, t)
            gap = (u(x_t, -t, -t) - u(x_t, t, t)).clamp(-1, 1)
        rectification = surrogate(v_one, gap)

        x = x.detach()  # sg
        eps = step.noise()
        fake = distance(u(add_noise(x, eps, t), -t, -t), velocity(x, eps)).mean()
        return matching + secant + rectification + fake

    def _secant(self, step: Step, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """To s, from the teacher's short step and the student's own rest."""
        u = step.flow_map()
        s = t * (1 - step.uniform())
        with torch.no_grad():
            short = torch.minimum(torch.full_like(t, self.short_step), t - s)
            near = euler_step(x_t, v, t, t - short)
            rest = expand_time(t - short - s, x_t) * u(near, t - short, s)
            whole = expand_time(short, x_t) * v + rest
            target = whole / expand_time((t - s).clamp_min(1e-4), x_t)
        return distance(u(x_t, t, s), target).mean()
