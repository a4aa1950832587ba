"""AdamW in 32 or 8 bits or Muon for one network, and its learning rate, a pure function of how far
training is.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) orthogonalises the momentum of hidden
matrices; here it updates the matrices and convolution kernels of repeated blocks, scaled so that
AdamW's rates apply (Liu et al., arXiv 2502.16982), and AdamW updates all else.

AdamW in 8 bits (arXiv 2110.02861; torchao's) keeps the moments of large parameters as a byte per
value and a scale per block of 256: 2 bytes per weight in place of 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from streamvid.training.sharding import cut_like


@dataclass
class OptimizerConfig:
    """How one network is updated. The defaults are those of DMD-like fine-tuning of a pretrained
    network.
    """

    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw8bit: a quarter of the state's memory, needs torchao; muon: for training from random
    weights."""
    lr: float = 1e-5
    """Learning rate after the warm-up; 2e-6 for a 1.3B student, 1e-3 for a tiny one."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adversarial and score-distillation updates often use (0, 0.999)."""
    weight_decay: float = 0.01
    """Decoupled, per step, times lr."""
    decay_vectors: bool = False
    """Whether norms, biases and other one-dimensional parameters decay too."""
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    """Largest norm of the whole network's gradient; null clips nothing."""
    warmup_steps: int = 0
    """Updates of this network over which lr rises linearly; the first one is lr / warmup_steps."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How lr changes after the warm-up, over the whole run."""
    decay_start: float = 0.0
    """Part of the run before cosine and linear begin to fall."""
    final_lr_ratio: float = 0.0
    """Where cosine and linear end, as a fraction of lr."""
    accumulate: int = 1
    """Batches that each process averages before an update."""

    def __post_init__(self) -> None:
        for key in ("lr", "weight_decay", "eps"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(
                    f"{key}={getattr(self, key)} must be a finite number of at least 0"
                )
        if self.lr <= 0:
            raise ValueError(
                f"lr={self.lr} must be above 0; leave a network out of `turns` to freeze it"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must be in [0, 1)")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(
                f"clip_norm={self.clip_norm} must be above 0; use null to clip nothing"
            )
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio={self.final_lr_ratio} must be in [0, 1]")
        if not 0 <= self.decay_start < 1:
            raise ValueError(f"decay_start={self.decay_start} must be in [0, 1)")
        if self.accumulate < 1 or self.warmup_steps < 0:
            raise ValueError(
                f"accumulate={self.accumulate} must be at least 1 and"
                f" warmup_steps={self.warmup_steps} at least 0"
            )


def learning_rate(config: OptimizerConfig, update: int, progress: float) -> float:
    """The rate of the update number `update` (from 0) of a network when the run is at `progress` in
    [0, 1].
    """
    warmup = min(1.0, (update + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    floor = config.final_lr_ratio
    progress = min(max((progress - config.decay_start) / (1 - config.decay_start), 0.0), 1.0)
    remaining = {
        "constant": 1.0,
        "cosine": floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": floor + (1 - floor) * (1 - progress),
    }[config.schedule]
    return config.lr * warmup * remaining


def build_optimizer(
    parameters: dict[str, Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """The optimiser of float32 parameters, by name; AdamW with the fused kernel where the device
    has it.
    """
    hidden = [
        p for name, p in parameters.items() if config.kind == "muon" and _is_hidden_matrix(name, p)
    ]
    taken = {id(p) for p in hidden}
    others = [p for p in parameters.values() if id(p) not in taken]
    matrices = [p for p in others if p.ndim > 1 or config.decay_vectors]
    vectors = [p for p in others if not (p.ndim > 1 or config.decay_vectors)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.kind == "adamw8bit":
        return _adamw8bit([group for group in groups if group["params"]], config)
    fused = all(p.device.type in ("cpu", "cuda") for p in others)
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused or None,
    )
    return MuonAndAdamW(hidden, adamw, config) if hidden else adamw


def _adamw8bit(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "kind=adamw8bit needs torchao; `pip install 'streamvid[adamw8bit]'`, or set kind=adamw"
        ) from error
    return AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def _is_hidden_matrix(name: str, parameter: Parameter) -> bool:
    """Kernels of images, and matrices inside repeated blocks; not embeddings, heads or modulation
    tables.
    """
    inside = any(part.isdigit() for part in name.split("."))
    return name.endswith("weight") and (parameter.ndim == 4 or (inside and parameter.ndim == 2))


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon on hidden matrices and AdamW on the rest, as one optimiser with one state.

    Muon takes matrices only: a kernel [O, I, h, w] is given to it as [O, I h w] on the same memory.
    """

    def __init__(
        self, hidden: list[Parameter], adamw: torch.optim.AdamW, config: OptimizerConfig
    ) -> None:
        self.adamw = adamw
        super().__init__([*adamw.param_groups, {"params": hidden}], {"lr": config.lr})
        self.kernels = [(p, Parameter(p.detach().view(p.shape[0], -1))) for p in hidden]
        self.muon = torch.optim.Muon(
            [flat for _, flat in self.kernels],
            lr=config.lr,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        self.adamw.param_groups = self.param_groups[:-1]
        self.adamw.state = self.state
        self.adamw.step()
        self.muon.param_groups[0]["lr"] = self.param_groups[-1]["lr"]
        for p, flat in self.kernels:
            flat.grad = None if p.grad is None else p.grad.reshape(flat.shape)
            if self.state[p]:
                self.muon.state[flat] = {
                    key: value.view(flat.shape) for key, value in self.state[p].items()
                }
        self.muon.step()
        for p, flat in self.kernels:
            flat.grad = None
            self.state[p] = {
                key: value.view(p.shape) for key, value in self.muon.state[flat].items()
            }


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao compiles its step for it
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str]
) -> dict[str, Tensor]:
    """What the optimiser remembers of each parameter, as `NAME/exp_avg`, `NAME/exp_avg_sq`,
    `NAME/step`.

    A moment in 8 bits is `NAME/exp_avg:codes`, of the parameter's shape, `:scale`, one per block,
    and `:qmap`, the 256 values.
    """
    return {
        f"{names[parameter]}/{key}": value
        for parameter, memory in optimizer.state.items()
        for moment, kept in memory.items()
        for key, value in _parts(moment, kept).items()
    }


def _parts(moment: str, kept: Tensor) -> dict[str, Tensor]:
    if not hasattr(kept, "codes"):
        return {moment: kept}
    return {f"{moment}:{part}": getattr(kept, part) for part in ("codes", "scale", "qmap")}


def _join_parts(memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undoes `_parts` for all moments of a parameter."""
    joined: dict[str, Any] = {}
    for key, tensor in memory.items():
        moment, _, part = key.partition(":")
        if part:
            joined.setdefault(moment, {})[part] = tensor
        else:
            joined[moment] = tensor
    return {
        moment: _moment8bit(moment, kept) if isinstance(kept, dict) else kept
        for moment, kept in joined.items()
    }


def _moment8bit(moment: str, parts: dict[str, Tensor]) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    if parts.keys() != {"codes", "scale", "qmap"}:
        raise ValueError(f"{moment} has of a moment in 8 bits only {', '.join(parts)}")
    return OptimState8bit(**parts, signed=moment == "exp_avg", dtype=torch.float32)


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]
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
        if not key.endswith(("step", ":scale", ":qmap")) and tensor.shape != shape:
            raise ValueError(
                f"{full_name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )
        part = tensor if key == "step" else cut_like(tensor, parameters[name])
        memories.setdefault(index[parameters[name]], {})[key] = part
    memories = {place: _join_parts(memory) for place, memory in memories.items()}
    optimizer.load_state_dict(
        {"state": memories, "param_groups": optimizer.state_dict()["param_groups"]}
    )
