"""Objectives that teach the student the teacher's flow itself: consistency, trajectories, mean
velocities, momenta.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamvid.core import guidance as specs
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
    step_times,
    uniform_target,
)
from streamvid.objectives.base import Context, Preset, fit_critic
from streamvid.objectives.score import dmd_term, gan_term, play

__all__ = [
    "cd",
    "lcm",
    "ctm",
    "tcd",
    "pcm",
    "tdd",
    "scott",
    "slam",
    "boot",
    "traflow",
    "scm",
    "rcm",
    "meanflow",
    "arcflow",
    "accvideo",
]

GAP = 1 / 16  # of a pair (t, r), in time


def pair_term(
    ctx: Context,
    target: FlowMap,
    land: str = "data",
    edges: tuple[float, ...] = (0.0,),
    eta: float = 0.0,
    num_teacher_steps: int = 1,
    gap: float = GAP,
    huber: float | None = None,
    gamma: bool = False,
) -> Tensor:
    """One consistency loss on noised data; the methods differ in these arguments only.

    Args:
        land: where: "data", "uniform", "phase" or "scheduled".
        edges: of phases, or the targets of a schedule.
        huber: width of the distance; None is squared.
        gamma: draw a point on the sub-path, as SLAM does.
    """
    x0, t = ctx.data(ctx.cond), ctx.times(low=gap, high=1.0)
    x_t, r = add_noise(x0, ctx.noise(), t), (t - gap).clamp_min(0)
    step = euler_step
    if eta:
        step = lambda x, v, a, b: eta_step(x, v, a, b, eta, ctx.noise())
    if land == "phase":
        r = torch.maximum(r, phase_target(t, edges))
    x_r = teacher_steps(ctx.real, x_t, t, r, num_teacher_steps, step)
    s = {
        "data": lambda: torch.zeros_like(t),
        "uniform": lambda: uniform_target(r, ctx.rng),
        "phase": lambda: phase_target(t, edges),
        "scheduled": lambda: scheduled_target(r, edges, 0.26, 0.3, ctx.rng),
    }[land]()
    x_in, t_in = x_t, t
    # the point is a state of our process, too, at another time: no embedding has to tell gamma
    if gamma:
        x_in, sigma = subpath_input(x_t, x_r, t, r, ctx.uniform(), "linear")
        size = expand_time(1 - t, x_in) + sigma
        x_in, t_in = x_in / size, (sigma / size).flatten()
    landed, aim = consistency_pair(ctx.flow_map(), target, x_in, t_in, x_r, r, s)
    each = distance(landed, aim) if huber is None else distance(landed, aim, "huber", huber)
    return each.mean()


def _consistency(paper: str, scale: float, target: str = "average", **options) -> Preset:
    steps, sampler, note = (
        options.pop(name, default)
        for name, default in (("steps", 2), ("sampler", "renoise"), ("note", ""))
    )

    def student(ctx: Context) -> Tensor:
        return pair_term(ctx, ctx.flow_map(target), **options)

    average = 0.95 if target == "average" else None
    return Preset(
        paper,
        student,
        steps=steps,
        sampler=sampler,
        average=average,
        guidance=specs.dmd(scale),
        note=note,
    )


def cd(scale: float = 1.0) -> Preset:
    """Consistency distillation."""
    return _consistency("2303.01469", scale)


def lcm(scale: float = 1.0) -> Preset:
    """LCM: consistency of the guided flow, Huber distance per element."""
    return _consistency("2310.04378", scale, huber=0.01, steps=4)


def ctm(scale: float = 1.0, gan: float = 0.02, matching: float = 1.0) -> Preset:
    """CTM: any to any, compared at data; flow matching and a game beside it."""

    def student(ctx: Context) -> Tensor:
        x0, t, eps = ctx.data(ctx.cond), ctx.times(low=GAP, high=1.0), ctx.noise()
        x_t, r = add_noise(x0, eps, t), (t - GAP).clamp_min(0)
        s = uniform_target(r, ctx.rng)
        x_r = teacher_steps(ctx.real, x_t, t, r, 2)
        landed, aim = consistency_pair(
            ctx.flow_map(), ctx.flow_map("average"), x_t, t, x_r, r, s, ctx.flow_map("average")
        )
        denoise = distance(ctx.flow_map()(x_t, t, t), ctx.real(x_t, t).detach()).mean()  # sg
        return (
            distance(landed, aim).mean() + matching * denoise + gan * gan_term(ctx, ctx.sample(0).x)
        )

    note = "learns all jumps at once, of which two are used; 2.4 on both at twice the updates"
    return Preset(
        "2310.02279",
        student,
        disc=play(),
        steps=2,
        sampler="jump",
        average=0.95,
        guidance=specs.dmd(scale),
        note=note,
    )


def tcd(scale: float = 1.0) -> Preset:
    """TCD: any to any; sampled with gamma = 0, the plain jumps."""
    return _consistency("2402.19159", scale, land="uniform", steps=4, sampler="jump")


def pcm(scale: float = 1.0, gan: float = 0.05) -> Preset:
    """PCM: consistency within each of four phases, and a hinge game with a margin on where they
    end.
    """
    edges = (0.0, 0.25, 0.5, 0.75)

    def student(ctx: Context) -> Tensor:
        t = ctx.times()
        x = _jumps(ctx, 4)
        game = generator_loss("hinge_margin", ctx.logits(add_noise(x, ctx.noise(), t), t))
        return pair_term(ctx, ctx.flow_map("average"), "phase", edges) + gan * game

    def disc(ctx: Context) -> Tensor:
        with torch.no_grad():
            x = _jumps(ctx, 4)
        t, t_real = ctx.times(), ctx.times()
        real = ctx.pairs(ctx.cond)[1]
        return discriminator_loss(
            "hinge", ctx.logits(ctx.noised(x, t), t), ctx.logits(ctx.noised(real, t_real), t_real)
        )

    return Preset(
        "2405.18407",
        student,
        disc=disc,
        steps=4,
        sampler="jump",
        average=0.95,
        guidance=specs.dmd(scale),
    )


def _jumps(ctx: Context, steps: int) -> Tensor:
    """A sample by the student's own jumps, with gradient through the last."""
    x, times = ctx.noise(), [*step_times(steps, 1.0), 0.0]
    for i, (time, after) in enumerate(zip(times, times[1:])):
        t = torch.full((ctx.batch_size,), time, dtype=ctx.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == steps - 1):
            x = ctx.jump(x, t, after)
    return x


def tdd(scale: float = 1.0) -> Preset:
    """TDD: lands where samplers of 1 to 4 steps stop; the student is its own target."""
    edges = tuple(sorted({k / n for n in range(1, 5) for k in range(n)}))
    return _consistency(
        "2409.01347",
        scale,
        target="student",
        land="scheduled",
        edges=edges,
        steps=4,
        sampler="jump",
    )


def scott(scale: float = 1.0, eta: float = 0.1, gan: float = 0.05) -> Preset:
    """SCott: consistency on slightly stochastic teacher steps, three a pair, and a hinge game that
    gives the detail back.
    """

    def student(ctx: Context) -> Tensor:
        pair = pair_term(ctx, ctx.flow_map("average"), eta=eta, num_teacher_steps=3)
        return pair + gan * gan_term(ctx, ctx.sample().x, "hinge")

    return Preset(
        "2403.01505", student, disc=play("hinge"), steps=2, average=0.95, guidance=specs.dmd(scale)
    )


def slam(scale: float = 1.0) -> Preset:
    """SLAM: consistency from points between the two ends of a teacher's step."""
    return _consistency("2404.13903", scale, gamma=True)


def boot(scale: float = 1.0, boundary: float = 1.0) -> Preset:
    """BOOT: no data. The signal of the flow from a noise, bootstrapped from t to s = t - 1/16 and
    held at the start.
    """
    last = 0.98

    def student(ctx: Context) -> Tensor:
        eps, t = ctx.noise(), ctx.times(low=2 * GAP, high=last)
        s, end = t - GAP, torch.full_like(t, last)
        y = lambda name, time: _signal(ctx.flow_map(name), eps, time)
        with torch.no_grad():
            y_t = y("average", t)
            x_t = add_noise(y_t, eps, t)
            aim = bootstrap_target(y_t, x0_from_v(x_t, ctx.real(x_t, t), t), t, s)
            start = x0_from_v(eps, ctx.real(eps, end), end)
        edge = distance(y("student", end), start).mean()
        return (distance(y("student", s), aim) / GAP).mean() + boundary * edge

    return Preset(
        "2306.05544",
        student,
        steps=1,
        average=0.95,
        guidance=specs.dmd(scale),
        note="data-free; errors add up from noise to data",
    )


def _signal(u: FlowMap, eps: Tensor, time: Tensor) -> Tensor:
    """BOOT's y(eps, t): a jump from noise to t, less the noise in it. At t = 0 it is the one-step
    sample.
    """
    one = torch.ones_like(time)
    x_t = euler_step(eps, u(eps, one, time), one, time)
    return (x_t - expand_time(time, eps) * eps) / (1 - expand_time(time, eps))


def traflow(scale: float = 1.0, straight: float = 0.01) -> Preset:
    """TraFlow: the trajectory's end, the teacher's velocity, self-consistency, and a little
    straightness.
    """

    def student(ctx: Context) -> Tensor:
        noise, end = ctx.pairs(ctx.cond)
        u, one = ctx.flow_map(), torch.ones(ctx.batch_size, dtype=ctx.dtype)
        zero, t = torch.zeros_like(one), ctx.times(low=GAP, high=1.0)
        output = distance(euler_step(noise, u(noise, one, zero), one, zero), end).mean()
        x_t = add_noise(ctx.data(ctx.cond), ctx.noise(), t)
        match = distance(u(x_t, t, t), ctx.real(x_t, t).detach()).mean()  # sg
        s = uniform_target(t, ctx.rng)
        direct, velocity_t = euler_step(x_t, u(x_t, t, zero), t, zero), u(x_t, t, t)
        middle = euler_step(x_t, u(x_t, t, s), t, s)
        over = euler_step(middle, u(middle, s, zero), s, zero)
        consistent = distance(over, direct.detach()).mean()  # sg
        return output + match + consistent + straight * straightness(velocity_t, u(x_t, t, zero))

    return Preset(
        "2502.16972",
        student,
        steps=1,
        sampler="jump",
        guidance=specs.dmd(scale),
        note="terms from an abstract: our reading",
    )


def _tangent_term(
    ctx: Context,
    land: str,
    share: float,
    c: float | None = None,
    power: float = 0.0,
    equal: float = 0.5,
) -> Tensor:
    """A mean velocity or a consistency model against its exact target along the teacher's flow.

    Args:
        land: "data", or "between" for any earlier time.
        share: of the tangent's second term.
        c: of the normalised tangent; None does not normalise.
        power: of the adaptive weight.
        equal: share of pairs whose two times are one.
    """
    x0, u = ctx.data(ctx.cond), ctx.flow_map()
    t, other = ctx.times(), ctx.times()
    if land == "data":
        t, s = t, torch.zeros_like(t)
    else:
        t, s = mean_flow_pair(t, other, equal, ctx.rng)
    x_t = add_noise(x0, ctx.noise(), t)
    with torch.no_grad():
        v = ctx.real(x_t, t)
    mean, slope = total_derivative(u, x_t, t, s, v)
    target = mean_velocity_target(v, slope, t, s, share)
    predicted = u(x_t, t, s)
    if c is not None:
        target = normalized_tangent(mean, target, c)
    return adaptive(distance(predicted, target), power).mean()


def scm(scale: float = 1.0, c: float | None = 0.1) -> Preset:
    """sCM: consistency with the exact tangent, normalised, its second term warmed up."""

    def student(ctx: Context) -> Tensor:
        return _tangent_term(ctx, "data", min(1.0, ctx.progress / 0.3), c)

    return Preset("2410.11081", student, steps=2, guidance=specs.dmd(scale))


def rcm(scale: float = 1.0, matching: float = 0.5) -> Preset:
    """rCM: sCM, and DMD on the student's samples."""

    def student(ctx: Context) -> Tensor:
        return _tangent_term(ctx, "data", min(1.0, ctx.progress / 0.3), 0.1) + matching * dmd_term(
            ctx, ctx.sample().x
        )

    return Preset("2510.08431", student, fit_critic(), steps=2, guidance=specs.dmd(scale))


def meanflow(scale: float = 1.0, power: float = 0.5, equal: float = 0.5) -> Preset:
    """MeanFlow, distilled: the teacher's velocity in place of the data's; half of the pairs have s
    = t.
    """
    return Preset(
        "2505.13447",
        lambda ctx: _tangent_term(ctx, "between", 1.0, power=power, equal=equal),
        steps=1,
        sampler="jump",
        guidance=specs.dmd(scale),
    )


def arcflow(scale: float = 1.0, window: float = 3 / 64) -> Preset:
    """ArcFlow's data-free training: along the student's own path from noise, its mean velocity over
    a short window is the teacher's. The student's jump stands in for the momentum displacement,
    whose head is the network's own matter.
    """

    def student(ctx: Context) -> Tensor:
        eps, one = ctx.noise(), torch.ones(ctx.batch_size, dtype=ctx.dtype)
        a, u = ctx.times(low=window, high=1.0), ctx.flow_map()
        b = a - window
        start = euler_step(eps, u(eps, one, a), one, a)
        end = euler_step(eps, u(eps, one, b), one, b)
        with torch.no_grad():
            v = ctx.real(start, a)
        short = secant_velocity(start, end, a, b)
        return distance(short, v).mean()

    return Preset(
        "2602.09014",
        student,
        steps=1,
        sampler="jump",
        guidance=specs.dmd(scale),
        note="a jump in place of momentum heads",
    )


def accvideo(scale: float = 1.0) -> Preset:
    """AccVideo: secants of stored teacher trajectories between four key times, and a game on what
    lands on them.
    """
    key = (1.0, 0.75, 0.5, 0.25, 0.0)

    def path(ctx: Context, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        noise, _ = ctx.pairs(ctx.cond)
        t, s = (torch.full((ctx.batch_size,), key[i], dtype=ctx.dtype) for i in (index, index + 1))
        one = torch.ones_like(t)
        x_t = teacher_steps(ctx.real, noise, one, t, 8 * index) if index else noise
        return x_t, teacher_steps(ctx.real, x_t, t, s, 8), t, s

    def student(ctx: Context) -> Tensor:
        index = int(torch.randint(4, (), generator=ctx.rng))
        x_t, x_s, t, s = path(ctx, index)
        u = ctx.flow_map()(x_t, t, s)
        landed = euler_step(x_t, u, t, s)
        game = generator_loss("ns", ctx.logits(landed, s))
        return distance(u, secant_velocity(x_t, x_s, t, s)).mean() + 0.02 * game

    def disc(ctx: Context) -> Tensor:
        index = int(torch.randint(4, (), generator=ctx.rng))
        with torch.no_grad():
            x_t, x_s, t, s = path(ctx, index)
            landed = ctx.jump(x_t, t, s)
        return discriminator_loss("ns", ctx.logits(landed, s), ctx.logits(x_s, s))

    return Preset(
        "2503.19462",
        student,
        disc=disc,
        steps=4,
        sampler="jump",
        heads="film",
        guidance=specs.dmd(scale),
    )
