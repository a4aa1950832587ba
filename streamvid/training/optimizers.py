"""AdamW for one network and its learning rate, a pure function of how far training is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter


@dataclass
class OptimizerConfig:
    """How one network is updated. The defaults are those of DMD-like fine-tuning of a pretrained network."""

    lr: float = 1e-5  # after the warm-up; 2e-6 for a 1.3B student, 1e-3 for a tiny one from scratch
    betas: tuple[float, float] = (0.9, 0.999)  # adversarial and score-distillation updates often use (0, 0.999)
    weight_decay: float = 0.01  # decoupled, a step, times lr
    decay_vectors: bool = False  # whether norms, biases and other one-dimensional parameters decay too
    eps: float = 1e-8
    clip_norm: float | None = 1.0  # largest norm of the whole network's gradient; null clips nothing
    warmup_steps: int = 0  # updates of this network over which lr rises linearly; the first one is lr / warmup_steps
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after the warm-up, over the whole run
    final_lr_ratio: float = 0.0  # where cosine and linear end, as a fraction of lr
    accumulate: int = 1  # batches a process averages before one update

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be above 0; leave a network out of `turns` to freeze it")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must be in [0, 1)")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be above 0; use null to clip nothing")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio={self.final_lr_ratio} must be in [0, 1]")
        if self.accumulate < 1 or self.warmup_steps < 0:
            raise ValueError(
                f"accumulate={self.accumulate} must be at least 1 and warmup_steps={self.warmup_steps} at least 0"
            )


def learning_rate(config: OptimizerConfig, update: int, progress: float) -> float:
    """The rate of the update number `update` (from 0) of a network when the run is at `progress` in [0, 1]."""
    warmup = min(1.0, (update + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    floor, progress = config.final_lr_ratio, min(max(progress, 0.0), 1.0)
    remaining = {
        "constant": 1.0,
        "cosine": floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": floor + (1 - floor) * (1 - progress),
    }[config.schedule]
    return config.lr * warmup * remaining


def build_optimizer(parameters: Iterable[Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over float32 parameters; with the fused kernel where the device has it."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.ndim > 1 or config.decay_vectors]
    vectors = [p for p in parameters if p.ndim <= 1 and not config.decay_vectors]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr, betas=config.betas, eps=config.eps, fused=fused or None,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Parameter, str]) -> dict[str, Tensor]:
    """What the optimiser remembers of each parameter, as `NAME/exp_avg`, `NAME/exp_avg_sq`, `NAME/step`."""
    return {
        f"{names[parameter]}/{key}": value
        for parameter, memory in optimizer.state.items()
        for key, value in memory.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[Parameter, str], tensors: dict[str, Tensor]
) -> None:
    """Undoes `optimizer_tensors`. A parameter that was never updated has no memory.

    Raises ValueError if a tensor is of no parameter or has not its shape.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    order = [p for group in optimizer.param_groups for p in group["params"]]
    index = {parameter: i for i, parameter in enumerate(order)}
    memories: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise ValueError(f"{full_name} is of no trained parameter")
        shape = parameters[name].shape
        if key != "step" and tensor.shape != shape:
            raise ValueError(f"{full_name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        memories.setdefault(index[parameters[name]], {})[key] = tensor
    optimizer.load_state_dict({"state": memories, "param_groups": optimizer.state_dict()["param_groups"]})
