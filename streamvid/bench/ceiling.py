"""How fast this machine multiplies matrices: what a transformer can reach at most."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from streamvid.bench.timing import in_turns

CPU_SIZE, GPU_SIZE = 1024, 8192
ROUNDS = 7


def matrix_ceiling(
    device: torch.device, size: int | None = None, rounds: int = ROUNDS
) -> dict[str, float]:
    """Operations per second of square products, by kernel and precision: "MKL float32" and so on.

    On a CPU, ``x @ w`` of float32 is not the best that there is: MKL takes no AVX-512 path on an
    AMD, and oneDNN's kernel on weights in its own layout is twice as fast there, at the same
    accuracy. So each precision is measured with all kernels at hand.
    """
    size = size or (CPU_SIZE if device.type == "cpu" else GPU_SIZE)
    x, w = (torch.randn(size, size, device=device) for _ in range(2))
    works = _gpu_products(x, w) if device.type != "cpu" else _cpu_products(x, w)
    for work in works.values():
        work()
    seconds = in_turns(works, device, rounds)
    return {name: 2 * size**3 / statistics.median(each) for name, each in seconds.items()}


def best(ceiling: dict[str, float], dtype: torch.dtype) -> float:
    """The fastest of a precision's kernels, operations per second."""
    name = "bf16" if dtype == torch.bfloat16 else "float32"
    return max(rate for kernel, rate in ceiling.items() if kernel.endswith(name))


def _cpu_products(x: Tensor, w: Tensor) -> dict[str, Callable[[], Tensor]]:
    half, half_w = x.bfloat16(), w.bfloat16()
    works: dict[str, Callable[[], Tensor]] = {
        "MKL float32": lambda: F.linear(x, w),
        "bf16": lambda: F.linear(half, half_w),
    }
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(w, x.shape[0])
        works["oneDNN prepacked float32"] = lambda: torch.ops.mkldnn._linear_pointwise(
            x, packed, None, "none", [], ""
        )
    return works


def _gpu_products(x: Tensor, w: Tensor) -> dict[str, Callable[[], Tensor]]:
    half, half_w = x.bfloat16(), w.bfloat16()
    return {"float32": lambda: F.linear(x, w), "bf16": lambda: F.linear(half, half_w)}
