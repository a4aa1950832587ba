"""The settings of a training run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from streamvid.training.ema import EMAConfig
from streamvid.training.optimizers import OptimizerConfig

# names reach terminals, cards and shells
RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
MAX_SEED = 2**31 - 1  # so that each process may add its rank
MOST_SAMPLES = 65_536  # per process and loss


@dataclass
class TrainConfig:
    """How a run is trained, whatever its objective."""

    name: str
    """Name of the run; its folder is output_dir/name, and the same command resumes it."""
    output_dir: str = "runs"
    seed: int = 0
    """Seed of the global generators; batches and decisions have their own keyed seeds."""
    max_steps: int = 1000
    max_minutes: float | None = None
    """Training time over all sessions after which the run ends; null is no limit."""
    batch_size: int = 1
    """Samples per process and loss."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of autocast; parameters stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations: less memory, about a third more time."""
    compile: bool = False
    """Compile the repeated blocks of the networks that have any."""
    shard: Literal["none", "full"] = "none"
    """full: processes divide all networks, trained and frozen; a single one keeps them whole."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints; the end of the run and an interruption save too."""
    keep_checkpoints: int = 2
    trackers: list[str] = field(default_factory=list)
    """Names of accelerate: tensorboard, wandb, ..."""
    optimizers: dict[str, OptimizerConfig] = field(default_factory=dict)
    """Settings of the optimiser of each network of the objective."""
    ema: dict[str, EMAConfig] = field(default_factory=dict)
    """Settings of the moving average of each network that has one."""

    def __post_init__(self) -> None:
        for key in ("max_steps", "batch_size", "log_every", "save_every", "keep_checkpoints"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.batch_size > MOST_SAMPLES:
            raise ValueError(f"batch_size={self.batch_size} must be at most {MOST_SAMPLES:,}")
        if self.max_minutes is not None and not 0 < self.max_minutes < math.inf:
            raise ValueError(
                f"max_minutes={self.max_minutes} must be above 0; use null for no limit"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed={self.seed} must be from 0 to {MAX_SEED}")
        if not RUN_NAME.fullmatch(self.name):
            raise ValueError(
                f"name={self.name!r} must be one folder name of at most 100 letters, digits and"
                " ._-, which begins with none of .-; choose the place with output_dir"
            )
