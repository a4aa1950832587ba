"""Adversaries: optima of each game, penalties of linear discriminators, heads, pools, and who gets
gradients.
"""

import math

import pytest
import torch
from torch import nn

from streamvid.core.adversary import (
    ConvHead,
    FeatureHeads,
    HeadPool,
    TokenHead,
    approximate_penalty,
    capture,
    discriminator_loss,
    euler_pair,
    generator_loss,
)
from streamvid.core.process import x0_from_v
from tests.fakes import TINY_WAN

KINDS = ("ns", "hinge", "hinge_margin", "lsgan", "wgan", "paired")
GRID = torch.linspace(-10, 12, 551, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])


def density(mean):
    return torch.exp(-((GRID - mean) ** 2) / 2) / math.sqrt(2 * math.pi)


def expected_loss(kind, logits, p_real, p_fake, step):
    """The discriminator's loss with a logit for each point of a grid; its fake and its real part
    add up.
    """
    loss = lambda f, r: float(
        discriminator_loss(kind, torch.tensor([[f]]).double(), torch.tensor([[r]]).double())
    )
    base = loss(0.0, 0.0)
    fakes = torch.tensor([loss(value, 0.0) for value in logits.tolist()], dtype=torch.float64)
    reals = torch.tensor([loss(0.0, value) for value in logits.tolist()], dtype=torch.float64)
    return float((p_fake * (fakes - base) + p_real * (reals - base)).sum() * step) + base


# ---- loss pairs


def test_the_hinge_optimum():
    """Q7: D* = sign(p - q) and the least loss is 2 int min(p, q) = 4 Phi(-d / 2) for unit Gaussians
    d apart.
    """
    d = 1.5
    p, q = density(d), density(0.0)
    best = torch.where(p > q, 1.0, -1.0)
    value = expected_loss("hinge", best, p, q, STEP)
    assert value == pytest.approx(4 * float(torch.special.ndtr(torch.tensor(-d / 2))), abs=2e-3)
    assert expected_loss("hinge", 0.9 * best, p, q, STEP) > value + 0.01


def test_the_logistic_optimum():
    """Q7: D* = log p / q and the least loss is 2 log 2 - 2 JS(p, q)."""
    p, q = density(1.5), density(0.0)
    middle = (p + q) / 2
    js = float((p * (p / middle).log() + q * (q / middle).log()).sum() * STEP / 2)
    best = (p / q).log()
    value = expected_loss("ns", best, p, q, STEP)
    assert value == pytest.approx(2 * math.log(2) - 2 * js, abs=1e-6)
    for change in (0.9, 1.1):
        assert expected_loss("ns", change * best, p, q, STEP) > value + 1e-4


def test_pairs_learn_the_log_ratio():
    """O6: softplus(D(fake) - D(real)) has its least value at D = log p / q + const; for unit
    Gaussians slope d.
    """
    d = 1.2
    x, y = torch.randn(2, 200000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slopes = torch.linspace(0.6, 1.8, 25, dtype=torch.float64)
    losses = [
        float(discriminator_loss("paired", (k * x)[:, None], (k * (y + d))[:, None]))
        for k in slopes
    ]
    assert float(slopes[losses.index(min(losses))]) == pytest.approx(d, abs=0.051)
    nothing = torch.randn(50, 1)
    assert float(discriminator_loss("paired", nothing, nothing)) == pytest.approx(math.log(2))


def test_pairs_do_not_see_a_constant():
    fake, real = torch.randn(
        2, 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    for c in (-3.0, 10.0):
        torch.testing.assert_close(
            generator_loss("paired", fake + c, real + c), generator_loss("paired", fake, real)
        )
        torch.testing.assert_close(
            discriminator_loss("paired", fake + c, real + c),
            discriminator_loss("paired", fake, real),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_climbs_and_the_discriminator_parts(kind):
    fake, real = torch.zeros(4, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    (up,) = torch.autograd.grad(generator_loss(kind, fake, real), fake)
    assert (up < 0).all()  # descent raises the fakes' logits
    fake_slope, real_slope = torch.autograd.grad(discriminator_loss(kind, fake, real), (fake, real))
    assert (
        (real_slope < 0).all()
        and (fake_slope > 0).all()
        or kind == "lsgan"
        and (real_slope < 0).all()
    )


def test_no_gradient_to_the_reals_of_a_pair_and_a_margin_where_asked():
    fake, real = torch.randn(4, 1, requires_grad=True), torch.randn(4, 1, requires_grad=True)
    generator_loss("paired", fake, real).backward()
    assert fake.grad is not None and real.grad is None
    beyond = torch.full((2, 1), 1.5, requires_grad=True)
    assert torch.autograd.grad(generator_loss("hinge_margin", beyond), beyond)[0].abs().max() == 0
    assert torch.autograd.grad(generator_loss("hinge", beyond), beyond)[0].abs().min() > 0


def test_bad_requests_are_refused():
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="kind='gan'"):
        generator_loss("gan", x)
    with pytest.raises(ValueError, match="compares by index"):
        generator_loss("paired", x)
    with pytest.raises(ValueError, match="one shape"):
        discriminator_loss("ns", x, torch.zeros(3, 1))


# ---- penalties


def test_penalties_of_a_linear_discriminator():
    """sigma^2 |w|^2 on average, and |w|^2 when divided."""
    w = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(20000, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits_of = lambda x: (x.flatten(1) @ w)[:, None]
    norm = float(w @ w)
    assert approximate_penalty(logits_of, x, noise, 0.05).item() == pytest.approx(
        0.05**2 * norm, rel=0.03
    )
    assert approximate_penalty(logits_of, x, noise, 0.05, divide=True).item() == pytest.approx(
        norm, rel=0.03
    )
    with pytest.raises(ValueError, match="sigma=0"):
        approximate_penalty(logits_of, x, noise, 0)


def test_a_regularised_slope():
    """O7: of the paired loss with gap d and weight lam on |D(x + s n) - D(x)|^2, slope about (d/2)
    / (s_x^2/2 + d^2/4 + 2 lam s^2).
    """
    d, lam, sigma = 0.1, 600.0, 0.05
    generator = torch.Generator().manual_seed(0)
    x, y, n, m = torch.randn(4, 100000, generator=generator, dtype=torch.float64)
    k = torch.zeros((), dtype=torch.float64, requires_grad=True)
    logits = lambda z: (k * z)[:, None]
    for _ in range(300):
        loss = discriminator_loss("paired", logits(x), logits(y + d))
        loss = loss + lam * (
            approximate_penalty(logits, x, n, sigma) + approximate_penalty(logits, y, m, sigma)
        )
        (slope,) = torch.autograd.grad(loss, k)
        k.data -= 0.1 * slope
    gap = float((y + d - x).mean())
    assert float(k.detach()) == pytest.approx(
        (gap / 2) / (0.5 + gap**2 / 4 + 2 * lam * sigma**2 * 2), rel=0.05
    )


# ---- features and heads


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)

    def forward(self, x):
        return self.second(torch.relu(self.first(x))).mean()


@pytest.mark.parametrize("kind", ["token", "film", "conv", "query"])
def test_gradients_reach_the_sample_and_the_heads_but_not_the_trunk(kind):
    trunk, x = Trunk().requires_grad_(False), torch.randn(3, 2, 5, 5, requires_grad=True)
    heads = FeatureHeads([6, 8], kind, num_logits=2, hidden=16)
    with capture(trunk, ["first", "second"]) as features:
        trunk(x)
    logits = heads(features, torch.tensor([0.1, 0.5, 0.9]))
    assert logits.shape == (3, 2 if kind == "query" else 4)
    generator_loss("ns", logits).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in heads.parameters())
    assert all(p.grad is None for p in trunk.parameters())


def test_heads_see_only_what_was_captured_and_hooks_go_away():
    trunk, x = Trunk().requires_grad_(False), torch.randn(2, 2, 5, 5)
    with capture(trunk, ["first"]) as features:
        trunk(x)
        seen = features[0]
        trunk(x + 1)
        assert not torch.equal(features[0], seen)  # the last call's
    last = features[0]
    trunk(x - 1)
    assert features[0] is last
    with pytest.raises(ValueError, match="no layer 'third' in Trunk"):
        with capture(trunk, ["third"]):
            pass


def test_clips_tokens_and_vectors():
    conv = ConvHead(4)
    clip = torch.randn(2, 4, 3, 5, 5)
    frames = torch.stack([conv(clip[:, :, i]) for i in range(3)])
    torch.testing.assert_close(conv(clip), frames.mean(0), rtol=1e-5, atol=1e-6)
    token = TokenHead(4)
    torch.testing.assert_close(token(clip), token(clip.flatten(2).transpose(1, 2)))
    assert token(torch.randn(2, 4)).shape == (2, 1)


def test_features_of_a_wan_transformer():
    from diffusers import WanTransformer3DModel

    trunk = WanTransformer3DModel(
        **{**TINY_WAN, "num_layers": 3},
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).requires_grad_(False)
    x = torch.randn(2, 4, 3, 4, 4, requires_grad=True)
    heads = FeatureHeads([24, 24], "query", num_logits=3, hidden=16)
    with capture(trunk, ["blocks.0", "blocks.2"]) as features:
        trunk(x, torch.tensor([100.0, 700.0]), torch.randn(2, 5, 8), return_dict=False)
    logits = heads(features)
    assert logits.shape == (2, 3) and features[0].shape == (2, 12, 24)
    logits.sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in trunk.parameters())


def test_unknown_heads_are_refused():
    with pytest.raises(ValueError, match="kind='mlp'"):
        FeatureHeads([4], "mlp")
    with pytest.raises(ValueError, match="dims is empty"):
        FeatureHeads([])


# ---- the pool


def pool(per_group=5):
    return HeadPool(lambda group: nn.Linear(group + 2, 1), num_groups=4, per_group=per_group)


def test_heads_outside_the_sample_get_no_gradient():
    heads, generator = pool(), torch.Generator().manual_seed(0)
    taken = heads.take(generator)
    assert [head.in_features for head in taken] == [2, 3, 4, 5]
    sum(head(torch.randn(3, head.in_features)).sum() for head in taken).backward()
    with_gradient = {
        id(head) for group in heads.groups for head in group if head.weight.grad is not None
    }
    assert with_gradient == {id(head) for head in taken}


@pytest.mark.parametrize("share, count", [(0.0, 0), (0.1, 2), (1.0, 20)])
def test_a_refresh_touches_exactly_its_share(share, count):
    heads, generator = pool(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(heads.parameters())
    sum(p.square().sum() for p in heads.parameters()).backward()
    optimizer.step()
    flat = [head for group in heads.groups for head in group]
    before, state = [head.weight.detach().clone() for head in flat], generator.get_state()
    chosen = heads.refresh(share, generator, optimizer)
    changed = [i for i, head in enumerate(flat) if not torch.equal(head.weight, before[i])]
    assert chosen == changed and len(changed) == count
    assert [i for i, head in enumerate(flat) if head.weight not in optimizer.state] == changed
    if count == 0:
        assert torch.equal(generator.get_state(), state)


def test_a_pool_of_one_is_plain_heads():
    heads, generator = pool(per_group=1), torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert [id(head) for head in heads.take(generator)] == [id(group[0]) for group in heads.groups]
    assert torch.equal(generator.get_state(), state)


# ---- adversarial distribution matching


@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (3, 2, 5, 4, 4)])
def test_the_pair_differs_by_the_difference_of_predictions(shape):
    generator = torch.Generator().manual_seed(0)
    x_t, v_real, v_fake = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    t, dt = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64), 1 / 64
    real, fake = euler_pair(x_t, t, dt, v_real, v_fake)
    span = dt / t.reshape(3, *[1] * (len(shape) - 1))
    torch.testing.assert_close(
        real - fake,
        span * (x0_from_v(x_t, v_real, t) - x0_from_v(x_t, v_fake, t)),
        rtol=0,
        atol=1e-12,
    )
    same = euler_pair(x_t, t, dt, v_real, v_real)
    assert torch.equal(*same)


def test_the_student_is_pushed_towards_the_teacher():
    """A student at mu > m: a discriminator that tells the pair apart pushes mu down, through the
    fake score's input.
    """
    m, t, dt = 0.0, 0.5, 0.1
    mu = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x_t = ((1 - t) * mu).reshape(1, 1, 1, 1)
    x0 = lambda x, mean: mean + (1 - t) / ((1 - t) ** 2 + t**2) * (x - (1 - t) * mean)  # noqa: E731  unit Gaussian
    real, fake = euler_pair(x_t, t, dt, (x_t - x0(x_t, m)) / t, (x_t - x0(x_t, 2.0)) / t)
    assert fake.item() > real.item()
    slope = -1.0  # of a linear discriminator that calls smaller values real
    generator_loss("hinge", slope * fake.reshape(1, 1)).backward()
    assert float(mu.grad) > 0
