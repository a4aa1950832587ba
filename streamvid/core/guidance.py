"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), in one convention for the whole repository."""

from __future__ import annotations

from torch import Tensor

from streamvid.core.process import as_work


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """``uncond + scale (cond - uncond)``: 1 is the conditional prediction, above 1 is away from the other.

    It applies to velocities, data predictions and scores alike, which are affine in one another.
    Self-Forcing, CausVid and DiagDistill write ``cond + g (cond - uncond)``: their g is ``scale - 1``.
    """
    cond, uncond = as_work(cond), as_work(uncond)
    return uncond + scale * (cond - uncond)
