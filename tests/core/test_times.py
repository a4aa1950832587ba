"""Times: the lists of the published students, and laws that stay inside their bounds."""

import pytest
import torch

from streamvid.core.times import euler_times, sample_times, shift_time, step_times, unshift_time


@pytest.mark.parametrize(
    "num_steps, shift, expected",
    [
        (4, 5, [1000, 937.5, 833.3333, 625]),  # Self-Forcing
        (4, 8, [1000, 960, 888.8889, 727.2727]),  # CausVid
        (5, 5, [1000, 952.3810, 882.3529, 769.2308, 555.5556]),  # RollingForcing
        (2, 5, [1000, 833.3333]),  # Causal-Forcing++
        (4, 1, [1000, 750, 500, 250]),
    ],
)
def test_the_published_lists(num_steps, shift, expected):
    assert [1000 * t for t in step_times(num_steps, shift)] == pytest.approx(expected, abs=1e-4)


def test_the_shift_and_its_inverse():
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    for shift in (0.5, 1.0, 5.0):
        t = shift_time(u, shift)
        torch.testing.assert_close(unshift_time(t, shift), u, rtol=0, atol=1e-12)
        assert t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()
    assert shift_time(0.1, 5.0) == pytest.approx(0.35714, abs=1e-5)  # DiagDistill's "step 100"


def test_euler_times_end_at_zero():
    assert euler_times(3, 5.0) == (*step_times(3, 5.0), 0.0)


def test_laws_have_their_medians_and_bounds():
    """A median is where the shift puts u = 1/2; truncation puts no mass on the bounds, unlike clamping."""
    for law in ("uniform", "logit_normal"):
        t = sample_times(20_000, law, 5.0, torch.Generator().manual_seed(1))
        assert t.dtype == torch.float32
        assert t.median().item() == pytest.approx(5 / 6, abs=0.01)
        assert 0 < t.min() and t.max() <= 1
        t = sample_times(20_000, law, 5.0, torch.Generator().manual_seed(1), low=0.02, high=0.98)
        assert 0.02 <= t.min() and t.max() <= 0.98
        assert ((t == t.max()) | (t == t.min())).float().mean() < 0.001


def test_logit_normal_has_unit_logits():
    t = sample_times(50_000, "logit_normal", 1.0, torch.Generator().manual_seed(2))
    logits = torch.logit(t.double())
    assert logits.mean().item() == pytest.approx(0, abs=0.02)
    assert logits.std().item() == pytest.approx(1, abs=0.02)


def test_draws_are_a_function_of_the_generator():
    draws = [sample_times(4, "uniform", 3.0, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws)


def test_bad_requests_are_refused():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="num_steps=0"):
        step_times(0, 5.0)
    with pytest.raises(ValueError, match="shift=0"):
        step_times(4, 0.0)
    with pytest.raises(ValueError, match="low=0.5, high=0.5"):
        sample_times(1, "uniform", 1.0, generator, low=0.5, high=0.5)
    with pytest.raises(ValueError, match="'normal'"):
        sample_times(1, "normal", 1.0, generator)
