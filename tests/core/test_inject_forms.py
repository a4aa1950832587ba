"""Forms of the injected gradient, SiD, f-divergence weights, groups and motion: closed forms and
reductions to DMD.
"""

import math
from typing import get_args

import numpy
import pytest
import torch

from streamvid.core.inject import (
    Divergence,
    dmd_gradient,
    f_weight,
    residual_gradient,
    sid_loss,
    surrogate,
    temporal_difference,
)
from streamvid.core.process import add_noise

NODES, WEIGHTS = (torch.from_numpy(a) for a in numpy.polynomial.hermite_e.hermegauss(8))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
Z, EPS = (grid.reshape(-1, 1, 1, 1) for grid in torch.meshgrid(NODES, NODES, indexing="ij"))
WEIGHT = torch.outer(WEIGHTS, WEIGHTS).reshape(-1)  # [64]
SHAPES = {"image": (2, 3, 4, 4), "video": (2, 3, 5, 4, 4)}


def denoise(x_t, t, mean, std):
    variance = (1 - t) ** 2 * std**2 + t**2
    return mean + (1 - t) * std**2 / variance * (x_t - (1 - t) * mean)


def doubles(shape, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64).unbind(0)


# ---- surrogate


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_gradient_is_the_weighted_masked_one(shape):
    x, g = doubles(shape, 2)
    x.requires_grad_()
    w, mask = torch.tensor([0.5, 3.0], dtype=torch.float64), torch.tensor([1, 0])
    full = lambda v: v.reshape(2, *[1] * (x.ndim - 1))
    expected = full(w) * g * full(mask) / (x.numel() / 2)
    for form in ("mse", "dot"):
        loss = surrogate(x, g, form=form, weight=w, mask=mask)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected, rtol=0, atol=1e-15)
    (huber,) = torch.autograd.grad(surrogate(x, g, form="huber", weight=w, huber_width=1e-3), x)
    wg = full(w) * g
    torch.testing.assert_close(
        huber, wg / (wg**2 + 1e-6).sqrt() / x.numel(), rtol=1e-12, atol=1e-15
    )
    large = wg.abs() > 0.01
    # no small correction
    torch.testing.assert_close((huber * x.numel())[large], g.sign()[large], rtol=0, atol=0.01)


def test_an_image_is_a_clip_of_one_frame_and_frames_have_their_own_weights():
    x, g = doubles((2, 3, 4, 4), 2)
    for form in ("mse", "dot", "huber"):
        image, clip = (
            surrogate(x, g, form=form),
            surrogate(x.unsqueeze(2), g.unsqueeze(2), form=form),
        )
        assert torch.equal(image, clip)
    x, g = doubles((2, 3, 5, 4, 4), 2)
    w = torch.rand(2, 5, dtype=torch.float64)
    whole = surrogate(x, g, "sum", weight=w)
    alone = sum(surrogate(x[:, :, i], g[:, :, i], "sum", weight=w[:, i]) for i in range(5))
    torch.testing.assert_close(whole, alone, rtol=1e-12, atol=0)


def test_an_unknown_form_is_refused():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="form='l1'"):
        surrogate(x, x, form="l1")


# ---- directions


def test_groups_of_one_are_plain_dmd():
    x, fake, real = doubles((4, 2, 3, 3), 3)
    assert torch.equal(
        dmd_gradient(x, fake, real, "group", torch.arange(4)), dmd_gradient(x, fake, real)
    )
    together = dmd_gradient(x, fake, real, "group", torch.tensor([0, 1, 0, 1]))
    scale = (x - real).abs().mean((1, 2, 3))
    torch.testing.assert_close(together[2], (fake - real)[2] / ((scale[0] + scale[2]) / 2))
    with pytest.raises(ValueError, match="takes the groups"):
        dmd_gradient(x, fake, real, "group")
    with pytest.raises(ValueError, match="takes the groups"):
        dmd_gradient(x, fake, real, "sample", torch.arange(4))


def test_centring_the_direction_over_a_group_kills_the_drift():
    """Why a group normalises the length of g and does not subtract the mean of g: that mean is what
    moves the student.
    """
    x = 1.5 + Z[:, 0, 0, 0].reshape(-1, 1, 1, 1)
    x_t = add_noise(x, EPS, 0.5)
    g = dmd_gradient(x, denoise(x_t, 0.5, 1.5, 1.0), denoise(x_t, 0.5, 0.0, 1.0), "none")
    assert float((WEIGHT * g.flatten()).sum()) == pytest.approx(1.5 * 0.25 / 0.5, abs=1e-12)
    centred = g - (WEIGHT * g.flatten()).sum()
    assert abs(float((WEIGHT * centred.flatten()).sum())) < 1e-12


def test_two_teachers_settle_between():
    """Uni-DAD: equal widths and no normaliser, mu* = (w_s m_s + w_t m_t) / (w_s + w_t); w_t = 0 is
    DMD bit for bit.
    """
    m_s, m_t, w_s, w_t, t, mu = -1.0, 3.0, 2.0, 0.5, 0.4, 0.0
    for _ in range(400):
        x = mu + Z
        x_t = add_noise(x, EPS, t)
        fake = denoise(x_t, t, mu, 1.0)
        g = w_s * dmd_gradient(x, fake, denoise(x_t, t, m_s, 1.0), "none") + w_t * dmd_gradient(
            x, fake, denoise(x_t, t, m_t, 1.0), "none"
        )
        mu -= 0.2 * float((WEIGHT * g.flatten()).sum())
    assert mu == pytest.approx((w_s * m_s + w_t * m_t) / (w_s + w_t), abs=1e-9)
    x, fake, real = doubles((2, 2, 3, 3), 3)
    assert torch.equal(
        dmd_gradient(x, fake, real) + 0.0 * dmd_gradient(x, fake, x + 1),
        dmd_gradient(x, fake, real),
    )


def test_the_residual_alone_collapses():
    """Q3: E[g dx/dmu] = (mu - m) t^2 / A and E[g dx/dsigma] = + sigma t^2 / A, so the fixed point
    has no spread.
    """
    m, s, mu, sigma, t = 0.3, 1.5, 1.1, 0.6, 0.7
    a = (1 - t) ** 2 * s**2 + t**2
    x = mu + sigma * Z
    g = residual_gradient(x, denoise(add_noise(x, EPS, t), t, m, s)).flatten()
    assert float((WEIGHT * g).sum()) == pytest.approx((mu - m) * t**2 / a, abs=1e-12)
    assert float((WEIGHT * g * Z.flatten()).sum()) == pytest.approx(sigma * t**2 / a, abs=1e-12)


# ---- SiD


def sid_gradients(alpha, mu, sigma, m, s, t):
    """d/dmu, d/dsigma and the value of the expected loss, with the exact fake score's parameters
    frozen.
    """
    p, q = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (mu, sigma))
    x = p + q * Z
    x_t = add_noise(x, EPS, t)
    fake, real = denoise(x_t, t, mu, sigma), denoise(x_t, t, m, s)
    # the loss is a product of two differences: weight each by the root
    root = WEIGHT.sqrt().reshape(-1, 1, 1, 1)
    zero = torch.zeros_like(x)
    value = sid_loss(root * (x - real) + zero, root * (fake - real), zero, alpha, "none", "sum")
    return *torch.autograd.grad(value, (p, q)), value.detach()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("t", [0.3, 0.8])
def test_sid_has_its_closed_form(alpha, t):
    """Q2, by autograd through both predictions; at alpha = 1 the expected value is 0."""
    m, s, mu, sigma = 0.3, 1.5, 1.1, 0.6
    a, b = ((1 - t) ** 2 * std**2 + t**2 for std in (s, sigma))
    k_real, k_fake = (1 - t) * s**2 / a, (1 - t) * sigma**2 / b
    d_mu, d_sigma, value = sid_gradients(alpha, mu, sigma, m, s, t)
    expected_mu = (mu - m) * (t**2 / a) * ((2 - 2 * alpha) * t**2 / a + (2 * alpha - 1) * t**2 / b)
    expected_sigma = -2 * (1 - t) * sigma * (k_real - k_fake) * t**2 * ((1 - alpha) / a + alpha / b)
    assert float(d_mu) == pytest.approx(expected_mu, abs=1e-10)
    assert float(d_sigma) == pytest.approx(expected_sigma, abs=1e-10)
    fisher = float(
        (
            WEIGHT
            * (
                denoise(add_noise(mu + sigma * Z, EPS, t), t, m, s)
                - denoise(add_noise(mu + sigma * Z, EPS, t), t, mu, sigma)
            ).flatten()
            ** 2
        ).sum()
    )
    assert float(value) == pytest.approx((1 - alpha) * fisher, abs=1e-10)


def test_sid_at_a_half_is_half_of_a_difference_of_errors():
    """L_(1/2) = 1/2 (|D_R - x|^2 - |D_f - x|^2), whose frozen-critic gradient is half the Fisher
    divergence's.
    """
    x, fake, real = doubles((2, 3, 4, 4), 3)
    expected = 0.5 * ((real - x).square() - (fake - x).square()).mean()
    torch.testing.assert_close(
        sid_loss(x, fake, real, 0.5, "none"), expected, rtol=1e-12, atol=1e-12
    )


def test_sid_at_a_half_has_half_of_the_fisher_gradient():
    """With its fake score frozen it equals half of d E|D_R - D_f|^2 with the fake score following
    the student.
    """
    m, s, mu, sigma, t = 0.3, 1.5, 1.1, 0.6, 0.6
    p, q = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (mu, sigma))
    x_t = add_noise(p + q * Z, EPS, t)
    gap = denoise(x_t, t, m, s) - denoise(x_t, t, p, q)
    half = torch.autograd.grad(0.5 * (WEIGHT * gap.flatten().square()).sum(), (p, q))
    for ours, exact in zip(sid_gradients(0.5, mu, sigma, m, s, t), half):
        assert float(ours) == pytest.approx(float(exact), abs=1e-12)


def test_sid_reaches_the_student_through_frozen_networks():
    """Student: yes. Teacher and fake score: only their inputs, none of their parameters."""
    real, fake = (torch.nn.Conv2d(2, 2, 1).double().requires_grad_(False) for _ in range(2))
    noise, eps = doubles((2, 2, 4, 4), 2)
    student = torch.nn.Conv2d(2, 2, 1).double()
    x = student(noise)
    x_t = add_noise(x, eps, 0.5)
    (whole,) = torch.autograd.grad(
        sid_loss(x, fake(x_t), real(x_t)), student.weight, retain_graph=True
    )
    (direct,) = torch.autograd.grad(
        sid_loss(x, fake(x_t.detach()), real(x_t.detach())), student.weight, retain_graph=True
    )
    assert (whole - direct).abs().max() > 1e-6
    sid_loss(x, fake(x_t), real(x_t)).backward()
    assert all(weight.grad is None for net in (real, fake) for weight in net.parameters())
    torch.testing.assert_close(student.weight.grad, whole)


@pytest.mark.parametrize("normalizer", ["sample", "none"])
def test_sid_gradients_pass_through_both_predictions(normalizer):
    """With D = D_R - D_f and E = D_R - x - alpha D: -D at x, E + (1 - alpha) D at D_R, alpha D - E
    at D_f.

    The normaliser divides them and has no gradient of its own.
    """
    x, fake, real = (z.clone().requires_grad_() for z in doubles((2, 3, 4, 4), 3))
    alpha = 1.2
    sid_loss(x, fake, real, alpha, normalizer, "sum").backward()
    with torch.no_grad():
        gap = real - fake
        error = real - x - alpha * gap
        scale = (x - real).abs().mean((1, 2, 3), keepdim=True) if normalizer == "sample" else 1.0
        expected = -gap / scale, (alpha * gap - error) / scale, (error + (1 - alpha) * gap) / scale
    for z, gradient in zip((x, fake, real), expected):
        torch.testing.assert_close(z.grad, gradient, rtol=1e-12, atol=1e-12)


# ---- f-divergences


F = {
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "js": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    "hellinger": lambda r: 1 - r.sqrt(),
    "neyman": lambda r: (1 - r) ** 2 / r,
}


@pytest.mark.parametrize("name", get_args(Divergence))
def test_weights_are_r_squared_times_the_second_derivative(name):
    """f as in the paper's table, differentiated by autograd; the squared distance's sqrt(r) / 2 was
    twice that of 1 - sqrt(r).
    """
    r = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    (f1,) = torch.autograd.grad(F[name](r).sum(), r, create_graph=True)
    (f2,) = torch.autograd.grad(f1.sum(), r)
    r = r.detach()
    torch.testing.assert_close(f_weight(r.log(), name), r**2 * f2, rtol=1e-12, atol=1e-12)


def test_the_ratio_is_clipped():
    """A discriminator that is sure of itself does not take over the batch."""
    log_ratio = torch.tensor([-50.0, 0.0, 50.0], dtype=torch.float64)
    expected = torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(f_weight(log_ratio, "kl"), expected, rtol=1e-12, atol=0)


def test_the_weighted_direction_is_the_gradient_of_the_divergence():
    """Q6: grad D_f(p || q_mu) = E_q[h(r) (s_q - s_p) dx/dmu] for Gaussians p = N(0, 1), q = N(mu,
    1).
    """
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    step = grid[1] - grid[0]
    density = lambda mu: torch.exp(-((grid - mu) ** 2) / 2) / math.sqrt(2 * math.pi)
    divergences = {
        "rkl": lambda r: -r.log(),
        "kl": lambda r: r * r.log(),
        "js": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    }
    for name, f in divergences.items():
        mu = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        q, p = density(mu), density(0.0)
        (expected,) = torch.autograd.grad((q * f(p / q)).sum() * step, mu)
        h = f_weight((p / q).log().detach(), name, clip=(0.0, math.inf))
        score_gap = -(grid - 0.7) + grid  # s_q - s_p
        ours = (q.detach() * h * score_gap).sum() * step
        assert float(ours) == pytest.approx(float(expected), abs=1e-9)


def test_weight_one_is_plain_dmd_bit_for_bit():
    x, fake, real = doubles((2, 3, 4, 4), 3)
    g = dmd_gradient(x, fake, real)
    assert torch.equal(surrogate(x, g, weight=f_weight(torch.randn(2), "rkl")), surrogate(x, g))


# ---- motion


def test_the_motion_gradient_is_live_and_blind_to_a_constant_offset():
    """dL/dx = D^T g_m / numel; the released code computes it under no_grad, where it is 0."""
    x, fake, real = doubles((2, 3, 5, 4, 4), 3)
    x.requires_grad_()

    def loss(fake):
        moves = temporal_difference(x)
        return surrogate(
            moves, dmd_gradient(moves, temporal_difference(fake), temporal_difference(real))
        )

    (gradient,) = torch.autograd.grad(loss(fake), x)
    matrix = torch.eye(5, dtype=torch.float64).diff(dim=0)  # D [4, 5]
    g = dmd_gradient(*(temporal_difference(z) for z in (x.detach(), fake, real)))
    expected = torch.einsum("st,bcshw->bcthw", matrix, g) / g.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert gradient.abs().max() > 0
    offset = real + torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    assert torch.autograd.grad(loss(offset), x)[0].abs().max() < 1e-15


def test_an_image_has_no_motion():
    for shape in ((2, 3, 4, 4), (2, 3, 1, 4, 4)):
        with pytest.raises(ValueError, match="no motion"):
            temporal_difference(torch.zeros(shape))
