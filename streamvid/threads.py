"""How the threads of a computation on a CPU behave beside other programs.

Without this, the threads of torch's OpenMP spin while they wait. Beside any other load that
waits for the same cores a step of a small network then takes many times as long.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""Of GNU's and Intel's OpenMP: a thread that waits sleeps at once."""


def set_thread_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads sleep; what the environment says already stays.

    OpenMP reads it once, when torch is loaded: call this before.
    """
    for name, value in PASSIVE.items():
        environment.setdefault(name, value)
