"""Guidance: where the student's mean ends under each convention, in closed form and in the printed table."""

import numpy
import pytest
import torch

from streamvid.core.guidance import (
    GuidanceSpec,
    anti_guidance,
    dmd,
    guide,
    long_short,
    random_scale,
    scale_from,
    vsd,
    zero_guidance,
)

NODES, WEIGHTS = (torch.from_numpy(a) for a in numpy.polynomial.hermite_e.hermegauss(120))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
TIMES = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)  # each as likely; the continuous law's table is 2 to 6 % lower


def denoise(x_t, t, mean):
    """The data prediction of N(mean, 1)."""
    return mean + (1 - t) / ((1 - t) ** 2 + t**2) * (x_t - (1 - t) * mean)


def denoise_pair(x_t, t, mean):
    """Of the even mixture of N(mean, 1) and N(-mean, 1)."""
    likely = torch.sigmoid(2 * (1 - t) * mean * x_t / ((1 - t) ** 2 + t**2))
    return likely * denoise(x_t, t, mean) + (1 - likely) * denoise(x_t, t, -mean)


def drift(spec, mu, a):
    """E[x0_fake - x0_real] over the student N(mu, 1) of prompt +a, with exact scores of students at +mu and -mu."""
    t = TIMES[:, None]
    x_t = (1 - t) * mu + ((1 - t) ** 2 + t**2).sqrt() * NODES
    shape = lambda x: x[..., None, None]  # noqa: E731
    real = guide(shape(denoise(x_t, t, a)), shape(denoise_pair(x_t, t, a)), spec.real)
    fake = guide(shape(denoise(x_t, t, mu)), shape(denoise_pair(x_t, t, mu)), spec.fake)
    return float(((fake - real).squeeze() * WEIGHTS).sum())


def fixed_point(spec, a):
    low, high = 1e-3, 12 * a
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if drift(spec, middle, a) < 0 else (low, middle)
    return low / a


@pytest.mark.parametrize("spec, expected", [
    (dmd(1.0), (1.00, 1.00, 1.00, 1.00)),
    (dmd(4.0), (3.52, 2.90, 2.29, 1.83)),
    (vsd(4.0), (1.00, 1.00, 1.00, 1.00)),
    (zero_guidance(), (3.31, 2.34, 1.75, 1.42)),
    (anti_guidance(-1.0), (7.03, 4.13, 2.64, 1.87)),
], ids=["plain", "dmd", "vsd", "zero", "anti"])
def test_where_the_mean_ends(spec, expected):
    """Two prompts at +a and -a, the true mixture as the unconditional model: mu / a at a = .5, 1, 2, 4.

    The values depend on the law of t, as those of equal Gaussians do not: here 25 times from .02 to .98.
    """
    for a, value in zip((0.5, 1.0, 2.0, 4.0), expected):
        assert fixed_point(spec, a) == pytest.approx(value, abs=0.006)


@pytest.mark.parametrize("spec, amplified", [
    (dmd(4.0), 4.0), (vsd(4.0), 1.0), (long_short(2.0), 2.0), (anti_guidance(-2.0), -0.5), (GuidanceSpec(3.0, 2.0, 4.0), 6.0),
])
def test_the_linear_model(spec, amplified):
    """Prompt at a, the unconditional model at 0, equal widths: mu = real fake_train / fake a."""
    a = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    zero = torch.zeros_like(a)
    mu = amplified * a
    fitted = mu / spec.fake_train  # the conditional branch whose guided combination fits the student
    torch.testing.assert_close(guide(fitted, zero, spec.fake_train), mu, rtol=0, atol=1e-12)
    torch.testing.assert_close(guide(fitted, zero, spec.fake), guide(a, zero, spec.real), rtol=0, atol=1e-12)


def test_any_shared_scale_leaves_the_mean():
    spec, generator = random_scale(0.5, 4.0), torch.Generator().manual_seed(0)
    real, fake = spec.draw(1000, generator)
    assert torch.equal(real, fake)
    assert 0.5 <= float(real.min()) < 0.6 and 3.9 < float(real.max()) <= 4.0
    a, zero = torch.full((1000, 1, 1, 1), 0.7), torch.zeros(1000, 1, 1, 1)
    assert (guide(a, zero, real) - guide(a, zero, fake)).abs().max() == 0


def test_a_fixed_scale_leaves_the_noise_stream_alone():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    real, fake = dmd(4.0).draw(3, generator)
    assert torch.equal(generator.get_state(), before)
    assert real.tolist() == [4.0] * 3 and fake.tolist() == [1.0] * 3


def test_scale_one_is_the_conditional_prediction_and_scales_differ_by_sample():
    cond, uncond = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guide(cond, uncond, 0.0), uncond)
    mixed = guide(cond, uncond, torch.tensor([1.0, 0.0, 2.0]))
    torch.testing.assert_close(mixed[0], cond[0])
    torch.testing.assert_close(mixed[1], uncond[1])
    torch.testing.assert_close(mixed[2], 2 * cond[2] - uncond[2])


def test_conventions_of_others():
    """Self-Forcing's 3.0 is our 4.0; DMD2 and diffusers write what we write."""
    assert scale_from("extra", 3.0) == 4.0 and scale_from("standard", 8.0) == 8.0
    with pytest.raises(ValueError, match="convention='cfg'"):
        scale_from("cfg", 1.0)


def test_specs_that_contradict_themselves():
    with pytest.raises(ValueError, match="lowest, highest"):
        GuidanceSpec(real=(4.0, 1.0))
    with pytest.raises(ValueError, match="shared"):
        GuidanceSpec(real=4.0, shared=True)
