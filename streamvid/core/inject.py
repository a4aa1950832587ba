"""Injecting a gradient that no loss has: distribution matching moves samples along a score difference.

Distribution matching distillation (Yin et al., arXiv 2311.18828, eq. 7; for flow matching, Self-Forcing,
arXiv 2506.08009): the gradient of KL(student || teacher) at a student sample is the difference of two
scores of its noised version, so of two data predictions,

    g = (x0_fake - x0_real) / mean |x - x0_real|,     L = 1/2 mean (x - sg(x - g))^2,     dL/dx = g / numel.

``x0_fake`` estimates the student's distribution, without guidance; ``x0_real`` is the (guided) teacher.

Shapes: ``[B, C, H, W]`` or ``[B, C, T, H, W]``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from streamvid.core.process import as_work

NORMALIZER_FLOOR = 1e-5  # of mean |x - x0_real|, so that a perfect sample divides 0 by this and not by 0


@torch.no_grad()
def dmd_gradient(
    x: Tensor, x0_fake: Tensor, x0_real: Tensor, normalizer: Literal["sample", "none"] = "sample"
) -> Tensor:
    """The direction along which a sample leaves the teacher's distribution; descend it.

    Args:
        x: student samples.
        x0_fake: what the fake score makes of their noised version.
        x0_real: what the teacher makes of the same noised version.
        normalizer: "sample" divides each sample's gradient by its mean |x - x0_real|, as all released code
            does (the paper's w_t); "none" leaves the plain difference, whose expectation has closed forms.

    Raises:
        ValueError: on an unknown normaliser.
    """
    x, x0_fake, x0_real = as_work(x), as_work(x0_fake), as_work(x0_real)
    gradient = x0_fake - x0_real
    if normalizer == "none":
        return gradient
    if normalizer != "sample":
        raise ValueError(f"normalizer={normalizer!r}, expected 'sample' or 'none'")
    scale = (x - x0_real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)  # [B, 1, ...]
    return gradient / scale.clamp_min(NORMALIZER_FLOOR)


def surrogate(x: Tensor, grad: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """``1/2 mean (x - sg(x - g))^2``, a scalar with the gradient ``g / numel`` ("sum": ``g``) at ``x``.

    Written as ``x - sg(x) + sg(g)``, the same thing with no rounding: a small ``g`` is not lost in ``x - g``.

    Raises:
        ValueError: on another reduction, or if the shapes differ.
    """
    if x.shape != grad.shape:
        raise ValueError(f"a gradient of shape {tuple(grad.shape)} for samples of shape {tuple(x.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}, expected 'mean' or 'sum'")
    x = as_work(x)
    square = (x - x.detach() + as_work(grad).detach()).square()  # sg, sg
    return 0.5 * (square.mean() if reduction == "mean" else square.sum())
