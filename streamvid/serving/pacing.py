"""When a stream's next chunk is due, how many of its frames its viewer can take, and how well it
was served.

All three are plain arithmetic on times that the caller gives, in seconds, so that tests need no
clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

RECENT = 120  # chunks that figures are taken over
LEAST_LEAD = 0.12  # seconds
LARGEST_STRIDE = 8


class Pacer:
    """Makes chunks just in time: a new prompt then waits for little that is already made.

    A viewer plays frames at ``fps`` from the moment the first chunk arrives. The next chunk is due
    when what is left to play is as long as making one takes, with half as much again for safety.

    Args:
        fps: frames per second of playback.
    """

    def __init__(self, fps: float):
        self.fps = fps
        self._plays_until: float | None = None
        self._waits_since: float | None = None  # of a stream that has nothing to play yet
        self._work = deque(maxlen=8)  # seconds per chunk

    @property
    def work_s(self) -> float:
        """What the most expensive of the last chunks took; 0 before the first."""
        return max(self._work, default=0.0)

    def due(self, now: float, streams: int = 1, is_full: bool = False) -> float:
        """The time at which the next chunk should be begun.

        Args:
            streams: that share the worker; each has to wait for the others.
            is_full: chunks still wait to be sent; another one is begun only when all of them
                should have been played.
        """
        if self._plays_until is None:
            return self.deadline(now)
        if is_full:
            return self._plays_until
        lead = max(LEAST_LEAD, 1.5 * self.work_s * max(1, streams))
        return self._plays_until - lead

    def deadline(self, now: float) -> float:
        """When the viewer has nothing left to play; if it has nothing yet, when that was first
        asked here.
        """
        if self._plays_until is not None:
            return self._plays_until
        if self._waits_since is None:
            self._waits_since = now
        return self._waits_since

    def made(self, now: float, num_frames: int, work_s: float) -> float:
        """Note a chunk that is ready; returns how long its viewer had to wait for it.

        Args:
            work_s: what it took; of a batch its share, because a larger batch takes longer, but not
                more than in proportion.
        """
        late = 0.0 if self._plays_until is None else max(0.0, now - self._plays_until)
        begins = now if self._plays_until is None else max(now, self._plays_until)
        self._plays_until = begins + num_frames / self.fps
        self._work.append(work_s)
        return late

    def restart(self) -> None:
        """The stream was held or began again; the next chunk is due at once and is not late."""
        self._plays_until = self._waits_since = None


@dataclass
class FlowControl:
    """Gives a viewer that falls behind every second, fourth or eighth frame.

    How far it is behind is the time between the last frame sent and the last one that it says it
    has shown. Without acknowledgements nothing is known, and every frame is sent.
    """

    fps: float
    acks: bool
    sent: int = -1  # sequence of the last frame sent
    shown: int = -1  # sequence of the last frame acknowledged
    heard: float = 0.0  # when the last acknowledgement came

    def behind(self, chunk_frames: int) -> float:
        """How many times the usual distance the viewer is behind; below 1 it follows."""
        usual = max(2 * chunk_frames + 4, 0.8 * self.fps)
        return (self.sent - self.shown) / usual if self.acks else 0.0

    def stride(self, chunk_frames: int) -> int:
        """Every how many frames one is sent: 1, 2, 4 or 8."""
        times = int(self.behind(chunk_frames))
        return min(2**times, LARGEST_STRIDE)

    def must_wait(self, chunk_frames: int) -> bool:
        """Whether the viewer is so far behind that nothing should be made for it."""
        return self.behind(chunk_frames) >= 4

    def acknowledge(self, sequence: int, now: float) -> None:
        """The viewer has shown ``sequence``; one that was never sent counts for nothing."""
        if self.shown < sequence <= self.sent:
            self.shown = sequence
            self.heard = now


@dataclass
class ServiceLevel:
    """Times of a stream's chunks, from which its figures are taken."""

    asked: float
    """When the stream was asked for."""
    chunks: int = 0
    first_s: float = 0.0
    stall_s: float = 0.0
    late: int = 0
    frames: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))
    work: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    intervals: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _last: float | None = None

    def add(self, now: float, num_frames: int, work_s: float, late_s: float) -> None:
        """Note a chunk that is ready."""
        if not self.chunks:
            self.first_s = now - self.asked
        if self._last is not None:
            self.intervals.append(now - self._last)
        self._last = now
        self.chunks += 1
        self.late += late_s > 0
        self.stall_s += late_s
        self.frames.append(num_frames)
        self.work.append(work_s)

    def interrupt(self) -> None:
        """The stream is held: the time until the next chunk is no interval."""
        self._last = None

    @property
    def deadlines_met(self) -> float:
        """Share of chunks that came in time; 1 before the first."""
        return 1 - self.late / self.chunks if self.chunks else 1.0

    @property
    def frames_per_second(self) -> float:
        """Frames that the model makes per second of its own work."""
        return sum(self.frames) / sum(self.work) if sum(self.work) else 0.0


def percentile_ms(seconds: deque[float], percent: float) -> float:
    """A percentile in milliseconds; 0 of nothing."""
    return 1000 * float(np.percentile(seconds, percent)) if seconds else 0.0
