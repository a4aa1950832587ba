"""The noise process, rectified flow, and every conversion between its quantities.

    x_t = (1 - t) x0 + t eps        t = 1 is noise, t = 0 is data
    v   = eps - x0 = dx_t / dt      what the networks predict
    x0  = x_t - t v,   eps = x_t + (1 - t) v,   score = -eps / t

Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747. Other model families are converted to
this one in ``teachers/`` and nowhere else, by ``adapt`` at the end of this file.

A *velocity field* is any callable ``v(x_t, t) -> Tensor`` with its prompt closed over; the rest of
the loss core takes networks as such.

Shapes: tensors are images ``[B, C, H, W]`` or videos ``[B, C, T, H, W]``. A time is a float, a
scalar tensor, ``[B]`` (one per sample) or, for videos, ``[B, T]`` (one per latent frame); it is
continuous in [0, 1] and already shifted. Results are float32, or float64 where an input is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Time = float | Tensor
VelocityField = Callable[[Tensor, Tensor], Tensor]


def as_work(x: Tensor) -> Tensor:
    """``x`` in the precision of the loss core: float32, or what it has if that is better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand_time(t: Time, x: Tensor) -> Time:
    """``t`` shaped to broadcast over ``x`` (``[B, C, H, W]`` or ``[B, C, T, H, W]``), in its work
    precision.

    Anything given per sample or per frame, such as a loss weight, expands the same way.

    Raises:
        ValueError: if ``t`` is neither a scalar, nor ``[B]``, nor ``[B, T]`` with a video ``x``.
    """
    if not isinstance(t, Tensor):
        return float(t)
    t = t.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    if t.ndim == 0:
        return t
    if t.shape == x.shape[:1]:
        return t.reshape(-1, *[1] * (x.ndim - 1))
    if x.ndim == 5 and t.shape == (x.shape[0], x.shape[2]):
        return t[:, None, :, None, None]  # [B, 1, T, 1, 1]
    raise ValueError(
        f"times of shape {tuple(t.shape)} do not fit a tensor of shape {tuple(x.shape)}; "
        "give a scalar, [B], or [B, T] for a video [B, C, T, H, W]"
    )


def masked_reduce(
    terms: Tensor, reduction: Literal["mean", "sum"] = "mean", mask: Tensor | None = None
) -> Tensor:
    """The mean or sum of what a mask (``[B]``, ``[B, T]`` or of the full shape) keeps; all of it
    without one.
    """
    if mask is None:
        return terms.mean() if reduction == "mean" else terms.sum()
    keep = (
        mask.to(terms.dtype)
        if mask.shape == terms.shape
        else expand_time(mask, terms).expand_as(terms)
    )
    total = (terms * keep).sum()
    return total / keep.sum() if reduction == "mean" else total


def add_noise(x0: Tensor, eps: Tensor, t: Time) -> Tensor:
    """``x_t = (1 - t) x0 + t eps``. At t = 0 this is ``x0`` exactly, at t = 1 ``eps`` exactly."""
    x0, eps = as_work(x0), as_work(eps)
    t = expand_time(t, x0)
    return (1 - t) * x0 + t * eps


def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """``v = eps - x0``, the regression target of flow matching."""
    return as_work(eps) - as_work(x0)


def x0_from_v(x_t: Tensor, v: Tensor, t: Time) -> Tensor:
    """The data prediction ``x0 = x_t - t v``."""
    x_t, v = as_work(x_t), as_work(v)
    return x_t - expand_time(t, x_t) * v


def eps_from_v(x_t: Tensor, v: Tensor, t: Time) -> Tensor:
    """The noise prediction ``eps = x_t + (1 - t) v``."""
    x_t, v = as_work(x_t), as_work(v)
    return x_t + (1 - expand_time(t, x_t)) * v


def v_from_x0(x_t: Tensor, x0: Tensor, t: Time) -> Tensor:
    """The velocity of a data prediction, ``v = (x_t - x0) / t``; t > 0 (at t = 0 any v has this
    x0).
    """
    x_t, x0 = as_work(x_t), as_work(x0)
    return (x_t - x0) / expand_time(t, x_t)


def score_from_v(x_t: Tensor, v: Tensor, t: Time) -> Tensor:
    """The score of the noised density, ``grad log p_t(x_t) = -eps / t``; t > 0.

    Two scores at one ``x_t`` differ by ``(1 - t) / t^2`` times the difference of their data
    predictions.
    """
    return -eps_from_v(x_t, v, t) / expand_time(t, x_t)


def euler_step(x_t: Tensor, v: Tensor, t: Time, t_next: Time) -> Tensor:
    """One Euler step of the probability flow, ``x_{t'} = x_t - (t - t') v``; deterministic."""
    x_t, v = as_work(x_t), as_work(v)
    return x_t - (expand_time(t, x_t) - expand_time(t_next, x_t)) * v


def renoise_step(x0: Tensor, eps_new: Tensor, t_next: Time) -> Tensor:
    """One consistency step: the data prediction with fresh noise at ``t_next`` (arXiv 2303.01469,
    alg. 1).
    """
    return add_noise(x0, eps_new, t_next)


# ---- stochastic steps ---------------------------------------------------------------------------------


def transition(x_s: Tensor, noise: Tensor, s: Time, t: Time) -> Tensor:
    """The forward process from ``s`` up to ``t`` >= s: ``a x_s + sqrt(t^2 - a^2 s^2) noise``, a =
    (1 - t) / (1 - s).

    It turns the law of states at ``s`` < 1 into that of states at ``t``; from s = t it changes
    nothing.
    """
    x_s, noise = as_work(x_s), as_work(noise)
    s, t = expand_time(s, x_s), expand_time(t, x_s)
    a = (1 - t) / (1 - s)
    return a * x_s + _root(t**2 - (a * s) ** 2) * noise


def eta_step(x_t: Tensor, v: Tensor, t: Time, t_next: Time, eta: float, noise: Tensor) -> Tensor:
    """A step that renews part of the noise: ``(1 - s) x0 + sqrt(s^2 - h^2) eps + h noise`` to s =
    ``t_next`` < t, with

        h = eta (s / t) sqrt(t^2 - ((1 - t) / (1 - s))^2 s^2)

    eta 0 is ``euler_step``, eta 1 the ancestral step, the forward process turned round (DDIM, arXiv
    2010.02502, eq. 16, for this process; consistency training on it: SCott, arXiv 2403.01505).
    """
    x_t = as_work(x_t)
    x0, eps = x0_from_v(x_t, v, t), eps_from_v(x_t, v, t)
    t, s = expand_time(t, x_t), expand_time(t_next, x_t)
    renewed = eta * s / t * _root(t**2 - ((1 - t) / (1 - s) * s) ** 2)
    return (1 - s) * x0 + _root(s**2 - renewed**2) * eps + renewed * as_work(noise)


def gamma_step(
    x_t: Tensor, v: Tensor, t: Time, t_next: Time, gamma: float, noise: Tensor
) -> Tensor:
    """Jump past ``t_next`` to (1 - gamma) t_next and come back by the forward process (TCD, arXiv
    2402.19159, alg. 2).

    gamma 0 is ``euler_step``, gamma 1 the consistency step ``renoise_step``.
    """
    s = (1 - gamma) * t_next
    return transition(euler_step(x_t, v, t, s), noise, s, t_next)


def _root(square: Time) -> Time:
    """A square root whose argument may have been rounded below 0."""
    return square.clamp_min(0).sqrt() if isinstance(square, Tensor) else math.sqrt(max(square, 0.0))


# ---- networks of other processes ----------------------------------------------------------------------

Clock = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""From our t, any shape, to (the network's own time, alpha, sigma) of its process ``alpha x0 +
sigma eps``."""


def adapt(network: VelocityField, kind: Literal["eps", "x0", "v"], clock: Clock) -> VelocityField:
    """The velocity field of a network that was trained for another process.

    Its states are ours times alpha + sigma, at the t for which t = sigma / (alpha + sigma); x0 and
    eps are the same.

    Args:
        network: takes its own states and its own time.
        kind: what it predicts: "eps", "x0", or "v" = alpha eps - sigma x0, of processes with
            alpha^2 + sigma^2 = 1 (Salimans and Ho, arXiv 2202.00512). Of pure noise an "eps"
            network says nothing about x0: not finite at t = 1.
        clock: ``edm_clock``, ``trig_clock`` or one of ``vp_clock``.

    Raises:
        ValueError: on another kind.
    """
    if kind not in _X0_OF:
        raise ValueError(f"kind={kind!r}, expected one of {tuple(_X0_OF)}")

    def velocity_field(x_t: Tensor, t: Time) -> Tensor:
        x_t = as_work(x_t)
        native, alpha, sigma = clock(torch.as_tensor(t, device=x_t.device).to(x_t.dtype))
        alpha, sigma = expand_time(alpha, x_t), expand_time(sigma, x_t)
        x = (alpha + sigma) * x_t
        return v_from_x0(x_t, _X0_OF[kind](x, as_work(network(x, native)), alpha, sigma), t)

    return velocity_field


_X0_OF = {
    "eps": lambda x, out, alpha, sigma: (x - sigma * out) / alpha,
    "x0": lambda x, out, alpha, sigma: out,
    "v": lambda x, out, alpha, sigma: alpha * x - sigma * out,
}


def edm_clock(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """EDM (arXiv 2206.00364): alpha = 1, and its time is sigma = t / (1 - t); a denoiser D(x;
    sigma) is of kind "x0".
    """
    sigma = t / (1 - t)
    return sigma, torch.ones_like(t), sigma


def trig_clock(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """TrigFlow (sCM, arXiv 2410.11081): alpha = cos tau, sigma = sin tau, t = sin / (sin + cos);
    its F is of kind "v".

    For data of unit variance; scale the network's input and output where sigma_d is not 1.
    """
    tau = torch.atan2(t, 1 - t)
    return tau, tau.cos(), tau.sin()


def vp_clock(alpha_bar: Sequence[float]) -> Clock:
    """Variance-preserving diffusion in discrete steps: alpha = sqrt(alpha_bar), sigma = sqrt(1 -
    alpha_bar).

    Args:
        alpha_bar: the falling cumulative products of a DDPM schedule, ``scheduler.alphas_cumprod``
            of diffusers. Between two steps the network's time is interpolated in t; beyond the ends
            it is held.
    """
    table = torch.as_tensor(alpha_bar, dtype=torch.float64)
    alpha, sigma = table.sqrt(), (1 - table).sqrt()
    times = sigma / (alpha + sigma)  # of the steps, rising; 1 where the schedule ends in pure noise

    def clock(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grid = times.to(t.device)
        high = torch.searchsorted(grid, t.double().contiguous()).clamp(1, len(grid) - 1)
        part = ((t.double() - grid[high - 1]) / (grid[high] - grid[high - 1])).clamp(0, 1)
        norm = (t**2 + (1 - t) ** 2).sqrt()
        return (high - 1 + part).to(t.dtype), (1 - t) / norm, t / norm

    return clock
