"""Live streams: how they begin, how their chunks are made and told, and how they end.

All of it happens in the worker's thread. Streams that are due together advance as one batch. A
viewer that has left is noticed between the student's calls, so within one denoising step. An error
ends the stream that it happened in, with a message; the others go on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from streamvid.printing import one_line
from streamvid.serving import protocol
from streamvid.serving.errors import ViewerGone, explain
from streamvid.serving.fmp4 import check_h264
from streamvid.serving.limits import Limits
from streamvid.serving.metrics import Metrics
from streamvid.serving.pacing import percentile_ms
from streamvid.serving.planning import plan, take_planned
from streamvid.serving.recording import ClipStore
from streamvid.serving.snapshots import Snapshots
from streamvid.serving.steering import Steering
from streamvid.serving.stream import Frames, Stream, say_after
from streamvid.students.batch import Batch

log = logging.getLogger(__name__)

METRICS_EVERY_S = 1.0


class LiveStreams:
    """Streams that have a place, and what is done with them.

    Args:
        limits: of the server.
        metrics: that are kept up to date.
        store: of recordings.
        lock: of what other threads see, the streams and their commands.
        snapshots: where streams are kept; None keeps none.
    """

    def __init__(
        self,
        limits: Limits,
        metrics: Metrics,
        store: ClipStore,
        lock: threading.Condition,
        snapshots: Snapshots | None = None,
    ) -> None:
        self.active: list[Stream] = []
        self.stopping = False
        """Whether the server is; ends wait for recordings then."""
        self._limits = limits
        self._metrics = metrics
        self._lock = lock
        self._steering = Steering(limits, store, self._tell_error, snapshots)

    def prepare(self, stream: Stream) -> bool:
        """Begin a stream that has not begun, and do what its viewer asked for meanwhile; False if
        that ended it.
        """
        try:
            if stream.session is None:
                self._begin(stream)
            self._apply_commands(stream)
        except Exception as error:
            self._fail(stream, error)
        return not stream.ended.is_set()

    def advance(self, streams: Sequence[Stream]) -> None:
        """Make a chunk of each, as one batch where their shapes agree."""
        started = time.monotonic()
        of_session = {stream.session: stream for stream in streams}
        batch = Batch(list(of_session), lambda session: check_watched(of_session[session]))
        size = len(batch)
        self._metrics.batch_streams.observe(size)
        while batch:
            for session, outcome in batch.step():
                self._receive(of_session[session], outcome, started, size)

    def _receive(self, stream: Stream, outcome: Any, started: float, size: int) -> None:
        try:
            if isinstance(outcome, Exception):
                raise outcome
            self._deliver(stream, outcome, started, size)
        except ViewerGone:
            self.end(stream, "stopped")
        except Exception as error:
            self._fail(stream, error)

    def _begin(self, stream: Stream) -> None:
        self._steering.open(stream)
        if stream.start.format == "h264":
            check_h264(stream.height, stream.width)
        self._metrics.started.inc()
        stream.outbox.put(
            protocol.VideoStart(
                session_id=stream.id,
                model=stream.model.id,
                height=stream.height,
                width=stream.width,
                fps=stream.fps,
                format=stream.start.format,
                prompt=stream.prompt,
                seed=stream.seed,
                steps=stream.session.steps,
                chunk=stream.session.index,
            )
        )

    def _deliver(self, stream: Stream, chunk: Any, started: float, size: int) -> None:
        """Put a chunk on its way to the viewer, with what is to be told of it.

        Args:
            started: when it was begun, with those of other streams that it was made with.
            size: streams in that batch.
        """
        images = chunk.images
        now = time.monotonic()
        num_frames, work_s = len(images), now - started
        late_s = stream.pacer.made(now, num_frames, work_s / size)
        stream.level.add(now, num_frames, work_s, late_s)
        stream.chunk_frames = num_frames
        self._metrics.chunks.labels("live").inc()
        self._metrics.chunk_seconds.observe(work_s)
        self._metrics.deadlines_missed.inc(late_s > 0)
        if stream.chunks == 0:
            self._metrics.first_chunk_seconds.observe(stream.level.first_s)
        self._announce(stream, chunk, num_frames, work_s, late_s, now)
        frames = Frames(
            images,
            stream.sequence,
            chunk.index,
            stream.prompt_id,
            int(1e6 * work_s),
            time.time_ns() // 1000,
            stream.switched_at is not None,
        )
        stream.switched_at = None
        stream.sequence += num_frames
        stream.chunks += 1
        self._drop(stream, stream.outbox.put(frames))
        self._steering.record(stream, images)
        self._steering.autosave(stream)
        if now - stream.measured >= METRICS_EVERY_S:
            stream.measured = now
            self._count_caches()
            stream.outbox.put(self._levels(stream))
        wanted = stream.start.num_frames
        if wanted is not None and stream.sequence >= wanted:
            self.end(stream, "finished")

    def _announce(
        self, stream: Stream, chunk: Any, num_frames: int, work_s: float, late_s: float, now: float
    ) -> None:
        if stream.switched_at is not None:
            latency_s = now - stream.switched_at
            self._metrics.switch_seconds.observe(latency_s)
            stream.outbox.put(
                protocol.PromptApplied(
                    prompt_id=stream.prompt_id,
                    prompt=stream.prompt,
                    mode=stream.switch_mode,
                    chunk=chunk.index,
                    sequence=stream.sequence,
                    latency_ms=1000 * latency_s,
                )
            )
        stream.outbox.put(
            protocol.VideoChunk(
                chunk=chunk.index,
                sequence=stream.sequence,
                frames=num_frames,
                prompt_id=stream.prompt_id,
                seed=stream.seed,
                steps=chunk.steps,
                compute_ms=1000 * work_s,
                late_ms=1000 * late_s,
                dropped=stream.dropped,
            )
        )

    def _drop(self, stream: Stream, num_frames: int) -> None:
        stream.dropped += num_frames
        self._metrics.frames_dropped.inc(num_frames)

    def _levels(self, stream: Stream) -> protocol.Levels:
        level = stream.level
        memory = None
        if stream.model.device.type == "cuda":
            memory = torch.cuda.memory_allocated(stream.model.device) / 2**20
        return protocol.Levels(
            chunks=level.chunks,
            first_chunk_ms=1000 * level.first_s,
            compute_p50_ms=percentile_ms(level.work, 50),
            compute_p95_ms=percentile_ms(level.work, 95),
            interval_p50_ms=percentile_ms(level.intervals, 50),
            interval_p95_ms=percentile_ms(level.intervals, 95),
            interval_p99_ms=percentile_ms(level.intervals, 99),
            deadlines_met=level.deadlines_met,
            stall_ms=1000 * level.stall_s,
            frames_per_second=level.frames_per_second,
            dropped=stream.dropped,
            sessions=len(self.active),
            memory_mb=memory,
        )

    def _count_caches(self) -> None:
        """Measure the memory of all caches."""
        self._metrics.cache_bytes.set(sum(stream.cache_bytes for stream in self.active))

    def _apply_commands(self, stream: Stream) -> None:
        """What was planned for the next chunk, then all that has come since the last one, in order;
        the session keeps the last prompt.
        """
        with self._lock:
            commands = [*take_planned(stream), *stream.commands]
            stream.commands.clear()
        for message, came in commands:
            try:
                if not plan(stream, message, self._limits):
                    self._steering.apply(stream, message, came)
            except ValueError as error:
                self._tell_error(stream, "bad_request", one_line(error))

    # ---- ends

    def _fail(self, stream: Stream, error: Exception) -> None:
        code, message = explain(error)
        if code == "internal":
            log.error("a stream has failed", exc_info=error)
        self._tell_error(stream, code, message)
        self.end(stream, "error")
        if code == "out_of_memory" and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _tell_error(self, stream: Stream, code: str, message: str) -> None:
        self._metrics.errors.labels(code).inc()
        retryable = code in ("out_of_memory", "internal")
        stream.outbox.put(protocol.Error(code=code, message=message, retryable=retryable))

    def end(self, stream: Stream, reason: str) -> None:
        """Free what a stream holds; its recording is finished."""
        if stream.ended.is_set():
            return
        stream.ended.set()
        if stream.recorder is not None:
            self._steering.stop_recording(stream)
        for session, _ in stream.bookmarks.values():
            session.close()
        stream.bookmarks.clear()
        if stream.session is not None:
            stream.session.close()
            stream.session = None
        with self._lock:
            if stream in self.active:
                self.active.remove(stream)
        self._metrics.sessions.set(len(self.active))
        self._count_caches()
        self._metrics.ended.labels("gone" if stream.gone else reason).inc()
        done = protocol.SessionDone(
            session_id=stream.id,
            reason=reason,
            chunks=stream.chunks,
            frames=stream.sequence,
            stopped=reason == "stopped",
        )
        if not stream.finishing:
            stream.outbox.put(done)
        elif self.stopping:
            say_after(stream, done)
        else:  # the others need not wait for the disk
            threading.Thread(target=say_after, args=(stream, done), daemon=True).start()


def check_watched(stream: Stream) -> None:
    """Raise ``ViewerGone`` if nobody waits for a stream any more."""
    if stream.gone:
        raise ViewerGone
