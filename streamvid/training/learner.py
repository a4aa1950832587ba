"""One network with what updates it: its optimiser, its average, its gradient scaler."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Module

from streamvid.training.checks import check_parameters
from streamvid.training.ema import EMA, EMAConfig
from streamvid.training.optimizers import (
    OptimizerConfig,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from streamvid.training.sharding import whole_tensor


class Learner:
    """One network with what updates it."""

    def __init__(
        self,
        name: str,
        network: Module,
        optimizer: OptimizerConfig,
        ema: EMAConfig | None,
        fp16: bool,
    ) -> None:
        self.network = network
        self.config = optimizer
        self.updates = 0
        self.parameters = {key: p for key, p in network.named_parameters() if p.requires_grad}
        check_parameters(name, self.parameters)
        self.optimizer = build_optimizer(self.parameters, optimizer)
        self.ema = EMA(self.parameters, ema) if ema is not None else None
        device = next(iter(self.parameters.values())).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    @property
    def names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.parameters.items()}

    def clip(self) -> float:
        """Clips the gradient to `clip_norm` and returns the norm that it had."""
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        return whole_tensor(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)).item()

    def update(self, progress: float) -> float:
        """One optimiser step, at the learning rate that is returned."""
        lr = learning_rate(self.config, self.updates, progress)
        set_learning_rate(self.optimizer, lr)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updates += 1
        if self.ema is not None:
            self.ema.update()
        return lr
