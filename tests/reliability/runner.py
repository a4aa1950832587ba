"""Runs hostile cases, each in a forked process of its own, and says which held.

The parent has imported torch and the tools; a case is forked from it, makes its folder, and forks
the tools that it runs, so that a case takes what its tool takes and not the seconds of an import.
The parent limits its time and its memory.

A case holds if its function returns. `NotHeld` says what came instead; any other exception is a
fault of the case and counts as not held too.
"""

from __future__ import annotations

import importlib
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ("train", "sample", "evaluate", "bench", "convert", "trajectories", "quickstart")
TOOL_LIMIT_S = 120.0  # of processor time, so that a busy machine is no failure
HANG_LIMIT_S = 900.0  # of the clock, for what waits and does not compute
MEMORY_LIMIT_MB = 2500
LONGEST_LINE = 1000


class NotHeld(AssertionError):
    """What came in place of what should have."""


@dataclass(frozen=True)
class Case:
    area: str
    name: str
    run: Callable[[Place], None]


@dataclass(frozen=True)
class Outcome:
    """What a tool did."""

    code: int  # the exit status; minus the signal that ended it
    out: str
    err: str
    limit: str = ""  # the limit that it ran into

    @property
    def last_line(self) -> str:
        return (self.err.strip().splitlines() or [""])[-1]

    def said(self) -> str:
        """The exit status and the end of what it wrote, for a report."""
        text = " ".join(
            repr(line) for line in (self.err.strip() or self.out.strip()).splitlines()[-1:]
        )
        return f"{self.limit or f'exit {self.code}'}, {text[:240]}"


@dataclass(frozen=True)
class Stroke:
    """A signal that a process sends to itself at the `nth` event of Python's audit hooks whose path
    matches.

    Events are "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"; so no case need be in time
    for anything.
    """

    number: int
    event: str
    pattern: str
    nth: int = 1


class Place:
    """The folder of one case, and the tools that it runs there.

    parts: what all cases share and none may change, see `parts.py`.
    marker: a file that only code out of hostile input would make.
    """

    def __init__(self, folder: Path, parts: Path) -> None:
        self.folder, self.parts, self.marker = folder, parts, folder / "CODE_RAN"
        self._count = 0

    def run(
        self,
        tool: str,
        *arguments: object,
        stroke: Stroke | None = None,
        largest_file: int | None = None,
    ) -> Outcome:
        """A tool's command line, to its end; it has no terminal and an empty standard input."""
        return self.finish(self.start(tool, *arguments, stroke=stroke, largest_file=largest_file))

    def start(
        self,
        tool: str | Callable[[], int],
        *arguments: object,
        stroke: Stroke | None = None,
        largest_file: int | None = None,
    ) -> tuple[int, Path]:
        """Begins a tool, or a function; `finish` waits for it."""
        self._count += 1
        log = self.folder / f".log-{self._count}"
        pid = os.fork()
        if pid:
            return pid, log
        try:
            self._become(log, stroke, largest_file)
            if callable(tool):
                sys.exit(tool())
            argv = [str(argument) for argument in arguments]
            sys.argv = ["streamvid", tool, *argv]
            sys.exit(importlib.import_module(f"streamvid.cli.{tool}").main(argv))
        except SystemExit as stop:
            _exit(stop.code)
        except BaseException as error:  # what Python itself does with it
            if isinstance(error, KeyboardInterrupt):
                traceback.print_exc()
                _exit(130)
            traceback.print_exc()
            _exit(1)

    def _become(self, log: Path, stroke: Stroke | None, largest_file: int | None) -> None:
        os.chdir(self.folder)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(
                number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            )
        for descriptor, path, flags in (
            (0, "/dev/null", os.O_RDONLY),
            (1, f"{log}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, f"{log}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(path, flags), descriptor)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(n, mode, encoding="utf-8") for n, mode in enumerate("rww")
        )
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        if stroke is not None:
            sys.addaudithook(_striking(stroke))

    def finish(self, started: tuple[int, Path]) -> Outcome:
        """Waits for what `start` began; ends it at a limit."""
        pid, log = started
        limit, began = "", time.monotonic()
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
            limit = limit or _limit_of(pid, time.monotonic() - began)
            if limit:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        out, err = (
            Path(f"{log}.{name}").read_text(encoding="utf-8", errors="replace")
            for name in ("out", "err")
        )
        return Outcome(os.waitstatus_to_exitcode(status), out, err, limit)

    def part(self, name: str) -> Path:
        """A copy of a shared part, to damage."""
        source = self.parts / name
        if source.is_dir():
            return shutil.copytree(source, self.folder / name, symlinks=True)
        return Path(shutil.copy(source, self.folder / name))


def _exit(code: object) -> None:
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            pass
    os._exit(code if isinstance(code, int) else int(code is not None))


def _striking(stroke: Stroke) -> Callable[[str, tuple], None]:
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event == stroke.event and re.search(stroke.pattern, " ".join(map(str, arguments))):
            seen += 1
            if seen == stroke.nth:
                os.kill(os.getpid(), stroke.number)

    return hook


def _limit_of(pid: int, waited_s: float) -> str:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        memory = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return ""
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    resident_mb = int(memory[1]) * resource.getpagesize() / 2**20
    if resident_mb > MEMORY_LIMIT_MB:
        return f"over {MEMORY_LIMIT_MB} MB of memory"
    if seconds > TOOL_LIMIT_S or waited_s > HANG_LIMIT_S:
        return f"no end in {TOOL_LIMIT_S if seconds > TOOL_LIMIT_S else HANG_LIMIT_S:.0f} s"
    return ""


# ---- verdicts ------------------------------------------------------------------------------------


def decent(outcome: Outcome) -> None:
    """No limit met, no traceback, no raw escape sequence, however it ended."""
    both = outcome.out + outcome.err
    if outcome.limit:
        raise NotHeld(outcome.said())
    if "Traceback (most recent call last)" in both:
        raise NotHeld(f"a traceback: {outcome.last_line[:240]}")
    if "\x1b" in both:
        raise NotHeld(f"a raw escape sequence is printed: {outcome.said()}")


def refused(outcome: Outcome, *words: str) -> None:
    """Exit status 2 and one `error:` line, the last, which has these words."""
    decent(outcome)
    if outcome.code != 2:
        raise NotHeld(f"expected a refusal, got {outcome.said()}")
    errors = [line for line in outcome.err.splitlines() if re.match(r"(\S+\.py: )?error: ", line)]
    if len(errors) != 1 or outcome.last_line != errors[0]:
        raise NotHeld(
            f"expected one error line as the last, got {len(errors)}:"
            f" {outcome.err.strip()[-240:]!r}"
        )
    if len(errors[0]) > LONGEST_LINE:
        raise NotHeld(f"an error line of {len(errors[0])} characters: {errors[0][:160]!r}")
    for word in words:
        if word not in errors[0]:
            raise NotHeld(f"expected {word!r} in the error line, got {errors[0][:300]!r}")


def worked(outcome: Outcome, *files: Path) -> None:
    """Exit status 0, and these files are there."""
    decent(outcome)
    if outcome.code != 0:
        raise NotHeld(f"expected it to work, got {outcome.said()}")
    for file in files:
        if not file.exists():
            raise NotHeld(f"{file.name} was not written: {outcome.said()}")


def worked_or_refused(outcome: Outcome, *files: Path) -> None:
    """Either is right, where the input is odd and not wrong; nothing in between is."""
    worked(outcome, *files) if outcome.code == 0 else refused(outcome)


# ---- running -------------------------------------------------------------------------------------


def import_everything() -> None:
    """What the tools import, so that no case has to."""
    import torch

    torch.set_num_threads(1)
    for name in ("diffusers", "transformers", "accelerate", "imageio.v2", "scipy.ndimage"):
        importlib.import_module(name)
    for module in (
        "streamvid.experiment.build",
        "streamvid.experiment.estimate",
        "streamvid.students.clips",
        "streamvid.teachers.load",
        "streamvid.evaluation.runs",
        "streamvid.evaluation.report",
        "streamvid.evaluation.bench_suites",
        "streamvid.models.convert",
        "streamvid.data.trajectories",
        "streamvid.objectives.dmd",
        "streamvid.objectives.trajectory",
    ):
        importlib.import_module(module)
    from diffusers import WanPipeline  # noqa: F401  lazily imported otherwise
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5EncoderModel  # noqa: F401


def run_all(
    cases: list[Case],
    parts: Path,
    work: Path,
    jobs: int,
    tell: Callable[[int, Case, str, float], None],
) -> list[str]:
    """What came of each case, "" where it held."""
    came, running, waiting = [""] * len(cases), {}, list(enumerate(cases))
    while waiting or running:
        while waiting and len(running) < jobs:
            index, case = waiting.pop(0)
            folder = work / f"{index:04d}"
            folder.mkdir(parents=True)
            running[_fork_case(case, Place(folder, parts))] = index, folder, time.monotonic()
        pid, status = os.wait()
        index, folder, began = running.pop(pid)
        verdict = folder / ".verdict"
        came[index] = (
            verdict.read_text() if verdict.is_file() else f"the case ended with status {status}"
        )
        if (folder / "CODE_RAN").exists():
            came[index] = "code out of the input was run"
        tell(index, cases[index], came[index], time.monotonic() - began)
        shutil.rmtree(folder, ignore_errors=True)
    return came


def _fork_case(case: Case, place: Place) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        case.run(place)
        came = ""
    except NotHeld as error:
        came = str(error)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        came = (
            f"the case itself failed: {type(error).__name__}: {error}"
            f" ({Path(where.filename).name}:{where.lineno})"
        )
    (place.folder / ".verdict").write_text(came or "", encoding="utf-8", errors="replace")
    os._exit(0)
