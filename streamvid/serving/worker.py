"""The thread that owns the model.

Everything that touches the model happens in one thread: it takes the live stream whose next chunk
is due first, applies what its viewer asked for meanwhile, makes the chunk and puts it into the
stream's outbox. Clips of ``POST /v1/videos`` use the time in between.

A viewer that has left is noticed between the student's forwards, by a hook on the transformer, so
within one denoising step, and its session is closed at once. An error ends the stream that it
happened in, with a message; the others go on.
"""

from __future__ import annotations

import logging
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from streamvid.command_line import is_out_of_memory
from streamvid.printing import one_line
from streamvid.serving import protocol
from streamvid.serving.limits import Limits
from streamvid.serving.metrics import Metrics
from streamvid.serving.pacing import percentile_ms
from streamvid.serving.recording import Clip, ClipStore, Recorder
from streamvid.serving.stream import Frames, Stream, say_after, script_text

log = logging.getLogger(__name__)

LIVE_PER_CLIP = 8
"""After so many chunks of live streams a waiting clip gets one, even if none has time."""
METRICS_EVERY_S = 1.0
CPU = torch.device("cpu")


class Busy(Exception):
    """There is no place, not even to wait."""


class ViewerGone(Exception):
    """Raised inside a chunk that nobody waits for any more."""


class Worker:
    """Advances live streams and clips, one chunk at a time.

    Args:
        open_session: ``open_session(prompt, seed=, height=, width=, steps=)`` gives a session.
        limits: of the server.
        metrics: that are kept up to date.
        store: of clips and recordings.
        model: its name.
        watched: a module whose every forward checks that someone still waits for it.
        warm_up: called first, in the worker's thread.
        device: of the model.
        options: of `streamvid sample`, which open the same model there.
    """

    def __init__(
        self,
        open_session: Callable[..., Any],
        limits: Limits,
        metrics: Metrics,
        store: ClipStore,
        model: str = "student",
        watched: torch.nn.Module | None = None,
        warm_up: Callable[[], None] | None = None,
        device: torch.device = CPU,
        options: Sequence[str] = (),
    ):
        self.limits = limits
        self.ready = threading.Event()
        self.failure: str | None = None
        self._open_session = open_session
        self._metrics = metrics
        self._store = store
        self._model = model
        self._warm_up = warm_up
        self._device = device
        self._options = options
        self._condition = threading.Condition()
        self._active: list[Stream] = []
        self._waiting: deque[Stream] = deque()
        self._clips: deque[Clip] = deque()
        self._job: tuple[Clip, Any, Recorder] | None = None
        self._current: Stream | Clip | None = None
        self._since_clip = 0
        self._heard_last = False
        self._stopping = False
        self._hook = watched.register_forward_pre_hook(self._check_current) if watched else None
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
            if len(self._active) + len(self._waiting) >= self.limits.sessions + self.limits.waiting:
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
            if len(self._clips) >= self.limits.clips_waiting:
                raise Busy("too many clips wait already; try again later")
            self._store.add(clip)
            self._clips.append(clip)
            self._metrics.clips_waiting.set(len(self._clips))
            self._condition.notify()

    def wake(self) -> None:
        """Look again, for example because a clip was cancelled."""
        with self._condition:
            self._condition.notify()

    # ---- the thread

    def _run(self) -> None:
        try:
            if self._warm_up is not None:
                self._warm_up()
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
            if self._hook is not None:
                self._hook.remove()

    def _advance(self) -> bool:
        """One chunk of whatever is due; False when the worker should end."""
        with self._condition:
            if self._stopping:
                return False
            ended = self._departed(time.monotonic())
            self._admit()
            task, wait_s = (None, 0) if ended else self._choose(time.monotonic())
            if task is None and not ended:
                self._condition.wait(wait_s)  # in the block that has looked: no call is missed
                return True
        for stream, reason in ended:
            self._end(stream, reason)
        if task is None:
            return True
        if isinstance(task, Stream):
            self._since_clip += 1
            self._serve(task)
        else:
            self._since_clip = 0
            self._advance_clip()
        return True

    def _departed(self, now: float) -> list[tuple[Stream, str]]:
        """Streams that are over, and why."""
        left = [s for s in self._waiting if s.gone or s.stopping]
        self._waiting = deque(s for s in self._waiting if s not in left)
        ended = [(stream, "stopped") for stream in left]
        for stream in self._active:
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
        while self._waiting and len(self._active) < self.limits.sessions:
            stream = self._waiting.popleft()
            stream.begun = time.monotonic()
            self._active.append(stream)
        for position, stream in enumerate(self._waiting, 1):
            if stream.place != position:
                stream.place = position
                stream.outbox.put(protocol.SessionQueued(position=position))
        self._metrics.sessions.set(len(self._active))
        self._metrics.waiting.set(len(self._waiting))

    def _choose(self, now: float) -> tuple[Stream | str | None, float | None]:
        """What to do now, or how long to wait for the next thing to do."""
        first = self._most_urgent(now)
        asking = [s for s in self._active if s.commands]
        self._heard_last = bool(asking) and not (self._heard_last and first is not None)
        if self._heard_last:  # one viewer between two chunks, so that none is held up by many
            return min(asking, key=lambda stream: stream.commands[0][1]), None
        clip = bool(self._clips or self._job)
        if clip and (first is None or self._since_clip >= LIVE_PER_CLIP):
            return "clip", None
        if first is not None:
            return first, None
        dues = self._dues(now).values()
        wait_s = 1.0 if self._active else None
        return None, wait_s if not dues else min(1.0, min(dues) - now)

    def _dues(self, now: float) -> dict[Stream, float]:
        """When the next chunk of each stream that goes on should be begun."""
        running = [s for s in self._active if s.may_advance]
        return {s: s.due(now, len(running)) for s in running}

    def _most_urgent(self, now: float) -> Stream | None:
        """Of the streams whose next chunk is due, the one whose viewer has the least left to play.

        Under too much work that is the one that has waited longest, so nobody starves.
        """
        due = [stream for stream, when in self._dues(now).items() if when <= now]
        return min(due, key=lambda stream: stream.deadline(now), default=None)

    def _check_current(self, *_: Any) -> None:
        """Before each forward of the student: does anyone still wait for it?"""
        task = self._current
        if isinstance(task, Stream) and task.gone or isinstance(task, Clip) and task.cancelled:
            raise ViewerGone

    # ---- live streams

    def _serve(self, stream: Stream) -> None:
        """Apply what was asked, then make a chunk if one is due; errors end the stream."""
        self._current = stream
        try:
            if stream.session is None:
                self._begin(stream)
            self._apply_commands(stream)
            if self._most_urgent(time.monotonic()) is stream:  # who asks much is not served first
                self._make_chunk(stream)
                self._count_caches()
        except ViewerGone:
            self._end(stream, "stopped")
        except Exception as error:
            self._fail(stream, error)
        finally:
            self._current = None

    def _begin(self, stream: Stream) -> None:
        stream.session = self._open(stream)
        self._metrics.started.inc()
        stream.outbox.put(
            protocol.VideoStart(
                session_id=stream.id,
                model=self._model,
                height=stream.height,
                width=stream.width,
                fps=stream.fps,
                format=stream.start.format,
                prompt=stream.prompt,
                seed=stream.seed,
                steps=stream.session.steps,
            )
        )

    def _open(self, stream: Stream) -> Any:
        session = self._open_session(
            stream.prompt,
            seed=stream.seed,
            height=stream.height,
            width=stream.width,
            steps=stream.steps,
        )
        if stream.hold_rate:
            session.hold_rate(stream.fps)
        return session

    def _make_chunk(self, stream: Stream) -> None:
        started = time.monotonic()
        chunk = stream.session.next_chunk()
        images = chunk.images
        now = time.monotonic()
        num_frames, work_s = len(images), now - started
        late_s = stream.pacer.made(now, num_frames, work_s)
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
        if stream.recorder is not None:
            self._record(stream, images)
        if now - stream.measured >= METRICS_EVERY_S:
            stream.measured = now
            stream.outbox.put(self._levels(stream))
        wanted = stream.start.num_frames
        if wanted is not None and stream.sequence >= wanted:
            self._end(stream, "finished")

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

    def _count_caches(self) -> None:
        self._metrics.cache_bytes.set(sum(stream.cache_bytes for stream in self._active))

    def _drop(self, stream: Stream, num_frames: int) -> None:
        stream.dropped += num_frames
        self._metrics.frames_dropped.inc(num_frames)

    def _levels(self, stream: Stream) -> protocol.Levels:
        level = stream.level
        memory = None
        if self._device.type == "cuda":
            memory = torch.cuda.memory_allocated(self._device) / 2**20
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
            sessions=len(self._active),
            memory_mb=memory,
        )

    # ---- what viewers ask for

    def _apply_commands(self, stream: Stream) -> None:
        """All that has come since the last chunk, in order; the session keeps the last prompt."""
        with self._condition:
            commands = list(stream.commands)
            stream.commands.clear()
        for message, came in commands:
            try:
                self._apply(stream, message, came)
            except ValueError as error:
                self._tell_error(stream, "bad_request", one_line(error))

    def _apply(self, stream: Stream, message: protocol.Message, came: float) -> None:
        match message:
            case protocol.PromptUpdate():
                stream.session.switch_prompt(
                    message.prompt,
                    mode=message.mode,
                    blend_chunks=message.blend_chunks,
                    keep_sink=message.keep_sink,
                )
                stream.prompt = message.prompt
                stream.prompt_id += 1
                stream.switched_at = came
                stream.switch_mode = message.mode
            case protocol.SessionUpdate():
                self._update(stream, message)
            case protocol.SessionPause():
                if stream.paused_since is None:
                    stream.paused_since = time.monotonic()
                    stream.level.interrupt()
                stream.outbox.put(protocol.SessionPaused())
            case protocol.SessionResume():
                stream.paused_since = None
                stream.pacer.restart()
                stream.outbox.put(protocol.SessionResumed())
            case protocol.SessionReset():
                self._reset(stream, message)
            case protocol.SessionBookmark():
                self._bookmark(stream)
            case protocol.SessionBranch():
                self._branch(stream, message.bookmark)
            case protocol.RecordStart():
                self._start_recording(stream, message)
            case protocol.RecordStop():
                self._stop_recording(stream)
            case protocol.ScriptGet():
                stream.outbox.put(
                    protocol.ScriptText(
                        script=stream.script, command=self._command("mp4", stream.fps)
                    )
                )

    def _update(self, stream: Stream, message: protocol.SessionUpdate) -> None:
        if message.steps is not None:
            stream.session.set_steps(message.steps)
            stream.steps, stream.hold_rate = message.steps, False
        if message.seed is not None:
            stream.session.set_seed(message.seed)
            stream.seed = message.seed
        if message.fps is not None:
            stream.fps = stream.pacer.fps = stream.flow.fps = message.fps
        if message.hold_rate is not None:
            stream.hold_rate = message.hold_rate
        if message.hold_rate is not None or (message.fps is not None and stream.hold_rate):
            stream.session.hold_rate(stream.fps if stream.hold_rate else None)
        stream.outbox.put(
            protocol.SettingsApplied(
                seed=stream.seed,
                steps=stream.session.steps,
                fps=stream.fps,
                hold_rate=stream.hold_rate,
            )
        )

    def _reset(self, stream: Stream, message: protocol.SessionReset) -> None:
        old = {"prompt": stream.prompt, "seed": stream.seed, "steps": stream.steps}
        for name in old:
            if getattr(message, name) is not None:
                setattr(stream, name, getattr(message, name))
        try:
            session = self._open(stream)
        except Exception:
            for name, value in old.items():
                setattr(stream, name, value)
            raise
        self._replace_session(stream, session)
        self._restarted(stream, None)

    def _replace_session(self, stream: Stream, session: Any) -> None:
        """A recording ends here: one script can't make what comes before and after."""
        if stream.recorder is not None:
            self._stop_recording(stream)
        stream.session.close()
        stream.session = session

    def _restarted(self, stream: Stream, bookmark: int | None) -> None:
        stream.prompt_id += 1
        stream.switched_at = None
        stream.paused_since = None
        stream.pacer.restart()
        stream.level.interrupt()
        stream.outbox.put(
            protocol.SessionRestarted(
                bookmark=bookmark,
                prompt=stream.prompt,
                prompt_id=stream.prompt_id,
                seed=stream.seed,
                steps=stream.session.steps,
                chunk=stream.session.index,
            )
        )

    def _bookmark(self, stream: Stream) -> None:
        if len(stream.bookmarks) >= self.limits.bookmarks:
            oldest = min(stream.bookmarks)
            stream.bookmarks.pop(oldest)[0].close()
        number = max(stream.bookmarks, default=-1) + 1
        settings = {
            name: getattr(stream, name) for name in ("prompt", "seed", "steps", "hold_rate")
        }
        stream.bookmarks[number] = (stream.session.branch(), settings)
        stream.outbox.put(
            protocol.BookmarkMade(
                bookmark=number, chunk=stream.session.index, sequence=stream.sequence
            )
        )

    def _branch(self, stream: Stream, number: int) -> None:
        if number not in stream.bookmarks:
            raise ValueError(f"there is no bookmark {number}; it may have made room for newer ones")
        kept, settings = stream.bookmarks[number]
        session = kept.branch()
        self._replace_session(stream, session)
        for name, value in settings.items():
            setattr(stream, name, value)
        self._restarted(stream, number)

    def _command(self, container: str, fps: float, first_chunk: int = 0) -> str:
        return command_line(container, fps, first_chunk, self._options, self._device)

    # ---- recordings

    def _start_recording(self, stream: Stream, message: protocol.RecordStart) -> None:
        if stream.recorder is not None:
            raise ValueError("the stream is being recorded already; stop that recording first")
        clip = Clip(
            prompt=stream.prompt,
            model=self._model,
            height=stream.height,
            width=stream.width,
            fps=stream.fps,
            format=message.format,
            seed=stream.seed,
            steps=stream.session.steps,
            kind="recording",
            status="in_progress",
        )
        first_chunk = stream.session.index
        self._store.add(clip)
        stream.recorder = Recorder(
            clip,
            self._store.path(clip),
            lambda error: self._recorded(stream, clip, first_chunk, error),
            first_chunk,
        )
        stream.outbox.put(protocol.RecordStarted(id=clip.id))

    def _record(self, stream: Stream, images: np.ndarray) -> None:
        recorder = stream.recorder
        recorder.append(images)
        too_long = recorder.num_frames >= self.limits.record_seconds * recorder.clip.fps
        if recorder.failed or too_long:
            self._stop_recording(stream)

    def _stop_recording(self, stream: Stream) -> None:
        recorder = stream.recorder
        if recorder is None:
            raise ValueError("the stream is not being recorded")
        stream.recorder = None
        clip = recorder.clip
        clip.num_frames = recorder.num_frames
        clip.script = stream.script
        clip.command = self._command(clip.format, clip.fps, recorder.first_chunk)
        recorder.finish({"title": clip.prompt, "comment": clip.script})
        stream.finishing.append(recorder)

    def _recorded(self, stream: Stream, clip: Clip, first_chunk: int, error: str | None) -> None:
        """In the recorder's thread: the file is complete, or there is none."""
        if clip.cancelled and not error:
            self._store.remove(clip)
            error = "it was deleted"
        clip.completed_at = int(time.time())
        clip.progress = 100
        clip.status = "failed" if error else "completed"
        clip.error = error
        if error:
            self._tell_error(stream, "record_failed", f"the recording was lost: {error}")
            return
        stream.outbox.put(
            protocol.RecordDone(
                id=clip.id,
                url=f"/v1/videos/{clip.id}/content",
                frames=clip.num_frames,
                format=clip.format,
                first_chunk=first_chunk,
                script=clip.script,
                command=clip.command,
            )
        )

    # ---- ends

    def _fail(self, stream: Stream, error: Exception) -> None:
        code, message = explain(error)
        if code == "internal":
            log.error("a stream has failed", exc_info=error)
        self._tell_error(stream, code, message)
        self._end(stream, "error")
        if code == "out_of_memory" and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _tell_error(self, stream: Stream, code: str, message: str) -> None:
        self._metrics.errors.labels(code).inc()
        retryable = code in ("out_of_memory", "internal")
        stream.outbox.put(protocol.Error(code=code, message=message, retryable=retryable))

    def _end(self, stream: Stream, reason: str) -> None:
        """Free what a stream holds; its recording is finished."""
        if stream.ended.is_set():
            return
        stream.ended.set()
        if stream.recorder is not None:
            self._stop_recording(stream)
        for session, _ in stream.bookmarks.values():
            session.close()
        stream.bookmarks.clear()
        if stream.session is not None:
            stream.session.close()
            stream.session = None
        with self._condition:
            if stream in self._active:
                self._active.remove(stream)
        self._metrics.sessions.set(len(self._active))
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
        elif self._stopping:
            say_after(stream, done)
        else:  # the others need not wait for the disk
            threading.Thread(target=say_after, args=(stream, done), daemon=True).start()

    def _end_all(self) -> None:
        for stream in [*self._active, *self._waiting]:
            self._end(stream, "server_stopping")
        self._active.clear()
        self._waiting.clear()
        if self._job is not None:
            self._fail_clip("the server was stopped")
        for clip in self._clips:
            clip.status, clip.error = "failed", "the server was stopped"

    # ---- clips

    def _advance_clip(self) -> None:
        """One chunk of the clip under way, or the beginning of the next."""
        if self._job is None:
            self._begin_clip()
            return
        clip, session, recorder = self._job
        self._current = clip
        try:
            chunk = session.next_chunk()
            images = chunk.images[: clip.num_frames - recorder.num_frames]
            recorder.append(images, wait=True)
            self._metrics.chunks.labels("clip").inc()
            clip.progress = min(99, 100 * recorder.num_frames // clip.num_frames)
            if recorder.failed:
                self._fail_clip("the file could not be written")
            elif recorder.num_frames >= clip.num_frames:
                self._job = None
                recorder.finish({"title": clip.prompt, "comment": script_text(session)})
                session.close()
        except ViewerGone:
            self._fail_clip("given up")
        except Exception as error:
            code, message = explain(error)
            if code == "internal":
                log.error("a clip has failed", exc_info=error)
            self._metrics.errors.labels(code).inc()
            self._fail_clip(message)
        finally:
            self._current = None

    def _begin_clip(self) -> None:
        with self._condition:
            clip = self._clips.popleft()
            self._metrics.clips_waiting.set(len(self._clips))
        if clip.cancelled:
            return
        clip.status = "in_progress"
        try:
            session = self._open_session(
                clip.prompt, seed=clip.seed, height=clip.height, width=clip.width, steps=clip.steps
            )
        except Exception as error:
            clip.status, clip.error = "failed", explain(error)[1]
            clip.completed_at = int(time.time())
            return

        def done(error: str | None) -> None:
            clip.completed_at = int(time.time())
            clip.error = clip.error or error
            clip.status = "failed" if clip.error else "completed"
            clip.progress = 0 if clip.error else 100
            if clip.cancelled:
                self._store.remove(clip)

        self._job = clip, session, Recorder(clip, self._store.path(clip), done)

    def _fail_clip(self, message: str) -> None:
        clip, session, recorder = self._job
        self._job = None
        clip.error = message
        recorder.give_up()
        session.close()


def command_line(
    container: str, fps: float, first_chunk: int, options: Sequence[str], device: torch.device
) -> str:
    """Makes a stream from ``first_chunk`` on again, bit for bit, from its script, which holds
    prompts, seed, size and steps. On a CPU sums depend on the number of threads.
    """
    words = ["streamvid", "sample", "--script", "stream.yaml", *options]
    if first_chunk:
        words += ["--first-chunk", str(first_chunk)]
    words += ["--fps", f"{fps:g}", "--out", f"clip.{container}"]
    threads = f"OMP_NUM_THREADS={torch.get_num_threads()} " if device.type == "cpu" else ""
    return threads + shlex.join(words)


def explain(error: Exception) -> tuple[str, str]:
    """A code and one line for a client; of errors that are ours it says no more than that."""
    if is_out_of_memory(error):
        return "out_of_memory", "there is not enough memory; try a smaller size, or later"
    if isinstance(error, ValueError):
        return "bad_request", one_line(error)
    return "internal", "the model failed on this stream; start it again"
