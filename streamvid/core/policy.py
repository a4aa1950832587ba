"""Policies: advantages, likelihoods of a sampler's steps, preferences, and negative-aware flow
matching.

A few-step student that re-noises its data prediction is a Gaussian policy: its next state is N((1 -
t') x0, t'^2).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from streamvid.core.process import Time, as_work, expand_time, x0_from_v


@torch.no_grad()
def group_advantage(
    rewards: Tensor,
    group: Tensor | None = None,
    std: Literal["group", "batch", "none"] = "group",
    clip: float | None = None,
) -> Tensor:
    """Rewards ``[B]`` or ``[B, J]`` less their group's mean, over a deviation (GRPO, arXiv
    2402.03300, section 4.1).

    With a deviation it does not change under rewards -> a rewards + b; a group of equal rewards
    gives 0. Near an optimum a deviation keeps steps from shrinking, so "none" is for what has to
    converge.

    Args:
        group: integers ``[B]``, such as the index of the prompt; None is one group.
        std: whose deviation to divide by; of J rewards a sample each has its own "group", and all
            share one "batch".
        clip: bound on the absolute value.

    Raises:
        ValueError: on another ``std``.
    """
    if std not in ("group", "batch", "none"):
        raise ValueError(f"std={std!r}, expected 'group', 'batch' or 'none'")
    rewards = as_work(rewards)
    same = (
        torch.ones(len(rewards), len(rewards)) if group is None else (group[:, None] == group[None])
    )
    share = same.to(rewards) / same.sum(dim=1, keepdim=True).to(rewards)
    centred = rewards - share @ rewards
    if std != "none":
        variance = share @ centred.square() if std == "group" else centred.square().mean()
        centred = centred / (variance.sqrt() + 1e-4 * (variance == 0))
    return centred if clip is None else centred.clamp(-clip, clip)


def optimality(advantage: Tensor, clip: float = 5.0) -> Tensor:
    """``clip(A, -c, c) / (2c) + 1/2``: advantages as probabilities of being good, in [0, 1]
    (DiffusionNFT, 2509.16117).
    """
    return as_work(advantage).clamp(-clip, clip) / (2 * clip) + 0.5


def step_logp(
    x_next: Tensor, x0: Tensor, t_next: Time, reduce: Literal["sum", "mean"] = "sum"
) -> Tensor:
    """``-|x_next - (1 - t') x0|^2 / (2 t'^2)`` of each sample ``[B]``: the log-likelihood of a
    re-noising step.

    Without the constant, which cancels in every use. "mean" over the numbers of a sample is PSO's
    released code: it divides every later temperature by the size of a sample.

    Args:
        x_next: the state that was drawn, at ``t_next`` > 0; detached by the caller.
        x0: the data prediction of the policy that is asked.

    Raises:
        ValueError: on another ``reduce``.
    """
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce={reduce!r}, expected 'sum' or 'mean'")
    t_next = expand_time(t_next, x0)
    terms = -((as_work(x_next) - (1 - t_next) * as_work(x0)) / t_next).square() / 2
    return terms.flatten(1).sum(1) if reduce == "sum" else terms.flatten(1).mean(1)


def pairwise(
    log_ratio_winner: Tensor, log_ratio_loser: Tensor, beta: float, clip: float | None = None
) -> Tensor:
    """``-log sigmoid(beta (log r_winner - log r_loser))``, a scalar: Diffusion-DPO (arXiv
    2311.12908), PSO (2410.03190).

    Args:
        log_ratio_winner, log_ratio_loser: ``[B]``, log pi - log pi_reference of what was preferred
            and of what was not.
        beta: temperature; the loss is log 2 where policy and reference agree.
        clip: PSO's: keeps each ratio in [1 - clip, 1 + clip], beyond which it has no gradient.
    """
    winner, loser = as_work(log_ratio_winner), as_work(log_ratio_loser)
    if clip is not None:
        winner, loser = (x.exp().clamp(1 - clip, 1 + clip).log() for x in (winner, loser))
    return -logsigmoid(beta * (winner - loser)).mean()


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    v_target: Tensor,
    weight: Tensor,
    beta: float = 1.0,
    x_t: Tensor | None = None,
    t: Time | None = None,
) -> Tensor:
    """Negative-aware flow matching, ``r |v+ - v*|^2 + (1 - r) |v- - v*|^2`` (DiffusionNFT, arXiv
    2509.16117; AFD, 2605.26105).

        v+ = (1 - b) v_old + b v        v- = (1 + b) v_old - b v
        v* = eps - x0 of the policy's own clean sample

    Good samples (r > 1/2) draw v on, bad ones push it off, both measured from the policy that drew
    them. Where v_old is the mean of v* the optimum is v_old + (2 / b) Cov(r, v* | x_t), so r = 1/2
    for all leaves it where it is.

    Args:
        v: the network's velocity, with gradient.
        v_old: the lagged policy's; ``v_target``: v*; neither gets gradient.
        weight: r in [0, 1], of ``optimality``: ``[B]``, or one a place, of a shape that broadcasts
            to that of ``v``.
        beta: b > 0.
        x_t, t: given both, the errors are taken of x0 and each sample's divided by its own mean
            absolute error, as in the released code; otherwise they are the plain squares above.

    Raises:
        ValueError: unless ``beta`` > 0, or if only one of ``x_t`` and ``t`` is given.
    """
    if beta <= 0:
        raise ValueError(f"beta={beta}, expected a positive number")
    if (x_t is None) != (t is None):
        raise ValueError("x_t and t go together: both, for the self-normalised form, or neither")
    v_old, v_target = as_work(v_old).detach(), as_work(v_target).detach()  # sg, sg
    positive = (1 - beta) * v_old + beta * as_work(v)
    negative = (1 + beta) * v_old - beta * as_work(v)
    if x_t is not None and t is not None:
        positive = x0_from_v(x_t, positive, t)
        negative = x0_from_v(x_t, negative, t)
        v_target = x0_from_v(x_t, v_target, t)
    good = _error(positive, v_target, normalized=x_t is not None)
    bad = _error(negative, v_target, normalized=x_t is not None)
    weight = as_work(weight).detach()  # sg
    if weight.ndim == 1:
        weight = expand_time(weight, v_target)
    return (weight * good + (1 - weight) * bad).mean()


def _error(guess: Tensor, target: Tensor, normalized: bool) -> Tensor:
    """Squared errors, of the inputs' shape."""
    error = guess - target
    if not normalized:
        return error.square()
    size = error.detach().abs().flatten(1).mean(1).clamp_min(1e-5)  # sg
    return error.square() / expand_time(size, error)


def winner_loser_gradient(
    winner: Tensor, loser: Tensor, x_is_winner: Tensor, eta: float | Tensor
) -> Tensor:
    """Distillation-DPO's direction (arXiv 2504.11447): DMD's of the winners' fake score, minus
    ``eta`` times the losers'.

    Args:
        winner, loser: ``inject.dmd_gradient`` with the fake score of winners and of losers, of one
            shape.
        x_is_winner: ``[B]``; each sample gets the direction of its own side.
        eta: 0 leaves the losers alone; one per sample, ``[B]``; a negative one draws its
            loser to the data.
    """
    side = expand_time(x_is_winner.to(winner.dtype), winner)
    if isinstance(eta, Tensor):
        eta = expand_time(eta, winner)
    return side * winner - eta * (1 - side) * loser
