"""How the threads of a computation on a CPU behave beside other programs.

Without this, the threads of torch's OpenMP spin while they wait. Beside any other load that
waits for the same cores a step of a small network then takes many times as long.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""Of GNU's and Intel's OpenMP: a thread that waits sleeps at once."""
TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def set_thread_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads sleep, and compute on as many as there are physical cores.

    What the environment says already stays. OpenMP reads it once, when torch is loaded: call this
    before.
    """
    for name, value in PASSIVE.items():
        environment.setdefault(name, value)
    environment.setdefault("OMP_NUM_THREADS", str(physical_cores()))


def physical_cores(topology: str = TOPOLOGY) -> int:
    """Cores that this process may use; hardware threads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):  # Linux has it
        return os.cpu_count() or 1
    files = {cpu: Path(topology.format(cpu)) for cpu in os.sched_getaffinity(0)}
    return len({file.read_text() if file.is_file() else str(cpu) for cpu, file in files.items()})
