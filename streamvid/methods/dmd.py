"""Distribution matching distillation on self-forced rollouts.

Self-Forcing, arXiv 2506.08009; after DMD, arXiv 2311.18828, and DMD2, arXiv 2405.14867. The update,
and all that this method is, stands in ``methods.matching``.

Departures from the released code: the time law is truncated to [low, high], not clamped; times are
continuous; clean context is exactly clean in training too; guidance is ``u + s (c - u)``, so that
its 3.0 is our 4.0; a NaN is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

from streamvid.methods.matching import DistributionMatching, MatchingConfig


@dataclass
class Config(MatchingConfig):
    """Settings of DMD."""


class DMD(DistributionMatching):
    """The method; see ``DistributionMatching`` for its parts."""


Method = DMD
