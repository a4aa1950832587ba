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
MOST_SAMPLES = 65_536
"""Of a batch of a process."""


@dataclass
class TrainConfig:
    name: str  # of the run; its folder is output_dir/name, and the same command resumes it
    output_dir: str = "runs"
    seed: int = 0  # of the global generators; batches and decisions have their own keyed seeds
    max_steps: int = 1000
    # training time, over all sessions, after which the run ends; null: no limit
    max_minutes: float | None = None
    batch_size: int = 1  # samples a process draws for one loss
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # autocast; parameters stay float32
    gradient_checkpointing: bool = False  # less memory, about a third more time
    compile: bool = False  # compiles the repeated blocks of the networks that have any
    # full: processes divide all networks, trained and frozen; one keeps them whole
    shard: Literal["none", "full"] = "none"
    log_every: int = 10  # steps between lines of metrics.jsonl
    # steps between checkpoints; the end of the run and an interruption save too
    save_every: int = 500
    keep_checkpoints: int = 2
    trackers: list[str] = field(default_factory=list)  # accelerate's names: tensorboard, wandb, ...
    # one for each network of the method
    optimizers: dict[str, OptimizerConfig] = field(default_factory=dict)
    ema: dict[str, EMAConfig] = field(default_factory=dict)  # for the networks that have an average

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
