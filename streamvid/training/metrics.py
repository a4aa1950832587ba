"""Numbers of a run: means between two log lines, and the file `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from streamvid.files import atomic_file

MAXIMUM = "_max"
"""How the name of a number ends that is a maximum, such as `latent_max`."""


class RunningMeans:
    """The mean of each named number since the last log line, over steps and processes; of one whose
    name ends in ``MAXIMUM`` the largest, which batches of other sizes, passes or processes don't
    change.

    A maximum is kept in ``sums`` too, with the count 1.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._join(self.sums, self.counts, name, float(value), 1)

    def take(self) -> dict[str, float]:
        """The means over all processes; starts anew. To be called in every process."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for state in gather_object([self.state_dict()]):
            for name, total in state["sums"].items():
                self._join(sums, counts, name, total, state["counts"][name])
        self.load_state_dict({"sums": {}, "counts": {}})
        return {name: sums[name] / counts[name] for name in sums}

    @staticmethod
    def _join(
        sums: dict[str, float], counts: dict[str, int], name: str, value: float, count: int
    ) -> None:
        """Adds a number, the sum of ``count``, or keeps it if it is the largest."""
        if not name.endswith(MAXIMUM):
            sums[name], counts[name] = sums.get(name, 0.0) + value, counts.get(name, 0) + count
        elif name not in sums or math.isnan(value) or value > sums[name]:
            sums[name], counts[name] = value, 1

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
        # of checkpoints from before: a sum of several
        for name in (name for name in self.sums if name.endswith(MAXIMUM)):
            self.sums[name], self.counts[name] = self.sums[name] / self.counts[name], 1


def append_metrics(path: Path, line: dict[str, float]) -> None:
    """Adds one JSON object; a number that is not finite, which JSON does not know, becomes null."""
    finite = {key: value if math.isfinite(value) else None for key, value in line.items()}
    with path.open("a") as file:
        file.write(json.dumps(finite) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a metrics file; those that a crash or an editor has damaged are left out, and no
    others.
    """
    lines = []
    for text in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def trim_metrics(path: Path, step: int) -> None:
    """Drops the lines beyond `step`, which a resumed run is about to write again."""
    if not path.is_file():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
