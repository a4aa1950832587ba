"""Times: the timestep shift, the lists of a few-step sampler, and the laws that training draws from.

A *nominal* time u in [0, 1] becomes t = S u / (1 + (S - 1) u) under the shift S (Esser et al., arXiv
2403.03206, eq. 23): S > 1 moves it towards noise, where a large latent still hides its layout. Everything
outside this file speaks of t, after the shift. Self-Forcing's list "1000, 750, 500, 250" is nominal: at
S = 5 it is t = 1, .9375, .8333, .625.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor

TimeLaw = Literal["uniform", "logit_normal"]
Number = TypeVar("Number", float, Tensor)


def shift_time(u: Number, shift: float) -> Number:
    """The time of a nominal time ``u`` in [0, 1]; ``shift`` 1 is the identity, 0 and 1 stay where they are."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_time(t: Number, shift: float) -> Number:
    """The nominal time of ``t``, the inverse of ``shift_time``."""
    return t / (shift - (shift - 1) * t)


def step_times(num_steps: int, shift: float) -> tuple[float, ...]:
    """The times at which a few-step student predicts: nominally 1, 1 - 1/n, ..., 1/n, shifted.

    Raises:
        ValueError: unless ``num_steps`` >= 1 and ``shift`` > 0.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}, expected at least 1")
    if shift <= 0:
        raise ValueError(f"shift={shift}, expected a positive number; 1 is no shift, Wan uses 3 to 8")
    return tuple(shift_time(1 - i / num_steps, shift) for i in range(num_steps))


def euler_times(num_steps: int, shift: float) -> tuple[float, ...]:
    """The ``num_steps`` + 1 ends of the intervals of an Euler sampler: ``step_times`` and the final 0."""
    return (*step_times(num_steps, shift), 0.0)


def sample_times(
    n: int,
    law: TimeLaw,
    shift: float,
    generator: torch.Generator,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """``n`` random times in (low, high], float32, on the generator's device.

    The nominal time is uniform, or logit-normal with location 0 and scale 1 (arXiv 2403.03206, section
    3.1), and is then shifted. ``low`` and ``high`` bound the time *after* the shift, and the law is
    truncated to them. Self-Forcing clamps instead, which at S = 5 puts 9 % of all draws on the upper bound.

    Raises:
        ValueError: on an unknown law, or unless 0 <= low < high <= 1.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"low={low}, high={high}, expected 0 <= low < high <= 1")
    if law not in ("uniform", "logit_normal"):
        raise ValueError(f"law={law!r}, expected 'uniform' or 'logit_normal'")
    device = generator.device
    u = 1 - torch.rand(n, generator=generator, dtype=torch.float64, device=device)  # (0, 1]: t > low >= 0
    bounds = unshift_time(torch.tensor([low, high], dtype=torch.float64, device=device), shift)
    if law == "logit_normal":
        bounds = torch.special.ndtr(torch.logit(bounds))
    u = bounds[0] + (bounds[1] - bounds[0]) * u
    if law == "logit_normal":
        u = torch.sigmoid(torch.special.ndtri(u))
    return shift_time(u, shift).float()
