"""One viewer's live stream: its settings, its place in time, and the outbox between threads."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml

from streamvid.serving import protocol
from streamvid.serving.models import ServedModel
from streamvid.serving.pacing import FlowControl, Pacer, ServiceLevel
from streamvid.serving.recording import Recorder
from streamvid.serving.starts import StartFile

CHUNKS_WAITING = 2
"""Chunks in an outbox; a third one pushes the oldest out."""


@dataclass(frozen=True)
class Frames:
    """A chunk on its way to the viewer."""

    images: np.ndarray  # [T, H, W, 3], bytes
    sequence: int  # of the first frame
    chunk: int
    prompt_id: int
    server_us: int
    captured_us: int
    first_of_prompt: bool


class Outbox:
    """What the worker has for one viewer: messages in order, and at most ``CHUNKS_WAITING`` chunks.

    Args:
        wake: called whenever something is put in, from any thread.
    """

    def __init__(self, wake: Callable[[], None]):
        self._items: deque[protocol.Message | Frames] = deque()
        self._lock = threading.Lock()
        self._wake = wake

    def put(self, item: protocol.Message | Frames) -> int:
        """Add an item; returns how many frames it pushed out."""
        dropped = 0
        with self._lock:
            if isinstance(item, Frames):
                waiting = [old for old in self._items if isinstance(old, Frames)]
                if len(waiting) >= CHUNKS_WAITING:
                    self._items.remove(waiting[0])
                    dropped = len(waiting[0].images)
            self._items.append(item)
        self._wake()
        return dropped

    def take(self) -> protocol.Message | Frames | None:
        """The next item, or None."""
        with self._lock:
            return self._items.popleft() if self._items else None

    @property
    def is_full(self) -> bool:
        """Whether another chunk would push one out."""
        with self._lock:
            waiting = sum(isinstance(item, Frames) for item in self._items)
        return waiting >= CHUNKS_WAITING

    def __len__(self) -> int:
        return len(self._items)


@dataclass(eq=False)
class Stream:
    """One viewer's live stream. Its session and bookmarks belong to the worker's thread."""

    start: protocol.SessionStart
    height: int
    width: int
    fps: float
    wake: Callable[[], None]
    model: ServedModel
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    gone: bool = False
    """Set by whoever notices that the viewer has left; read inside each forward."""
    stopping: bool = False
    session: Any = None
    prompt: str = ""
    prompt_id: int = 0
    seed: int = 0
    steps: int | None = None
    hold_rate: bool = False
    paused_since: float | None = None
    sequence: int = 0
    chunks: int = 0
    dropped: int = 0
    place: int | None = None
    bookmarks: dict[int, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    automatic_bookmarks: set[int] = field(default_factory=set)
    start_file: StartFile | None = None
    """The frames that the stream begins from; None is from noise."""
    autosave_id: str | None = None
    recorder: Recorder | None = None
    finishing: list[Recorder] = field(default_factory=list)
    switched_at: float | None = None
    switch_mode: str = "cut"
    commands: deque[tuple[protocol.Message, float]] = field(default_factory=deque)
    planned: list[protocol.Planned] = field(default_factory=list)
    """What waits for its chunk, in the order in which it came."""

    def __post_init__(self) -> None:
        self.outbox = Outbox(self.wake)
        self.pacer = Pacer(self.fps)
        self.flow = FlowControl(self.fps, self.start.acks, heard=time.monotonic())
        self.level = ServiceLevel(time.monotonic())
        self.begun = time.monotonic()
        self.measured = time.monotonic()
        self.chunk_frames = 0
        self.prompt = self.start.prompt or ""  # a snapshot says it when it is opened
        self.seed = self.start.seed
        self.steps = self.start.steps
        self.hold_rate = self.start.hold_rate
        self.ended = threading.Event()

    @property
    def may_advance(self) -> bool:
        """Whether its viewer is there, follows, and has not held it."""
        held = self.gone or self.stopping or self.paused_since is not None
        return not held and not self.flow.must_wait(self.chunk_frames)

    def due(self, now: float, streams: int) -> float:
        """When the next chunk should be begun, among so many streams."""
        return self.pacer.due(now, streams, self.outbox.is_full)

    def deadline(self, now: float) -> float:
        """When the viewer has nothing left to play."""
        return self.pacer.deadline(now)

    @property
    def cache_bytes(self) -> int:
        """Memory that its caches hold, with those of its bookmarks."""
        sessions = [self.session] if self.session is not None else []
        sessions += [kept for kept, _ in self.bookmarks.values()]
        return sum(session.memory_bytes for session in sessions)

    @property
    def shape(self) -> Hashable:
        """What has to agree for streams to advance as one batch; of its own before it has begun."""
        return id(self) if self.session is None else self.session.shape

    @property
    def script(self) -> str:
        """What has been steered so far, as YAML that ``Script.load`` reads."""
        return script_text(self.session)


def say_after(stream: Stream, done: protocol.SessionDone) -> None:
    """Say that a stream is over, when its recordings are complete."""
    for recorder in stream.finishing:
        recorder.join(60)
    stream.outbox.put(done)


def script_text(session: Any) -> str:
    """What has been steered in a session, as YAML that ``Script.load`` reads."""
    plain = session.script.to_plain()
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
