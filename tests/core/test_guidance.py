"""Guidance: where the student's mean ends under each convention, in closed form and by
quadrature.
"""

import numpy
import pytest
import torch

from streamvid.core.guidance import (
    GuidanceSpec,
    dmd,
    guide,
    long_short,
    random_scale,
    vsd,
    zero_guidance,
)

NODES, WEIGHTS = (torch.from_numpy(a) for a in numpy.polynomial.hermite_e.hermegauss(120))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
LEGENDRE = numpy.polynomial.legendre.leggauss(60)
# t ~ U(.02, .98), converged
UNIFORM = torch.from_numpy(0.5 + 0.48 * LEGENDRE[0]), torch.from_numpy(LEGENDRE[1] / 2)
COARSE = (
    torch.linspace(0.02, 0.98, 25, dtype=torch.float64),
    torch.full((25,), 1 / 25, dtype=torch.float64),
)


def denoise(x_t, t, mean):
    """The data prediction of N(mean, 1)."""
    return mean + (1 - t) / ((1 - t) ** 2 + t**2) * (x_t - (1 - t) * mean)


def denoise_pair(x_t, t, mean):
    """Of the even mixture of N(mean, 1) and N(-mean, 1)."""
    likely = torch.sigmoid(2 * (1 - t) * mean * x_t / ((1 - t) ** 2 + t**2))
    return likely * denoise(x_t, t, mean) + (1 - likely) * denoise(x_t, t, -mean)


def drift(spec, mu, a, law):
    """E[x0_fake - x0_real] over the student N(mu, 1) of prompt +a, with exact scores of students at
    +mu and -mu.
    """
    t = law[0][:, None]
    x_t = (1 - t) * mu + ((1 - t) ** 2 + t**2).sqrt() * NODES
    shape = lambda x: x[..., None, None]
    real = guide(shape(denoise(x_t, t, a)), shape(denoise_pair(x_t, t, a)), spec.real)
    fake = guide(shape(denoise(x_t, t, mu)), shape(denoise_pair(x_t, t, mu)), spec.fake)
    return float(((fake - real).squeeze() * WEIGHTS * law[1][:, None]).sum())


def fixed_point(spec, a, law):
    low, high = 1e-3, 12 * a
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if drift(spec, middle, a, law) < 0 else (low, middle)
    return low / a


SPECS = {
    "plain": dmd(1.0),
    "dmd": dmd(4.0),
    "vsd": vsd(4.0),
    "zero": zero_guidance(),
    "anti": GuidanceSpec(fake=-1.0),
}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("plain", (1, 1, 1, 1)),
        ("dmd", (3.4968, 2.8665, 2.2371, 1.7594)),
        ("vsd", (1, 1, 1, 1)),
        ("zero", (3.2454, 2.2858, 1.7083, 1.3740)),
        ("anti", (6.6365, 3.8928, 2.4860, 1.7514)),
    ],
)
def test_where_the_mean_ends(name, expected):
    """Two prompts at +a and -a, the true mixture as the unconditional model: mu / a at a = .5, 1,
    2, 4.

    t ~ U(.02, .98) by a quadrature that has converged to the digits given.
    """
    for a, value in zip((0.5, 1.0, 2.0, 4.0), expected):
        assert fixed_point(SPECS[name], a, UNIFORM) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("dmd", (3.515, 2.903, 2.292, 1.830)),
        ("zero", (3.307, 2.336, 1.753, 1.416)),
        ("anti", (7.027, 4.129, 2.643, 1.869)),
    ],
)
def test_where_the_mean_ends_on_a_list_of_times(name, expected):
    """The same for 25 equally likely times, both ends among them: not a fine enough grid for the
    law above, up to 7 % off.
    """
    for a, value in zip((0.5, 1.0, 2.0, 4.0), expected):
        assert fixed_point(SPECS[name], a, COARSE) == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize(
    "spec, amplified",
    [
        (dmd(4.0), 4.0),
        (vsd(4.0), 1.0),
        (long_short(2.0), 2.0),
        (GuidanceSpec(fake=-2.0), -0.5),
        (GuidanceSpec(3.0, 2.0, 4.0), 6.0),
    ],
)
def test_the_linear_model(spec, amplified):
    """Prompt at a, the unconditional model at 0, equal widths: mu = real fake_train / fake a."""
    a = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    zero = torch.zeros_like(a)
    mu = amplified * a
    # the conditional branch whose guided combination fits the student
    fitted = mu / spec.fake_train
    torch.testing.assert_close(guide(fitted, zero, spec.fake_train), mu, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        guide(fitted, zero, spec.fake), guide(a, zero, spec.real), rtol=0, atol=1e-12
    )


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


def test_specs_that_contradict_themselves():
    with pytest.raises(ValueError, match="lowest, highest"):
        GuidanceSpec(real=(4.0, 1.0))
    with pytest.raises(ValueError, match="shared"):
        GuidanceSpec(real=4.0, shared=True)
