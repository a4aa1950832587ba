"""The fit of a velocity network to samples: flow matching, for teachers, students and fake scores alike.

Lipman et al., arXiv 2210.02747. A fake score is fitted to detached student samples with the same law of t
that distribution matching evaluates it at.
"""

from __future__ import annotations

from torch import Tensor

from streamvid.core.process import as_work, expand_time, velocity


def flow_matching_loss(
    v_pred: Tensor, x0: Tensor, eps: Tensor, weight: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """``mean w (v_pred - (eps - x0))^2``, a scalar; no gradient reaches ``x0`` and ``eps``.

    Args:
        v_pred: the network's velocity at ``x_t = (1 - t) x0 + t eps``; ``[B, C, H, W]`` or ``[B, C, T, H, W]``.
        x0: the samples.
        eps: the noise that made ``x_t``.
        weight: ``[B]`` or ``[B, T]``; None is 1 everywhere.
        mask: ``[B]`` or ``[B, T]``, or of the full shape, 1 or True where the error counts; the mean is over
            what counts, of which there must be something. None keeps everything.
    """
    error = (as_work(v_pred) - velocity(x0, eps).detach()).square()  # sg
    if weight is not None:
        error = error * expand_time(weight, error)
    if mask is None:
        return error.mean()
    keep = mask.to(error.dtype) if mask.shape == error.shape else expand_time(mask, error).expand_as(error)
    return (error * keep).sum() / keep.sum()
