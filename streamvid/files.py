"""Writing files and folders so that a crash leaves either the old one or the new one, never half of one.

The new content is written beside its place under a hidden name (`.NAME.tmp-XXXXXXXX`) and renamed when it
is complete and on the disk. Whatever a crash leaves behind under such a name is ignored by every reader
and removed by `remove_leftovers`.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEFTOVER = ".tmp-"


def _hidden_sibling(path: Path) -> Path:
    """A fresh name in the same folder, hence on the same disk; the suffix stays, writers look at it."""
    return path.with_name(f".{path.stem}{LEFTOVER}{uuid.uuid4().hex[:8]}{path.suffix}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Gives the path to write to; the file appears at `path` when the block ends without an error.

    `with atomic_file("a/b.json") as temporary: temporary.write_text(...)`. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden_sibling(path)
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Gives an empty folder to fill; it becomes `path` when the block ends without an error.

    A folder that is already at `path` is replaced. POSIX can't swap two folders in one step, so between two
    renames there is an instant in which `path` does not exist; write to a new name where that matters.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = _hidden_sibling(path), _hidden_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
    finally:
        _remove(temporary)
        _remove(replaced)


def remove_leftovers(folder: str | Path) -> list[str]:
    """Removes what a crash left half-written in `folder` and returns the names; nobody may be writing there."""
    leftovers = sorted(Path(folder).glob(f".*{LEFTOVER}*"))
    for path in leftovers:
        _remove(path)
    return [path.name for path in leftovers]
