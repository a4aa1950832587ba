"""Policies: advantages, likelihoods, preferences, and the optimum of negative-aware flow
matching.
"""

import math

import pytest
import torch

from streamvid.core.policy import (
    group_advantage,
    nft_loss,
    optimality,
    pairwise,
    step_logp,
    winner_loser_gradient,
)
from streamvid.core.process import add_noise, velocity


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GROUP = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_advantages(std):
    rewards = normals(8)
    advantage = group_advantage(rewards, GROUP, std)
    for g in range(3):
        assert advantage[GROUP == g].mean().abs() < 1e-12
    shifted = group_advantage(rewards + 5 * GROUP, GROUP, std)
    torch.testing.assert_close(shifted, advantage)
    scaled = group_advantage(3 * rewards, GROUP, std)
    torch.testing.assert_close(scaled, advantage * (3 if std == "none" else 1))
    if std == "group":
        assert advantage[:3].square().mean().item() == pytest.approx(1)


def test_equal_rewards_have_no_advantage():
    assert group_advantage(torch.full((8,), 2.5), GROUP).abs().max() == 0
    assert group_advantage(torch.full((3,), 2.5)).abs().max() == 0
    assert group_advantage(torch.tensor([-9.0, 9.0]), std="none", clip=5.0).tolist() == [-5.0, 5.0]
    # rewards of two places share a batch's deviation
    two = torch.stack([torch.arange(8.0), torch.zeros(8)], dim=1)
    torch.testing.assert_close(
        group_advantage(two, GROUP, "batch")[:, 0],
        group_advantage(two[:, 0], GROUP, "batch") * 2**0.5,
    )
    with pytest.raises(ValueError, match="std='mad'"):
        group_advantage(torch.zeros(2), std="mad")


def test_optimality_maps_to_the_unit_interval():
    assert optimality(torch.tensor([-9.0, -5.0, 0.0, 2.5, 7.0])).tolist() == [
        0.0,
        0.0,
        0.5,
        0.75,
        1.0,
    ]


def test_the_likelihood_of_a_step_is_a_normal_density():
    x0, noise, t = normals(3, 2, 4, 4), normals(3, 2, 4, 4, seed=1), 0.6
    x_next = add_noise(x0, noise, t)
    density = torch.distributions.Normal((1 - t) * x0, torch.tensor(t).double())
    constant = 32 * (math.log(0.6) + 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(
        step_logp(x_next, x0, t), density.log_prob(x_next).flatten(1).sum(1) + constant
    )
    torch.testing.assert_close(step_logp(x_next, x0, t, "mean") * 32, step_logp(x_next, x0, t))


def test_preferences():
    """log 2 where policy and reference agree; a mean in place of a sum divides the temperature by
    the size of a sample.
    """
    zero = torch.zeros(4, dtype=torch.float64)
    assert pairwise(zero, zero, 50.0).item() == pytest.approx(math.log(2))
    winner, loser = normals(4), normals(4, seed=1)
    torch.testing.assert_close(
        pairwise(winner, loser, 2.0), pairwise(32 * winner, 32 * loser, 2.0 / 32)
    )
    ratios = [x.clone().requires_grad_() for x in (torch.full((1,), 0.5), torch.full((1,), -0.5))]
    pairwise(*ratios, 50.0, clip=0.1).backward()
    assert all(x.grad == 0 for x in ratios)  # beyond the clip
    ratios = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    pairwise(*ratios, 1.0, clip=0.1).backward()
    assert ratios[0].grad < 0 < ratios[1].grad


# ---- negative-aware flow matching


def test_the_optimum_is_the_shifted_policy():
    """q = N(mu, s^2), r = 1/2 + k (x0 - mu): the least loss is at the velocity of N(mu + 2 k
    s^2 / b, s^2), at every t.
    """
    mu, s, k, beta = 0.3, 0.8, 0.05, 0.5
    for t in (0.2, 0.7):
        x0, eps = mu + s * normals(400000), normals(400000, seed=1)
        x_t, target = (
            add_noise(x0[:, None, None, None], eps[:, None, None, None], t).flatten(),
            eps - x0,
        )
        variance = (1 - t) ** 2 * s**2 + t**2

        def field(mean):
            x0_hat = mean + (1 - t) * s**2 / variance * (x_t - (1 - t) * mean)
            return (x_t - x0_hat) / t

        r = 0.5 + k * (x0 - mu)
        best = field(mu + 2 * k * s**2 / beta)
        v = best.clone().requires_grad_()
        shape = lambda z: z[:, None, None, None]
        (slope,) = torch.autograd.grad(
            nft_loss(shape(v), shape(field(mu)), shape(target), r, beta), v
        )
        # a regression residual: uncorrelated with functions of x_t at the optimum
        total = slope * len(x0) / 2 / beta
        for probe in (torch.ones_like(x_t), (x_t - x_t.mean()) / x_t.std()):
            mean = (total * probe).mean()
            assert abs(mean) < 4 * (total * probe).std() / math.sqrt(len(x_t))
        (off,) = torch.autograd.grad(
            nft_loss(shape(field(mu).requires_grad_()), shape(field(mu)), shape(target), r, beta),
            v,
            allow_unused=True,
        )
        assert off is None
        wrong = field(mu).clone().requires_grad_()
        (slope,) = torch.autograd.grad(
            nft_loss(shape(wrong), shape(field(mu)), shape(target), r, beta), wrong
        )
        total = slope * len(x0) / 2 / beta
        assert abs(total.mean()) > 8 * total.std() / math.sqrt(len(x_t))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_indifference_changes_nothing(beta):
    """r = 1/2 for all: the gradient at v = v_old is b^2 (v - v_old), 0, whatever the target."""
    v = normals(4, 2, 3, 3).requires_grad_()
    (slope,) = torch.autograd.grad(
        nft_loss(v, v, normals(4, 2, 3, 3, seed=1), torch.full((4,), 0.5), beta), v
    )
    assert slope.abs().max() < 1e-15


def test_good_samples_at_beta_one_are_flow_matching():
    v, old, target = (normals(4, 2, 3, 3, seed=i) for i in range(3))
    torch.testing.assert_close(
        nft_loss(v, old, target, torch.ones(4)), (v - target).square().mean()
    )


def test_bad_samples_push_off():
    v, target = normals(4, 2, 3, 3).requires_grad_(), normals(4, 2, 3, 3, seed=1)
    slopes = [
        torch.autograd.grad(nft_loss(v, v, target, torch.full((4,), r), 0.5), v)[0]
        for r in (0.0, 1.0)
    ]
    torch.testing.assert_close(slopes[0], -slopes[1])


def test_a_weight_a_place_is_felt_there_alone():
    v, old, target = (
        normals(2, 1, 4, 2).requires_grad_(),
        normals(2, 1, 4, 2, seed=1),
        normals(2, 1, 4, 2, seed=2),
    )
    slope = lambda weight: torch.autograd.grad(nft_loss(v, old, target, weight, 0.5), v)[0]
    mixed = torch.full((2, 1, 4, 1), 0.2, dtype=torch.float64)
    mixed[:, :, 2:] = 0.9
    low, high = (slope(torch.full((2,), r)) for r in (0.2, 0.9))
    torch.testing.assert_close(slope(mixed), torch.cat([low[:, :, :2], high[:, :, 2:]], dim=2))


def test_the_self_normalised_form():
    """Each sample's error of x0 is divided by its own mean size, so that scaling the errors of one
    scales its loss once.
    """
    x0, eps, t = (
        normals(2, 2, 3, 3),
        normals(2, 2, 3, 3, seed=1),
        torch.tensor([0.4, 0.8], dtype=torch.float64),
    )
    x_t, target = add_noise(x0, eps, t), velocity(x0, eps)
    v = target + normals(2, 2, 3, 3, seed=2)
    error = t[:, None, None, None] * (v - target)
    expected = (error.square().mean((1, 2, 3)) / error.abs().mean((1, 2, 3))).mean()
    torch.testing.assert_close(nft_loss(v, v, target, torch.ones(2), 1.0, x_t, t), expected)
    with pytest.raises(ValueError, match="go together"):
        nft_loss(v, v, target, torch.ones(2), 1.0, x_t)
    with pytest.raises(ValueError, match="beta=0"):
        nft_loss(v, v, target, torch.ones(2), 0)


def test_only_the_policy_gets_a_gradient():
    v, old, target, weight = (
        normals(2, 1, 2, 2),
        normals(2, 1, 2, 2, seed=1),
        normals(2, 1, 2, 2, seed=2),
        torch.rand(2),
    )
    inputs = [z.clone().requires_grad_() for z in (v, old, target, weight)]
    nft_loss(*inputs, beta=0.5).backward()
    assert inputs[0].grad is not None and all(z.grad is None for z in inputs[1:])


def test_winners_and_losers():
    """Without losers it is DMD on the winners; the two directions meet their own side's samples
    only.
    """
    winner, loser = normals(4, 2, 3, 3), normals(4, 2, 3, 3, seed=1)
    side = torch.tensor([1, 0, 1, 0])
    direction = winner_loser_gradient(winner, loser, side, eta=0.4)
    assert torch.equal(direction[0], winner[0])
    torch.testing.assert_close(direction[1], -0.4 * loser[1])
    assert winner_loser_gradient(winner, loser, side, eta=0.0)[1].abs().max() == 0
    own = winner_loser_gradient(
        winner, loser, side, torch.full((len(side),), -1.0, dtype=winner.dtype)
    )
    torch.testing.assert_close(own[side == 0], loser[side == 0])  # drawn, as a winner is
