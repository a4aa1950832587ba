"""The clips of ``POST /v1/videos``, made in the time that live streams leave."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from streamvid.serving.errors import ViewerGone, explain
from streamvid.serving.metrics import Metrics
from streamvid.serving.models import ServedModels
from streamvid.serving.recording import Clip, ClipStore, Recorder
from streamvid.serving.stream import script_text
from streamvid.students.batch import Batch

log = logging.getLogger(__name__)

CALLS_PER_TURN = 6
"""Passes and decodings that a clip gets at a time: a chunk of four steps with its commit."""


@dataclass
class _Job:
    """A clip under way."""

    clip: Clip
    session: Any
    recorder: Recorder
    chunk: Batch | None = None

    def check(self, _: Any) -> None:
        """Before each call: does anyone still wait for the clip?"""
        if self.clip.cancelled:
            raise ViewerGone


class ClipJobs:
    """Clips that wait and the one under way. ``advance`` is called in the worker's thread.

    Args:
        models: that make them.
        store: of their files.
        metrics: that are kept up to date.
    """

    def __init__(self, models: ServedModels, store: ClipStore, metrics: Metrics) -> None:
        self._models = models
        self._store = store
        self._metrics = metrics
        self._waiting: deque[Clip] = deque()
        self._job: _Job | None = None

    def __len__(self) -> int:
        """Clips that wait or are under way."""
        return self.num_waiting + (self._job is not None)

    @property
    def num_waiting(self) -> int:
        """Clips that wait."""
        return len(self._waiting)

    def add(self, clip: Clip) -> None:
        """Queue a clip."""
        self._store.add(clip)
        self._waiting.append(clip)
        self._metrics.clips_waiting.set(len(self._waiting))

    def advance(self) -> None:
        """Some calls of the clip under way, at most to the end of a chunk; or begin the next."""
        job = self._job
        if job is None:
            self._begin()
            return
        if job.chunk is None:
            job.chunk = Batch([job.session], job.check)
        for _ in range(CALLS_PER_TURN):
            for _, outcome in job.chunk.step():
                job.chunk = None
                self._receive(job, outcome)
                return

    def stop(self) -> None:
        """Give all clips up."""
        if self._job is not None:
            self._fail(self._job, "the server was stopped")
        for clip in self._waiting:
            clip.status, clip.error = "failed", "the server was stopped"

    def _begin(self) -> None:
        clip = self._waiting.popleft()
        self._metrics.clips_waiting.set(len(self._waiting))
        if clip.cancelled:
            return
        clip.status = "in_progress"
        try:
            session = self._models.find(clip.model).open_session(
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

        self._job = _Job(clip, session, Recorder(clip, self._store.path(clip), done))

    def _receive(self, job: _Job, outcome: Any) -> None:
        """Write a chunk, or end the clip with the error that came in its place."""
        clip, recorder = job.clip, job.recorder
        try:
            if isinstance(outcome, Exception):
                raise outcome
            recorder.append(outcome.images[: clip.num_frames - recorder.num_frames], wait=True)
        except ViewerGone:
            self._fail(job, "given up")
            return
        except Exception as error:
            code, message = explain(error)
            if code == "internal":
                log.error("a clip has failed", exc_info=error)
            self._metrics.errors.labels(code).inc()
            self._fail(job, message)
            return
        self._metrics.chunks.labels("clip").inc()
        clip.progress = min(99, 100 * recorder.num_frames // clip.num_frames)
        if recorder.failed:
            self._fail(job, "the file could not be written")
        elif recorder.num_frames >= clip.num_frames:
            self._job = None
            recorder.finish({"title": clip.prompt, "comment": script_text(job.session)})
            job.session.close()

    def _fail(self, job: _Job, message: str) -> None:
        self._job = None
        job.clip.error = message
        job.recorder.give_up()
        job.session.close()
