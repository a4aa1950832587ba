"""Several processes that train as one with the joint batch.

Gradients are averaged by us and not by DistributedDataParallel: a method calls `student.commit`,
rollouts and several forwards before one backward, all of which DDP's wrapper of `forward` either
bypasses or forbids. One reduction of the flattened gradient before each optimiser step is exact
whatever the method does, and accumulation costs no communication. The price is one float32 copy of
the gradient. Networks that do not fit on a device are divided instead, see
`streamvid.training.sharding`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter


def start_accelerator(mixed_precision: str, trackers: list[str], project_dir: str) -> Accelerator:
    """accelerate's view of this process. Without CUDA the CPU is asked for by name, or accelerate
    1.15 would start two unconnected trainings under `torchrun --nproc_per_node 2`.
    """
    cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in (
        "1",
        "true",
    )
    if cpu and mixed_precision == "fp16":
        raise ValueError("mixed_precision=fp16 needs a GPU; use bf16 or no on a CPU")
    return Accelerator(
        cpu=cpu, mixed_precision=mixed_precision, log_with=trackers or None, project_dir=project_dir
    )


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Every process gets the values of process 0."""
    if not dist.is_initialized():
        return
    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=0)


@torch.no_grad()
def average_gradients(parameters: list[Parameter], loss: Tensor) -> Tensor:
    """Averages the gradients in place over the processes, and returns the averaged loss.

    One float32 reduction carries the loss, the gradients, and for each parameter whether it has
    one. A parameter that no process has used keeps no gradient, so that the optimiser skips it as
    it would in one process; the loss travels along so that all processes agree on whether it is
    finite.
    """
    if not dist.is_initialized():
        return loss
    device = parameters[0].device
    used = torch.tensor(
        [p.grad is not None for p in parameters], device=device, dtype=torch.float32
    )
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat(
        [loss.reshape(1).float().to(device), used, *(g.reshape(-1).float() for g in gradients)]
    )
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    sizes = [1, len(parameters), *(p.numel() for p in parameters)]
    loss, used, *averages = flat.split(sizes)
    for parameter, average, has_one in zip(parameters, averages, used.tolist()):
        parameter.grad = average.view_as(parameter).to(parameter.dtype) if has_one else None
    return loss[0]


@torch.no_grad()
def average_loss(loss: Tensor) -> Tensor:
    """The loss averaged over the processes, whose gradients are averaged elsewhere."""
    loss = loss.float().clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def agree_on_largest(values: list[float], device: torch.device) -> list[float]:
    """The largest of each value over the processes: equal everywhere afterwards."""
    if not dist.is_initialized():
        return values
    agreed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return agreed.tolist()


class StopSignals:
    """Ctrl-C, SIGTERM and SIGHUP ask for a stop after the step that is under way; Ctrl-C again
    abandons the step.

    A launcher repeats a signal that the terminal has sent already, so that "again" means two
    seconds later. Under `nohup` the closed terminal goes on being ignored.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if not self.received:
            self.received, self._since = int(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > 2:
            raise KeyboardInterrupt
