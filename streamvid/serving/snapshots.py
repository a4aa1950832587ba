"""Streams on the server's disk: kept by viewers, or by the server itself every few chunks.

A snapshot is a file of ``students.snapshot``. A stream that began from frames has these beside it,
because commands of its recordings need them. Names are made here, never by a client.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamvid.files import atomic_file
from streamvid.serving.starts import START_TYPES, StartFile, StartStore, link_or_copy

SUFFIX = ".safetensors"


class Snapshots:
    """Snapshots by id, in a folder that outlives the server.

    Args:
        folder: of the files; it is made if it is not there.
        most: snapshots that are kept; the oldest goes first.
        starts: keeps the frames that a restored stream began from.
        autosave: chunks of a stream after which it is kept by itself; None is never.

    Raises:
        ValueError: if ``autosave`` is no number of chunks.
    """

    def __init__(
        self,
        folder: Path,
        most: int,
        starts: StartStore,
        autosave: int | None = None,
    ):
        if autosave is not None and autosave < 1:
            raise ValueError(f"autosave={autosave}, expected at least 1 chunk")
        self.folder = folder
        self.autosave = autosave
        self._most = most
        self._starts = starts
        folder.mkdir(parents=True, exist_ok=True)

    def new_id(self) -> str:
        """A name that nobody guesses."""
        return f"snapshot_{secrets.token_hex(16)}"

    def is_due(self, num_chunks: int) -> bool:
        """Whether a stream of so many chunks is to be kept now."""
        return self.autosave is not None and num_chunks % self.autosave == 0

    def save(self, snapshot_id: str, session: Any, start: StartFile | None) -> None:
        """Keep a session; one that has this id is replaced at once.

        Raises:
            OSError: if the disk does not take it.
        """
        path = self._path(snapshot_id)
        if start is not None and not path.exists():  # a stream keeps its start
            with atomic_file(path.with_suffix(start.path.suffix)) as temporary:
                link_or_copy(start.path, temporary)
        session.snapshot(path)
        self._make_room()

    def open(
        self, snapshot_id: str, restore: Callable[[Path], Any]
    ) -> tuple[Any, StartFile | None]:
        """The session of an id, and the frames that it began from.

        Args:
            restore: makes a session of a snapshot's file.

        Raises:
            ValueError: one line without a path, if there is none, or it is damaged, or of another
                student.
        """
        path = self._path(snapshot_id)
        if not path.is_file():
            raise ValueError("there is no such snapshot; it may have made room for newer ones")
        try:
            session = restore(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), snapshot_id)) from None
        kept = (path.with_suffix(suffix) for suffix in START_TYPES)
        start = next((self._starts.adopt(file) for file in kept if file.is_file()), None)
        return session, start

    def _path(self, snapshot_id: str) -> Path:
        return self.folder / f"{snapshot_id}{SUFFIX}"

    def _make_room(self) -> None:
        paths = self.folder.glob(f"snapshot_*{SUFFIX}")
        newest_first = sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for old in newest_first[self._most :]:
            for suffix in (SUFFIX, *START_TYPES):
                old.with_suffix(suffix).unlink(missing_ok=True)
