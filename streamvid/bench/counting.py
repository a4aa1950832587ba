"""What a chunk asks of a machine, counted by running it: operations, bytes, forwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streamvid.metering import Meter
from streamvid.rollout.schedule import StreamConfig, build_schedule, cost_of


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, each as if nothing were cached between them.

    Views move nothing. What an operator reads twice, or keeps inside itself, is not seen.

    Attributes:
        bytes: read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not _is_view(func):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes += sum(x.nbytes for x in tensors)
        return out


def _is_view(func: Any) -> bool:
    """Whether an operator only gives another shape to what it was given."""
    aliases = [each.alias_info for each in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


@dataclass(frozen=True)
class Counted:
    """Of one piece of work."""

    flops: int
    """Floating-point operations of products, convolutions and attention, by torch's formulas."""
    bytes: int
    """Of ``Traffic``."""


def count(work: Callable[[], Any]) -> Counted:
    """Run ``work`` once and count it."""
    with Meter() as meter, Traffic() as traffic:
        work()
    return Counted(meter.flops, traffic.bytes)


def forwards_per_chunk(config: StreamConfig) -> int:
    """Passes through the transformer, commits included, that a stream takes for one more chunk."""
    start = max(len(config.step_table), 2 * config.num_steps)  # where every chunk takes the same
    few, more = (
        cost_of(build_schedule(config, n), config.chunk_frames, config.commit, commit_last=True)
        for n in (start, start + 1)
    )
    return more.nfe + more.commits - few.nfe - few.commits
