"""Clips on the server's disk: those that were asked for, and recordings of live streams.

A recording is written by a thread of its own, so that a slow or full disk can end the recording but
not the stream. Names of files are made here, never by a client.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from streamvid.files import atomic_file, disk_full
from streamvid.printing import one_line
from streamvid.serving.starts import StartFile, link_or_copy
from streamvid.video import VideoWriter

MEDIA_TYPES = {"mp4": "video/mp4", "webm": "video/webm", "gif": "image/gif"}
BACKLOG = 8  # chunks that a recording may lag behind
SLOWEST_WRITE_S = 5.0  # that a clip waits for the disk


@dataclass
class Clip:
    """A clip and how far it is."""

    prompt: str
    model: str
    height: int
    width: int
    fps: float
    format: str
    seed: int
    steps: int | None = None
    num_frames: int = 0
    """Wanted frames of a clip that was asked for, written frames of a recording."""
    kind: str = "clip"
    status: str = "queued"
    progress: int = 0
    error: str | None = None
    id: str = field(default_factory=lambda: f"video_{secrets.token_hex(12)}")
    created_at: int = field(default_factory=lambda: int(time.time()))
    completed_at: int | None = None
    cancelled: bool = False
    script: str = ""
    """Makes a recorded stream again, YAML."""
    command: str = ""
    """Makes the same clip again from its script."""
    start: str | None = None
    """The file of frames that a recorded stream began from, as the command names it."""


class ClipStore:
    """Clips by id, and the folder of their files.

    Args:
        folder: of the files; it is made if it is not there.
        most: finished clips that are kept; the oldest goes first.
    """

    def __init__(self, folder: Path, most: int):
        self.folder = folder
        self.most = most
        self._clips: OrderedDict[str, Clip] = OrderedDict()
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, clip: Clip) -> Path:
        """The file of a clip."""
        return self.folder / f"{clip.id}.{clip.format}"

    def start_path(self, clip: Clip) -> Path:
        """The frames that a recorded stream began from, see ``keep_start``."""
        return self.folder / f"{clip.id}.{clip.start}"

    def keep_start(self, clip: Clip, file: StartFile) -> None:
        """Keep the frames that a recorded stream began from, for as long as the recording."""
        clip.start = file.name
        link_or_copy(file.path, self.start_path(clip))

    def add(self, clip: Clip) -> None:
        """Keep a clip; the oldest finished ones make room."""
        with self._lock:
            self._clips[clip.id] = clip
            ended = [old for old in self._clips.values() if old.completed_at is not None]
            surplus = ended[: max(0, len(ended) - self.most)]
            for old in surplus:
                del self._clips[old.id]
        for old in surplus:
            self._remove_files(old)

    def get(self, clip_id: str) -> Clip | None:
        """The clip of an id, or None."""
        with self._lock:
            return self._clips.get(clip_id)

    def remove(self, clip: Clip) -> None:
        """Forget a clip and its file; one under way is given up."""
        clip.cancelled = True
        with self._lock:
            self._clips.pop(clip.id, None)
        self._remove_files(clip)

    def _remove_files(self, clip: Clip) -> None:
        self.path(clip).unlink(missing_ok=True)
        if clip.start is not None:
            self.start_path(clip).unlink(missing_ok=True)

    def newest_first(self) -> list[Clip]:
        """All clips."""
        with self._lock:
            return list(reversed(self._clips.values()))


class Recorder:
    """Writes frames to a clip's file in a thread of its own.

    Args:
        clip: says format, frames per second and seed.
        path: of the file, which appears when it is complete.
        done: called from the thread at the end, with None or what went wrong in words.
        first_chunk: of the stream that is in the file.
    """

    def __init__(
        self, clip: Clip, path: Path, done: Callable[[str | None], None], first_chunk: int = 0
    ):
        self.clip = clip
        self.first_chunk = first_chunk
        self.num_frames = 0
        self.failed = False
        self._path = path
        self._done = done
        self._notes: dict[str, str] = {}
        self._given_up = False
        # one place more than frames may take, so that the end never waits for the disk
        self._frames: queue.Queue[np.ndarray | None] = queue.Queue(BACKLOG + 1)
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._thread.start()

    def append(self, images: np.ndarray, wait: bool = False) -> None:
        """The next frames ``[T, H, W, 3]``, bytes.

        Args:
            wait: for the disk, which a live stream must not.
        """
        if self.failed:
            return
        self.num_frames += len(images)
        patience = time.monotonic() + (SLOWEST_WRITE_S if wait else 0)
        while self._frames.qsize() >= BACKLOG and time.monotonic() < patience:
            time.sleep(0.01)
        if self._frames.qsize() >= BACKLOG:
            self._given_up = self.failed = True
            return
        self._frames.put(images)

    def finish(self, notes: dict[str, str]) -> None:
        """No more frames come; the file is completed in the background.

        Args:
            notes: for the metadata of .mp4 and .webm files.
        """
        self._notes = notes
        self._frames.put(None)

    def give_up(self) -> None:
        """No more frames come, and the file is not wanted."""
        self._given_up = True
        self._frames.put(None)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the file is complete."""
        self._thread.join(timeout)

    def _write(self) -> None:
        error, frames_come = None, True
        try:
            with VideoWriter(self._path, self.clip.fps) as writer:
                while (images := self._frames.get()) is not None:
                    writer.append_images(images)
                frames_come = False
                if self._given_up:
                    raise _GivenUp
            write_notes(self._path, self._notes)
        except _GivenUp:
            error = "the disk is too slow for the stream" if self.failed else "given up"
        except Exception as problem:  # of writers and disks; the stream must live on
            error = disk_full(problem) or one_line(problem)
            self.failed = True
            if frames_come:
                self._drain()
        self._done(error)

    def _drain(self) -> None:
        """Let who waits for room go on; ends when no more frames come."""
        while self._frames.get() is not None:
            pass


class _GivenUp(Exception):
    """Leaves a writer without a file."""


def write_notes(path: Path, notes: dict[str, str]) -> None:
    """Put notes into the metadata of an .mp4 or .webm file; frames stay as they are, bit for bit.

    Args:
        notes: ``title`` and ``comment`` are fields that players show.
    """
    import av

    if path.suffix == ".gif" or not notes:
        return
    with atomic_file(path) as temporary:
        with av.open(str(path)) as source, av.open(str(temporary), "w") as target:
            stream = source.streams.video[0]
            copy = target.add_stream_from_template(stream)
            target.metadata.update(notes)
            for packet in source.demux(stream):
                if packet.dts is not None:
                    packet.stream = copy
                    target.mux(packet)


def read_notes(path: Path) -> dict[str, str]:
    """The metadata of a video file."""
    import av

    with av.open(str(path)) as source:
        return dict(source.metadata)
