"""Writing files and folders so that a crash leaves either the old one or the new one, never half of
one.

The new content is written beside its place under a hidden name (`.NAME.tmp-XXXXXXXX`) and renamed
when it is complete and on the disk. The name says which process writes. Whatever a crash leaves
behind under such a name is ignored by every reader, and removed by the next process that writes
into the same folder, or by `remove_leftovers`. What is written can be read by whom the umask lets,
whatever a library makes of its own files.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

LEFTOVER = ".tmp-"
OWNED = re.compile(
    rf"\..*{re.escape(LEFTOVER)}(?P<machine>[0-9a-f]{{6}})_(?P<process>\d+)_[0-9a-f]{{8}}(\.[^.]+)?"
)
FULL = {  # what of the system's errors means that there is no room
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota used up",
    errno.EFBIG: "file too large for this disk or for `ulimit -f`",
}


def disk_full(error: Exception) -> str | None:
    """In words, if an error in writing means that there is no room; None for others.

    safetensors hands on the system's error as a text of its own exception.
    """
    number = getattr(error, "errno", None)
    if number is None:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else None
    return FULL.get(number)


@contextmanager
def _errors_of_the_system() -> Iterator[None]:
    """Inside, an error of the disk that a library hands on as a text of its own exception is an
    ``OSError`` again.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = disk_full(error)
        if reason is None:
            raise
        number = next(number for number, words in FULL.items() if words == reason)
        raise OSError(number, f"{reason} ({os.strerror(number)})") from error


@cache
def _machine() -> str:
    """Where numbers of processes mean what they mean here: this host, and this container of it."""
    space = Path("/proc/self/ns/pid")
    home = f"{socket.gethostname()} {os.readlink(space) if space.is_symlink() else ''}"
    return hashlib.blake2b(home.encode(), digest_size=3).hexdigest()


def _hidden_sibling(path: Path) -> Path:
    """A fresh name in the same folder, hence on the same disk; the suffix stays, writers look at
    it.
    """
    return path.with_name(
        f".{path.stem[:40]}{LEFTOVER}{_machine()}_{os.getpid()}_{uuid.uuid4().hex[:8]}{path.suffix}"
    )


def _is_orphan(path: Path) -> bool:
    """Whether a name is of a process of this machine that is no more."""
    match = OWNED.fullmatch(path.name)
    if match is None or match["machine"] != _machine():
        return False
    try:
        os.kill(int(match["process"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # it lives, as another user; it can't be
        pass
    return False


@cache
def _remove_orphans(folder: Path, process: int) -> None:
    """Removes what processes that were killed have left in a folder; once for each process that
    writes there.
    """
    for path in folder.glob(f".*{LEFTOVER}*"):
        if _is_orphan(path):
            with suppress(OSError):  # another process may be at it, or it is another user's
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(path: str | Path) -> None:
    """Removes a folder so that a crash leaves it whole or not there at all, never with a part of
    its files.
    """
    hidden = _hidden_sibling(Path(path))
    Path(path).rename(hidden)
    _remove(hidden)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _usual_mode(path: Path) -> int:
    """The mode that this process's umask gives a new file at `path`, which is not there
    afterwards.
    """
    path.touch(mode=0o666)
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode


def _set_mode(path: Path, mode: int) -> None:
    """Some disks have one mode for all and refuse to set it."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Gives the path to write to; the file appears at `path` when the block ends without an error.

    `with atomic_file("a/b.json") as temporary: temporary.write_text(...)`. Missing folders are
    made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_orphans(path.parent.absolute(), os.getpid())
    temporary = _hidden_sibling(path)
    mode = _usual_mode(temporary)
    try:
        with _errors_of_the_system():
            yield temporary
        _set_mode(temporary, mode)
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Gives an empty folder to fill; it becomes `path` when the block ends without an error.

    A folder that is already at `path` is replaced. POSIX can't swap two folders in one step, so
    between two renames there is an instant in which `path` does not exist; write to a new name
    where that matters.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_orphans(path.parent.absolute(), os.getpid())
    temporary, replaced = _hidden_sibling(path), _hidden_sibling(path)
    temporary.mkdir()
    mode = stat.S_IMODE(temporary.stat().st_mode)
    try:
        with _errors_of_the_system():
            yield temporary
        for file in temporary.rglob("*"):
            if file.is_symlink():
                continue
            _set_mode(file, mode if file.is_dir() else mode & 0o666)
            if file.is_file():
                _flush_to_disk(file)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
    finally:
        _remove(temporary)
        _remove(replaced)


def remove_leftovers(folder: str | Path) -> list[str]:
    """Removes what a crash left half-written in `folder` and returns the names; nobody may be
    writing there.
    """
    leftovers = sorted(Path(folder).glob(f".*{LEFTOVER}*"))
    for path in leftovers:
        _remove(path)
    return [path.name for path in leftovers]
