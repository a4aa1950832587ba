"""Times: the timestep shift, the lists of a few-step sampler, and the laws that training draws
from.

A *nominal* time u in [0, 1] becomes t = S u / (1 + (S - 1) u) under the shift S (Esser et al.,
arXiv 2403.03206, eq. 23): S > 1 moves it towards noise, where a large latent still hides its
layout. Everything outside this file speaks of t, after the shift. Self-Forcing's list "1000, 750,
500, 250" is nominal: at S = 5 it is t = 1, .9375, .8333, .625.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

TimeLaw = Literal["uniform", "logit_normal", "log_normal", "cubic"]
Number = TypeVar("Number", float, Tensor)


def shift_time(u: Number, shift: float) -> Number:
    """The time of a nominal time ``u`` in [0, 1]; ``shift`` 1 is the identity, 0 and 1 stay where
    they are.
    """
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
        raise ValueError(
            f"shift={shift}, expected a positive number; 1 is no shift, Wan uses 3 to 8"
        )
    return tuple(shift_time(1 - i / num_steps, shift) for i in range(num_steps))


def euler_times(num_steps: int, shift: float) -> tuple[float, ...]:
    """The ``num_steps`` + 1 ends of the intervals of an Euler sampler: ``step_times`` and the final
    0.
    """
    return (*step_times(num_steps, shift), 0.0)


def sample_times(
    n: int,
    law: TimeLaw,
    shift: float,
    generator: torch.Generator,
    low: float = 0.0,
    high: float = 1.0,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """``n`` random times in (low, high], float32, on the generator's device.

    The nominal time follows one of four laws and is then shifted: "uniform"; "logit_normal", whose
    logit is N(mean, std^2) (arXiv 2403.03206, section 3.1); "log_normal", the same thing written
    for EDM's sigma = t / (1 - t), of which ln sigma is N(mean, std^2) (arXiv 2206.00364); "cubic",
    1 - u^3, mostly noise (ADM, arXiv 2507.18569). ``low`` and ``high`` bound the time *after* the
    shift, and the law is truncated to them. Self-Forcing clamps instead, which at S = 5 puts 9 % of
    all draws on the upper bound.

    Raises:
        ValueError: on an unknown law, unless 0 <= low < high <= 1 and ``std`` > 0.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"low={low}, high={high}, expected 0 <= low < high <= 1")
    if law not in _CUMULATIVE:
        raise ValueError(f"law={law!r}, expected one of {tuple(_CUMULATIVE)}")
    if std <= 0:
        raise ValueError(f"std={std}, expected a positive number")
    device = generator.device
    # (0, 1]: t > low >= 0
    u = 1 - torch.rand(n, generator=generator, dtype=torch.float64, device=device)
    bounds = unshift_time(torch.tensor([low, high], dtype=torch.float64, device=device), shift)
    cumulative, quantile = _CUMULATIVE[law]
    bounds = cumulative(bounds, mean, std)
    return shift_time(quantile(bounds[0] + (bounds[1] - bounds[0]) * u, mean, std), shift).float()


def _logit_normal_cdf(u: Tensor, mean: float, std: float) -> Tensor:
    return torch.special.ndtr((torch.logit(u) - mean) / std)


def _logit_normal_quantile(p: Tensor, mean: float, std: float) -> Tensor:
    return torch.sigmoid(mean + std * torch.special.ndtri(p))


# Of each law of the nominal time, the distribution function and its inverse.
_CUMULATIVE = {
    "uniform": (lambda u, mean, std: u, lambda p, mean, std: p),
    "logit_normal": (_logit_normal_cdf, _logit_normal_quantile),
    "log_normal": (_logit_normal_cdf, _logit_normal_quantile),
    "cubic": (lambda u, mean, std: 1 - (1 - u) ** (1 / 3), lambda p, mean, std: 1 - (1 - p) ** 3),
}


def choose_times(times: Sequence[float], n: int, generator: torch.Generator) -> Tensor:
    """``n`` times ``[n]`` from a list, such as a student's own steps, each as likely as the others.

    Raises:
        ValueError: if the list is empty.
    """
    if not len(times):
        raise ValueError("times is empty, expected at least one to choose from")
    index = torch.randint(len(times), (n,), generator=generator, device=generator.device)
    return torch.tensor(times, dtype=torch.float32, device=generator.device)[index]


# ---- where a flow map lands: s for a pair (t, r), s <= r < t -------------------------------------


def uniform_target(r: Tensor, generator: torch.Generator) -> Tensor:
    """Anywhere below ``r`` ``[B]``, uniformly in [0, r) (CTM, arXiv 2310.02279; TCD, arXiv
    2402.19159).
    """
    return r * torch.rand(r.shape, generator=generator, device=r.device)


def phase_target(t: Tensor, edges: Sequence[float]) -> Tensor:
    """The beginning of the phase that ``t`` ``[B]`` lies in (PCM, arXiv 2405.18407): the greatest
    edge below it.

    Args:
        edges: times where phases begin, 0 among them; ``(0.0,)`` is one phase, plain consistency.

    Raises:
        ValueError: if 0 is not among the edges.
    """
    if 0.0 not in edges:
        raise ValueError(f"edges={tuple(edges)}, expected 0 among them")
    sorted_edges = torch.tensor(sorted(edges), dtype=t.dtype, device=t.device)
    return sorted_edges[
        (torch.searchsorted(sorted_edges, t.contiguous(), right=False) - 1).clamp_min(0)
    ]


def scheduled_target(
    r: Tensor, targets: Sequence[float], window: float, shrink: float, generator: torch.Generator
) -> Tensor:
    """A time that a few-step sampler will stop at, or somewhat below (TDD, arXiv 2409.01347).

    Of the ``targets``, the largest <= ``r`` and those at most ``window`` below it are candidates,
    one of which is chosen and multiplied by 1 - U(0, ``shrink``). TDD counts both in steps of its
    training grid; here they are times.

    Args:
        r: ``[B]``.
        targets: the union of the schedules to be served, 0 among them.

    Raises:
        ValueError: if 0 is not among the targets, or ``window`` or ``shrink`` is out of [0, 1].
    """
    if 0.0 not in targets:
        raise ValueError(f"targets={tuple(targets)}, expected 0 among them")
    if not (0 <= window <= 1 and 0 <= shrink <= 1):
        raise ValueError(f"window={window}, shrink={shrink}, expected numbers in [0, 1]")
    grid = torch.tensor(sorted(targets), dtype=r.dtype, device=r.device)
    last = torch.searchsorted(grid, r.contiguous(), right=True) - 1  # the largest <= r
    first = torch.searchsorted(grid, (grid[last] - window).contiguous())
    draws = torch.rand((2, *r.shape), generator=generator, device=r.device, dtype=r.dtype)
    chosen = first + (draws[0] * (last - first + 1)).long()
    return grid[chosen] * (1 - shrink * draws[1])


def mean_flow_pair(
    t: Tensor, other: Tensor, equal_share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(t, r) with r <= t: the two draws in order, or r = t in ``equal_share`` of the cases
    (MeanFlow, arXiv 2505.13447).

    Args:
        t, other: two draws ``[B]`` of a time law.
    """
    same = torch.rand(t.shape, generator=generator, device=t.device) < equal_share
    later, earlier = torch.maximum(t, other), torch.minimum(t, other)
    return later, torch.where(same, later, earlier)
