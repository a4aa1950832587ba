"""Flow maps: networks that jump along the teacher's probability flow from a time t to a time s < t.

A flow map is a callable ``u(x_t, t, s) -> Tensor``, the mean velocity of the way from t down to s,
so that

    F(x_t, t -> s) = x_t - (t - s) u(x_t, t, s)                        process.euler_step

is the jump, F(x, t -> t) = x needs no boundary condition, and u(x_t, t, t) is the velocity itself.
A consistency model is the jump to s = 0. Consistency distillation says that a jump from x_t and a
jump from where the teacher takes x_t within a short time, x_r, land in the same place:

    dist( F_student(x_in, t -> s),  sg F_target(x_r, r -> s) ),
    x_r = teacher's step t -> r,    s <= r < t

=======  ==========================  ====================  ===================================
method   s                           teacher's step        besides
=======  ==========================  ====================  ===================================
CD, LCM  0                           Euler                 target: average of the student
                                                           (2303.01469, 2310.04378)
CTM      ``times.uniform_target``    Euler, several        both ends mapped on to 0
                                                           (2310.02279)
TCD      ``times.uniform_target``    Euler                 ``process.gamma_step`` to sample
                                                           (2402.19159)
PCM      ``times.phase_target``      Euler                 a hinge GAN (2405.18407)
TDD      ``times.scheduled_target``  Euler                 target: the student itself
                                                           (2409.01347)
SCott    0                           ``process.eta_step``  a hinge GAN; eta 1 only blurs
                                                           (2403.01505)
SLAM     0                           Euler                 ``subpath_input`` as x_in
                                                           (2404.13903)
=======  ==========================  ====================  ===================================

With the exact derivative in place of a short step the same condition is sCM and MeanFlow
(``total_derivative``). Shapes: B batch; points are images or clips, times a number, ``[B]`` or, for
clips, ``[B, T]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from streamvid.core.process import Time, VelocityField, as_work, euler_step, expand_time

FlowMap = Callable[[Tensor, Tensor, Tensor], Tensor]


# ---- the consistency pair ------------------------------------------------------------------------


def consistency_pair(
    student: FlowMap,
    target: FlowMap,
    x_in: Tensor,
    t: Tensor,
    x_r: Tensor,
    r: Tensor,
    s: Tensor,
    to_data: FlowMap | None = None,
) -> tuple[Tensor, Tensor]:
    """Where the student lands from ``x_in`` at t, with gradient, and where the target lands from
    ``x_r`` at r, without.

    Args:
        student, target: flow maps; the target is an average of the student, or the student.
        x_in: the state at t, or ``subpath_input``.
        x_r: the teacher's state at r, of ``teacher_steps``.
        s: where both land, s <= r < t.
        to_data: CTM's: a frozen flow map by which both are taken on from s to 0, the student's with
            gradient.
    """
    landed = euler_step(x_in, student(x_in, t, s), t, s)
    with torch.no_grad():
        aim = euler_step(x_r, target(x_r, r, s), r, s)
    if to_data is None:
        return landed, aim
    zero = 0 * s
    with torch.no_grad():
        aim = euler_step(aim, to_data(aim, s, zero), s, zero)
    return euler_step(landed, to_data(landed, s, zero), s, zero), aim


@torch.no_grad()
def teacher_steps(
    velocity_field: VelocityField,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    num_steps: int = 1,
    step: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = euler_step,
) -> Tensor:
    """The teacher's state at ``r`` after ``num_steps`` equal steps from ``x_t`` at ``t``.

    Args:
        step: (x, v, t, t_next) to the next state: ``euler_step``, or ``eta_step`` with its noise
            bound (SCott).
    """
    for i in range(num_steps):
        here, there = t + (r - t) * (i / num_steps), t + (r - t) * ((i + 1) / num_steps)
        x_t = step(x_t, velocity_field(x_t, here), here, there)
    return x_t


def subpath_input(
    x_t: Tensor,
    x_r: Tensor,
    t: Time,
    r: Time,
    gamma: Time,
    law: Literal["independent", "linear"] = "independent",
) -> tuple[Tensor, Tensor]:
    """A point between ``x_t`` and the scaled ``x_r``, and the share of noise in it (SLAM, arXiv
    2404.13903).

        x_in = gamma x_t + (1 - gamma) a x_r,  a = (1 - t) / (1 - r),
        x0 = (x_in - sigma eps) / (1 - t)

    Args:
        gamma: in [0, 1]; 1 is plain consistency: ``x_t`` and sigma = t.
        law: of sigma: "independent", sqrt((a r)^2 + gamma^2 (t^2 - (a r)^2)), is the released
            code's; "linear", gamma t + (1 - gamma) a r, is exact where x_t and x_r have the same
            noise.

    Returns:
        ``x_in`` and sigma, which broadcasts over it.

    Raises:
        ValueError: on another law.
    """
    if law not in ("independent", "linear"):
        raise ValueError(f"law={law!r}, expected 'independent' or 'linear'")
    x_t, x_r = as_work(x_t), as_work(x_r)
    t, r, gamma = (torch.as_tensor(expand_time(time, x_t)) for time in (t, r, gamma))
    a = (1 - t) / (1 - r)
    linear = gamma * t + (1 - gamma) * a * r
    sigma = linear if law == "linear" else ((a * r) ** 2 + gamma**2 * (t**2 - (a * r) ** 2)).sqrt()
    return gamma * x_t + (1 - gamma) * a * x_r, sigma


def bootstrap_target(y_t: Tensor, x0_real: Tensor, t: Time, s: Time) -> Tensor:
    """One step t -> s of the teacher's flow in BOOT's signal, ``k y_t + (1 - k) x0_real``, k = s (1
    - t) / (t (1 - s)).

    BOOT (arXiv 2306.05544): from noise alone, a network y(eps, t) says what the flow from eps has
    become, x_t = (1 - t) y + t eps; it is fitted at s to this target, made of its own y at t and of
    the teacher's ``x0_real`` at x_t. The step is an Euler step of x. s < t < 1; no gradient.
    """
    y_t, x0_real = as_work(y_t).detach(), as_work(x0_real).detach()  # sg, sg
    t, s = expand_time(t, y_t), expand_time(s, y_t)
    k = s * (1 - t) / (t * (1 - s))
    return k * y_t + (1 - k) * x0_real


# ---- exact tangents ------------------------------------------------------------------------------


@torch.no_grad()
def total_derivative(
    u: FlowMap,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    v: Tensor,
    mode: Literal["jvp", "fd"] = "jvp",
    h: float = 5e-3,
) -> tuple[Tensor, Tensor]:
    """``u(x_t, t, s)`` and its derivative along the flow, ``du/dt = v . grad_x u + partial_t u``,
    at fixed s; no gradient.

    Args:
        v: the flow's velocity at ``x_t``, the teacher's or the data's.
        mode: "jvp", forward differentiation, exact; "fd", a central difference over 2 h, for
            networks whose attention has no forward derivative.
        h: step of the difference; one-sided where t + h would pass 1.

    Raises:
        ValueError: on another mode.
    """
    if mode not in ("jvp", "fd"):
        raise ValueError(f"mode={mode!r}, expected 'jvp' or 'fd'")
    if mode == "jvp":
        found = torch.func.jvp(lambda x, time: u(x, time, s), (x_t, t), (v, torch.ones_like(t)))
        return found[0], found[1]
    up, down = torch.minimum(t + h, torch.ones_like(t)) - t, torch.full_like(t, h)
    late = u(x_t + expand_time(up, x_t) * v, t + up, s)
    early = u(x_t - expand_time(down, x_t) * v, t - down, s)
    return u(x_t, t, s), (late - early) / expand_time(up + down, x_t)


def mean_velocity_target(v: Tensor, du_dt: Tensor, t: Time, s: Time, share: float = 1.0) -> Tensor:
    """The value that a mean velocity must have, ``v - share (t - s) du/dt`` (MeanFlow, arXiv
    2505.13447, eq. 6); no gradient.

    At s = 0 it is the consistency model's target, v - t du/dt (sCM, arXiv 2410.11081, for this
    process): ``u + df/dt`` with f = x_t - t u. At s = t it is flow matching.

    Args:
        share: in [0, 1], rises during a warm-up of the tangent.
    """
    span = expand_time(t, v) - expand_time(s, v)
    return (as_work(v) - share * span * as_work(du_dt)).detach()  # sg


def normalized_tangent(u: Tensor, target: Tensor, c: float = 0.1) -> Tensor:
    """``u + g / (|g| + c)`` with g = target - u and its norm per sample: sCM's tangent
    normalisation; no gradient.

    |g| is the root mean square here, so that c does not depend on the size of a sample.
    """
    u, target = as_work(u).detach(), as_work(target).detach()  # sg, sg
    g = target - u
    norm = g.square().mean(dim=tuple(range(1, g.ndim)), keepdim=True).sqrt()
    return u + g / (norm + c)


# ---- secants -------------------------------------------------------------------------------------


def secant_velocity(x_t: Tensor, x_s: Tensor, t: Time, s: Time) -> Tensor:
    """``(x_t - x_s) / (t - s)``, the mean velocity between two points of a stored trajectory; s <
    t.

    The regression target of AccVideo (arXiv 2503.19462) between its key times, and of a student
    that jumps to an end.
    """
    x_t, x_s = as_work(x_t), as_work(x_s)
    return (x_t - x_s) / (expand_time(t, x_t) - expand_time(s, x_t))


def straightness(u_early: Tensor, u_late: Tensor) -> Tensor:
    """``mean |u_late - sg(u_early)|^2`` of mean velocities at two points of one path: 0 where the
    path is straight.

    TraFlow's (arXiv 2502.16972) third term. It contradicts the other two where the teacher's paths
    are curved, so its weight stays small.
    """
    return (as_work(u_late) - as_work(u_early).detach()).square().mean()  # sg


# ---- distances -----------------------------------------------------------------------------------


def distance(
    a: Tensor, b: Tensor, kind: Literal["l2", "huber"] = "l2", c: float = 1e-3, per: str = "element"
) -> Tensor:
    """A distance for each sample, ``[B]``.

    "l2" is the mean square. "huber" is ``sqrt(d^2 + c^2) - c``, of each element and then averaged
    (``per="element"``, LCM with c = 1e-3), or of the root mean square of a sample
    (``per="sample"``, improved consistency training, arXiv 2310.14189, whose c grows with the root
    of the size; here c is per element): two different losses.

    Raises:
        ValueError: on another kind or ``per``.
    """
    if kind not in ("l2", "huber") or per not in ("element", "sample"):
        raise ValueError(
            f"kind={kind!r}, per={per!r}, expected 'l2' or 'huber', and 'element' or 'sample'"
        )
    square = (as_work(a) - as_work(b)).square()
    if kind == "l2":
        return square.flatten(1).mean(1)
    if per == "sample":
        return (square.flatten(1).mean(1) + c**2).sqrt() - c
    return ((square + c**2).sqrt() - c).flatten(1).mean(1)


def adaptive(losses: Tensor, power: float = 1.0, c: float = 1e-2) -> Tensor:
    """``losses / sg(losses + c)^power`` for losses ``[B]``: no sample outweighs the others
    (MeanFlow, section 4.3).
    """
    return losses / (losses.detach() + c) ** power  # sg


# ---- ArcFlow's momentum --------------------------------------------------------------------------


def arc_displacement(
    velocities: Tensor, logits: Tensor, log_rates: Tensor, t_source: Time, t: Time, s: Time
) -> Tensor:
    """The integral from ``s`` up to ``t`` of the velocity that a network gave at ``t_source``, in
    closed form: a jump is ``x_s = x_t - displacement`` (ArcFlow, arXiv 2602.09014).

        v(t) = sum_k softmax(logits)_k velocities_k exp(log_rates_k (t_source - t))

    Args:
        velocities: ``[B, K, C, ...]``.
        logits, log_rates: ``[B, K, 1, ...]``, broadcasting over the velocities; a component with
            rate 0 is a straight line, and all rates 0 make it an Euler step.

    Returns:
        ``[B, C, ...]``.
    """
    start = _component_time(t_source, velocities) - _component_time(t, velocities)
    span = _component_time(t, velocities) - _component_time(s, velocities)
    rates = as_work(log_rates)
    weights = (
        as_work(logits).softmax(1) * (rates * start).exp() * span * _relative_growth(rates * span)
    )
    return (weights * as_work(velocities)).sum(1)


def _component_time(t: Time, velocities: Tensor) -> Time:
    """A time ``[B]`` or ``[B, T]`` that broadcasts over ``[B, K, C, ...]``."""
    t = expand_time(t, velocities[:, 0])
    return t.unsqueeze(1) if isinstance(t, Tensor) and t.ndim else t


def _relative_growth(z: Tensor) -> Tensor:
    """``expm1(z) / z``, which is 1 at 0, with a gradient there."""
    small = z.abs() < 1e-4
    safe = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, 1 + z / 2 + z**2 / 6, torch.expm1(safe) / safe)
