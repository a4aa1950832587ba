"""The thread that owns the models.

Everything that touches a model happens in one thread: it takes the live stream whose next chunk is
due first, and with it, as one batch, those of equal shape whose chunks would fall due while that
one is made. Clips of ``POST /v1/videos`` use the time in between.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from streamvid.printing import one_line
from streamvid.serving import protocol
from streamvid.serving.clip_jobs import ClipJobs
from streamvid.serving.errors import Busy
from streamvid.serving.limits import Limits
from streamvid.serving.live import LiveStreams
from streamvid.serving.metrics import Metrics
from streamvid.serving.models import ServedModels
from streamvid.serving.recording import Clip, ClipStore
from streamvid.serving.snapshots import Snapshots
from streamvid.serving.stream import Stream

log = logging.getLogger(__name__)

LIVE_PER_CLIP = 8
"""After so many chunks of live streams a waiting clip gets one, even if none has time."""


@dataclass(frozen=True)
class Turn:
    """What the worker does next: the chunks of live streams, or a part of a clip."""

    streams: tuple[Stream, ...] = ()
    """Those that advance as one batch; none means a clip."""


class Worker:
    """Advances live streams and clips, one batch of chunks at a time.

    Args:
        models: that are served.
        limits: of the server.
        metrics: that are kept up to date.
        store: of clips and recordings.
        batch: most streams that advance together.
        snapshots: where streams are kept; None keeps none.
    """

    def __init__(
        self,
        models: ServedModels,
        limits: Limits,
        metrics: Metrics,
        store: ClipStore,
        batch: int = 1,
        snapshots: Snapshots | None = None,
    ):
        self.models = models
        self.limits = limits
        self.ready = threading.Event()
        self.failure: str | None = None
        self._metrics = metrics
        self._batch = batch
        self._condition = threading.Condition()
        self._live = LiveStreams(limits, metrics, store, self._condition, snapshots)
        self._waiting: deque[Stream] = deque()
        self._clips = ClipJobs(models, store, metrics)
        self._since_clip = 0
        self._heard_last = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="streamvid-worker", daemon=True)

    # ---- called from other threads

    def start(self) -> None:
        """Begin; ``ready`` is set when the model is warm."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """End all streams cleanly, finish recordings, and wait for the thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether streams can be begun."""
        return self._thread.is_alive() and not self._stopping

    def add_stream(self, stream: Stream) -> None:
        """Give a stream a place, or a place in the queue.

        Raises:
            Busy: if the queue is full, or the server is stopping.
        """
        with self._condition:
            if not self.alive:
                raise Busy("the server is stopping; try again later")
            # streams that came within one chunk wait here too, until there is time to admit them
            places = self.limits.sessions + self.limits.waiting
            if len(self._live.active) + len(self._waiting) >= places:
                raise Busy("all places are taken, and so is the queue; try again later")
            self._waiting.append(stream)
            self._condition.notify()

    def tell(self, stream: Stream, message: protocol.Message) -> bool:
        """Hand on what a viewer asks for; False if too much waits for the end of the chunk."""
        with self._condition:
            if isinstance(message, protocol.SessionStop):
                stream.stopping = True
                self._condition.notify()
                return True
            if len(stream.commands) >= self.limits.commands:
                return False
            stream.commands.append((message, time.monotonic()))
            self._condition.notify()
            return True

    def acknowledge(self, stream: Stream, sequence: int) -> None:
        """The viewer has shown all frames up to ``sequence``."""
        with self._condition:
            waited = stream.flow.must_wait(stream.chunk_frames)
            stream.flow.acknowledge(sequence, time.monotonic())
            if waited:
                self._condition.notify()

    def leave(self, stream: Stream) -> None:
        """The viewer has left: its session is closed within one denoising step."""
        stream.gone = True
        with self._condition:
            self._condition.notify()

    def add_clip(self, clip: Clip) -> None:
        """Queue a clip.

        Raises:
            Busy: if too many wait.
        """
        with self._condition:
            if not self.alive:
                raise Busy("the server is stopping; try again later")
            if self._clips.num_waiting >= self.limits.clips_waiting:
                raise Busy("too many clips wait already; try again later")
            self._clips.add(clip)
            self._condition.notify()

    def wake(self) -> None:
        """Look again, for example because a clip was cancelled."""
        with self._condition:
            self._condition.notify()

    # ---- the thread

    def _run(self) -> None:
        try:
            for model in self.models:
                if model.warm_up is not None:
                    model.warm_up()
            self.ready.set()
            self._metrics.ready.set(1)
            while self._advance():
                pass
        except Exception as error:
            self.failure = one_line(error)
            log.exception("the worker has ended")
        finally:
            self._metrics.ready.set(0)
            self.ready.clear()
            self._stopping = True
            self._end_all()

    def _advance(self) -> bool:
        """One batch or a part of a clip, whatever is due; False when the worker should end."""
        with self._condition:
            if self._stopping:
                return False
            ended = self._departed(time.monotonic())
            self._admit()
            turn, wait_s = (None, 0.0) if ended else self._choose(time.monotonic())
            if turn is None and not ended:
                self._condition.wait(wait_s)  # in the block that has looked: no call is missed
                return True
        for stream, reason in ended:
            self._live.end(stream, reason)
        if turn is None:
            return True
        if turn.streams:
            self._since_clip += len(turn.streams)
            self._serve(turn.streams)
        else:
            self._since_clip = 0
            self._clips.advance()
        return True

    def _departed(self, now: float) -> list[tuple[Stream, str]]:
        """Streams that are over, and why."""
        left = [s for s in self._waiting if s.gone or s.stopping]
        self._waiting = deque(s for s in self._waiting if s not in left)
        ended = [(stream, "stopped") for stream in left]
        for stream in self._live.active:
            idle = stream.paused_since or (
                stream.flow.heard if stream.flow.must_wait(stream.chunk_frames) else None
            )
            limit = self.limits.session_seconds
            if stream.gone or stream.stopping:
                ended.append((stream, "stopped"))
            elif idle is not None and now - idle > self.limits.idle_seconds:
                ended.append((stream, "idle"))
            elif limit is not None and now - stream.begun > limit:
                ended.append((stream, "time_limit"))
        return ended

    def _admit(self) -> None:
        while self._waiting and len(self._live.active) < self.limits.sessions:
            stream = self._waiting.popleft()
            stream.begun = time.monotonic()
            self._live.active.append(stream)
        for position, stream in enumerate(self._waiting, 1):
            if stream.place != position:
                stream.place = position
                stream.outbox.put(protocol.SessionQueued(position=position))
        self._metrics.sessions.set(len(self._live.active))
        self._metrics.waiting.set(len(self._waiting))

    def _choose(self, now: float) -> tuple[Turn | None, float | None]:
        """What to do now, or how long to wait for the next thing to do."""
        dues = self._dues(now)
        first = most_urgent(dues, now)
        asking = [stream for stream in self._live.active if stream.commands]
        self._heard_last = bool(asking) and not (self._heard_last and first is not None)
        if self._heard_last:  # one viewer between two chunks, so that none is held up by many
            return Turn((min(asking, key=lambda stream: stream.commands[0][1]),)), None
        if self._clips and (first is None or self._since_clip >= LIVE_PER_CLIP):
            return Turn(), None
        if first is not None:
            return Turn((first, *self._companions(first, dues, now))), None
        wait_s = 1.0 if self._live.active else None
        return None, wait_s if not dues else min(1.0, min(dues.values()) - now)

    def _dues(self, now: float) -> dict[Stream, float]:
        """When the next chunk of each stream that goes on should be begun."""
        running = [stream for stream in self._live.active if stream.may_advance]
        return {stream: stream.due(now, len(running)) for stream in running}

    def _companions(self, first: Stream, dues: dict[Stream, float], now: float) -> list[Stream]:
        """Streams that advance with the first one: those of its shape whose chunks would fall due
        while the batch is made, and so would have to wait without it.
        """
        if first.session is None:
            return []
        companions: list[Stream] = []
        ready_at = now + first.pacer.work_s
        for stream, due in sorted(dues.items(), key=lambda item: item[1]):
            fits = stream.shape == first.shape and not stream.outbox.is_full
            if stream is first or not fits:
                continue
            if due > ready_at or len(companions) + 1 >= self._batch:
                break
            companions.append(stream)
            ready_at += stream.pacer.work_s
        return companions

    def _serve(self, streams: tuple[Stream, ...]) -> None:
        """Do what the streams' viewers asked, then make a chunk of each, if the first is the most
        urgent one: who asks much is not served before the others.
        """
        prepared = [stream for stream in streams if self._live.prepare(stream)]
        running = [stream for stream in prepared if stream.may_advance]
        now = time.monotonic()
        if streams[0] in running and most_urgent(self._dues(now), now) is streams[0]:
            self._live.advance(running)

    def _end_all(self) -> None:
        self._live.stopping = True
        for stream in [*self._live.active, *self._waiting]:
            self._live.end(stream, "server_stopping")
        self._live.active.clear()
        self._waiting.clear()
        self._clips.stop()


def most_urgent(dues: Mapping[Stream, float], now: float) -> Stream | None:
    """Of the streams whose next chunk is due, the one whose viewer has the least left to play.

    Under too much work that is the one that has waited longest, so nobody starves.

    Args:
        dues: when the next chunk of each should be begun.
    """
    due = [stream for stream, when in dues.items() if when <= now]
    return min(due, key=lambda stream: stream.deadline(now), default=None)
