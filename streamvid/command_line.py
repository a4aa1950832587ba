"""What all commands share: what an option may be, how a mistake is told, and how an interruption
ends.

One name means one thing on every command line: `--prompts` is a file, `--num-prompts` a number,
`--size` is in pixels, `--seeds` is a list, bf16 is spelled `bf16`, and `--device` is the best there
is by default. Nothing here imports torch, so that a wrong option is told at once.

A mistake of the user's is one line on stderr and the exit code 2, an interruption one line and 128
+ the signal. Other errors are ours, and keep their traceback.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from streamvid.printing import one_line, printable


class Parser(argparse.ArgumentParser):
    """Options of a command. They are not abbreviated, so that each has one name.

    Args:
        doc: the command's docstring, shown as it is by ``--help``.
        command: its name after ``streamvid``; None for a script of its own.
        may_be_empty: destinations for which an empty text means something; for all others it is an
            error, as what an unset variable of a shell leaves, unless it is the default.
    """

    def __init__(
        self, doc: str | None, command: str | None = None, may_be_empty: Iterable[str] = ()
    ):
        super().__init__(
            prog=f"streamvid {command}" if command else None,
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.may_be_empty = set(may_be_empty)

    def add_device(self, runs: str = "") -> None:
        """``--device``; ``runs`` says what is computed there, if not all is."""
        self.add_argument(
            "--device",
            default="auto",
            help=f"{runs}cpu, cuda or cuda:1; by default a GPU where there is one",
        )

    def add_engine(self) -> None:
        """``--engine``, for ``students.engine.engine_options``."""
        self.add_argument(
            "--engine",
            default="",
            metavar="OPTIONS",
            help="ways to run faster, such as prepacked,attention=auto (docs/engine.md)",
        )

    def add_runs(self, folder: str) -> None:
        """``--jobs``, ``--folder`` and ``--out``, of a command that keeps finished runs."""
        self.add_argument(
            "--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)"
        )
        self.add_argument(
            "--folder", default=folder, help=f"where finished runs are kept (default {folder})"
        )
        self.add_argument("--out", default=f"{folder}/report.json", help="the report, .json")

    def renamed(self, old: str, new: str) -> None:
        """An option's earlier name ends with one line that tells the present one."""
        self.add_argument(
            old,
            nargs="*",
            action=_Renamed,
            const=new,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        return self._checked(super().parse_args(args, namespace))

    def parse_intermixed_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        return self._checked(super().parse_intermixed_args(args, namespace))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(message)}; see --help\n")

    def _checked(self, args: argparse.Namespace) -> argparse.Namespace:
        for name, value in vars(args).items():
            if isinstance(value, float) and not math.isfinite(value):
                self.error(f"--{name.replace('_', '-')} {value}, expected a finite number")
            texts = value if isinstance(value, (list, tuple)) else [value]
            if name in self.may_be_empty or value == self.get_default(name):
                continue
            if any(isinstance(text, str) and not text.strip() for text in texts):
                self.error(
                    f"--{name.replace('_', '-')} is an empty text; is a variable of the shell not"
                    " set? Leave the option out for its default"
                )
        return args


class _Renamed(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, _namespace: Any, _values: Any, option: Any = None
    ) -> None:
        parser.error(f"{option} is called {self.const} now")


def sides(form: str) -> Callable[[str], tuple[int, ...]]:
    """What reads sizes of a form such as ``HxW``: as many sides of at least 1 as it has letters."""
    count = form.count("x") + 1
    example = "x".join(("16", "21", "480", "832")[-count:])

    def read(text: str) -> tuple[int, ...]:
        parts = text.split("x")
        if len(parts) != count or not all(map(_is_count, parts)):
            raise argparse.ArgumentTypeError(
                f"{_short(text)}, expected {form} with sides of at least 1, such as {example}"
            )
        return tuple(map(int, parts))

    return read


def counts(text: str) -> list[int]:
    """Numbers of at least 1, such as ``1,2,4``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(map(_is_count, parts)):
        raise argparse.ArgumentTypeError(f"{_short(text)}, expected numbers such as 1,2,4")
    return [int(part) for part in parts]


def seeds(text: str) -> list[int]:
    """Different seeds, such as ``0,1,2``, or ``0-9`` for all from 0 to 9."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip(), re.ASCII)
        last = int(match[2] or match[1]) if match else -1
        if not match or not 0 <= last - int(match[1]) < MOST_SEEDS:
            raise argparse.ArgumentTypeError(f"{_short(text)}, expected seeds such as 0,1,2 or 0-9")
        found += range(int(match[1]), last + 1)
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{_short(text)} names a seed twice")
    return found


def names_of(option: str, text: str | None, known: Sequence[str]) -> list[str]:
    """The names of an option's comma-separated list; all that are known without one.

    Raises:
        ValueError: for a name that is not known.
    """
    if text is None:
        return list(known)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {_short(name)}: expected some of {', '.join(known)}")
    return names


def in_repository(path: str) -> Path:
    """A file of the repository that the installed package does not hold.

    Raises:
        ValueError: outside of a clone.
    """
    root = Path(__file__).parents[1]
    if not (root / "configs").is_dir():
        raise ValueError(
            f"{path} is in the repository, not in the installed package; run this from a clone,"
            " after pip install -e ."
        )
    return root / path


MOST_SEEDS = 10_000  # of a range


def _is_count(text: str) -> bool:
    return re.fullmatch(r"0*[1-9]\d{0,8}", text, re.ASCII) is not None


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which end a command as Ctrl-C does: nothing half-written is left."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run_tool(job: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a command's job; returns the exit code. This is the only place that ends in an error.

    Args:
        job: returns None or an exit code.
        interrupted: what an interruption leaves, in words.
    """
    try:
        with _signals_raised():
            return job() or 0
    except (ValueError, OSError) as error:
        tell(f"error: {one_line(error)}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = one_line(error)[:200]
        tell(
            f"error: there is not enough memory ({reason}); ask for a smaller size, batch or length"
        )
        return 2
    except KeyboardInterrupt as stop:
        tell(f"error: {interrupted}")
        return 128 + (stop.number if isinstance(stop, Terminated) else signal.SIGINT)


def is_out_of_memory(error: BaseException) -> bool:
    """Torch has a class of its own for that on a GPU, and says it in words on a CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "allocate memory" in str(error)
    )


def invocation() -> str:
    """The command that this process was started with, as a shell takes it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program, *arguments = sys.argv
    if spec is not None:
        words = ["python", "-m", spec.name.removesuffix(".__main__")]
    elif Path(program).name == "streamvid":
        words = ["streamvid"]
    else:
        words = ["python", program]
    return shlex.join([*words, *arguments])


def tell(text: str) -> None:
    """A line on stderr."""
    print(printable(text), file=sys.stderr)


def say(text: str) -> None:
    """A line on stdout."""
    print(printable(text), flush=True)


def log_to_stderr() -> None:
    """Show what modules log, each message in one plain line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = printable(record.getMessage())
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise ``Terminated``; only the main thread can have that."""

    def stop(number: int, _frame: Any) -> None:
        raise Terminated(number)

    previous = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
                    previous[number] = signal.signal(number, stop)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
