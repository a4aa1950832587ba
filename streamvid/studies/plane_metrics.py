"""How far a student's points are from the teacher's, against how far two sets of the teacher's own
points are.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_POINTS = 1024
"""Points of a set that is compared. The floor falls as 1 / points, so a ratio to it is a statement
about this number."""


def energy_distance(x: Tensor, y: Tensor) -> float:
    """``2 E|x - y| - E|x - x'| - E|y - y'|`` of points ``[N, 2]``, pairs of a point with itself
    included.

    Szekely and Rizzo, 2013. It is the squared distance, not its root: 0 for equal sets, for sets of
    N points of one law about 2 E|x - x'| / N.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


def median_distance(points: Tensor, reference: Tensor) -> float:
    """The median of the energy distances of sets of ``NUM_POINTS``: the k-th of ``points`` with the
    k-th of ``reference``.
    """
    pairs = zip(points.split(NUM_POINTS), reference.split(NUM_POINTS))
    return float(torch.tensor([energy_distance(x, y) for x, y in pairs]).median())


def modes_covered(points: Tensor, means: Tensor, width: float) -> int:
    """Modes with at least a quarter of an equal share of the points within three widths."""
    near = (torch.cdist(points.flatten(1), means) < 3 * width).float().mean(0)
    return int((near >= 0.25 / len(means)).sum())
