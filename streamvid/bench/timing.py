"""Seconds of pieces of work that are compared: all in one process, in turns, in random order.

On a CPU the clock is the process's own CPU time, on one thread, so that other programs of the
machine count little; on a GPU it is the wall's, when the device has done its work. Even so the same
code measured twice differs by some per cent: what is compared is measured beside itself once more,
see ``suite.compare``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from streamvid.metering import synchronize


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Inside, torch computes on one thread of a CPU; nothing changes for another device."""
    before = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def clock(device: torch.device) -> float:
    """Seconds since some moment, when everything asked of the device is done."""
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    started = clock(device)
    work()
    return clock(device) - started


def in_turns(
    works: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call, by name: every round calls all works once, in an order of its own.

    Raises:
        ValueError: if ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}, expected at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in works}
    order, shuffled = list(works), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            seconds[name].append(seconds_of(works[name], device))
    return seconds


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least ``share`` of all values do not exceed."""
    ordered = sorted(values)
    rank = -int(-share * len(ordered) // 1)  # rounded up
    return ordered[max(rank, 1) - 1]
