"""What the command lines of tools/ share: what an option may be, how a mistake is told, and how an
interruption ends.

A mistake of the user's is one line on stderr and the exit code 2, an interruption one line and 128
+ the signal. Other errors are ours, and keep their traceback.
"""

from __future__ import annotations

import argparse
import logging
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from streamvid.printing import one_line, printable


class Parser(argparse.ArgumentParser):
    """Options of a tool.

    Args:
        doc: the tool's docstring, shown as it is by ``--help``.
        may_be_empty: destinations for which an empty text means something; for all others it is an
            error, as what an unset variable of a shell leaves, unless it is the default.
    """

    def __init__(self, doc: str | None, may_be_empty: Iterable[str] = ()):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.may_be_empty = set(may_be_empty)

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


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which end a tool as Ctrl-C does: with nothing half-written left behind."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run_tool(job: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a tool's job; returns the exit code.

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
        if not _is_out_of_memory(error):
            raise
        reason = one_line(error)[:200]
        tell(
            f"error: there is not enough memory ({reason}); ask for a smaller size, batch or length"
        )
        return 2
    except KeyboardInterrupt as stop:
        tell(f"error: {interrupted}")
        return 128 + (stop.number if isinstance(stop, Terminated) else signal.SIGINT)


def _is_out_of_memory(error: BaseException) -> bool:
    """Torch has a class of its own for that on a GPU, and says it in words on a CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "allocate memory" in str(error)
    )


def tell(text: str) -> None:
    """A line on stderr."""
    print(printable(text), file=sys.stderr)


def say(text: str) -> None:
    """A line on stdout."""
    print(printable(text), flush=True)


def log_to_stderr() -> None:
    """What modules log as plain lines, each of them one line."""
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
