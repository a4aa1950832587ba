"""Objectives that join a host: moments of sets, preferences, relations; and Distillation++, a hook
of the sampler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamvid.core import guidance as specs
from streamvid.core.fitting import flow_matching_loss
from streamvid.core.flowmap import distance, teacher_steps
from streamvid.core.inject import dmd_gradient, surrogate
from streamvid.core.moments import RandomFeatures, mmd2, relational_kl
from streamvid.core.policy import pairwise, step_logp, winner_loser_gradient
from streamvid.core.process import add_noise, euler_step, renoise_step, x0_from_v
from streamvid.objectives.base import Context, Preset, fit_critic
from streamvid.objectives.score import dmd_term

__all__ = ["embedding_loss", "pso", "distillation_dpo", "rdd"]


def embedding_loss(scale: float = 1.0, weight: float = 0.1, num_nets: int = 2) -> Preset:
    """Embedding Loss: DMD, and the mean features of student and teacher samples in networks drawn
    anew each step.
    """

    def student(ctx: Context) -> Tensor:
        x, (_, real) = ctx.sample().x, ctx.pairs(ctx.cond)
        kernel = 1 if x.shape[-1] == 1 else 3
        total = dmd_term(ctx, x)
        for _ in range(num_nets):
            seed = int(torch.randint(2**31, (), generator=ctx.rng))
            net = RandomFeatures(x.shape[1], seed, width=128, depth=2, kernel=kernel).to(x.dtype)
            total = total + weight / num_nets * mmd2(net(x), net(real), unbiased=False)
        return total

    note = (
        "our reading of kernel, nets, weight; its batch noise takes the host from 1.2 to 2.5;"
        " compares all prompts together"
    )
    return Preset(
        "2604.22379", student, fit_critic(), guidance=specs.dmd(scale), covers=True, note=note
    )


def pso(scale: float = 1.0, beta: float = 5.0, hold: float = 1.0) -> Preset:
    """PSO: of two next states that the student draws, the one with the better reward is made more
    likely than the other, against the student as it was; DMD holds the law meanwhile. Two steps.
    """

    def student(ctx: Context) -> Tensor:
        first, zero = ctx.sample(0), torch.zeros(ctx.batch_size, dtype=ctx.dtype)
        t = zero + 0.5
        old = ctx.flow_map("lagged")
        with torch.no_grad():
            x0_old = euler_step(first.x_t, old(first.x_t, first.t, zero), first.t, zero)
            states = [renoise_step(x0_old, ctx.noise(), t) for _ in range(2)]
            rewards = [
                ctx.reward(euler_step(s, old(s, t, zero), t, zero), ctx.cond) for s in states
            ]
        ratios = [
            step_logp(s, first.x, t, "mean") - step_logp(s, x0_old, t, "mean") for s in states
        ]
        better = (rewards[0] > rewards[1]).to(ctx.dtype)
        winner = better * ratios[0] + (1 - better) * ratios[1]
        loser = better * ratios[1] + (1 - better) * ratios[0]
        return hold * dmd_term(ctx, ctx.sample().x) + 0.1 * pairwise(winner, loser, beta, clip=0.1)

    note = "chases a reward, here the teacher's density: modes narrow"
    return Preset(
        "2410.03190",
        student,
        fit_critic(),
        steps=2,
        guidance=specs.dmd(scale),
        role="add-on",
        note=note,
    )


def distillation_dpo(scale: float = 1.0, eta: float = 0.2, stop: float = 0.1) -> Preset:
    """Distillation-DPO: a fake score of winners and one of losers; samples move by DMD's direction
    of their own side.

    Half of the samples are losers whatever they are, and to be pushed off has no end: so a loser is
    pushed, with the weight ``eta``, only while its fake score's data prediction is within ``stop``
    of the teacher's, and drawn as a winner is beyond. The released code has a small rate and
    clipped gradients (1e-5, norm .05) in place of such a bound.
    """

    def split(ctx: Context, x: Tensor) -> Tensor:
        """1 for samples whose reward is not below their prompt's median; the only one of its prompt
        has nobody to lose to.
        """
        reward = ctx.reward(x.detach(), ctx.cond)
        side = torch.zeros(ctx.batch_size, dtype=ctx.dtype)
        for prompt in ctx.cond.unique():
            rows = ctx.cond == prompt
            side[rows] = (reward[rows] >= reward[rows].quantile(0.5)).to(ctx.dtype)
        return side

    def student(ctx: Context) -> Tensor:
        x = ctx.sample().x
        with torch.no_grad():
            side, t = split(ctx, x), ctx.times()
            x_t = ctx.noised(x, t)
            real = x0_from_v(x_t, ctx.real(x_t, t), t)
            networks = (ctx.critic, ctx.networks.second_critic)
            own = [x0_from_v(x_t, net(x_t, t, ctx.cond), t) for net in networks]
            winner, loser = (dmd_gradient(x, x0, real) for x0 in own)
            far = (own[1] - real).abs().flatten(1).mean(1) > stop
            push = torch.where(far, -1.0, eta)
        return surrogate(x, winner_loser_gradient(winner, loser, side, push), form="dot")

    def critic(ctx: Context) -> Tensor:
        with torch.no_grad():
            x = ctx.sample().x
        side, t, eps = split(ctx, x), ctx.times(), ctx.noise()
        x_t = add_noise(x, eps, t)
        loss = flow_matching_loss(ctx.critic(x_t, t, ctx.cond), x, eps, mask=side)
        if bool(side.all()):
            return loss
        return loss + flow_matching_loss(
            ctx.networks.second_critic(x_t, t, ctx.cond), x, eps, mask=1 - side
        )

    note = (
        "prefers the denser half of each prompt; the push of the other half ends at a distance, or"
        " it diverges"
    )
    return Preset(
        "2504.11447", student, critic, guidance=specs.dmd(scale), role="add-on", note=note
    )


def rdd(scale: float = 1.0, relation: float = 0.05) -> Preset:
    """RDD: two teacher steps in one of the student's, and who is like whom, in the frozen start's
    features.
    """

    def student(ctx: Context) -> Tensor:
        noise, _ = ctx.pairs(ctx.cond)
        one = torch.ones(ctx.batch_size, dtype=ctx.dtype)
        index = int(torch.randint(ctx.preset.steps, (), generator=ctx.rng))
        t, s = one * (1 - index / ctx.preset.steps), one * (1 - (index + 1) / ctx.preset.steps)
        x_t = teacher_steps(ctx.real, noise, one, t, 8 * index) if index else noise
        aim = teacher_steps(ctx.real, x_t, t, s, 8)
        landed = ctx.jump(x_t, t, s)
        features = [ctx.networks.features(x, s, ctx.cond) for x in (landed, aim)]
        return distance(landed, aim).mean() + relation * relational_kl(*features)

    return Preset("2410.07679", student, steps=4, sampler="jump", guidance=specs.dmd(scale))


def teacher_refinement(ctx: Context, x0: Tensor, s: Tensor, weight: float) -> Tensor:
    """Distillation++ (arXiv 2412.08871): a student's data prediction, mixed with the teacher's of
    it re-noised to ``s``.

    A hook of the sampler, used after the first step or two; ``weight`` 0 calls no network and draws
    nothing.
    """
    if weight == 0:
        return x0
    x_s = add_noise(x0, ctx.noise(), s)
    return (1 - weight) * x0 + weight * x0_from_v(x_s, ctx.real(x_s, s), s)
