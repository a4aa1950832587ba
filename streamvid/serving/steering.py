"""What viewers ask of their streams: changes, bookmarks and recordings.

All of it happens in the worker's thread, between two chunks of the stream.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from streamvid.files import disk_full
from streamvid.serving import protocol
from streamvid.serving.limits import Limits
from streamvid.serving.recording import Clip, ClipStore, Recorder
from streamvid.serving.snapshots import Snapshots
from streamvid.serving.stream import Stream

NO_SNAPSHOTS = "this server keeps no snapshots; it was started without --state"

TellError = Callable[[Stream, str, str], None]


class Steering:
    """Does what the messages of a viewer ask for.

    Args:
        limits: of the server.
        store: of recordings.
        tell_error: ``tell_error(stream, code, message)``, also from a recorder's thread.
        snapshots: where streams are kept; None keeps none.
    """

    def __init__(
        self,
        limits: Limits,
        store: ClipStore,
        tell_error: TellError,
        snapshots: Snapshots | None = None,
    ) -> None:
        self._limits = limits
        self._store = store
        self._tell_error = tell_error
        self._snapshots = snapshots

    def open(self, stream: Stream) -> None:
        """Give a stream its session, a new one or that of a snapshot.

        Raises:
            ValueError: for what can't be.
        """
        if stream.start.snapshot is None:
            stream.session = open_session(stream)
            return
        if self._snapshots is None or stream.model.restore is None:
            raise ValueError(NO_SNAPSHOTS)
        session, stream.start_file = self._snapshots.open(
            stream.start.snapshot, stream.model.restore
        )
        stream.session, script = session, session.script
        self._limits.check_size(script.height, script.width)
        stream.height, stream.width = script.height, script.width
        stream.prompt, stream.seed, stream.steps = session.prompt, session.seed, session.asked_steps
        session.hold_rate(stream.fps if stream.hold_rate else None)

    def apply(self, stream: Stream, message: protocol.Message, came: float) -> None:
        """Do what a message asks for.

        Args:
            came: when it came, in monotonic seconds.

        Raises:
            ValueError: for what can't be; the stream is as it was.
        """
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
                self._bookmark(stream, message.automatic)
            case protocol.SessionBranch():
                self._branch(stream, message.bookmark)
            case protocol.SessionSnapshot():
                self._snapshot(stream, autosave=False)
            case protocol.RecordStart():
                self._start_recording(stream, message)
            case protocol.RecordStop():
                self.stop_recording(stream)
            case protocol.ScriptGet():
                stream.outbox.put(
                    protocol.ScriptText(
                        script=stream.script, command=self._command(stream, "mp4", stream.fps)
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
                chunk=stream.session.index,
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
            session = open_session(stream)
        except Exception:
            for name, value in old.items():
                setattr(stream, name, value)
            raise
        self._replace_session(stream, session)
        self._restarted(stream, None)

    def _replace_session(self, stream: Stream, session: Any) -> None:
        """A recording ends here: one script can't make what comes before and after."""
        if stream.recorder is not None:
            self.stop_recording(stream)
        stream.session.close()
        stream.session = session
        stream.planned.clear()

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

    def _bookmark(self, stream: Stream, automatic: bool) -> None:
        if len(stream.bookmarks) >= self._limits.bookmarks:
            oldest = min(stream.automatic_bookmarks or stream.bookmarks)
            stream.automatic_bookmarks.discard(oldest)
            stream.bookmarks.pop(oldest)[0].close()
        number = max(stream.bookmarks, default=-1) + 1
        settings = {
            name: getattr(stream, name) for name in ("prompt", "seed", "steps", "hold_rate")
        }
        stream.bookmarks[number] = (stream.session.branch(), settings)
        if automatic:
            stream.automatic_bookmarks.add(number)
        stream.outbox.put(
            protocol.BookmarkMade(
                bookmark=number,
                chunk=stream.session.index,
                sequence=stream.sequence,
                automatic=automatic,
                kept=sorted(stream.bookmarks),
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

    def _command(self, stream: Stream, container: str, fps: float, first_chunk: int = 0) -> str:
        options = [*stream.model.options]
        if stream.start_file is not None:
            options += ["--start", stream.start_file.name]
        return command_line(container, fps, first_chunk, options, stream.model.device)

    # ---- snapshots

    def autosave(self, stream: Stream) -> None:
        """Keep a stream if that is due."""
        if self._snapshots is not None and self._snapshots.is_due(stream.chunks):
            self._snapshot(stream, autosave=True)

    def _snapshot(self, stream: Stream, autosave: bool) -> None:
        """Keep a stream; a disk that does not take it does not end the stream."""
        if self._snapshots is None:
            raise ValueError(NO_SNAPSHOTS)
        snapshot_id = self._snapshots.new_id()
        if autosave:
            stream.autosave_id = snapshot_id = stream.autosave_id or snapshot_id
        try:
            self._snapshots.save(snapshot_id, stream.session, stream.start_file)
        except OSError as error:
            reason = disk_full(error) or "the disk did not take it"
            self._tell_error(stream, "snapshot_failed", f"the stream was not kept: {reason}")
            return
        stream.outbox.put(
            protocol.SnapshotMade(
                id=snapshot_id,
                chunk=stream.session.index,
                sequence=stream.sequence,
                autosave=autosave,
            )
        )

    # ---- recordings

    def _start_recording(self, stream: Stream, message: protocol.RecordStart) -> None:
        if stream.recorder is not None:
            raise ValueError("the stream is being recorded already; stop that recording first")
        clip = Clip(
            prompt=stream.prompt,
            model=stream.model.id,
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
        if stream.start_file is not None:
            try:
                self._store.keep_start(clip, stream.start_file)
            except OSError as error:
                reason = disk_full(error) or "the disk does not take it"
                raise ValueError(f"nothing is recorded: {reason}") from error
        self._store.add(clip)
        stream.recorder = Recorder(
            clip,
            self._store.path(clip),
            lambda error: self._recorded(stream, clip, first_chunk, error),
            first_chunk,
        )
        stream.outbox.put(protocol.RecordStarted(id=clip.id))

    def record(self, stream: Stream, images: np.ndarray) -> None:
        """Put a chunk ``[T, H, W, 3]`` into the recording, if there is one."""
        recorder = stream.recorder
        if recorder is None:
            return
        recorder.append(images)
        too_long = recorder.num_frames >= self._limits.record_seconds * recorder.clip.fps
        if recorder.failed or too_long:
            self.stop_recording(stream)

    def stop_recording(self, stream: Stream) -> None:
        """End the recording; its file is completed in the background.

        Raises:
            ValueError: if there is none.
        """
        recorder = stream.recorder
        if recorder is None:
            raise ValueError("the stream is not being recorded")
        stream.recorder = None
        clip = recorder.clip
        clip.num_frames = recorder.num_frames
        clip.script = stream.script
        clip.command = self._command(stream, clip.format, clip.fps, recorder.first_chunk)
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
                start_url=None if clip.start is None else f"/v1/videos/{clip.id}/start",
            )
        )


def open_session(stream: Stream) -> Any:
    """A new session with the settings of a stream."""
    start = {} if stream.start_file is None else {"start": stream.start_file.images()}
    session = stream.model.open_session(
        stream.prompt,
        seed=stream.seed,
        height=stream.height,
        width=stream.width,
        steps=stream.steps,
        **start,
    )
    if stream.hold_rate:
        session.hold_rate(stream.fps)
    return session


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
