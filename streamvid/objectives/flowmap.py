"""Objectives that teach the student the teacher's flow itself: consistency, trajectories, mean
velocities, momenta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from streamvid.core.adversary import discriminator_loss, generator_loss
from streamvid.core.flowmap import (
    FlowMap,
    adaptive,
    bootstrap_target,
    consistency_pair,
    distance,
    mean_velocity_target,
    normalized_tangent,
    secant_velocity,
    straightness,
    subpath_input,
    teacher_steps,
    total_derivative,
)
from streamvid.core.process import add_noise, eta_step, euler_step, expand_time, x0_from_v
from streamvid.core.times import (
    mean_flow_pair,
    phase_target,
    scheduled_target,
    shift_time,
    uniform_target,
)
from streamvid.objectives.adversarial import tell_apart
from streamvid.objectives.base import (
    Distillation,
    Loss,
    ScoreMatching,
    Step,
    require,
)
from streamvid.objectives.score import dmd_term, gan_term, play

GAP = 1 / 16
"""Of a pair (t, r), in time."""


# ---- consistency ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A state on noised data, and where the teacher takes it in a short step."""

    x_t: Tensor  # [B, ...]
    t: Tensor  # [B]
    x_r: Tensor  # [B, ...]
    r: Tensor  # [B]


def draw_states(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Noised data ``x_t`` at ``t``, and the time ``r`` a short step below."""
    x0 = step.data()
    t = step.times(low=GAP, high=1.0)
    x_t = add_noise(x0, step.noise(), t)
    return x_t, t, (t - GAP).clamp_min(0)


def draw_pair(step: Step, num_teacher_steps: int = 1) -> Pair:
    """Noised data, and where the guided teacher's Euler steps take it."""
    x_t, t, r = draw_states(step)
    return Pair(x_t, t, teacher_steps(step.real, x_t, t, r, num_teacher_steps), r)


def land_together(
    step: Step, pair: Pair, s: Tensor, target: str = "average", huber: float | None = None
) -> Tensor:
    """The mean distance of the student's jumps to ``s`` from the target's: squared, or Huber's of
    the width ``huber``.
    """
    landed, aim = consistency_pair(
        step.flow_map(), step.flow_map(target), pair.x_t, pair.t, pair.x_r, pair.r, s
    )
    each = distance(landed, aim) if huber is None else distance(landed, aim, "huber", huber)
    return each.mean()


@dataclass
class CD(Distillation):
    """Consistency distillation."""

    name = "cd"
    paper = "2303.01469"
    needs = frozenset({"score", "clips", "average"})
    num_steps = 2

    def student(self, step: Step) -> Loss:
        pair = draw_pair(step)
        return land_together(step, pair, torch.zeros_like(pair.t))


@dataclass
class LCM(Distillation):
    """LCM: consistency of the guided flow, Huber distance per element."""

    name = "lcm"
    paper = "2310.04378"
    needs = frozenset({"score", "clips", "average"})
    num_steps = 4

    huber: float = 0.01
    """Width of the distance, 0.00001 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, huber=(1e-5, 1))

    def student(self, step: Step) -> Loss:
        pair = draw_pair(step)
        return land_together(step, pair, torch.zeros_like(pair.t), huber=self.huber)


@dataclass
class CTM(Distillation):
    """CTM: any to any, compared at data; flow matching and a game beside it."""

    name = "ctm"
    paper = "2310.02279"
    needs = frozenset({"score", "features", "clips", "average", "jumps"})
    num_steps = 2
    sampler = "jump"

    gan: float = 0.02
    """Weight of the game, at least 0."""
    matching: float = 1.0
    """Weight of the teacher's velocity at s = t, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, gan=(0, math.inf), matching=(0, math.inf))

    @property
    def note(self) -> str:
        return "learns all jumps at once, of which two are used; 2.4 on both at twice the updates"

    def student(self, step: Step) -> Loss:
        u = step.flow_map()
        average = step.flow_map("average")
        x_t, t, r = draw_states(step)
        s = uniform_target(r, step.uniform())
        x_r = teacher_steps(step.real, x_t, t, r, 2)
        landed, aim = consistency_pair(u, average, x_t, t, x_r, r, s, to_data=average)
        denoise = distance(u(x_t, t, t), step.real(x_t, t).detach()).mean()  # sg
        trajectory = distance(landed, aim).mean() + self.matching * denoise
        return trajectory + self.gan * gan_term(step, step.sample(0).x)

    def discriminator(self, step: Step) -> Loss:
        """Student samples against data."""
        return play(step)


@dataclass
class TCD(Distillation):
    """TCD: any to any; sampled with gamma = 0, the plain jumps."""

    name = "tcd"
    paper = "2402.19159"
    needs = frozenset({"score", "clips", "average", "jumps"})
    num_steps = 4
    sampler = "jump"

    def student(self, step: Step) -> Loss:
        pair = draw_pair(step)
        s = uniform_target(pair.r, step.uniform())
        return land_together(step, pair, s)


@dataclass
class PCM(Distillation):
    """PCM: consistency within each step of the sampler, a phase, and a hinge game with a margin on
    where the last one ends.
    """

    name = "pcm"
    paper = "2405.18407"
    needs = frozenset({"score", "features", "clips", "pairs", "average", "jumps"})
    num_steps = 4
    sampler = "jump"

    gan: float = 0.05
    """Weight of the game, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, gan=(0, math.inf))

    def student(self, step: Step) -> Loss:
        t = step.times()
        x = add_noise(step.jump_through(), step.noise(), t)
        game = generator_loss("hinge_margin", step.logits(x, t))

        x_t, t, r = draw_states(step)
        edges = [step.step_time(index + 1) for index in range(step.num_steps)]
        s = phase_target(t, edges)
        r = torch.maximum(r, s)
        pair = Pair(x_t, t, teacher_steps(step.real, x_t, t, r), r)
        return land_together(step, pair, s) + self.gan * game

    def discriminator(self, step: Step) -> Loss:
        """Student samples against the teacher's."""
        with torch.no_grad():
            fake = step.jump_through()
        t = step.times()
        t_real = step.times()
        _, real = step.pairs()
        return tell_apart(step, "hinge", fake, t, real, t_real)


@dataclass
class TDD(Distillation):
    """TDD: lands where samplers of 1 to 4 steps stop; the student is its own target."""

    name = "tdd"
    paper = "2409.01347"
    needs = frozenset({"score", "clips", "jumps"})
    num_steps = 4
    sampler = "jump"

    window: float = 0.26
    """How far below its largest candidate a landing may lie, in time; 0 to 1."""
    shrink: float = 0.3
    """A landing is lowered by up to this share of itself, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, window=(0, 1), shrink=(0, 1))

    def student(self, step: Step) -> Loss:
        pair = draw_pair(step)
        nominal = sorted({k / n for n in range(1, step.num_steps + 1) for k in range(n)})
        stops = [shift_time(u, self.shift) for u in nominal]
        draws = (step.uniform(), step.uniform())
        s = scheduled_target(pair.r, stops, self.window, self.shrink, draws)
        return land_together(step, pair, s, target="student")


@dataclass
class SCott(Distillation):
    """SCott: consistency on slightly stochastic teacher steps, three per pair, and a hinge game
    that gives the detail back.
    """

    name = "scott"
    paper = "2403.01505"
    needs = frozenset({"score", "features", "clips", "average"})
    num_steps = 2

    eta: float = 0.1
    """Share of the noise that a teacher's step renews, 0 to 1."""
    gan: float = 0.05
    """Weight of the game, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, eta=(0, 1), gan=(0, math.inf))

    def student(self, step: Step) -> Loss:
        def renew(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
            return eta_step(x, v, t, t_next, self.eta, step.noise())

        x_t, t, r = draw_states(step)
        pair = Pair(x_t, t, teacher_steps(step.real, x_t, t, r, 3, renew), r)
        consistency = land_together(step, pair, torch.zeros_like(t))
        return consistency + self.gan * gan_term(step, step.sample().x, "hinge")

    def discriminator(self, step: Step) -> Loss:
        """Student samples against data."""
        return play(step, "hinge")


@dataclass
class SLAM(Distillation):
    """SLAM: consistency from points between the two ends of a teacher's step.

    Such a point is a state of our process, too, at another time: no embedding has to tell gamma.
    """

    name = "slam"
    paper = "2404.13903"
    needs = frozenset({"score", "clips", "average"})
    num_steps = 2

    def student(self, step: Step) -> Loss:
        pair = draw_pair(step)
        between, sigma = subpath_input(pair.x_t, pair.x_r, pair.t, pair.r, step.uniform(), "linear")
        size = expand_time(1 - pair.t, between) + sigma
        state = Pair(between / size, (sigma / size).flatten(), pair.x_r, pair.r)
        return land_together(step, state, torch.zeros_like(pair.t))


@dataclass
class BOOT(Distillation):
    """BOOT: no data. The signal of the flow from a noise, bootstrapped from t to s = t - 1/16 and
    held at the start.
    """

    name = "boot"
    paper = "2306.05544"
    needs = frozenset({"score", "average", "jumps"})

    boundary: float = 1.0
    """Weight of the start, at least 0."""

    LAST = 0.98
    """The time at which the signal is the teacher's; at 1 there is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, boundary=(0, math.inf))

    @property
    def note(self) -> str:
        return "data-free; errors add up from noise to data"

    def student(self, step: Step) -> Loss:
        eps = step.noise()
        t = step.times(low=2 * GAP, high=self.LAST)
        s = t - GAP
        end = torch.full_like(t, self.LAST)
        with torch.no_grad():
            y_t = signal(step.flow_map("average"), eps, t)
            x_t = add_noise(y_t, eps, t)
            aim = bootstrap_target(y_t, x0_from_v(x_t, step.real(x_t, t), t), t, s)
            start = x0_from_v(eps, step.real(eps, end), end)
        u = step.flow_map()
        edge = distance(signal(u, eps, end), start).mean()
        follow = (distance(signal(u, eps, s), aim) / GAP).mean()
        return follow + self.boundary * edge


def signal(u: FlowMap, eps: Tensor, time: Tensor) -> Tensor:
    """BOOT's y(eps, t): a jump from noise to t, less the noise in it. At t = 0 it is the one-step
    sample.
    """
    one = torch.ones_like(time)
    x_t = euler_step(eps, u(eps, one, time), one, time)
    return (x_t - expand_time(time, eps) * eps) / (1 - expand_time(time, eps))


@dataclass
class TraFlow(Distillation):
    """TraFlow: the trajectory's end, the teacher's velocity, self-consistency, and a little
    straightness.
    """

    name = "traflow"
    paper = "2502.16972"
    needs = frozenset({"score", "clips", "pairs", "jumps"})
    sampler = "jump"

    straight: float = 0.01
    """Weight of the straightness, which contradicts curved flows; 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, straight=(0, 1))

    @property
    def note(self) -> str:
        return "terms from an abstract: our reading"

    def student(self, step: Step) -> Loss:
        u = step.flow_map()
        noise, end = step.pairs()
        one = step.full(1.0)
        zero = step.full(0.0)
        t = step.times(low=GAP, high=1.0)
        output = distance(euler_step(noise, u(noise, one, zero), one, zero), end).mean()

        x_t = add_noise(step.data(), step.noise(), t)
        match = distance(u(x_t, t, t), step.real(x_t, t).detach()).mean()  # sg

        s = uniform_target(t, step.uniform())
        direct = euler_step(x_t, u(x_t, t, zero), t, zero)
        velocity_t = u(x_t, t, t)
        middle = euler_step(x_t, u(x_t, t, s), t, s)
        over = euler_step(middle, u(middle, s, zero), s, zero)
        consistent = distance(over, direct.detach()).mean()  # sg
        bend = straightness(velocity_t, u(x_t, t, zero))
        return output + match + consistent + self.straight * bend


# ---- exact tangents ------------------------------------------------------------------------------


def tangent_term(
    step: Step,
    share: float = 1.0,
    c: float | None = None,
    power: float = 0.0,
    equal: float | None = None,
) -> Tensor:
    """A mean velocity or a consistency model against its exact target along the teacher's flow.

    Args:
        share: of the tangent's second term.
        c: of the normalised tangent; None does not normalise.
        power: of the adaptive weight.
        equal: share of pairs whose two times are one, the others land anywhere between; None lands
            at data.
    """
    u = step.flow_map()
    x0 = step.data()
    t = step.times()
    other = step.times()
    if equal is None:
        s = torch.zeros_like(t)
    else:
        t, s = mean_flow_pair(t, other, equal, step.uniform())
    x_t = add_noise(x0, step.noise(), t)
    with torch.no_grad():
        v = step.real(x_t, t)
    mean, slope = total_derivative(u, x_t, t, s, v, step.tangent, step.difference)
    target = mean_velocity_target(v, slope, t, s, share)
    predicted = u(x_t, t, s)
    if c is not None:
        target = normalized_tangent(mean, target, c)
    return adaptive(distance(predicted, target), power).mean()


@dataclass
class SCM(Distillation):
    """sCM: consistency with the exact tangent, normalised, its second term warmed up."""

    name = "scm"
    paper = "2410.11081"
    needs = frozenset({"score", "clips"})
    num_steps = 2

    c: float | None = 0.1
    """Of the tangent's normalisation; None does not normalise."""
    warm_up: float = 0.3
    """Share of the run in which the second term rises to its full weight, above 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, warm_up=(1e-6, 1))
        if self.c is not None:
            require(self, c=(0, math.inf))

    def student(self, step: Step) -> Loss:
        return tangent_term(step, min(1.0, step.progress / self.warm_up), self.c)


@dataclass
class RCM(ScoreMatching):
    """rCM: sCM, and DMD on the student's samples."""

    name = "rcm"
    paper = "2510.08431"
    needs = frozenset({"score", "clips"})
    num_steps = 2

    matching: float = 0.5
    """Weight of DMD, at least 0."""
    c: float = 0.1
    """Of the tangent's normalisation, at least 0."""
    warm_up: float = 0.3
    """Share of the run in which the tangent's second term rises to its full weight, above 0 to
    1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, matching=(0, math.inf), c=(0, math.inf), warm_up=(1e-6, 1))

    def student(self, step: Step) -> Loss:
        consistency = tangent_term(step, min(1.0, step.progress / self.warm_up), self.c)
        return consistency + self.matching * dmd_term(step, step.sample().x)


@dataclass
class MeanFlow(Distillation):
    """MeanFlow, distilled: the teacher's velocity in place of the data's."""

    name = "meanflow"
    paper = "2505.13447"
    needs = frozenset({"score", "clips", "jumps"})
    sampler = "jump"

    power: float = 0.5
    """Of the adaptive weight, 0 (none) to 1."""
    equal: float = 0.5
    """Share of pairs with s = t, which is flow matching; 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, power=(0, 1), equal=(0, 1))

    def student(self, step: Step) -> Loss:
        return tangent_term(step, power=self.power, equal=self.equal)


# ---- secants -------------------------------------------------------------------------------------


@dataclass
class ArcFlow(Distillation):
    """ArcFlow's data-free training: along the student's own path from noise, its mean velocity over
    a short window is the teacher's. The student's jump stands in for the momentum displacement,
    whose head is the network's own matter.
    """

    name = "arcflow"
    paper = "2602.09014"
    needs = frozenset({"score", "jumps"})
    sampler = "jump"

    window: float = 3 / 64
    """Of the mean velocity, in time; 0.001 to 0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, window=(0.001, 0.5))

    @property
    def note(self) -> str:
        return "a jump in place of momentum heads"

    def student(self, step: Step) -> Loss:
        u = step.flow_map()
        eps = step.noise()
        one = step.full(1.0)
        a = step.times(low=self.window, high=1.0)
        b = a - self.window
        start = euler_step(eps, u(eps, one, a), one, a)
        end = euler_step(eps, u(eps, one, b), one, b)
        with torch.no_grad():
            v = step.real(start, a)
        return distance(secant_velocity(start, end, a, b), v).mean()


@dataclass
class AccVideo(Distillation):
    """AccVideo: secants of stored teacher trajectories between the times of the sampler's steps,
    and a game on what lands on them.
    """

    name = "accvideo"
    paper = "2503.19462"
    needs = frozenset({"score", "features", "pairs", "jumps"})
    num_steps = 4
    sampler = "jump"
    heads = "film"

    gan: float = 0.02
    """Weight of the game, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, gan=(0, math.inf))

    def student(self, step: Step) -> Loss:
        x_t, x_s, t, s = self.draw(step)
        u = step.flow_map()(x_t, t, s)
        landed = euler_step(x_t, u, t, s)
        game = generator_loss("ns", step.logits(landed, s))
        return distance(u, secant_velocity(x_t, x_s, t, s)).mean() + self.gan * game

    def discriminator(self, step: Step) -> Loss:
        """Where the student lands against where the teacher does."""
        with torch.no_grad():
            x_t, x_s, t, s = self.draw(step)
            landed = step.jump(x_t, t, s)
        return discriminator_loss("ns", step.logits(landed, s), step.logits(x_s, s))

    def draw(self, step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One of the student's steps, on the teacher's path from a stored noise."""
        index = step.choose(step.num_steps)
        noise, _ = step.pairs()
        return follow_path(step, noise, index)


def follow_path(step: Step, noise: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The teacher's path from ``noise`` in the student's step ``index``.

    Returns:
        ``x_t``, ``x_s``, ``t`` and ``s``: its states where the step begins and ends, by eight Euler
        steps for each of the student's, and these times.
    """
    one = step.full(1.0)
    t = step.full(step.step_time(index))
    s = step.full(step.step_time(index + 1))
    x_t = teacher_steps(step.real, noise, one, t, 8 * index)
    return x_t, teacher_steps(step.real, x_t, t, s, 8), t, s
