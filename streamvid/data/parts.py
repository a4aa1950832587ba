"""A long job in parts, each a file that appears when it is complete, so that an interruption loses
one part at most.

Several processes may do one job in one folder without an agreement: each makes parts that are not
there and that no other has claimed. A claim is a lock on a hidden file beside the part; the system
takes it back when its holder ends, however it ends. Where a disk knows no locks two processes may
make the same part, which costs time and nothing else.
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

WAIT_S = 0.5  # between looks at what others are making
BLOCK_BYTES, MAX_BLOCKS = 2**20, 2**10  # of a weight file, for its key: up to 1 GiB all of it


def make_parts(
    paths: Sequence[Path],
    make: Callable[[int], None],
    first: int = 0,
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """Make the parts that are missing and that no other process is making, each once.

    Args:
        make: writes the part of that number.
        first: the number to begin with; processes that begin at different ones meet late.
        is_over: whether the parts are not needed any more.
    """
    for number in (*range(first, len(paths)), *range(first)):
        if paths[number].exists() or is_over():
            continue
        with claimed(paths[number]) as own:
            if own and not paths[number].exists() and not is_over():
                make(number)


def make_all_parts(
    paths: Sequence[Path],
    make: Callable[[int], None],
    first: int = 0,
    is_over: Callable[[], bool] = lambda: False,
) -> None:
    """``make_parts`` until all are there; a part whose maker ends early is made here."""
    while True:
        make_parts(paths, make, first, is_over)
        if all(path.exists() for path in paths) or is_over():
            return
        time.sleep(WAIT_S)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether ``path`` is this process's to make inside the block; False while another is at it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # no locks on this disk
            pass
        try:
            yield True
        finally:
            lock.unlink(missing_ok=True)


def checkpoint_key(home: str | Path, *parts: str) -> str:
    """Names the files of some folders of a checkpoint by their content, wherever they lie and
    whenever they were written.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(
        path for part in parts for path in (Path(home) / part).rglob("*") if path.is_file()
    ):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(home)} {size} ".encode())
        with path.open("rb") as file:
            for place in _places(size):
                file.seek(place)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _places(size: int) -> Iterable[int]:
    """Where the blocks of a file begin that are read for its key: all of them, or as many, spread
    from first to last.
    """
    if size <= BLOCK_BYTES * MAX_BLOCKS:
        return range(0, size, BLOCK_BYTES)
    return ((size - BLOCK_BYTES) * block // (MAX_BLOCKS - 1) for block in range(MAX_BLOCKS))
