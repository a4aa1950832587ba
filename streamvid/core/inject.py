"""Injecting a gradient that no loss has: distribution matching moves samples along a score
difference.

Distribution matching distillation (Yin et al., arXiv 2311.18828, eq. 7; for flow matching,
Self-Forcing, arXiv 2506.08009): the gradient of KL(student || teacher) at a student sample is the
difference of two scores of its noised version, so of two data predictions,

    g = (x0_fake - x0_real) / mean |x - x0_real|,
    L = 1/2 mean (x - sg(x - g))^2,                  dL/dx = g / numel.

``x0_fake`` estimates the student's distribution, without guidance; ``x0_real`` is the (guided)
teacher.

A direction (``dmd_gradient``, ``residual_gradient``, or a weighted sum of several), a weight on it
(``f_weight``) and a ``surrogate`` make an objective. Distribution matching of motion, DiagDistill's
(arXiv 2603.09488), is the same on ``temporal_difference`` of all three clips: its gradient is live
in x, where the released code's is not.

Shapes: ``[B, C, H, W]`` or ``[B, C, T, H, W]``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from streamvid.core.process import as_work, expand_time, masked_reduce

# of mean |x - x0_real|, so that a perfect sample divides 0 by this and not by 0
NORMALIZER_FLOOR = 1e-5

Normalizer = Literal["sample", "group", "none"]


@torch.no_grad()
def dmd_gradient(
    x: Tensor,
    x0_fake: Tensor,
    x0_real: Tensor,
    normalizer: Normalizer = "sample",
    group: Tensor | None = None,
) -> Tensor:
    """The direction along which a sample leaves the teacher's distribution; descend it.

    Args:
        x: student samples.
        x0_fake: what the fake score makes of their noised version.
        x0_real: what the teacher makes of the same noised version.
        normalizer: "sample" divides each sample's gradient by its mean |x - x0_real|, as all
            released code does (the paper's w_t); "group" by the mean of that over the samples of a
            group, which keeps their proportions where they differ in t (a reading of GNDM, arXiv
            2603.28460; with groups of 1 it is "sample"); "none" leaves the plain difference, whose
            expectation has closed forms.
        group: with "group", integers ``[B]``, such as the index of the prompt.

    Raises:
        ValueError: on an unknown normaliser, or groups without, or against, their normaliser.
    """
    gradient = as_work(x0_fake) - as_work(x0_real)
    if normalizer == "none":
        return gradient
    return gradient / scale_of(x, x0_real, normalizer, group)


@torch.no_grad()
def scale_of(
    x: Tensor, x0_real: Tensor, normalizer: Normalizer = "sample", group: Tensor | None = None
) -> Tensor:
    """The normaliser ``[B, 1, ...]``: mean |x - x0_real| of each sample, or its mean over the
    sample's group.

    Raises:
        ValueError: as ``dmd_gradient``; "none" has no scale.
    """
    if normalizer not in ("sample", "group"):
        raise ValueError(
            f"normalizer={normalizer!r}, expected 'sample', 'group' or, for a gradient, 'none'"
        )
    if (group is not None) != (normalizer == "group"):
        raise ValueError(
            f"normalizer={normalizer!r} with group={group}; 'group' and only 'group' takes the"
            " groups [B]"
        )
    scale = (as_work(x) - as_work(x0_real)).abs().mean(dim=tuple(range(1, x.ndim)))
    if group is not None:
        same = (group[:, None] == group[None]).to(scale)  # [B, B]
        scale = (same @ scale) / same.sum(dim=1)
    return expand_time(scale.clamp_min(NORMALIZER_FLOOR), x)


@torch.no_grad()
def residual_gradient(x: Tensor, x0_real: Tensor) -> Tensor:
    """``x - x0_real``: towards what the teacher makes of the sample, with no fake score to hold the
    spread.

    Score distillation sampling (arXiv 2209.14988) and the distillation term of ADD (arXiv
    2311.17042). By itself it collapses each prompt to a mode.
    """
    return as_work(x) - as_work(x0_real)


Form = Literal["mse", "dot", "huber"]


def surrogate(
    x: Tensor,
    grad: Tensor,
    reduction: Literal["mean", "sum"] = "mean",
    form: Form = "mse",
    weight: Tensor | float = 1.0,
    mask: Tensor | None = None,
    huber_width: float = 1e-3,
) -> Tensor:
    """A scalar whose gradient at ``x`` is ``w g / numel`` ("sum": ``w g``).

        mse    1/2 mean (x - sg(x - w g))^2              its value is 1/2 mean (w g)^2
        dot    mean sg(w g) x                            the same gradient, a meaningless value
        huber  mean sqrt((x - sg(x - w g))^2 + c^2) - c  gradient w g / sqrt((w g)^2 + c^2), nearly
                                                         the sign of g

    Written with ``x - sg(x) + sg(g)``, the same thing with no rounding: a small ``g`` is not lost
    in ``x - g``.

    Args:
        weight: w, a number, ``[B]`` or ``[B, T]``.
        mask: ``[B]``, ``[B, T]`` or of the full shape, 1 where the gradient counts; "mean" is then
            over what counts.
        huber_width: c.

    Raises:
        ValueError: on another reduction or form, or if the shapes differ.
    """
    if x.shape != grad.shape:
        raise ValueError(
            f"a gradient of shape {tuple(grad.shape)} for samples of shape {tuple(x.shape)}"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}, expected 'mean' or 'sum'")
    if form not in ("mse", "dot", "huber"):
        raise ValueError(f"form={form!r}, expected 'mse', 'dot' or 'huber'")
    x = as_work(x)
    grad = (as_work(grad) * expand_time(weight, x)).detach()  # sg
    if form == "dot":
        terms = grad * x
    else:
        square = (x - x.detach() + grad).square()  # sg
        terms = 0.5 * square if form == "mse" else (square + huber_width**2).sqrt() - huber_width
    return masked_reduce(terms, reduction, mask)


def sid_loss(
    x: Tensor,
    x0_fake: Tensor,
    x0_real: Tensor,
    alpha: float = 1.0,
    normalizer: Normalizer = "sample",
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Score identity distillation, ``(x0_real - x0_fake) (x0_real - x - alpha (x0_real - x0_fake))
    / scale``.

    SiD (Zhou et al., arXiv 2404.04057, eq. 23). **Gradients pass through x and both predictions**
    down to x; the parameters of teacher and fake score are frozen by the caller. alpha = 1/2 is
    half the Fisher divergence's exact gradient, 1 to 1.2 is what trains well; at 1 the value is 0
    on average, so it tells no progress.

    Raises:
        ValueError: on another normaliser or reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}, expected 'mean' or 'sum'")
    x, x0_fake, x0_real = as_work(x), as_work(x0_fake), as_work(x0_real)
    gap = x0_real - x0_fake
    terms = gap * (x0_real - x - alpha * gap)
    if normalizer != "none":
        terms = terms / scale_of(x, x0_real, normalizer)
    return masked_reduce(terms, reduction)


Divergence = Literal["rkl", "kl", "js", "jeffreys", "hellinger", "neyman"]


@torch.no_grad()
def f_weight(
    log_ratio: Tensor, divergence: Divergence = "js", clip: tuple[float, float] = (0.1, 20.0)
) -> Tensor:
    """``h(r) = r^2 f''(r)``, the weight ``[B]`` on DMD's direction that makes it the gradient of
    D_f(teacher || student).

    f-distill (arXiv 2502.15681): r = p_teacher / p_student at the noised sample, for which the
    logit of a discriminator of the two stands in. "rkl" is 1, plain DMD; "kl" r; "js" r / (1 + r);
    "jeffreys" 1 + r; "hellinger" sqrt(r) / 4 (of f = 1 - sqrt(r), the paper's; half of the squared
    distance); "neyman" 2 / r. Divide by its mean before use, as the paper does, to keep the scale.

    Args:
        log_ratio: ``[B]``, log r.
        clip: bounds of r.

    Raises:
        ValueError: on another divergence.
    """
    if divergence not in _F_WEIGHTS:
        raise ValueError(f"divergence={divergence!r}, expected one of {tuple(_F_WEIGHTS)}")
    return _F_WEIGHTS[divergence](as_work(log_ratio).exp().clamp(*clip))


_F_WEIGHTS = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "jeffreys": lambda r: 1 + r,
    "hellinger": lambda r: r.sqrt() / 4,
    "neyman": lambda r: 2 / r,
}


def temporal_difference(x: Tensor) -> Tensor:
    """``x[:, :, 1:] - x[:, :, :-1]`` of a clip ``[B, C, T, H, W]``: what moves; with gradient.

    Raises:
        ValueError: on an image, or a clip of one frame.
    """
    if x.ndim != 5 or x.shape[2] < 2:
        raise ValueError(
            f"a tensor of shape {tuple(x.shape)} has no motion; expected a clip [B, C, T, H, W]"
            " with T >= 2"
        )
    return as_work(x).diff(dim=2)
