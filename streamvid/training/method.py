"""What the trainer asks of what it trains and of the data that feeds it.

Notation: a *step* is one optimiser step of the run; a *turn* is the update of one network inside a
step; a *joint batch* is what all processes and all accumulation passes together feed to one turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module


class BatchSource(Protocol):
    """Where batches come from. It has no state, so that a resumed run draws exactly what it would
    have drawn.

    Shuffling, prompts and per-sample seeds are functions of (the source's seed, step, turn, micro,
    index), see `streamvid.seeding`: what sample 5 of a joint batch is does not depend on how many
    processes share the batch. Two processes with 4 samples each, one with 8, and one with 4 that
    accumulates 2 draw the same.

    Optional, found by name: ``fingerprint: str``, of the data itself; a run whose data has another
    is not resumed.
    """

    def batch(self, step: int, turn: str, micro: int, indices: range) -> dict[str, Any]:
        """The samples `indices` of a joint batch, as CPU tensors and lists whose first axis is the
        sample.

        step: optimiser steps that the run has completed. turn: the network about to be updated.
        micro: 0 for the first joint batch of this turn in this step, 1 for the second if `turns`
        repeats it. indices: the samples of the joint batch that this call is to return, in order.
        The dictionary has "keys": list[int], a seed for each sample, for noise that is keyed by it.
        The trainer adds "micro", so that a method with a repeated turn can draw a new decision for
        each.
        """
        ...


class Method(Protocol):
    """What a run trains: an objective with its networks, such as `settings.video.VideoSetting`.

    What all processes must agree on, such as the exit step of a rollout, is drawn from
    `keyed_generator(seed, "decision", step, turn)` and never from the batch or from a global
    generator.

    Optional, found by name:
    - `losses(turn: str, batch: dict, step: int) -> Iterator[tuple[Tensor, dict[str, float]]]`:
      parts that add up to `loss`, in its place, see `loss_parts`;
    - `after_step(turn: str, step: int) -> None`, called after each update of a network;
    - `choices(turn: str, step: int) -> Hashable`: what of the random choices of a turn its cost
      depends on, None if nothing; the dry run measures steps of equal choices once, and of a method
      without it each step by itself;
    - `frozen() -> dict[str, Module]`: networks that it holds and does not train, such as a
      teacher's; where networks are divided among processes, these are too;
    - `set_progress(progress: float) -> None`, called before each step: how far the run is, in
      [0, 1];
    - `extra_state() -> dict[str, Tensor]`: live tensors besides the networks that change in
      training, such as a reference policy that follows the student; they are saved in checkpoints
      and restored in place.
    """

    @property
    def needs(self) -> frozenset[str]:
        """What it asks of a teacher: some of "score", "features", "clips"."""
        ...

    def networks(self) -> dict[str, Module]:
        """The networks that are trained, by the names under which optimisers and EMA are
        configured.
        """
        ...

    def turns(self, step: int) -> tuple[str, ...]:
        """Which networks this step updates, in order; a name may come several times. A function of
        `step` only.
        """
        ...

    def loss(self, turn: str, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of network `turn`, a scalar averaged over the samples, and numbers worth
        logging.

        Only the parameters of network `turn` require gradients during the call. The numbers have
        the same names in every process.
        """
        ...


def loss_parts(
    method: Method, turn: str, batch: dict[str, Any], step: int
) -> Iterator[tuple[Tensor, dict[str, float]]]:
    """The loss of a turn in parts that add up to it; most methods have one.

    Each is to be differentiated before the next is asked for, so that only one has its activations
    in memory.
    """
    if hasattr(method, "losses"):
        yield from method.losses(turn, batch, step)
    else:
        yield method.loss(turn, batch, step)


def as_floats(numbers: dict[str, Tensor]) -> dict[str, float]:
    """Scalar tensors as numbers, from the device in one transfer; of the meta device, which has
    none, NaN.
    """
    if any(number.is_meta for number in numbers.values()):
        return dict.fromkeys(numbers, math.nan)
    return dict(
        zip(numbers, torch.stack([number.detach().float() for number in numbers.values()]).tolist())
    )
