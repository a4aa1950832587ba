"""The noise of a rollout: every draw is named by (seed, chunk, event).

So a sample's noise does not depend on the batch it is in, on the rank that makes it, on how often
the stream was interrupted, or on how the draws of different chunks interleave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from streamvid.seeding import keyed_normal

INITIAL_EVENT = 0  # what a chunk begins as; event k > 0 is its k-th re-noising
CONTEXT_EVENT = -1  # the noise on a committed chunk, if context_t > 0


class Noise(Protocol):
    """What the loop asks of a noise."""

    def __len__(self) -> int:
        """The batch size."""

    def draw(
        self,
        chunk: int,
        event: int,
        shape_per_sample: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """Standard normal numbers ``[B, *shape_per_sample]``."""


class KeyedNoise:
    """One seed per sample; drawn in float32 on the CPU, so the same on every device."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(seeds)

    def __len__(self) -> int:
        return len(self.seeds)

    def draw(
        self,
        chunk: int,
        event: int,
        shape_per_sample: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """The noise ``[B, *shape_per_sample]`` of an event of a chunk."""
        samples = torch.stack(
            [keyed_normal(shape_per_sample, "rollout", seed, chunk, event) for seed in self.seeds]
        )
        # from pinned memory the host needn't wait for the device
        if torch.device(device).type == "cuda":
            return samples.pin_memory().to(device=device, non_blocking=True).to(dtype)
        return samples.to(device=device, dtype=dtype)
