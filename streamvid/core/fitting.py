"""The fit of a velocity network to samples, for teachers, students and fake scores, and how a fake
score follows.

Lipman et al., arXiv 2210.02747. A fake score is fitted to detached student samples with the same
law of t that distribution matching evaluates it at.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, overload

import torch
from torch import Tensor

from streamvid.core.process import Time, as_work, expand_time, masked_reduce, velocity


def flow_matching_loss(
    v_pred: Tensor,
    x0: Tensor,
    eps: Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``mean w (v_pred - (eps - x0))^2``, a scalar; no gradient reaches ``x0`` and ``eps``.

    Args:
        v_pred: the network's velocity at ``x_t = (1 - t) x0 + t eps``; ``[B, C, H, W]`` or ``[B, C,
            T, H, W]``.
        x0: the samples.
        eps: the noise that made ``x_t``.
        weight: ``[B]`` or ``[B, T]``; None is 1 everywhere.
        mask: ``[B]`` or ``[B, T]``, or of the full shape, 1 or True where the error counts; the
            mean is over what counts, of which there must be something. None keeps everything.
    """
    error = (as_work(v_pred) - velocity(x0, eps).detach()).square()  # sg
    if weight is not None:
        error = error * expand_time(weight, error)
    return masked_reduce(error, mask=mask)


Weighting = Literal["v", "x0", "eps", "edm", "dmd2_edm", "swiftbrush"]


@overload
def loss_weight(kind: Weighting, t: Tensor, sigma_data: float = 0.5) -> Tensor: ...
@overload
def loss_weight(kind: Weighting, t: float, sigma_data: float = 0.5) -> float: ...
@overload
def loss_weight(kind: Weighting, t: Time, sigma_data: float = 0.5) -> Time: ...
def loss_weight(kind: Weighting, t: Time, sigma_data: float = 0.5) -> Time:
    """The weight on the squared error of the velocity that makes it the loss that others write.

    ============  =============================  ==================================================
    "v"           1                              flow matching
    "x0", "eps"   t^2, (1 - t)^2                 mean squared error of x0, of eps
    "edm"         (t^2 + (1 - t)^2 sd^2) / sd^2  EDM's, (sigma^2 + sd^2) / (sigma sd)^2 on x0:
                                                 arXiv 2206.00364
    "dmd2_edm"    (1 - t)^2 + t^2 / sd^2         DMD2's fake score, 1/sigma^2 + 1/sd^2 on x0:
                                                 arXiv 2405.14867
    "swiftbrush"  (1 - t)^4 / (t^2 + (1 - t)^2)  SwiftBrush's, alpha^2 on eps: arXiv 2312.05239
    ============  =============================  ==================================================

    Args:
        sigma_data: sd, the deviation of the data that EDM assumes.

    Raises:
        ValueError: on another kind.
    """
    if kind not in _WEIGHTS:
        raise ValueError(f"kind={kind!r}, expected one of {tuple(_WEIGHTS)}")
    return _WEIGHTS[kind](t, sigma_data)


_WEIGHTS = {
    "v": lambda t, sd: 1 + 0 * t,
    "x0": lambda t, sd: t**2,
    "eps": lambda t, sd: (1 - t) ** 2,
    "edm": lambda t, sd: (t**2 + (1 - t) ** 2 * sd**2) / sd**2,
    "dmd2_edm": lambda t, sd: (1 - t) ** 2 + t**2 / sd**2,
    "swiftbrush": lambda t, sd: (1 - t) ** 4 / (t**2 + (1 - t) ** 2),
}


@torch.no_grad()
def couple(destination: Iterable[Tensor], source: Iterable[Tensor], keep: float) -> None:
    """``destination <- keep destination + (1 - keep) source``, in place: 1 leaves it, 0 copies.

    An average of the student's weights, and, from the student into the fake score, the implicit
    alignment of SenseFlow (arXiv 2506.00523) that Flash-DMD (arXiv 2511.20549) uses to follow with
    fewer updates.

    Raises:
        ValueError: unless 0 <= keep <= 1, or if the numbers of tensors differ.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep={keep}, expected a number in [0, 1]")
    destination, source = list(destination), list(source)
    if len(destination) != len(source):
        raise ValueError(
            f"{len(source)} tensors to follow for {len(destination)}; expected the same network"
        )
    followed = [new.detach().to(kept) for kept, new in zip(destination, source)]
    torch._foreach_lerp_(destination, followed, 1 - keep)
