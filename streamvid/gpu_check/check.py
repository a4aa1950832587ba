"""What we want to know of a GPU, in parts: each runs in a process of its own with its own time
limit.

So a failure, a hang or too little memory costs one part, and of that what it had measured before is
kept. The next part's process imports its libraries while a part runs, and waits without touching
the device. The report is written anew after every part.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamvid import reports

ROOT = Path(__file__).parents[2]
LEAST_S = 8.0  # with less time left than this no part begins
LOG_LINES = 12


@dataclass(frozen=True)
class Part:
    """A function of a report, as ``module:function``, and the seconds that it may take."""

    name: str
    target: str
    limit_s: float


PARTS = (
    Part("machine", "streamvid.gpu_check.machine:machine", 40),
    Part("gradients", "streamvid.gpu_check.equality:gradients", 60),
    Part("equality", "streamvid.gpu_check.equality:equality", 60),
    Part("stream_1.3b", "streamvid.gpu_check.streaming:stream_1_3b", 110),
    Part("memory", "streamvid.gpu_check.streaming:memory", 45),
    Part("compile", "streamvid.gpu_check.streaming:compiled", 100),
    Part("train_24gb", "streamvid.gpu_check.turns:train_24gb", 75),
    Part("train_full", "streamvid.gpu_check.turns:train_full", 75),
    Part("tests", "streamvid.gpu_check.machine:gpu_tests", 60),
)
"""In the order of their worth."""


@dataclass
class Result:
    """What came of a part."""

    part: str
    status: str = "skipped"
    """skipped, ok, partly, failed or out of time."""
    seconds: float = 0.0
    measurements: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    """The last lines of a part that went wrong."""


def chosen(names: str | None) -> tuple[Part, ...]:
    """The parts of these names, comma-separated, in our order; None is all.

    Raises:
        ValueError: for a name that there is not.
    """
    if names is None:
        return PARTS
    wanted = [name.strip() for name in names.split(",")]
    known = [part.name for part in PARTS]
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"--parts {name}: there is no such part; expected some of {', '.join(known)}"
            )
    return tuple(part for part in PARTS if part.name in wanted)


def run_parts(parts: Sequence[Part], out: Path, minutes: float, tiny: bool = False) -> list[Result]:
    """Run parts one after the other within ``minutes``; ``out`` and a ``.md`` beside it are
    rewritten after each.
    """
    deadline = time.monotonic() + 60 * minutes
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        upcoming = [Child(part, Path(folder), tiny) for part in parts]
        try:
            for index, child in enumerate(upcoming):
                left = deadline - time.monotonic()
                if left >= LEAST_S:
                    child.start()
                    for following in upcoming[index + 1 : index + 2]:
                        following.start()
                    results.append(child.run(min(child.part.limit_s, left)))
                else:
                    results.append(Result(child.part.name, log=["no time was left"]))
                write_report(out, results)
                print(text_of(results[-1]), flush=True)
        finally:
            for child in upcoming:
                child.kill()
    return results


class Child:
    """The process of a part."""

    def __init__(self, part: Part, folder: Path, tiny: bool) -> None:
        self.part, self.tiny = part, tiny
        self.file, self.log = folder / f"{part.name}.json", folder / f"{part.name}.log"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Let it import; nothing if it does already."""
        if self.process is not None:
            return
        command = [
            sys.executable,
            "-m",
            "streamvid.gpu_check.child",
            self.part.target,
            str(self.file),
        ]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        )
        if self.tiny:
            command.append("--tiny")
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )

    def run(self, limit_s: float) -> Result:
        """Let it measure, and read what it wrote."""
        started = time.monotonic()
        try:
            self.process.communicate(b"go\n", timeout=limit_s)
            status = "ok" if self.process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        self.kill()
        result = Result(self.part.name, status, round(time.monotonic() - started, 1))
        self._read_into(result)
        if result.status != "ok":
            # where it lies is nobody's business
            text = self.log.read_text(errors="replace").replace(f"{ROOT}{os.sep}", "")
            result.log = text.strip().splitlines()[-LOG_LINES:]
        return result

    def _read_into(self, result: Result) -> None:
        if not self.file.is_file():  # it ended before its first measurement
            result.status = "failed" if result.status == "ok" else result.status
            return
        kept = json.loads(self.file.read_text())
        result.measurements, result.errors = kept["measurements"], kept["errors"]
        if kept["running"] and result.status != "ok":
            result.errors[kept["running"]] = f"the part ended here: {result.status}"
        if result.errors and result.status == "ok":
            result.status = "partly"

    def kill(self) -> None:
        """End it and what it started."""
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()


# ---- the report ----------------------------------------------------------------------------------


def write_report(out: Path, results: Sequence[Result]) -> None:
    text = "\n".join(markdown_of(result) for result in results)
    reports.write_report(out, text, [asdict(result) for result in results])


def markdown_of(result: Result) -> str:
    lines = [f"## {result.part}: {result.status}, {result.seconds} s\n"]
    rows = rows_of(result.measurements)
    if rows:
        lines += [reports.markdown([("measurement", "value"), *rows]), ""]
    lines += [
        f"- error in {name}: {' '.join(error.split())}" for name, error in result.errors.items()
    ]
    lines += ["", "```", *result.log, "```"] if result.log else []
    return "\n".join(lines) + "\n"


def text_of(result: Result) -> str:
    """For the terminal."""
    lines = [f"\n{result.part}: {result.status}, {result.seconds} s"]
    lines += [f"  {name:58} {value}" for name, value in rows_of(result.measurements)]
    lines += [f"  error in {name}: {error}" for name, error in result.errors.items()]
    lines += [f"  | {line}" for line in result.log]
    return "\n".join(lines)


def rows_of(measurements: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names joined by dots, and values."""
    rows: list[tuple[str, str]] = []
    for name, value in measurements.items():
        if isinstance(value, dict):
            rows += rows_of(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, each in enumerate(value):
                rows.append(
                    (f"{prefix}{name}.{index}", "  ".join(f"{k} {v}" for k, v in each.items()))
                )
        else:
            rows.append((f"{prefix}{name}", str(value)))
    return rows
