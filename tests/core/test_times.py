"""Times: the lists of the published students, and laws that stay inside their bounds."""

import pytest
import torch

from streamvid.core.times import (
    choose_times,
    euler_times,
    mean_flow_pair,
    phase_target,
    sample_times,
    scheduled_target,
    shift_time,
    step_times,
    uniform_target,
    unshift_time,
)


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
    """A median is where the shift puts u = 1/2; truncation puts no mass on the bounds, unlike
    clamping.
    """
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


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_log_normal_law_is_edms():
    """ln sigma = ln(t / (1 - t)) has the mean and deviation asked for."""
    t = sample_times(40000, "log_normal", 1.0, generator(), mean=-1.2, std=1.2).double()
    log_sigma = torch.log(t / (1 - t))
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=0.02)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=0.02)


def test_the_cubic_law_is_one_minus_u_cubed():
    t = sample_times(40000, "cubic", 1.0, generator())
    assert float(t.mean()) == pytest.approx(0.75, abs=0.005)
    for level in (0.2, 0.9):  # P(t <= level) = 1 - (1 - level)^(1/3)
        assert float((t <= level).float().mean()) == pytest.approx(
            1 - (1 - level) ** (1 / 3), abs=0.01
        )


def test_a_bounded_law_is_truncated_and_not_clamped():
    for law in ("log_normal", "cubic"):
        t = sample_times(5000, law, 3.0, generator(), low=0.3, high=0.6)
        assert 0.3 < float(t.min()) and float(t.max()) <= 0.6
        assert float((t == t.max()).float().mean()) < 0.01


def test_times_are_chosen_from_a_list():
    t = choose_times((1.0, 0.9, 0.5), 3000, generator())
    counts = [float((t == torch.tensor(value)).float().mean()) for value in (1.0, 0.9, 0.5)]
    assert counts == pytest.approx([1 / 3] * 3, abs=0.03)
    with pytest.raises(ValueError, match="empty"):
        choose_times((), 3, generator())


def test_phases_begin_at_the_edge_below():
    t = torch.tensor([0.1, 0.25, 0.26, 0.75, 1.0])
    assert phase_target(t, (0.0, 0.25, 0.5, 0.75)).tolist() == [0.0, 0.0, 0.25, 0.5, 0.75]
    # PCM with one phase is consistency distillation
    assert phase_target(t, (0.0,)).tolist() == [0.0] * 5
    with pytest.raises(ValueError, match="expected 0"):
        phase_target(t, (0.5,))


def test_scheduled_targets_reduce():
    """TDD: of the single target 0 it is consistency distillation, of one schedule with window 0 it
    is PCM's phases.
    """
    r = torch.linspace(0.05, 1, 200)
    draws = lambda count: tuple(torch.rand(2, count, generator=generator()))
    assert scheduled_target(r, (0.0,), 1.0, 0.0, draws(200)).abs().max() == 0
    edges = (0.0, 0.25, 0.5, 0.75)
    between = r[(r % 0.25).abs() > 1e-3]
    assert torch.equal(
        scheduled_target(between, edges, 0.0, 0.0, draws(len(between))),
        phase_target(between, edges),
    )
    s = scheduled_target(torch.full((4000,), 0.8), edges, 0.3, 0.0, draws(4000))
    assert sorted(set(s.tolist())) == [0.5, 0.75]
    assert float((s == 0.5).float().mean()) == pytest.approx(0.5, abs=0.03)
    shrunk = scheduled_target(torch.full((4000,), 0.8), edges, 0.0, 0.3, draws(4000))
    assert 0.75 * 0.7 <= float(shrunk.min()) and float(shrunk.max()) <= 0.75


def test_a_scheduled_target_uses_each_of_its_draws_once():
    """The first chooses among candidates, the second lowers what was chosen."""
    r = torch.full((3,), 0.8)
    u = torch.tensor([0.0, 0.4, 0.99])
    zero = torch.zeros(3)
    chosen = scheduled_target(r, (0.0, 0.25, 0.5, 0.75), 0.5, 0.3, (u, zero))
    assert chosen.tolist() == [0.25, 0.5, 0.75]
    lowered = scheduled_target(r, (0.0, 0.25, 0.5, 0.75), 0.5, 0.3, (zero, u))
    torch.testing.assert_close(lowered, 0.25 * (1 - 0.3 * u))


def test_which_target_and_how_far_below_it_are_drawn_apart():
    """With one draw for both, the lower target would always be shrunk less than the upper one."""
    low, high = 0.5, 0.75
    s = scheduled_target(torch.full((4000,), 0.8), (0.0, low, high), 0.3, 0.1, generator())
    for chosen, part in ((low, s[s <= low]), (high, s[s > low])):
        assert float(part.mean()) == pytest.approx(0.95 * chosen, abs=0.005)
        assert float(part.min()) >= 0.9 * chosen
        assert float(part.max() - part.min()) > 0.095 * chosen


def test_pairs_are_in_order():
    t = torch.rand(2000, generator=generator())
    draw = lambda seed: torch.rand(2000, generator=generator(seed))
    s = uniform_target(t, draw(1))
    assert (s < t).all() and float((s / t).mean()) == pytest.approx(0.5, abs=0.02)
    later, earlier = mean_flow_pair(t, draw(2), 0.75, draw(3))
    assert (earlier <= later).all()
    assert float((earlier == later).float().mean()) == pytest.approx(0.75, abs=0.03)
