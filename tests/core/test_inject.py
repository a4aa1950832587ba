"""Distribution matching on Gaussians, where every expectation and every fixed point is known.

Teacher N(m, s^2); student x = mu + sigma z; D = (1 - t)^2 s^2 + t^2 is the variance of the noised
teacher. Expectations over (z, eps) are Gauss-Hermite sums, exact for the polynomials that occur
here.
"""

import numpy
import pytest
import torch

from streamvid.core.guidance import guide
from streamvid.core.inject import dmd_gradient, surrogate
from streamvid.core.process import add_noise, velocity, x0_from_v

NODES, WEIGHTS = (torch.from_numpy(a) for a in numpy.polynomial.hermite_e.hermegauss(6))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
# [36, 1, 1, 1]
Z, EPS = (grid.reshape(-1, 1, 1, 1) for grid in torch.meshgrid(NODES, NODES, indexing="ij"))
WEIGHT = torch.outer(WEIGHTS, WEIGHTS).reshape(-1, 1, 1, 1)


def denoise(x_t, t, mean, std):
    """The data prediction of N(mean, std^2)."""
    variance = (1 - t) ** 2 * std**2 + t**2
    return mean + (1 - t) * std**2 / variance * (x_t - (1 - t) * mean)


def expected_gradient(mu, sigma, t, fake, real):
    """E[g dx/dmu], E[g dx/dsigma] through the surrogate, with data predictions ``fake`` and
    ``real``.
    """
    mu, sigma = (
        torch.tensor(float(p), dtype=torch.float64, requires_grad=True) for p in (mu, sigma)
    )
    x = mu + sigma * Z
    x_t = add_noise(x.detach(), EPS, t)
    g = dmd_gradient(x, fake(x_t), real(x_t), normalizer="none")
    return torch.autograd.grad(surrogate(x, g * WEIGHT, "sum"), (mu, sigma))


def test_denoiser_is_the_posterior_mean():
    """The residual x0 - x0_hat is uncorrelated with x_t, which makes a linear predictor the
    best one.
    """
    m, s, t = 0.7, 1.3, 0.6
    x0 = m + s * Z
    x_t = add_noise(x0, EPS, t)
    residual = x0 - denoise(x_t, t, m, s)
    for moment in (residual, residual * x_t):
        assert abs((WEIGHT * moment).sum().item()) < 1e-12
    v = (x_t - denoise(x_t, t, m, s)) / t
    torch.testing.assert_close(x0_from_v(x_t, v, t), denoise(x_t, t, m, s), rtol=0, atol=1e-12)
    assert abs((WEIGHT * (velocity(x0, EPS) - v) * x_t).sum().item()) < 1e-12


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_gradient_has_its_closed_form(t):
    """Positive where the student is too high or too wide, so that descent along +g is right."""
    m, s, mu, sigma = 0.3, 1.5, 1.1, 0.6
    d_real, d_fake = ((1 - t) ** 2 * std**2 + t**2 for std in (s, sigma))
    d_mu, d_sigma = expected_gradient(
        mu, sigma, t, lambda x: denoise(x, t, mu, sigma), lambda x: denoise(x, t, m, s)
    )
    assert d_mu.item() == pytest.approx((mu - m) * t**2 / d_real, abs=1e-12)
    expected = (1 - t) ** 2 * t**2 * sigma * (sigma**2 - s**2) / (d_fake * d_real)
    assert d_sigma.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("t", [0.2, 0.8])
def test_gradient_is_that_of_the_divergence(t):
    """x0_f - x0_r = t^2 / (1 - t) (s_f - s_r) and dx_t/dx = 1 - t: g is t^2 / (1 - t)^2 dKL by
    autograd.
    """
    m, s = 0.3, 1.5
    mu, sigma = (torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in (1.1, 0.6))
    teacher = torch.tensor([m, s], dtype=torch.float64)
    real, fake = (
        torch.distributions.Normal((1 - t) * mean, ((1 - t) ** 2 * std**2 + t**2).sqrt())
        for mean, std in (teacher, (mu, sigma))
    )
    divergence = torch.distributions.kl_divergence(fake, real)
    exact = torch.stack(torch.autograd.grad(divergence, (mu, sigma))) * t**2 / (1 - t) ** 2
    ours = expected_gradient(
        mu.item(), sigma.item(), t, lambda x: denoise(x, t, 1.1, 0.6), lambda x: denoise(x, t, m, s)
    )
    torch.testing.assert_close(torch.stack(ours), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [0.3, 0.7])
def test_guided_fixed_point(t):
    """Mean mc + (w - 1)(mc - mu), whatever t; ``cond + w (cond - uncond)`` would end at w (mc -
    mu).
    """
    mean_cond, mean_uncond, s, w = 0.5, -0.2, 0.8, 4.0
    mu, sigma = 0.0, 1.4

    def real(x):
        return guide(denoise(x, t, mean_cond, s), denoise(x, t, mean_uncond, s), w)

    for _ in range(300):
        d_mu, d_sigma = expected_gradient(mu, sigma, t, lambda x: denoise(x, t, mu, sigma), real)
        mu, sigma = mu - d_mu.item(), sigma - d_sigma.item()
    assert mu == pytest.approx(mean_cond + (w - 1) * (mean_cond - mean_uncond), abs=1e-8)
    assert sigma == pytest.approx(s, abs=1e-8)


def sign_changes(rate, dt=0.05, duration=30.0, t=0.5):
    """How often mu crosses the teacher's mean 0, if its critic follows ``rate`` times as fast as
    it.
    """
    mu, mu_fake, crossings = 1.0, 1.0, 0
    for _ in range(int(duration / dt)):
        # a = 1
        pull = dmd_gradient(*stale_predictions(mu, mu_fake, t), normalizer="none").item() * 2
        before = mu
        mu, mu_fake = mu - dt * pull, mu_fake + dt * rate * (mu - mu_fake)
        crossings += before * mu < 0
    return crossings


def stale_predictions(mu, mu_fake, t):
    """x = mu at its mean, noised with eps = 0, under a fake score centred on ``mu_fake``; all std
    1.
    """
    x = torch.full((1, 1, 1, 1), mu, dtype=torch.float64)
    x_t = add_noise(x, torch.zeros_like(x), t)
    return x, denoise(x_t, t, mu_fake, 1.0), denoise(x_t, t, 0.0, 1.0)


def test_slow_critic_oscillates():
    """g depends on the critic's mean and not on mu; oscillation iff the critic is under 4 times
    as fast.
    """
    t = 0.5
    for mu in (-2.0, 3.0):
        g = dmd_gradient(*stale_predictions(mu, 0.4, t), normalizer="none")
        assert g.item() == pytest.approx(0.4 * t**2 / ((1 - t) ** 2 + t**2), abs=1e-12)
    assert sign_changes(rate=3.5) >= 3
    assert sign_changes(rate=4.5) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 5, 4, 4)])
def test_surrogate_injects_exactly_the_gradient(shape, dtype):
    """dL/dx = g / numel to the last bit, even for a g that is lost in the rounding of x - g."""
    x = (100 * torch.randn(shape, dtype=dtype)).requires_grad_()
    g = 1e-6 * torch.randn(shape, dtype=dtype)
    loss = surrogate(x, g)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], g / g.numel(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.detach(), 0.5 * g.square().mean())
    assert torch.equal(torch.autograd.grad(surrogate(x, g, "sum"), x)[0], g)


@pytest.mark.parametrize("normalizer", ["sample", "none"])
def test_no_difference_no_gradient(normalizer):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    x0 = torch.randn(2, 3, 4, 4)
    assert dmd_gradient(x, x0, x0, normalizer).eq(0).all()
    assert dmd_gradient(x, x.detach(), x.detach(), normalizer).eq(0).all()  # 0 / 0 would be NaN
    loss = surrogate(x, dmd_gradient(x, x0, x0, normalizer))
    assert torch.autograd.grad(loss, x)[0].eq(0).all()


def test_normaliser_is_one_number_a_sample():
    x, fake, real = torch.randn(3, 2, 3, 5, 4, 4).double().unbind(0)
    g = dmd_gradient(x, fake, real)
    for i in range(2):
        torch.testing.assert_close(g[i], (fake - real)[i] / (x - real)[i].abs().mean())


def test_only_the_samples_get_a_gradient():
    x, fake, real = (torch.randn(1, 2, 3, 3, requires_grad=True) for _ in range(3))
    surrogate(x, dmd_gradient(x, fake, real)).backward()
    assert x.grad is not None and fake.grad is None and real.grad is None


def test_bad_requests_are_refused():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="'batch'"):
        dmd_gradient(x, x, x, "batch")
    with pytest.raises(ValueError, match="'median'"):
        surrogate(x, x, "median")
    with pytest.raises(ValueError, match="shape"):
        surrogate(x, x[..., :1])
