"""Objectives in which a discriminator says what is wrong: on noised features, on clean samples, on
pairs of Euler steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamvid.core import guidance as specs
from streamvid.core.adversary import (
    approximate_penalty,
    discriminator_loss,
    euler_pair,
    generator_loss,
)
from streamvid.core.flowmap import distance
from streamvid.core.inject import surrogate
from streamvid.core.policy import group_advantage, nft_loss, optimality
from streamvid.core.process import add_noise, euler_step, velocity, x0_from_v
from streamvid.objectives.base import Context, Loss, Preset, fit_critic
from streamvid.objectives.score import dmd_term, with_penalty

__all__ = ["ladd", "gdd", "nitrofusion", "adm", "dmdx", "tad_sr", "asd", "afd"]


def feature_game(
    kind: str, low: float, high: float, source: str, law: str = "uniform"
) -> tuple[Loss, Loss]:
    """Both sides of a game on noised samples: (student's, discriminator's).

    Args:
        source: where the reals come from, "teacher" or "data".
    """

    def student(ctx: Context) -> Tensor:
        t = ctx.times(law, low, high)
        return generator_loss(kind, ctx.logits(add_noise(ctx.sample().x, ctx.noise(), t), t))

    def disc(ctx: Context) -> Tensor:
        with torch.no_grad():
            fake = ctx.sample().x
        real = ctx.pairs(ctx.cond)[1] if source == "teacher" else ctx.data(ctx.cond)
        t, t_real = ctx.times(law, low, high), ctx.times(law, low, high)
        return discriminator_loss(
            kind, ctx.logits(ctx.noised(fake, t), t), ctx.logits(ctx.noised(real, t_real), t_real)
        )

    return student, disc


def ladd(scale: float = 1.0) -> Preset:
    """LADD: a hinge game on the frozen teacher's features of re-noised samples; the reals are the
    teacher's own.
    """
    student, disc = feature_game("hinge", 0.02, 0.5, "teacher")
    disc = with_penalty(disc, 0.01, 0.1, "both")
    return Preset(
        "2403.12015", student, disc=disc, heads="film", guidance=specs.dmd(scale), rate=0.3
    )


def gdd(scale: float = 1.0) -> Preset:
    """GDD: data only. A logistic game on features of clean samples with R1; no teacher's score, no
    regression.
    """
    student, disc = feature_game("ns", 0.0, 0.05, "data")
    disc = with_penalty(disc, 0.01, 0.05, "data")
    return Preset(
        "2405.20750", student, disc=disc, note="data only: ignores guidance" if scale != 1 else ""
    )


def nitrofusion(scale: float = 1.0) -> Preset:
    """NitroFusion, in part: LADD's game with one head a layer, all of them used, of which a
    hundredth a step is made anew.

    The paper has a pool of heads for each layer, of which a step uses some, and a refreshed one
    begins with no optimiser state (``core.adversary.HeadPool``). Here there is no choice among
    heads, and the optimiser keeps its state. A pool of 48 with both measured no better: 5.24 times
    the floor on the ring, against 4.82.
    """
    student, disc = feature_game("hinge", 0.02, 0.5, "teacher")
    disc = with_penalty(disc, 0.01, 0.1, "both")

    def refresh(ctx: Context) -> None:
        ctx.networks.refresh_heads(0.01, ctx.rng)

    note = (
        "a head a layer is the whole pool: one made anew is a third of the discriminator; LADD is"
        " this without"
    )
    return Preset(
        "2412.02030",
        student,
        disc=disc,
        heads="film",
        guidance=specs.dmd(scale),
        rate=0.3,
        after_student=refresh,
        note=note,
    )


def adm(scale: float = 1.0, dt: float = 1 / 8) -> Preset:
    """ADM: which of two Euler steps of dt is the teacher's and which the fake score's; the gradient
    passes through the latter.

    The paper's dt is 1/64, with a discriminator as large as the teacher; small heads need the
    longer step to see a difference.
    """

    def pair(ctx: Context, x: Tensor, law: str) -> tuple[Tensor, Tensor, Tensor]:
        t = ctx.times(law, low=dt + 0.02)
        x_t = add_noise(x, ctx.noise(), t)
        return *euler_pair(x_t, t, dt, ctx.real(x_t, t), ctx.fake(x_t, t)), t - dt

    def student(ctx: Context) -> Tensor:
        _, fake, t = pair(ctx, ctx.sample().x, "cubic")
        return generator_loss("hinge", ctx.logits(fake, t))

    def disc(ctx: Context) -> Tensor:
        with torch.no_grad():
            real, fake, t = pair(ctx, ctx.sample().x, "uniform")
        return discriminator_loss("hinge", ctx.logits(fake, t), ctx.logits(real, t))

    return Preset(
        "2507.18569",
        student,
        fit_critic(),
        disc,
        heads="film",
        guidance=specs.dmd(scale),
        covers=True,
    )


def dmdx(scale: float = 1.0, share: float = 0.4) -> Preset:
    """DMDX: adversarial pre-training on the teacher's pairs of noise and sample (ADP), then ADM."""
    later = adm(scale)

    def on_path(ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        noise, real = ctx.pairs(ctx.cond)
        t = ctx.times(low=0.5, high=1.0)
        x_in = add_noise(real, noise, t)  # on the straight line between the two
        return ctx.jump(x_in, t), real, t

    def student(ctx: Context) -> Tensor:
        if ctx.progress >= share:
            return later.student(ctx)
        fake, _, _ = on_path(ctx)
        t = ctx.times()
        return generator_loss("hinge", ctx.logits(add_noise(fake, ctx.noise(), t), t))

    def disc(ctx: Context) -> Tensor:
        if ctx.progress >= share:
            return later.disc(ctx)
        with torch.no_grad():
            fake, real, _ = on_path(ctx)
        t, t_real = ctx.times(), ctx.times()
        return discriminator_loss(
            "hinge",
            ctx.logits(ctx.noised(fake, t), t),
            ctx.logits(ctx.noised(real, t_real), t_real),
        )

    note = "ADM's part has 60 % of the updates"
    return Preset(
        "2507.18569",
        student,
        later.critic,
        disc,
        heads="film",
        guidance=specs.dmd(scale),
        covers=True,
        note=note,
    )


def tad_sr(scale: float = 1.0, gan: float = 0.3) -> Preset:
    """TAD-SR's high-frequency score distillation beside a time-aware game: what the teacher changes
    in the student's sample less what it changes in its own, at low noise, where its bias
    cancels.
    """
    game, disc = feature_game("ns", 0.02, 0.98, "teacher")

    def student(ctx: Context) -> Tensor:
        noise, real = ctx.pairs(ctx.cond)
        one = torch.ones(ctx.batch_size, dtype=ctx.dtype)
        x, eps, t = ctx.jump(noise, one), ctx.noise(), ctx.times(low=0.02, high=0.3)
        with torch.no_grad():
            changes = [
                z - x0_from_v(z_t, ctx.real(z_t, t), t)
                for z in (x, real)
                for z_t in [add_noise(z, eps, t)]
            ]
        return (
            surrogate(x, changes[0] - changes[1]) + 0.5 * distance(x, real).mean() + gan * game(ctx)
        )

    return Preset("2408.07476", student, disc=disc, heads="film", guidance=specs.dmd(scale))


def asd(scale: float = 1.0, alpha: float = 0.3, steps: int = 2) -> Preset:
    """ASD: the n-step output of the student against its own (n + 1)-step output, in pairs, with DMD
    as the anchor.

    A logit for each n; approximate R1 and R2; no gradient into the better branch.
    """

    def branches(ctx: Context) -> tuple[Tensor, Tensor, Tensor, int]:
        n = int(torch.randint(ctx.preset.steps - 1, (), generator=ctx.rng))
        fewer = ctx.sample(n).x
        with torch.no_grad():
            more = ctx.sample(n + 1).x  # sg
        t = ctx.times()
        return add_noise(fewer, ctx.noise(), t), ctx.noised(more, t), t, n

    def student(ctx: Context) -> Tensor:
        anchor = dmd_term(ctx, ctx.sample().x)
        fewer, more, t, n = branches(ctx)
        own = slice(n, None, ctx.preset.num_logits)
        return anchor + alpha * generator_loss(
            "paired", ctx.logits(fewer, t)[:, own], ctx.logits(more, t)[:, own]
        )

    def disc(ctx: Context) -> Tensor:
        with torch.no_grad():
            fewer, more, t, n = branches(ctx)
        own = slice(n, None, ctx.preset.num_logits)
        logits = lambda x: ctx.logits(x, t)[:, own]
        penalty = sum(
            approximate_penalty(logits, x, ctx.noise(), 0.05, divide=True) for x in (fewer, more)
        )
        return discriminator_loss("paired", logits(fewer), logits(more)) + 0.1 * penalty

    return Preset(
        "2511.01419",
        student,
        fit_critic(),
        disc,
        steps=steps,
        heads="film",
        num_logits=steps - 1,
        guidance=specs.dmd(scale),
        note="the student's own more steps are the reals",
    )


def afd(scale: float = 1.0, beta: float = 0.5, prior: float = 1e-3) -> Preset:
    """AFD: no teacher's score. A paired discriminator on clean samples gives advantages,
    negative-aware flow matching moves the student's velocity from a lagged policy; a prior holds it
    near its start.
    """
    near = 0.02

    def clean_logits(ctx: Context, x: Tensor) -> Tensor:
        return ctx.logits(x, torch.full((ctx.batch_size,), near, dtype=ctx.dtype))

    def rollout(ctx: Context) -> Tensor:
        old, times = (
            ctx.flow_map("lagged"),
            torch.linspace(1, 0, ctx.preset.steps + 1, dtype=ctx.dtype),
        )
        with torch.no_grad():
            x = ctx.noise()
            for t, s in zip(times, times[1:]):
                t, s = t.expand(ctx.batch_size), s.expand(ctx.batch_size)
                x = euler_step(x, old(x, t, t), t, s)
        return x

    def student(ctx: Context) -> Tensor:
        x, t, eps = rollout(ctx), ctx.times(), ctx.noise()
        with torch.no_grad():
            advantage = group_advantage(clean_logits(ctx, x).mean(1), ctx.cond, std="none")
            x_t = add_noise(x, eps, t)
            v_old, v_start = ctx.flow_map("lagged")(x_t, t, t), ctx.flow_map("start")(x_t, t, t)
        v = ctx.flow_map()(x_t, t, t)
        return (
            nft_loss(v, v_old, velocity(x, eps), optimality(advantage, 5.0), beta)
            + prior * distance(v, v_start).mean()
        )

    def disc(ctx: Context) -> Tensor:
        fake, real = rollout(ctx), ctx.pairs(ctx.cond)[1]
        logits = lambda x: clean_logits(ctx, x)
        penalty = approximate_penalty(logits, real, ctx.noise(), 0.05, divide=True)
        return discriminator_loss("paired", logits(fake), logits(real)) + 0.05 * penalty

    return Preset(
        "2605.26105",
        student,
        disc=disc,
        steps=4,
        sampler="euler",
        rate=0.2,
        note="moves a velocity, not a jump: a policy step, sampled with Euler steps",
    )
