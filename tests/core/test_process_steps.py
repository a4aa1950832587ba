"""Stochastic steps have the laws they should, and networks of other processes become velocity
fields exactly.
"""

import math

import pytest
import torch

from streamvid.core.process import (
    adapt,
    add_noise,
    eps_from_v,
    eta_step,
    euler_step,
    expand_time,
    gamma_step,
    renoise_step,
    transition,
    velocity,
    vp_clock,
    x0_from_v,
)

VIDEO = (3, 2, 6, 4, 5)
T = torch.tensor([0.35, 0.6, 0.9], dtype=torch.float64)
CLOSE = dict(rtol=0, atol=1e-12)


def draw(count, shape=VIDEO, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def coefficients(step):
    """What a step makes of (x0, eps, noise), each alone, as three numbers; the step is linear."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    return [float(step(*(one * (i == k) for i in range(3)))) for k in range(3)]


@pytest.mark.parametrize("s, t", [(0.0, 0.4), (0.3, 0.3), (0.3, 0.8), (0.5, 1.0)])
def test_a_transition_keeps_the_process(s, t):
    """Signal 1 - t, and variances of the old and the new noise that add up to t^2."""
    signal, old, new = coefficients(lambda x0, eps, n: transition(add_noise(x0, eps, s), n, s, t))
    assert signal == pytest.approx(1 - t, abs=1e-12)
    assert old**2 + new**2 == pytest.approx(t**2, abs=1e-12)
    if s == t:
        assert new == 0


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_an_eta_step_keeps_the_process(eta):
    t, s = 0.7, 0.45
    step = lambda x0, eps, n: eta_step(add_noise(x0, eps, t), velocity(x0, eps), t, s, eta, n)
    signal, old, new = coefficients(step)
    assert signal == pytest.approx(1 - s, abs=1e-12)
    assert old**2 + new**2 == pytest.approx(s**2, abs=1e-12)
    a = (1 - t) / (1 - s)
    assert new == pytest.approx(eta * s / t * math.sqrt(t**2 - a**2 * s**2), abs=1e-12)


def test_eta_one_is_the_posterior_of_the_forward_process():
    """q(x_s | x_t, x0): mean weight a s^2 / t^2 on x_t, so that of eps in x_t it keeps a s^2 /
    t.
    """
    t, s = 0.7, 0.45
    a = (1 - t) / (1 - s)
    _, kept, new = coefficients(
        lambda x0, eps, n: eta_step(add_noise(x0, eps, t), velocity(x0, eps), t, s, 1.0, n)
    )
    assert kept == pytest.approx(a * s**2 / t, abs=1e-12)
    assert new**2 == pytest.approx(s**2 * (t**2 - a**2 * s**2) / t**2, abs=1e-12)


def test_steps_without_new_noise_are_euler_steps():
    x_t, v, noise = draw(3)
    expected = euler_step(x_t, v, T, 0.2)
    torch.testing.assert_close(eta_step(x_t, v, T, 0.2, 0.0, noise), expected, **CLOSE)
    torch.testing.assert_close(gamma_step(x_t, v, T, 0.2, 0.0, noise), expected, **CLOSE)


def test_gamma_one_is_the_consistency_step():
    x_t, v, noise = draw(3)
    s = torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        gamma_step(x_t, v, T, s, 1.0, noise), renoise_step(x0_from_v(x_t, v, T), noise, s), **CLOSE
    )


PER_FRAME = torch.linspace(0.2, 0.95, 18, dtype=torch.float64).reshape(3, 6)


@pytest.mark.parametrize(
    "step",
    [
        lambda x, v, n, t: eta_step(x, v, t, 0.5 * t, 0.4, n),
        lambda x, v, n, t: gamma_step(x, v, t, 0.5 * t, 0.4, n),
        lambda x, v, n, t: transition(x, n, 0.5 * t, t),
    ],
)
def test_per_frame_times_are_a_loop_over_frames(step):
    x, v, n = draw(3)
    whole = step(x, v, n, PER_FRAME)
    for frame in range(6):
        alone = step(*(z[:, :, frame] for z in (x, v, n)), PER_FRAME[:, frame])
        assert torch.equal(whole[:, :, frame], alone)


ALPHA_BAR = torch.cumprod(
    1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0
)
VP_CLOCK = vp_clock(ALPHA_BAR)


def test_a_schedule_that_ends_in_pure_noise_has_its_last_step_at_one():
    """As CogVideoX's, whose last alpha_bar is 0."""
    native, alpha, sigma = vp_clock([0.9, 0.5, 0.1, 0.0])(
        torch.tensor([0.5, 0.75, 1.0], dtype=torch.float64)
    )
    assert native.tolist() == pytest.approx([1.0, 2.0, 3.0]) and (alpha[2], sigma[2]) == (0, 1)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_adapters_return_the_velocity(kind):
    """A network that knows x0 and eps, asked in its own process, gives eps - x0 in ours."""
    x0, eps = draw(2)
    _, alpha, sigma = (expand_time(each, x0) for each in VP_CLOCK(T))
    torch.testing.assert_close(sigma / (alpha + sigma), expand_time(T, x0), **CLOSE)
    seen = []

    def network(x, native):
        seen.append((x, native))
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[kind]

    x_t = add_noise(x0, eps, T)
    v = adapt(network, kind, VP_CLOCK)(x_t, T)
    torch.testing.assert_close(seen[0][0], alpha * x0 + sigma * eps, **CLOSE)
    torch.testing.assert_close(x0_from_v(x_t, v, T), x0, **CLOSE)
    torch.testing.assert_close(eps_from_v(x_t, v, T), eps, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "step, t", [(20, 0.121), (99, 0.255), (499, 0.617), (625, 0.714), (980, 0.929), (999, 0.936)]
)
def test_the_clock_of_stable_diffusion(step, t):
    sigma = ((1 - ALPHA_BAR[step]) / ALPHA_BAR[step]).sqrt()
    ours = sigma / (1 + sigma)
    assert float(ours) == pytest.approx(t, abs=6e-4)
    native, alpha, _ = VP_CLOCK(ours[None])
    assert float(native) == pytest.approx(step, abs=1e-6)
    assert float(alpha) == pytest.approx(float(ALPHA_BAR[step].sqrt()), abs=1e-12)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind='flow'"):
        adapt(lambda x, t: x, "flow", VP_CLOCK)
