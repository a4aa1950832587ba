"""The noise process, rectified flow, and every conversion between its quantities.

    x_t = (1 - t) x0 + t eps        t = 1 is noise, t = 0 is data
    v   = eps - x0 = dx_t / dt      what the networks predict
    x0  = x_t - t v,   eps = x_t + (1 - t) v,   score = -eps / t

Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747. Other model families are converted to this
one in ``teachers/`` and nowhere else.

Shapes: tensors are images ``[B, C, H, W]`` or videos ``[B, C, T, H, W]``. A time is a float, a scalar
tensor, ``[B]`` (one a sample) or, for videos, ``[B, T]`` (one a latent frame); it is continuous in [0, 1]
and already shifted. Results are float32, or float64 where an input is.
"""

from __future__ import annotations

import torch
from torch import Tensor

Time = float | Tensor


def as_work(x: Tensor) -> Tensor:
    """``x`` in the precision of the loss core: float32, or what it has if that is better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand_time(t: Time, x: Tensor) -> Time:
    """``t`` shaped to broadcast over ``x`` (``[B, C, H, W]`` or ``[B, C, T, H, W]``), in its work precision.

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
    """The velocity of a data prediction, ``v = (x_t - x0) / t``; t > 0 (at t = 0 any v has this x0)."""
    x_t, x0 = as_work(x_t), as_work(x0)
    return (x_t - x0) / expand_time(t, x_t)


def score_from_v(x_t: Tensor, v: Tensor, t: Time) -> Tensor:
    """The score of the noised density, ``grad log p_t(x_t) = -eps / t``; t > 0.

    Two scores at one ``x_t`` differ by ``(1 - t) / t^2`` times the difference of their data predictions.
    """
    return -eps_from_v(x_t, v, t) / expand_time(t, x_t)


def euler_step(x_t: Tensor, v: Tensor, t: Time, t_next: Time) -> Tensor:
    """One Euler step of the probability flow, ``x_{t'} = x_t - (t - t') v``; deterministic."""
    x_t, v = as_work(x_t), as_work(v)
    return x_t - (expand_time(t, x_t) - expand_time(t_next, x_t)) * v


def renoise_step(x0: Tensor, eps_new: Tensor, t_next: Time) -> Tensor:
    """One consistency step: the data prediction with fresh noise at ``t_next`` (arXiv 2303.01469, alg. 1)."""
    return add_noise(x0, eps_new, t_next)
