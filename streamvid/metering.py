"""What work costs: live bytes, floating-point operations and seconds, counted in the same way on
every device.

A figure is a median of repeats after one to warm up. What is compared is measured in turns in one
run, so that whatever else slows the machine slows all of it.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

MIB = 2**20
GIB = 2**30
_aten = torch.ops.aten
FLOPS = {  # torch knows no formula for the CPU's attention
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _aten._scaled_dot_product_flash_attention
    ],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass(frozen=True)
class Measured:
    """What a piece of work costs."""

    seconds: float
    """The median."""
    peak_bytes: int
    """The most bytes that were alive at once, besides those that were there before."""


class Meter(TorchDispatchMode):
    """Counts the operations of what runs inside, and the bytes of the tensors that it makes.

    It works on the CPU and on torch's meta device, whose allocators keep no such count. It does not
    see the work memory inside an operator.

    Attributes:
        flops: floating-point operations, by torch's own formulas.
        now: bytes that are alive.
        peak: the most bytes that were alive at once.
    """

    _shapes: ClassVar[dict[Any, tuple]] = {}  # of results on the meta device, by what gave them

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}  # by address; 0 bytes for what was there before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for tensor in given:
            self._see(tensor.untyped_storage(), made_here=False)
        out = self._run(func, args, kwargs, given)
        if func._overloadpacket in FLOPS:
            self.flops += FLOPS[func._overloadpacket](*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _run(self, func: Any, args: tuple, kwargs: dict, given: list[Tensor]) -> Any:
        """What an operator gives.

        On the meta device results are shapes only, and what gave them once is made without asking
        again: most of torch's kernels for it are Python, and take ten times as long.
        """
        if not given or not all(x.is_meta for x in given):
            return func(*args, **kwargs)
        key = (func, _signature(args), _signature(kwargs))
        if key in self._shapes:
            size, stride, dtype = self._shapes[key]
            return torch.empty_strided(size, stride, dtype=dtype, device="meta")
        out = func(*args, **kwargs)
        if _is_new(out, given):
            self._shapes[key] = (out.shape, out.stride(), out.dtype)
        return out

    def _see(self, storage: torch.UntypedStorage, made_here: bool = True) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes() if made_here else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        self._alive[key] = weakref.ref(storage, lambda _: self._forget(key, size))

    def _forget(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def _signature(x: Any) -> Any:
    """What the shape of a result depends on: shapes of tensors, and numbers as they are."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    if isinstance(x, (tuple, list)):
        return tuple(map(_signature, x))
    if isinstance(x, dict):
        return tuple((name, _signature(value)) for name, value in x.items())
    return type(x), x  # 1 and 1.0 are equal, and give different results


def _is_new(out: Any, given: list[Tensor]) -> bool:
    """Whether a result is one tensor with a storage of its own, no larger than its shape asks."""
    if type(out) is not Tensor or not out.is_meta:
        return False
    storage = out.untyped_storage()
    shared = any(storage._cdata == x.untyped_storage()._cdata for x in given)
    extent = 1 + sum((n - 1) * step for n, step in zip(out.shape, out.stride()))
    needed = extent * out.itemsize if out.numel() else 0
    return not shared and storage.nbytes() == needed


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes that ``work`` holds at its worst moment, its result included."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with Meter() as meter:
        work()
    return meter.peak


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, until the device is done."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
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


@contextmanager
def as_on_accelerator(mixed_precision: str = "no", keep_casts: bool = True) -> Iterator[None]:
    """Inside, attention is one fused operation, and autocast is played on the meta device, which
    has none.

    The functions are replaced, not intercepted, because what checkpointing recomputes in the
    backward pass escapes torch's function modes.

    Args:
        keep_casts: whether the cast of a weight that is trained lives as long as this, as it does
            in autocast's cache. What checkpointing recomputes has a cache of its own per block.
    """
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    copies: dict[int, Tensor] = {}  # autocast casts each leaf that is trained once

    def cast(x: Any) -> Any:
        if (
            dtype is None
            or not isinstance(x, Tensor)
            or x.dtype == dtype
            or not x.is_floating_point()
        ):
            return x
        if not (keep_casts and x.is_leaf and x.requires_grad and torch.is_grad_enabled()):
            return x.to(dtype)
        if id(x) not in copies:
            copies[id(x)] = x.to(dtype)
        return copies[id(x)]

    def casting(function: Any) -> Any:
        return lambda *args, **kwargs: function(
            *map(cast, args), **{key: cast(value) for key, value in kwargs.items()}
        )

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _aten._scaled_dot_product_flash_attention(cast(query), cast(key), cast(value))[0]

    names = ("linear", "conv2d", "conv3d")
    kept = {name: getattr(F, name) for name in (*names, "scaled_dot_product_attention")}
    try:
        for name in names:
            setattr(F, name, casting(kept[name]))
        F.scaled_dot_product_attention = attend
        yield
    finally:
        for name, function in kept.items():
            setattr(F, name, function)
