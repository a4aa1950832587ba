"""What things cost: seconds and peak memory of a piece of work, measured the same way on a CPU and
on a GPU.

A figure is a median of repeats after one to warm up, and what is compared is measured in turns in
one run, so that whatever else slows the machine slows all of it.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Measured:
    """Seconds (median) and the greatest number of bytes that were alive at once, besides what was
    there before.
    """

    seconds: float
    peak_bytes: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and are still alive; ``peak`` is their
    maximum.

    For CPU tensors, whose allocator keeps no such count. Work memory inside an operator is not
    seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {
            _storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and _storage_key(leaf) not in given:
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes that ``work`` holds at its worst moment, its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        work()
    return live.peak


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(
    works: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int = 5
) -> dict[str, Measured]:
    """Measure several pieces of work in turns: all once to warm up and for memory, then ``repeats``
    rounds of all.

    Raises:
        ValueError: if ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}, expected at least 1")
    memory = {name: peak_bytes(work, device) for name, work in works.items()}
    rounds = [
        {name: seconds_of(work, device) for name, work in works.items()} for _ in range(repeats)
    ]
    return {
        name: Measured(statistics.median(each[name] for each in rounds), memory[name])
        for name in works
    }
