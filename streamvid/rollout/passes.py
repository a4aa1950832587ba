"""The calls of a student that a rollout asks for.

The loop is a generator that yields a ``Pass`` wherever it needs the student and is sent what the
pass gives. Whoever drives it decides when, and together with which others, a pass runs: ``rollout``
runs each at once, ``students.batch`` runs those of several streams as one.

Shapes: B batch, C channels, T latent frames, h w latent size, L text tokens, D embedding size.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True)
class Pass:
    """A denoising pass; it gives the velocity ``[B, C, T, h, w]`` and, if they are kept, the
    detached keys and values.
    """

    student: Any
    latents: Tensor  # [B, C, T, h, w]
    timestep: Tensor  # [B] or [B, T], 0 to 1000
    cond: Tensor  # of the prompts, [B, L, D]
    cache: Any
    target: Tensor | None = None  # where the jump of a flow map is to land, as ``timestep``
    keeps_kv: bool = False
    gradient: bool = False  # whether it carries the caller's gradient

    def run(self) -> Any:
        """Call the student."""
        options: dict[str, Any] = {"cache": self.cache}
        if self.target is not None:
            options["target_timestep"] = self.target
        if self.keeps_kv:
            options["return_kv"] = True
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient):
            output = self.student(self.latents, self.timestep, self.cond, **options)
        return output.sample, _detached(output.kv) if self.keeps_kv else None  # sg


@dataclass(frozen=True)
class CommitPass(Pass):
    """A pass that writes finished frames into the cache; it gives nothing."""

    def run(self) -> None:
        """Let the student commit."""
        with torch.no_grad():
            self.student.commit(self.latents, self.timestep, self.cond, self.cache)


def run_passes(steps: Generator[Pass | Result, Any, Any]) -> Iterator[Result]:
    """What a rollout yields besides its passes, each of which is run as soon as it is asked for."""
    item = next(steps, None)
    while item is not None:
        if isinstance(item, Pass):
            item = resume(steps, item.run())
        else:
            yield item
            item = next(steps, None)


def next_result(steps: Generator[Pass | Result, Any, Any]) -> Generator[Pass, Any, Result | None]:
    """Hand on the passes of a rollout until it yields something else, which is returned; None at
    its end.
    """
    item = next(steps, None)
    while isinstance(item, Pass):
        item = resume(steps, (yield item))
    return item


def resume(steps: Generator[Any, Any, Any], given: Any) -> Any:
    """What a generator yields when it is sent ``given``; None at its end."""
    try:
        return steps.send(given)
    except StopIteration:
        return None


def _detached(kv: Any) -> Any:
    """Keys and values, a tensor or nested tuples and lists of them, without their graph."""
    return kv.detach() if isinstance(kv, Tensor) else tuple(_detached(part) for part in kv)
