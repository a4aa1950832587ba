"""The noise process: conversions are exact inverses, and times broadcast as the legend says."""

import pytest
import torch

from streamvid.core.process import (
    add_noise,
    eps_from_v,
    euler_step,
    expand_time,
    renoise_step,
    score_from_v,
    v_from_x0,
    velocity,
    x0_from_v,
)

IMAGE, VIDEO = (3, 2, 4, 5), (3, 2, 6, 4, 5)
TIMES = {
    "float": (VIDEO, 0.3),
    "scalar": (VIDEO, torch.tensor(0.3, dtype=torch.float64)),
    "per sample, image": (IMAGE, torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)),
    "per sample, video": (VIDEO, torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)),
    "per frame": (VIDEO, torch.linspace(0.05, 1, 18, dtype=torch.float64).reshape(3, 6)),
}


def draw(shape, count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("case", TIMES)
def test_conversions_are_inverse_to_one_another(case):
    shape, t = TIMES[case]
    x0, eps = draw(shape, 2)
    x_t, v = add_noise(x0, eps, t), velocity(x0, eps)
    close = dict(rtol=0, atol=1e-12)
    torch.testing.assert_close(x0_from_v(x_t, v, t), x0, **close)
    torch.testing.assert_close(eps_from_v(x_t, v, t), eps, **close)
    torch.testing.assert_close(v_from_x0(x_t, x0, t), v, **close)
    torch.testing.assert_close(score_from_v(x_t, v, t) * expand_time(t, x_t), -eps, **close)
    torch.testing.assert_close(euler_step(x_t, v, t, 0.0), x0, **close)
    torch.testing.assert_close(euler_step(x_t, v, t, 0.25), add_noise(x0, eps, 0.25), **close)
    torch.testing.assert_close(renoise_step(x0, eps, t), x_t, **close)


@pytest.mark.parametrize("case", TIMES)
def test_differences_of_predictions(case):
    """x0_f - x0_r = -t (v_f - v_r) and s_f - s_r = (1 - t) / t^2 (x0_f - x0_r): what DMD rests
    on.
    """
    shape, t = TIMES[case]
    x_t, v_f, v_r = draw(shape, 3)
    time = expand_time(t, x_t)
    x0_gap = x0_from_v(x_t, v_f, t) - x0_from_v(x_t, v_r, t)
    score_gap = score_from_v(x_t, v_f, t) - score_from_v(x_t, v_r, t)
    torch.testing.assert_close(x0_gap, -time * (v_f - v_r), rtol=0, atol=1e-12)
    torch.testing.assert_close(score_gap, (1 - time) / time**2 * x0_gap, rtol=1e-12, atol=1e-12)


def test_the_ends_are_exact():
    """Clean context is exactly clean: a table of 1000 noise levels would add noise of deviation
    .005 at 0.
    """
    x0, eps = (x.float() for x in draw(VIDEO, 2))
    assert torch.equal(add_noise(x0, eps, 0.0), x0)
    assert torch.equal(add_noise(x0, eps, 1.0), eps)
    assert torch.equal(add_noise(x0, eps, torch.zeros(3)), x0)


def test_per_frame_times_act_on_their_frame():
    x0, eps = draw(VIDEO, 2)
    t = torch.rand(3, 6, dtype=torch.float64)
    whole = add_noise(x0, eps, t)
    for frame in range(6):
        alone = add_noise(x0[:, :, frame], eps[:, :, frame], t[:, frame])
        assert torch.equal(whole[:, :, frame], alone)


def test_half_precision_is_raised_even_under_autocast():
    x, v = (x.bfloat16() for x in draw(VIDEO, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x0 = x0_from_v(x, v, torch.full((3,), 0.3))
    assert x0.dtype == torch.float32
    assert torch.equal(x0, x.float() - torch.tensor(0.3) * v.float())


@pytest.mark.parametrize(
    "shape, times", [(IMAGE, (2,)), (IMAGE, (3, 6)), (VIDEO, (6,)), (VIDEO, (3, 5))]
)
def test_times_that_fit_nothing_are_refused(shape, times):
    with pytest.raises(ValueError, match="do not fit"):
        expand_time(torch.rand(times), torch.zeros(shape))
