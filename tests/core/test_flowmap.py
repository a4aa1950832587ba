"""Flow maps on Gaussians, where the teacher's flow is known: x_s = (1-s) m + R_s / R_t (x_t - (1-t)
m), R_t^2 = (1-t)^2 s^2 + t^2.
"""

import math

import pytest
import torch

from streamvid.core.fitting import flow_matching_loss
from streamvid.core.flowmap import (
    adaptive,
    arc_displacement,
    bootstrap_target,
    consistency_pair,
    distance,
    mean_velocity_target,
    normalized_tangent,
    secant_velocity,
    straightness,
    subpath_input,
    teacher_steps,
    total_derivative,
)
from streamvid.core.process import add_noise, eta_step, euler_step, expand_time, velocity, x0_from_v
from streamvid.core.times import phase_target, scheduled_target

M, S = 0.4, 1.3
IMAGE, VIDEO = (2, 3, 4, 4), (2, 3, 5, 4, 4)
TIGHT = dict(rtol=0, atol=1e-12)


def radius(t):
    return ((1 - t) ** 2 * S**2 + t**2) ** 0.5


def velocity_field(x_t, t):
    """The exact velocity of N(M, S^2)."""
    t = expand_time(t, x_t)
    x0 = M + (1 - t) * S**2 / radius(t) ** 2 * (x_t - (1 - t) * M)
    return (x_t - x0) / t


def jump(x_t, t, s):
    t, s = expand_time(t, x_t), expand_time(s, x_t)
    return (1 - s) * M + radius(s) / radius(t) * (x_t - (1 - t) * M)


def flow_map(x_t, t, s):
    """The exact mean velocity; where s = t, the velocity."""
    t_, s_ = expand_time(t, x_t), expand_time(s, x_t)
    span = torch.as_tensor(t_ - s_, dtype=x_t.dtype)
    mean = (x_t - jump(x_t, t, s)) / torch.where(span == 0, torch.ones_like(span), span)
    return torch.where(span == 0, velocity_field(x_t, t), mean)


def points(shape=IMAGE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- the map itself


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
def test_the_map_is_a_semigroup(shape):
    """Q4: jumping t -> r -> s is jumping t -> s."""
    x, t, r, s = points(shape), times(0.9, 0.7), times(0.5, 0.6), times(0.2, 0.0)
    middle = euler_step(x, flow_map(x, t, r), t, r)
    torch.testing.assert_close(
        euler_step(middle, flow_map(middle, r, s), r, s), jump(x, t, s), **TIGHT
    )


@pytest.mark.parametrize("d", [0.1, 0.05, 0.025])
def test_one_euler_step_of_the_teacher_leaves_a_residual_of_second_order(d):
    """Q4 at t = .9: how far two jumps of the exact map land apart; it falls with d^2."""
    residuals = []
    for width in (d, d / 2):
        x, t, r, s = points(), times(0.9, 0.9), times(0.9, 0.9) - width, times(0.0, 0.0)
        landed, aim = consistency_pair(
            flow_map, flow_map, x, t, teacher_steps(velocity_field, x, t, r), r, s
        )
        residuals.append(float((landed - aim).abs().max() / (x - 0.1 * M).abs().max()))
    assert residuals[0] / residuals[1] == pytest.approx(4, rel=0.12)
    t, r = 0.9, 0.9 - d
    gain = 1 - d * (
        (1 - (1 - t) * S**2 / radius(t) ** 2 * (1 - t)) / t - (1 - t) * S**2 / radius(t) ** 2
    )
    assert residuals[0] == pytest.approx(abs(S / radius(t) - S / radius(r) * gain), rel=1e-9)


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
def test_many_teacher_steps_follow_the_flow(shape):
    x, t, r = points(shape), times(0.9, 0.6), times(0.4, 0.3)
    torch.testing.assert_close(
        teacher_steps(velocity_field, x, t, r, 4000), jump(x, t, r), rtol=0, atol=1e-3
    )


def test_per_frame_times_are_a_loop_over_frames():
    x = points(VIDEO)
    t = torch.linspace(0.3, 0.95, 10, dtype=torch.float64).reshape(2, 5)
    r, s = 0.8 * t, 0.3 * t
    landed, aim = consistency_pair(
        flow_map, flow_map, x, t, teacher_steps(velocity_field, x, t, r), r, s
    )
    for i in range(5):
        one = x[:, :, i]
        each = consistency_pair(
            flow_map,
            flow_map,
            one,
            t[:, i],
            teacher_steps(velocity_field, one, t[:, i], r[:, i]),
            r[:, i],
            s[:, i],
        )
        torch.testing.assert_close(landed[:, :, i], each[0], **TIGHT)
        torch.testing.assert_close(aim[:, :, i], each[1], **TIGHT)


# ---- one pair, many methods


def rough_map(x_t, t, s):
    """Some network that is no flow map."""
    t, s = expand_time(t, x_t), expand_time(s, x_t)
    return torch.sin(2 * x_t) + t - 0.5 * s


def pair(s, x_r=None, **options):
    x, t, r = points(), times(0.9, 0.7), times(0.8, 0.55)
    x_r = teacher_steps(velocity_field, x, t, r) if x_r is None else x_r
    return consistency_pair(rough_map, rough_map, options.pop("x_in", x), t, x_r, r, s, **options)


def test_reductions_to_consistency_distillation():
    """TDD with target 0, PCM with one phase, SCott with eta 0, SLAM with gamma 1: all equal CD."""
    x, t, r = points(), times(0.9, 0.7), times(0.8, 0.55)
    draws = times(0.3, 0.6), times(0.9, 0.2)
    plain = pair(times(0.0, 0.0))
    noisy = lambda x, v, t, s: eta_step(x, v, t, s, 0.0, points(seed=7))
    x_in, sigma = subpath_input(x, teacher_steps(velocity_field, x, t, r), t, r, 1.0)
    for other in (
        pair(scheduled_target(r, (0.0,), 0.3, 0.0, draws)),
        pair(phase_target(t, (0.0,))),
        pair(times(0.0, 0.0), teacher_steps(velocity_field, x, t, r, step=noisy)),
        pair(times(0.0, 0.0), x_in=x_in),
    ):
        for ours, theirs in zip(plain, other):
            torch.testing.assert_close(ours, theirs, **TIGHT)
    torch.testing.assert_close(sigma.flatten(), t, **TIGHT)


def test_trajectory_consistency_maps_both_ends_to_data():
    """CTM at s = 0 is CD whatever frozen map follows; at the exact map any s gives the same data
    point.
    """
    zero, s = times(0.0, 0.0), times(0.3, 0.1)
    for ours, theirs in zip(pair(zero), pair(zero, to_data=rough_map)):
        torch.testing.assert_close(ours, theirs, **TIGHT)
    x, t, r = points(), times(0.9, 0.7), times(0.8, 0.55)
    landed, aim = consistency_pair(flow_map, flow_map, x, t, jump(x, t, r), r, s, to_data=flow_map)
    torch.testing.assert_close(landed, jump(x, t, zero), **TIGHT)
    torch.testing.assert_close(aim, jump(x, t, zero), **TIGHT)


def test_who_gets_gradients():
    """The student, through what it lands on; not the target, the teacher, nor CTM's frozen map's
    target side.
    """
    student, target, teacher = (torch.nn.Conv2d(3, 3, 1).double() for _ in range(3))
    x, t, r, s = points(), times(0.9, 0.7), times(0.8, 0.55), times(0.1, 0.2)
    x_r = teacher_steps(lambda x, t: teacher(x), x, t, r)
    landed, aim = consistency_pair(
        lambda x, t, s: student(x), lambda x, t, s: target(x), x, t, x_r, r, s
    )
    distance(landed, aim).sum().backward()
    assert student.weight.grad.abs().sum() > 0
    assert target.weight.grad is None and teacher.weight.grad is None


@pytest.mark.parametrize("eta, gain", [(0.0, 1.430), (0.3, 1.200), (1.0, 0.204)])
def test_sde_consistency_blurs(eta, gain):
    """A negative oracle: squared-error consistency on ancestral steps has the denoiser, the blurred
    mean, as fixed point.

    A linear map x0 = k(t) x_t on data N(0, s^2); k(t) = E[k(r) x_r x_t] / E[x_t^2] along a fine
    grid from 0. At t = .9 and s = 1.3 the flow's gain is 1.430, and eta = 1 gives the denoiser's,
    (1 - t) s^2 / R^2 = .204.
    """
    s, num, end = 1.3, 20000, 0.9
    k = 1.0
    grid = torch.linspace(1e-6, end, num + 1, dtype=torch.float64)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    zero = torch.zeros_like(one)
    steps = list(zip(grid[:-1].tolist(), grid[1:].tolist()))
    for r, t in steps:
        # denoiser gain: x_r keeps only its part along x_t
        drift = (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2)
        v = (1 - drift) / t
        if eta == 0:
            part = 1 - (t - r) * v
        else:
            a = (1 - t) / (1 - r)
            new = eta * r / t * math.sqrt(max(t**2 - (a * r) ** 2, 0.0))
            part = (1 - r) * drift + math.sqrt(max(r**2 - new**2, 0.0)) * (1 - (1 - t) * drift) / t
        k *= part
    assert k == pytest.approx(gain, abs=2e-3)
    r, t = steps[-1]
    v = (1 - (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2)) / t
    assert float(eta_step(one, v * one, t, r, eta, zero)) == pytest.approx(part, abs=1e-12)


def test_a_subpath_point_has_the_share_of_noise_that_it_says():
    """With the same x0 and eps at both ends the linear law gives x0 back for every gamma."""
    x0, eps = points(), points(seed=1)
    t, r = times(0.8, 0.6), times(0.5, 0.2)
    for gamma in (0.0, 0.3, 1.0):
        x_in, sigma = subpath_input(
            add_noise(x0, eps, t), add_noise(x0, eps, r), t, r, gamma, "linear"
        )
        torch.testing.assert_close(
            (x_in - sigma * eps) / expand_time(1 - t, x_in), x0, rtol=0, atol=1e-12
        )
    ends = [subpath_input(x0, eps, t, r, gamma)[1] for gamma in (0.0, 1.0)]
    same = [subpath_input(x0, eps, t, r, gamma, "linear")[1] for gamma in (0.0, 1.0)]
    for ours, theirs in zip(ends, same):
        torch.testing.assert_close(ours, theirs, **TIGHT)
    with pytest.raises(ValueError, match="law='cubic'"):
        subpath_input(x0, eps, t, r, 0.5, "cubic")


def test_boot_follows_the_flow():
    """y = (x_t - t eps) / (1 - t) along the teacher's flow; the step is an Euler step of x, so its
    error is O(d^2).
    """
    eps, t = points(), times(0.9, 0.7)
    one = times(0.999999, 0.999999)

    def signal(time):
        return (jump(eps, one, time) - expand_time(time, eps) * eps) / expand_time(1 - time, eps)

    errors = []
    for d in (0.02, 0.01):
        x_t = expand_time(1 - t, eps) * signal(t) + expand_time(t, eps) * eps
        x0_real = x0_from_v(x_t, velocity_field(x_t, t), t)
        y_s = bootstrap_target(signal(t), x0_real, t, t - d)
        x_s = expand_time(1 - t + d, eps) * y_s + expand_time(t - d, eps) * eps
        torch.testing.assert_close(
            x_s, euler_step(x_t, velocity_field(x_t, t), t, t - d), rtol=0, atol=1e-12
        )
        errors.append(float((y_s - signal(t - d)).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)


# ---- tangents


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
def test_the_mean_velocity_satisfies_its_identity(shape):
    """Q5: u = v - (t - s) du/dt, exactly, so that the target at the exact map is the map."""
    x, t, s = points(shape), times(0.9, 0.7), times(0.3, 0.0)
    v = velocity_field(x, t)
    u, du = total_derivative(flow_map, x, t, s, v)
    torch.testing.assert_close(mean_velocity_target(v, du, t, s), u, rtol=0, atol=1e-10)
    torch.testing.assert_close(u, flow_map(x, t, s), **TIGHT)


def test_a_finite_difference_is_the_derivative():
    x, t, s = points(), times(0.9, 0.7), times(0.3, 0.0)
    v = velocity_field(x, t)
    _, exact = total_derivative(flow_map, x, t, s, v)
    _, close = total_derivative(flow_map, x, t, s, v, "fd", 1e-4)
    torch.testing.assert_close(close, exact, rtol=0, atol=1e-6)
    at_end = total_derivative(
        flow_map, x, times(1.0, 1.0), s, velocity_field(x, times(1.0, 1.0)), "fd", 1e-4
    )[1]
    assert at_end.isfinite().all()
    with pytest.raises(ValueError, match="mode='vjp'"):
        total_derivative(flow_map, x, t, s, v, "vjp")


def test_continuous_consistency_is_mean_flow_to_zero():
    """sCM: f = x - t u, df/dt = v - u - t du/dt, target u + df/dt, which is MeanFlow's at s = 0; 0
    at the exact map.
    """
    x, t, s = points(), times(0.9, 0.7), times(0.0, 0.0)
    v = velocity_field(x, t)
    u, du = total_derivative(rough_map, x, t, s, v)
    f, df = torch.func.jvp(
        lambda x, t: euler_step(x, rough_map(x, t, s), t, s), (x, t), (v, torch.ones_like(t))
    )
    torch.testing.assert_close(mean_velocity_target(v, du, t, s), u + df, rtol=0, atol=1e-12)
    exact, du = total_derivative(flow_map, x, t, s, v)
    assert (mean_velocity_target(v, du, t, s) - exact).abs().max() < 1e-10


def test_equal_times_are_flow_matching():
    x0, eps, t = points(), points(seed=1), times(0.9, 0.7)
    v, x_t = velocity(x0, eps), add_noise(x0, eps, t)
    u, du = total_derivative(rough_map, x_t, t, t, v)
    loss = distance(u, mean_velocity_target(v, du, t, t)).mean()
    torch.testing.assert_close(loss, flow_matching_loss(u, x0, eps), **TIGHT)


def test_a_tangent_warms_up_and_is_normalised():
    v, du, t, s = points(), points(seed=1), times(0.9, 0.7), times(0.3, 0.0)
    torch.testing.assert_close(mean_velocity_target(v, du, t, s, share=0.0), v, **TIGHT)
    u = points(seed=2)
    g = normalized_tangent(u, u + 1000 * v) - u
    torch.testing.assert_close(
        g.square().mean((1, 2, 3)).sqrt(), torch.ones(2, dtype=torch.float64), rtol=1e-3, atol=0
    )
    assert normalized_tangent(u, u).equal(u)


def test_targets_have_no_gradient():
    x = points().requires_grad_()
    t, s = times(0.9, 0.7), times(0.3, 0.0)
    v = velocity_field(x, t)
    u, du = total_derivative(flow_map, x, t, s, v)
    targets = (
        u,
        du,
        mean_velocity_target(v, du, t, s),
        normalized_tangent(v, x),
        bootstrap_target(x, v, t, s),
    )
    assert not any(each.requires_grad for each in targets)


# ---- secants and distances


def test_secants_of_the_flow_rebuild_its_end():
    """AccVideo: an affine student that fits the secants between key times lands on the trajectory's
    end in as many steps.
    """
    x = start = points()
    key = [times(t, t) for t in (1.0, 0.9, 0.6, 0.0)]
    for t, s in zip(key, key[1:]):
        x = euler_step(
            x, secant_velocity(jump(start, key[0], t), jump(start, key[0], s), t, s), t, s
        )
    torch.testing.assert_close(x, jump(start, key[0], key[-1]), **TIGHT)


def test_straightness_is_zero_on_straight_paths_only():
    x, t, s = points(), times(0.9, 0.7), times(0.3, 0.2)
    assert float(straightness(x, x.clone())) == 0
    late = flow_map(x, t, times(0.0, 0.0))
    middle = jump(x, t, s)
    # curved, though the map is exact
    assert float(straightness(flow_map(middle, s, times(0.0, 0.0)), late)) > 1e-3
    early, late = (z.requires_grad_() for z in (points(), points(seed=1)))
    straightness(early, late).backward()
    assert early.grad is None and late.grad is not None


def test_distances():
    a, b = points(), points(seed=1)
    c = 0.03
    square = (a - b) ** 2
    torch.testing.assert_close(distance(a, b), square.mean((1, 2, 3)), **TIGHT)
    torch.testing.assert_close(
        distance(a, b, "huber", c), ((square + c**2).sqrt() - c).mean((1, 2, 3)), **TIGHT
    )
    per_sample = (square.mean((1, 2, 3)) + c**2).sqrt() - c
    torch.testing.assert_close(distance(a, b, "huber", c, per="sample"), per_sample, **TIGHT)
    assert (distance(a, b, "huber", c) - per_sample).abs().min() > 1e-3  # two different losses
    assert distance(a, a, "huber").abs().max() == 0
    with pytest.raises(ValueError, match="kind='l1'"):
        distance(a, b, "l1")


def test_the_adaptive_weight_is_detached():
    losses = times(0.5, 4.0).requires_grad_()
    torch.testing.assert_close(
        adaptive(losses).detach(), losses.detach() / (losses.detach() + 0.01)
    )
    adaptive(losses).sum().backward()
    torch.testing.assert_close(losses.grad, 1 / (losses.detach() + 0.01))


# ---- ArcFlow


def components(shape, seed=0, rates=True):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    batch, _, *rest = shape
    u, logits = draw(batch, 3, *shape[1:]), draw(batch, 3, 1, *rest)
    return u, logits, draw(batch, 3, 1, *rest) * rates


def arc_velocity(u, logits, rates, t_source, t):
    """ArcFlow, arXiv 2602.09014: a mixture of exponentials, given at ``t_source``."""
    span = expand_time(t_source - t, u[:, 0]).unsqueeze(1)
    return (logits.softmax(1) * u * (rates * span).exp()).sum(1)


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
def test_arcs_without_rates_are_euler_steps(shape):
    u, logits, rates = components(shape, rates=False)
    x, t, s = points(shape), times(0.9, 0.7), times(0.4, 0.1)
    v = arc_velocity(u, logits, rates, t, t)
    torch.testing.assert_close(
        x - arc_displacement(u, logits, rates, t, t, s), euler_step(x, v, t, s), **TIGHT
    )


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
def test_arcs_add_up_and_differentiate_to_their_velocity(shape):
    u, logits, rates = components(shape)
    source, a, b, c = times(1.0, 0.9), times(0.9, 0.8), times(0.5, 0.6), times(0.0, 0.1)
    move = lambda t, s: arc_displacement(u, logits, rates, source, t, s)
    torch.testing.assert_close(move(a, c), move(a, b) + move(b, c), **TIGHT)
    d = 1e-5
    slope = (move(a, b - d) - move(a, b + d)) / (2 * d)
    torch.testing.assert_close(slope, arc_velocity(u, logits, rates, source, b), rtol=0, atol=1e-8)


def test_an_exponential_field_is_exact_in_one_step():
    """v(t) = A e^{l (1 - t)} + B with two components."""
    rate = 1.7
    u = torch.stack([2 * points(), 2 * points(seed=1)], dim=1)
    rates = torch.tensor([rate, 0.0], dtype=torch.float64).reshape(1, 2, 1, 1, 1)
    logits = torch.zeros(1, 2, 1, 1, 1, dtype=torch.float64)
    ours = arc_displacement(u, logits, rates, 1.0, 1.0, 0.2)
    expected = points() * (math.exp(rate * 0.8) - 1) / rate + points(seed=1) * 0.8
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_arc_gradients_are_finite_at_rate_zero():
    u, logits, rates = components(IMAGE, rates=False)
    rates.requires_grad_()
    arc_displacement(u, logits, rates, 1.0, 0.9, 0.2).sum().backward()
    assert rates.grad.isfinite().all() and rates.grad.abs().sum() > 0
