"""Holding a frame rate: how many steps the next chunk can afford.

The time of a chunk is that of its passes through the transformer, which all cost about the same,
and of its decoding. Both are measured on the chunks that were made, the newest counting half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NEWEST = 0.5  # weight of the newest chunk in a running mean
ROOM = 0.9  # share of the time that more steps may take, so that the choice does not flicker


@dataclass
class RateHolder:
    """Chooses the most steps that hold a frame rate.

    Args:
        fps: frames per second that the stream has to keep up with.
        choices: steps per chunk to choose from.
        pass_s: measured seconds per pass; None before the first chunk.
        decode_s: measured seconds per chunk.

    Raises:
        ValueError: if the rate is not positive, or there are no choices.
    """

    fps: float
    choices: Sequence[int] = (1, 2, 3, 4)
    pass_s: float | None = None
    decode_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.fps < math.inf:
            raise ValueError(f"fps={self.fps}, expected a positive number of frames per second")
        if not self.choices or any(type(n) is not int or n < 1 for n in self.choices):
            raise ValueError(
                f"choices={tuple(self.choices)}, expected numbers of steps per chunk, at least 1"
            )
        self.choices = tuple(sorted(set(self.choices)))

    def observe(self, num_passes: int, denoise_s: float, decode_s: float) -> None:
        """A chunk was made with ``num_passes`` passes, commits included, in these seconds."""
        pass_s = denoise_s / num_passes
        if self.pass_s is None:
            self.pass_s, self.decode_s = pass_s, decode_s
            return
        self.pass_s += NEWEST * (pass_s - self.pass_s)
        self.decode_s += NEWEST * (decode_s - self.decode_s)

    def choose(self, num_frames: int, current: int, num_commits: int = 1) -> int:
        """Steps of the next chunk.

        Args:
            num_frames: pixel frames of the chunk.
            current: steps of the chunk before. More are chosen only if they leave a tenth of the
                time unused.
            num_commits: passes that write context, per chunk.
        """
        if self.pass_s is None:
            return max((n for n in self.choices if n <= current), default=self.choices[0])
        budget_s = num_frames / self.fps
        fits = [
            steps
            for steps in self.choices
            if self.decode_s + (steps + num_commits) * self.pass_s
            <= budget_s * (ROOM if steps > current else 1.0)
        ]
        return max(fits, default=self.choices[0])
