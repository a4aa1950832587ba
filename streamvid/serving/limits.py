"""What one client may ask of the server, and how often."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a server; every one of them has a message of its own when it is reached."""

    prompt_chars: int = 500
    """Longest prompt, in characters."""
    max_pixels: int = 832 * 480
    """Largest frame, height times width."""
    max_steps: int = 8
    """Most denoising steps per chunk."""
    max_fps: float = 60.0
    """Fastest playback, in frames per second."""
    sessions: int = 8
    """Live streams that advance at the same time."""
    waiting: int = 16
    """Live streams that wait for a place."""
    sessions_per_address: int = 6
    """Live streams, waiting ones included, of one network address."""
    connections_per_address: int = 32
    """Open WebSockets of one network address, with and without a stream."""
    session_seconds: float | None = None
    """Longest life of a stream, in seconds; None is no limit."""
    idle_seconds: float = 300.0
    """A paused stream, or one whose viewer confirms nothing, ends after so many seconds."""
    bookmarks: int = 16
    """Moments per stream to which the viewer can return; each holds a cache."""
    messages_per_minute: int = 240
    """Control messages per connection; acknowledgements have a limit of their own."""
    message_bytes: int = 16_384
    """Largest message of a viewer."""
    commands: int = 32
    """Control messages that may wait for the end of a chunk."""
    record_seconds: float = 600.0
    """Longest recording, in seconds of playback."""
    clip_seconds: float = 60.0
    """Longest clip of ``POST /v1/videos``, in seconds of playback."""
    clips_waiting: int = 16
    """Clips that wait for the worker."""
    clips_kept: int = 64
    """Finished clips and recordings on disk; the oldest goes first."""
    upload_bytes: int = 65_536
    """Largest body of a request, uploads of starts apart."""
    start_bytes: int = 16 * 2**20
    """Largest image or clip that a stream begins from."""
    start_pixels: int = 2**25
    """Largest picture in it, width times height; a camera's 33 million pixels."""
    start_seconds: float = 60.0
    """Longest clip that a stream begins from."""
    start_frames: int = 81
    """Frames of it that are kept, its last ones."""
    start_upload_seconds: float = 60.0
    """Time that it may take to arrive."""
    start_decode_seconds: float = 20.0
    """Time after which decoding it is given up."""
    start_decode_bytes: int = 2 * 2**30
    """Address space of the process that decodes it."""
    starts_decoded: int = 2
    """Files that are decoded at a time."""
    starts_waiting: int = 8
    """Files that wait to be decoded."""
    starts_kept: int = 32
    """Images and clips that streams may begin from; the oldest goes first."""
    start_life_seconds: float = 3600.0
    """Time for which they are kept."""
    snapshots_kept: int = 64
    """Snapshots on disk; the oldest goes first."""

    def check_prompt(self, prompt: str) -> None:
        """Refuse a prompt that is too long."""
        if len(prompt) > self.prompt_chars:
            raise ValueError(
                f"the prompt has {len(prompt)} characters, expected at most {self.prompt_chars};"
                " shorten it"
            )

    def check_size(self, height: int, width: int) -> None:
        """Refuse frames that are too large."""
        if height * width > self.max_pixels:
            raise ValueError(
                f"frames of {width} x {height} pixels, expected at most {self.max_pixels:,} pixels;"
                " ask for a smaller size"
            )

    def check_steps(self, steps: int | None) -> None:
        """Refuse more steps per chunk than the server allows."""
        if steps is not None and steps > self.max_steps:
            raise ValueError(f"steps={steps}, expected 1 to {self.max_steps}; use fewer")

    def check_fps(self, fps: float | None) -> None:
        """Refuse a playback that is too fast."""
        if fps is not None and fps > self.max_fps:
            raise ValueError(f"fps={fps:g}, expected at most {self.max_fps:g}; use a slower one")


class TokenBucket:
    """Allows ``per_minute`` events, as many at once, refilled evenly.

    Args:
        clock: seconds; another one for tests.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self.per_minute = per_minute
        self._clock = clock
        self._left = per_minute
        self._then = clock()

    def take(self) -> bool:
        """Whether one more event is within the limit."""
        now = self._clock()
        refill = (now - self._then) * self.per_minute / 60
        self._left = min(self.per_minute, self._left + refill)
        self._then = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
