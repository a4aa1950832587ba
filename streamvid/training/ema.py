"""An exponential moving average of a network's weights, counted in that network's own updates.

shadow <- decay * shadow + (1 - decay) * weights, in float32. A student that is updated every fifth
step averages over its own updates and not over the fake score's; released code of this field
differs here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter


@dataclass
class EMAConfig:
    """How the average of a network is kept."""

    decay: float = 0.99
    """Averages over about 1 / (1 - decay) updates of the network; 0.99 to 0.9999."""
    start_step: int = 0
    """Updates of the network during which the average follows the weights."""
    warmup: bool = False
    """Rise to `decay` as (1 + n) / (10 + n), n updates after start_step."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must be in [0, 1)")
        if self.start_step < 0:
            raise ValueError(f"start_step={self.start_step} must be at least 0")


class EMA:
    """The average of the parameters given; buffers and frozen parameters stay as the network has
    them.
    """

    def __init__(self, parameters: dict[str, Parameter], config: EMAConfig) -> None:
        self.config = config
        self.updates = 0
        self.parameters = parameters
        self.shadow = {name: p.detach().float().clone() for name, p in parameters.items()}

    def decay_at(self, update: int) -> float:
        """The decay that update number `update` (from 0) uses."""
        since_start = update - self.config.start_step
        if since_start < 0:
            return 0.0
        if self.config.warmup:
            return min(self.config.decay, (1 + since_start) / (10 + since_start))
        return self.config.decay

    @torch.no_grad()
    def update(self) -> None:
        """To be called after each update of the network."""
        weights = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - self.decay_at(self.updates))
        self.updates += 1

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The network has the averaged weights inside the block, and its own, bit for bit, after
        it.
        """
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._put(self.shadow)
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Live tensors; the number of updates is kept by the trainer, which counts them for the
        network.
        """
        return dict(self.shadow)
