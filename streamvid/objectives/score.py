"""Objectives that move the student along a difference of scores: the DMD and the SiD families, and
what is near them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from streamvid.core import guidance as specs
from streamvid.core.adversary import approximate_penalty, discriminator_loss, generator_loss
from streamvid.core.fitting import couple, loss_weight
from streamvid.core.flowmap import distance
from streamvid.core.guidance import GuidanceSpec
from streamvid.core.inject import dmd_gradient, f_weight, residual_gradient, sid_loss, surrogate
from streamvid.core.process import add_noise, euler_step, expand_time, velocity, x0_from_v
from streamvid.objectives.base import Context, Loss, Preset, fit_critic

__all__ = [
    "sds",
    "dmd",
    "dmd2",
    "f_distill",
    "swiftbrush",
    "snoopi",
    "sid",
    "sid_lsg",
    "few_step_sid",
    "sida",
    "uni_dad",
    "flash_dmd",
    "gndm",
    "emd",
    "add",
    "msd",
    "twinflow",
    "tdm",
    "flow_dmd",
]


# ---- pieces -------------------------------------------------------------------------------------------


def dmd_term(
    ctx: Context,
    x: Tensor,
    weight: Tensor | float = 1.0,
    normalizer: str = "sample",
    t: Tensor | None = None,
) -> Tensor:
    """DMD's surrogate at a fresh noising of ``x``."""
    with torch.no_grad():
        t = ctx.times() if t is None else t
        x_t = ctx.noised(x, t)
        fake, real = ctx.predictions(x_t, t)
    return surrogate(x, dmd_gradient(x, fake, real, normalizer), weight=weight)


def gan_term(
    ctx: Context, x: Tensor, kind: str = "ns", low: float = 0.02, high: float = 0.98
) -> Tensor:
    """The student's side of a game on noised samples."""
    t = ctx.times(low=low, high=high)
    return generator_loss(kind, ctx.logits(add_noise(x, ctx.noise(), t), t))


def play(
    kind: str = "ns",
    shared: bool = False,
    low: float = 0.02,
    high: float = 0.98,
    exit_index: int | None = None,
) -> Loss:
    """The discriminator's side: student samples against data, each with its own noise and time, or
    with the same ones.
    """

    def loss(ctx: Context) -> Tensor:
        with torch.no_grad():
            fake = ctx.sample(exit_index).x
        real, t, eps = ctx.data(ctx.cond), ctx.times(low=low, high=high), ctx.noise()
        t_real, eps_real = (t, eps) if shared else (ctx.times(low=low, high=high), ctx.noise())
        fake, real = add_noise(fake, eps, t), add_noise(real, eps_real, t_real)
        return discriminator_loss(kind, ctx.logits(fake, t), ctx.logits(real, t_real))

    return loss


def with_penalty(disc: Loss, weight: float, sigma: float, points: str) -> Loss:
    """A discriminator's loss with an approximate gradient penalty on clean ``points``, "data" or
    "both" (R1, R1 + R2).
    """

    def loss(ctx: Context) -> Tensor:
        t = torch.full((ctx.batch_size,), 0.02, dtype=ctx.dtype)
        logits = lambda x: ctx.logits(x, t)
        total = disc(ctx) + weight / sigma**2 * approximate_penalty(
            logits, ctx.data(ctx.cond), ctx.noise(), sigma
        )
        if points == "both":
            with torch.no_grad():
                x = ctx.sample().x
            total = total + weight / sigma**2 * approximate_penalty(logits, x, ctx.noise(), sigma)
        return total

    return loss


def sid_term(
    ctx: Context, x: Tensor, alpha: float, low: float = 0.02, high: float = 0.96
) -> Tensor:
    """SiD's loss, gradients through both scores' inputs included."""
    t = ctx.times(low=low, high=high)
    fake, real = ctx.predictions(add_noise(x, ctx.noise(), t), t)
    return sid_loss(x, fake, real, alpha)


# ---- distribution matching ----------------------------------------------------------------------------


def sds(scale: float = 1.0) -> Preset:
    """Score distillation sampling: the residual alone. It collapses to modes, whatever its
    weight.
    """

    def student(ctx: Context) -> Tensor:
        x = ctx.sample().x
        with torch.no_grad():
            t = ctx.times()
            x_t = ctx.noised(x, t)
            g = residual_gradient(x, x0_from_v(x_t, ctx.real(x_t, t), t))
        return surrogate(x, g)

    return Preset(
        "2209.14988",
        student,
        guidance=specs.dmd(scale),
        role="baseline",
        note="no fake score: spread collapses",
    )


def dmd(scale: float = 1.0) -> Preset:
    """DMD without its regression: the score difference over |x - x0_real|, one step."""
    return Preset(
        "2311.18828",
        lambda ctx: dmd_term(ctx, ctx.sample().x),
        fit_critic(),
        guidance=specs.dmd(scale),
    )


def dmd2(scale: float = 1.0, gan: float = 0.03) -> Preset:
    """DMD2: DMD and a non-saturating game on noised samples against data, two steps by backward
    simulation.
    """

    def student(ctx: Context) -> Tensor:
        x = ctx.sample().x
        return dmd_term(ctx, x) + gan * gan_term(ctx, x)

    return Preset(
        "2405.14867", student, fit_critic(), play(), steps=2, guidance=specs.dmd(scale), covers=True
    )


def f_distill(scale: float = 1.0, gan: float = 0.03, divergence: str = "js") -> Preset:
    """f-distill: DMD2's direction times h(r), r from the discriminator's logit; Jensen-Shannon by
    default.
    """

    def student(ctx: Context) -> Tensor:
        x = ctx.sample().x
        with torch.no_grad():
            t = ctx.times()
            x_t = ctx.noised(x, t)
            h = f_weight(ctx.logits(x_t, t).mean(1), divergence)
            fake, real = ctx.predictions(x_t, t)
        term = surrogate(x, dmd_gradient(x, fake, real), weight=h / h.mean())
        return term + gan * gan_term(ctx, x)

    return Preset("2502.15681", student, fit_critic(), play(), guidance=specs.dmd(scale))


def swiftbrush(scale: float = 1.0) -> Preset:
    """SwiftBrush: no normaliser, the weight of variance-preserving noise, one guidance for both
    scores.
    """

    def student(ctx: Context) -> Tensor:
        t = ctx.times()
        weight = t * (1 - t) / (t**2 + (1 - t) ** 2)
        return dmd_term(ctx, ctx.sample().x, weight, "none", t)

    critic = fit_critic(weight=lambda t: loss_weight("swiftbrush", t))
    return Preset(
        "2312.05239",
        student,
        critic,
        guidance=specs.vsd(scale),
        note="guides both scores: settles at the plain prompt",
    )


def snoopi(scale: float = 1.0) -> Preset:
    """SNOOPI's PG-SB: a random scale a sample, the same for both scores. (Its NASA is a hook in
    attention.)
    """
    spec = specs.random_scale(0.5, max(scale, 0.5) * 2)
    base = swiftbrush(scale)
    return Preset(
        "2412.02687",
        base.student,
        base.critic,
        guidance=spec,
        note="guides both scores: settles at the plain prompt",
    )


def uni_dad(
    scale: float = 1.0, source: float = 0.5, target: float = 0.5, gan: float = 0.03
) -> Preset:
    """Uni-DAD: two teachers, one fake score, one game. Here the target's teacher is the unguided
    one.
    """

    def student(ctx: Context) -> Tensor:
        x = ctx.sample().x
        with torch.no_grad():
            t = ctx.times()
            x_t = ctx.noised(x, t)
            fake, real = ctx.predictions(x_t, t)
            plain = x0_from_v(x_t, ctx.real(x_t, t, 1.0), t)
            g = source * dmd_gradient(x, fake, real) + target * dmd_gradient(x, fake, plain)
        return surrogate(x, g) + gan * gan_term(ctx, x)

    note = "between the two teachers' laws" if scale != 1 else ""
    return Preset(
        "2511.18281", student, fit_critic(), play(), steps=2, guidance=specs.dmd(scale), note=note
    )


def flash_dmd(scale: float = 1.0, gan: float = 0.3, keep: float = 0.97) -> Preset:
    """Flash-DMD: the high-noise step learns from DMD, the low-noise step from the game; the fake
    score is pulled along (IDA).
    """

    def student(ctx: Context) -> Tensor:
        sample = ctx.sample()
        if sample.index == 0:
            return dmd_term(ctx, sample.x)
        return dmd_term(ctx, ctx.sample(0).x) + gan * gan_term(ctx, sample.x, high=0.5)

    def follow(ctx: Context) -> None:
        networks = ctx.networks
        couple(networks.critic_parameters(), networks.student_parameters(), keep)

    return Preset(
        "2511.20549",
        student,
        fit_critic(),
        play(high=0.5, exit_index=1),
        steps=2,
        critic_updates=2,
        guidance=specs.dmd(scale),
        after_student=follow,
    )


def gndm(scale: float = 1.0) -> Preset:
    """GNDM: the normaliser is the mean over the samples of a prompt, so that their proportions in t
    stay.
    """

    def student(ctx: Context) -> Tensor:
        x = ctx.sample().x
        with torch.no_grad():
            t = ctx.times()
            x_t = ctx.noised(x, t)
            g = dmd_gradient(x, *ctx.predictions(x_t, t), "group", ctx.cond)
        return surrogate(x, g)

    return Preset(
        "2603.28460",
        student,
        fit_critic(),
        guidance=specs.dmd(scale),
        note="the group form is our reading of an abstract",
    )


def emd(scale: float = 1.0, num_langevin: int = 4, gamma: float = 0.1) -> Preset:
    """EM distillation: Langevin steps on (eps, z) towards the teacher's posterior, then regression
    to where they led.

    The noises that were injected are cancelled from the residual, as in the paper, and its scale is
    such that one step with z held would be DMD's direction, times (1 - t)^2.
    """

    def student(ctx: Context) -> Tensor:
        t = ctx.times(low=0.05, high=0.95)
        one, z, eps = torch.ones_like(t), ctx.noise(), ctx.noise()
        a, b = 1 - expand_time(t, z), expand_time(t, z)
        gamma_z = gamma * b**2  # the pull on z grows as 1 / t^2
        led = torch.zeros_like(eps)
        for _ in range(num_langevin):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                x = ctx.jump(z, one)
            with torch.no_grad():
                x_t = a * x + b * eps
                fake, real = ctx.predictions(x_t, t)
                d = a / b**2 * (real - fake)  # the teacher's score less the fake one
            (pull,) = torch.autograd.grad(x, z, a * d)
            with torch.no_grad():
                led = (1 - gamma) * led + gamma * b * d
                eps = (1 - gamma) * eps + gamma * b * d + math.sqrt(2 * gamma) * ctx.noise()
                z = (1 - gamma_z) * z + gamma_z * pull + (2 * gamma_z).sqrt() * ctx.noise()
        g = -b / a * led / (gamma * num_langevin)
        return surrogate(ctx.jump(z, one), g, weight=(1 - t) ** 2, form="dot")

    return Preset("2405.16852", student, fit_critic(), guidance=specs.dmd(scale), covers=True)


def add(scale: float = 1.0, residual: float = 0.02) -> Preset:
    """ADD: a hinge game and the teacher's residual, which would collapse without the game."""

    def student(ctx: Context) -> Tensor:
        x = ctx.sample().x
        with torch.no_grad():
            t = ctx.times()
            x_t = ctx.noised(x, t)
            g = residual_gradient(x, x0_from_v(x_t, ctx.real(x_t, t), t))
        return gan_term(ctx, x, "hinge", high=0.5) + residual * surrogate(x, g, weight=1 - t)

    return Preset(
        "2311.17042",
        student,
        disc=with_penalty(play("hinge", high=0.5), 0.01, 0.1, "both"),
        guidance=specs.dmd(scale),
        rate=0.3,
        note="the residual narrows the modes",
    )


def msd(scale: float = 1.0, warm_up: float = 0.2, gan: float = 0.03) -> Preset:
    """MSD: DMD2 for each part of the prompts' space, after a warm-up on the teacher's velocity
    (TSM). Here one part.
    """
    base = dmd2(scale, gan)

    def student(ctx: Context) -> Tensor:
        if ctx.progress >= warm_up:
            return base.student(ctx)
        x, t, eps = ctx.data(ctx.cond), ctx.times(), ctx.noise()
        x_t = add_noise(x, eps, t)
        return distance(ctx.flow_map()(x_t, t, t), ctx.real(x_t, t).detach()).mean()  # sg

    return Preset("2410.23274", student, base.critic, base.disc, steps=1, guidance=base.guidance)


def tdm(scale: float = 1.0) -> Preset:
    """TDM: DMD on the noise levels between this step of the student and the next, in the sign-like
    Huber form.
    """

    def student(ctx: Context) -> Tensor:
        sample = ctx.sample()
        low = max(1 - (sample.index + 1) / ctx.preset.steps, 0.02)
        with torch.no_grad():
            t = low + (sample.t.clamp(max=0.98) - low) * ctx.uniform()
            x_t = ctx.noised(sample.x, t)
            g = dmd_gradient(sample.x, *ctx.predictions(x_t, t))
        return surrogate(sample.x, g, form="huber", huber_width=0.5)

    note = "each of four steps gets a quarter of the updates"
    return Preset(
        "2503.06674", student, fit_critic(), steps=4, guidance=specs.dmd(scale), note=note
    )


def flow_dmd(scale: float = 1.0, motion: float = 0.2) -> Preset:
    """DiagDistill's flow distribution matching: DMD, and DMD on what moves. For clips."""
    from streamvid.core.inject import temporal_difference as moves

    def student(ctx: Context) -> Tensor:
        x = ctx.sample().x
        with torch.no_grad():
            t = ctx.times()
            fake, real = ctx.predictions(ctx.noised(x, t), t)
            g = dmd_gradient(x, fake, real)
            g_motion = dmd_gradient(moves(x), moves(fake), moves(real))
        return surrogate(x, g) + motion * surrogate(moves(x), g_motion)

    return Preset(
        "2603.09488",
        student,
        fit_critic(),
        guidance=specs.dmd(scale),
        role="add-on",
        on_points=False,
        note="needs clips",
    )


# ---- score identity -----------------------------------------------------------------------------------


def sid(scale: float = 1.0, alpha: float = 1.2) -> Preset:
    """SiD: one step, gradients through teacher and fake score, updates one to one."""
    return Preset(
        "2404.04057",
        lambda ctx: sid_term(ctx, ctx.sample().x, alpha),
        fit_critic(),
        critic_updates=1,
        guidance=specs.dmd(scale),
        note="alpha above 1 keeps it moving: 1.8 and 2.5 at half the updates",
    )


def sid_lsg(scale: float = 1.0) -> Preset:
    """SiD-LSG: alpha 1 and one guidance for the teacher, for the fake score and for its fit."""
    return Preset(
        "2406.01561",
        lambda ctx: sid_term(ctx, ctx.sample().x, 1.0),
        fit_critic(),
        critic_updates=1,
        guidance=specs.long_short(scale),
    )


def few_step_sid(scale: float = 1.0) -> Preset:
    """Few-step SiD: every step of the student by its own, one fake score for their mixture;
    Zero-CFG where guided.
    """
    spec = GuidanceSpec() if scale == 1 else specs.zero_guidance()
    return Preset(
        "2505.12674",
        lambda ctx: sid_term(ctx, ctx.sample().x, 1.0),
        fit_critic(),
        steps=4,
        critic_updates=1,
        guidance=spec,
        note="each of four steps gets a quarter of the updates",
    )


def sida(scale: float = 1.0, gan: float = 0.03) -> Preset:
    """SiDA: SiD and a game in which real and fake share time and noise."""

    def student(ctx: Context) -> Tensor:
        x = ctx.sample().x
        return 0.5 * (sid_term(ctx, x, 1.0) + gan * gan_term(ctx, x))

    return Preset(
        "2410.14919",
        student,
        fit_critic(),
        play(shared=True),
        critic_updates=1,
        guidance=specs.dmd(scale),
        covers=True,
    )


# ---- one network for all ------------------------------------------------------------------------------


def twinflow(scale: float = 1.0, step: float = 0.01) -> Preset:
    """TwinFlow: the student is its own fake score at negative times. Four equal parts of a batch
    each have their loss.
    """

    def student(ctx: Context) -> Tensor:
        u, t, eps, data = (
            ctx.flow_map(),
            ctx.times(low=0.05, high=1.0),
            ctx.noise(),
            ctx.data(ctx.cond),
        )
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        x_t = add_noise(data, eps, t)
        v = ctx.real(x_t, t).detach() if scale != 1 else velocity(data, eps)  # sg
        matching = distance(u(x_t, t, t), v).mean()
        # a secant to s, from the teacher's short step and the student's own rest
        s = t * (1 - ctx.uniform())
        with torch.no_grad():
            short = torch.minimum(torch.full_like(t, step), t - s)
            near = euler_step(x_t, v, t, t - short)
            rest = expand_time(t - short - s, x_t) * u(near, t - short, s)
            target = (expand_time(short, x_t) * v + rest) / expand_time(
                (t - s).clamp_min(1e-4), x_t
            )
        secant = distance(u(x_t, t, s), target).mean()
        z = ctx.noise()
        velocity_one = u(z, one, zero)
        x = euler_step(z, velocity_one, one, zero)
        with torch.no_grad():  # the fake flow at (-t, -t) against the real at (t, t)
            x_n = ctx.noised(x, t)
            gap = (u(x_n, -t, -t) - u(x_n, t, t)).clamp(-1, 1)
        rectification = surrogate(velocity_one, gap)
        fake_eps = ctx.noise()
        # sg, sg
        fake = distance(
            u(add_noise(x.detach(), fake_eps, t), -t, -t), velocity(x.detach(), fake_eps)
        ).mean()
        return matching + secant + rectification + fake

    return Preset(
        "2512.05150",
        student,
        guidance=specs.dmd(scale),
        note="one network; no teacher's score where unguided",
    )
