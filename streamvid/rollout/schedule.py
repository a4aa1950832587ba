"""Schedules: in which order, and at which noise levels, the chunks of a stream are denoised.

A schedule is data, a lazily generated sequence of ``Denoise`` events, finite or endless. One event
is one student forward over one or several neighbouring chunks. ``rollout.loop`` runs it; nothing
else decides an order. For two steps per chunk, at times 1 and .8 (a row is a chunk, a column an
event):

    autoregressive       rolling             full_sequence
    1 .8                 1 .8                1 .8
         1 .8               1 .8             1 .8
              1 .8             1 .8          1 .8

Self-forcing is ``autoregressive`` (arXiv 2506.08009) and its random exit ``move_tap``, or
``truncate`` where the exit ends the chunk; first-frame enhancement gives chunk 0 its own
``first_times`` (arXiv 2511.01419); diagonal denoising is a ``table`` (arXiv 2603.09488); rolling
forcing is ``rolling`` (arXiv 2509.25161); a bidirectional teacher samples a ``full_sequence``.
Times are continuous in (0, 1], after the shift, and fall along a list; a chunk begins as pure noise
at the first time of its list, and its last step goes to 0.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from streamvid.core.times import step_times
from streamvid.weights import parse_json

Times = Sequence[float]
Commit = Literal["clean", "reuse", "none"]
Stepper = Literal["renoise", "euler", "jump"]

STREAM_CONFIG_FILE = "stream_config.json"  # beside a student's weights


@dataclass(frozen=True)
class Denoise:
    """One student forward over neighbouring chunks; every field has one entry a chunk.

    A chunk that goes to ``t_next`` 0 is finished. ``tap`` marks the prediction that carries the
    gradient.
    """

    chunks: tuple[int, ...]
    t: tuple[float, ...]
    t_next: tuple[float, ...]
    tap: tuple[bool, ...]


# ---- orders --------------------------------------------------------------------------------------


def autoregressive(
    times: Times, num_chunks: int | None = None, first_times: Times | None = None
) -> Iterator[Denoise]:
    """Chunk after chunk, each through ``times``; chunk 0 through ``first_times`` if they are given.

    Args:
        times: the falling times of a chunk's steps.
        num_chunks: None streams for ever.
        first_times: the list of chunk 0, usually longer: it has no context to lean on.
    """
    return table([times if first_times is None else first_times, times], num_chunks)


def table(step_table: Sequence[Times], num_chunks: int | None = None) -> Iterator[Denoise]:
    """Chunk after chunk, chunk k through the k-th list of ``step_table``; its last list repeats."""
    if not step_table:
        raise ValueError(
            "the step table is empty, expected a list of times for each of the first chunks"
        )
    for times in step_table:
        _check_times(times)
    return _one_by_one(step_table, _chunk_range(num_chunks))


def _one_by_one(step_table: Sequence[Times], chunks: Iterable[int]) -> Iterator[Denoise]:
    for chunk in chunks:
        times = step_table[min(chunk, len(step_table) - 1)]
        for step in range(len(times)):
            yield _event([(chunk, times, step)])


def rolling(times: Times, num_chunks: int | None = None) -> Iterator[Denoise]:
    """As many chunks jointly as there are times, one time apart, the oldest the cleanest.

    Every event finishes its oldest chunk and, until ``num_chunks`` have begun, the next one joins
    as noise. The window fills up chunk by chunk at the start, so that each chunk takes all steps.
    """
    _check_times(times)
    depth = len(times)
    if num_chunks is None:
        windows = ((max(0, end - depth), end) for end in itertools.count(1))
    else:
        ends = range(1, len(_finite_range(num_chunks)) + depth)
        windows = ((max(0, end - depth), min(end, num_chunks)) for end in ends)
    return (
        _event([(chunk, times, newest - chunk) for chunk in range(first, last)])
        for newest, (first, last) in enumerate(windows)
    )


def full_sequence(times: Times, num_chunks: int) -> Iterator[Denoise]:
    """All chunks jointly at one time, the order of a bidirectional model."""
    _check_times(times)
    chunks = _chunk_range(num_chunks)
    return (_event([(chunk, times, step) for chunk in chunks]) for step in range(len(times)))


def _event(steps: Sequence[tuple[int, Times, int]]) -> Denoise:
    """The joint forward of chunks given as (chunk, its times, which of them); the last one is
    tapped.
    """
    return Denoise(
        chunks=tuple(chunk for chunk, _, _ in steps),
        t=tuple(times[step] for _, times, step in steps),
        t_next=tuple(times[step + 1] if step + 1 < len(times) else 0.0 for _, times, step in steps),
        tap=tuple(step + 1 == len(times) for _, times, step in steps),
    )


def _chunk_range(num_chunks: int | None) -> Iterable[int]:
    return itertools.count() if num_chunks is None else _finite_range(num_chunks)


def _finite_range(num_chunks: int) -> range:
    if num_chunks < 1:
        raise ValueError(
            f"num_chunks={num_chunks}, expected at least 1, or None for an endless stream"
        )
    return range(num_chunks)


def _check_times(times: Times) -> None:
    falling = all(later < earlier for earlier, later in itertools.pairwise(times))
    if not len(times) or not falling or times[0] > 1 or times[-1] <= 0:
        raise ValueError(
            f"times {tuple(times)}, expected at least one, falling, in (0, 1] and without the final"
            " 0, as core.times.step_times gives them"
        )


# ---- what can be done to a schedule --------------------------------------------------------------


def truncate(
    schedule: Iterable[Denoise], exit_index: int | Callable[[int], int]
) -> Iterator[Denoise]:
    """The same schedule, in which every chunk ends with its step ``exit_index``, which is tapped.

    Self-forcing's random exit: up to the exit the steps, levels and noises are those of the full
    schedule, and the exit's prediction is the finished chunk. A chunk with fewer steps ends with
    its own last one.

    Args:
        schedule: any schedule.
        exit_index: the number of steps before the last, for all chunks or as a function of the
            chunk.
    """
    return _truncated(schedule, _exit_of(exit_index))


def move_tap(
    schedule: Iterable[Denoise], exit_index: int | Callable[[int], int]
) -> Iterator[Denoise]:
    """The same schedule, in which step ``exit_index`` of every chunk is tapped in place of its
    last.

    The exit's prediction carries the gradient, and the chunk takes the rest of its steps before it
    becomes context. So the context is written from the state and at the time that a stream has.
    A chunk with fewer steps is tapped at its last one.

    Args:
        schedule: any schedule.
        exit_index: the number of steps before the tapped one, for all chunks or as a function of
            the chunk.
    """
    return _tapped(schedule, _exit_of(exit_index))


def _exit_of(exit_index: int | Callable[[int], int]) -> Callable[[int], int]:
    if callable(exit_index):
        return exit_index
    if exit_index < 0:
        raise ValueError(f"exit_index={exit_index}, expected 0 for the first step, or more")
    return lambda chunk: exit_index


def _tapped(schedule: Iterable[Denoise], exit_of: Callable[[int], int]) -> Iterator[Denoise]:
    taken: Counter[int] = Counter()  # steps taken of the chunks under way
    for event in schedule:
        taps = []
        for chunk, t_next in zip(event.chunks, event.t_next):
            step, taken[chunk] = taken[chunk], taken[chunk] + 1
            is_last = t_next == 0
            taps.append(step == exit_of(chunk) or (is_last and step < exit_of(chunk)))
            if is_last:
                del taken[chunk]
        yield replace(event, tap=tuple(taps))


def _truncated(schedule: Iterable[Denoise], exit_of: Callable[[int], int]) -> Iterator[Denoise]:
    taken: Counter[int] = Counter()  # steps taken of the chunks under way
    for event in schedule:
        kept = []
        for chunk, t, t_next, tap in zip(event.chunks, event.t, event.t_next, event.tap):
            step, taken[chunk] = taken[chunk], taken[chunk] + 1
            if step == exit_of(chunk):
                kept.append((chunk, t, 0.0, True))
            elif step < exit_of(chunk):
                kept.append((chunk, t, t_next, tap))
            if t_next == 0:
                del taken[chunk]
        if kept:
            yield Denoise(*zip(*kept))


@dataclass(frozen=True)
class Cost:
    """The cost of a schedule, counted without running it."""

    nfe: int  # student forwards that denoise
    commits: int  # student forwards that write context
    latent_frames: int  # frames pushed through the transformer by both, the work


def cost_of(
    schedule: Iterable[Denoise],
    chunk_frames: int,
    commit: Commit = "clean",
    commit_last: bool = False,
) -> Cost:
    """The cost of a *finite* schedule, with the arguments that ``rollout`` will have."""
    nfe = frames = finished = 0
    for event in schedule:
        nfe += 1
        frames += len(event.chunks) * chunk_frames
        just_finished = sum(t_next == 0 for t_next in event.t_next)
        finished += just_finished
    uncommitted = 0 if commit_last or not nfe else just_finished  # those of the last event
    commits = finished - uncommitted if commit == "clean" else 0
    return Cost(nfe, commits, frames + commits * chunk_frames)


# ---- how a student wants to be streamed ----------------------------------------------------------

_CHOICES = {
    "commit": ("clean", "reuse", "none"),
    "stepper": ("renoise", "euler", "jump"),
    "positions": ("absolute", "window"),
    "order": ("autoregressive", "rolling", "full_sequence"),
}
_LEAST = {
    "num_steps": 1,
    "first_steps": 1,
    "chunk_frames": 1,
    "window_frames": 1,
    "sink_frames": 0,
    "max_trained_frames": 1,
}
_MOST = {
    "num_steps": 1000,  # as many as published models know times
    "first_steps": 1000,
    "chunk_frames": 10_000,
    "window_frames": 1_000_000,
    "sink_frames": 1_000_000,
    "max_trained_frames": 1_000_000,
}
_MOST_ROWS = 100_000  # of a step table
_OPTIONAL = ("first_steps", "window_frames", "max_trained_frames")


@dataclass(frozen=True)
class StreamConfig:
    """How a student was trained to be streamed, saved beside it as ``stream_config.json``.

    Raises:
        ValueError: on a wrong type, a value out of range, or fields that contradict each other.
    """

    num_steps: int = 4
    """Steps per chunk, at ``step_times(num_steps, shift)``; students have 1 to 4, teachers about
    50."""
    shift: float = 5.0
    """Timestep shift, > 0; 1 is none, Wan has 3 to 8."""
    first_steps: int | None = None
    """Steps of chunk 0 (first-frame enhancement); None is ``num_steps``."""
    step_table: tuple[tuple[float, ...], ...] = ()
    """Explicit times, after the shift, of each of the first chunks, the last list repeating
    (diagonal). If not empty it stands in for ``num_steps`` and ``shift``."""
    chunk_frames: int = 3
    """Latent frames denoised together, 1 to about 8."""
    window_frames: int | None = None
    """Latent frames that the student sees, those being denoised included; None is all."""
    sink_frames: int = 0
    """The first latent frames of the stream, kept in the window for ever."""
    context_t: float = 0.0
    """Noise level of the context, in [0, 1); "clean" commits are re-noised to it."""
    commit: Commit = "clean"
    """"clean" runs an extra pass over the finished chunk, "reuse" keeps the keys of its last step,
    "none" has no context."""
    stepper: Stepper = "renoise"
    """From step to step: fresh noise on the data prediction, an Euler step of the flow, or a jump
    of a student that is told where to land; one that can't be told takes Euler steps."""
    positions: Literal["absolute", "window"] = "absolute"
    """The cache's position policy; "window" for streams past the training length."""
    max_trained_frames: int | None = None
    """Latent frames of the clips that the student was trained on; None leaves it to the cache."""
    order: Literal["autoregressive", "rolling", "full_sequence"] = "autoregressive"
    """The schedule."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _expect(getattr(self, name) in choices, name, getattr(self, name), f"one of {choices}")
        for name, least in _LEAST.items():
            _check_integer(name, getattr(self, name), least, _MOST[name])
        for name in ("shift", "context_t"):
            value = getattr(self, name)
            _expect(type(value) in (int, float), name, value, "a number")
        _expect(self.shift > 0, "shift", self.shift, "a positive number; 1 is no shift")
        _expect(0 <= self.context_t < 1, "context_t", self.context_t, "a noise level in [0, 1)")
        object.__setattr__(self, "step_table", _checked_table(self.step_table))
        self._check_combination()

    def _check_combination(self) -> None:
        if self.step_table and (self.first_steps is not None or self.order != "autoregressive"):
            raise ValueError(
                "step_table gives the times of every chunk of an autoregressive stream; "
                "leave first_steps at null and order at 'autoregressive', or drop it"
            )
        if self.first_steps is not None and self.order != "autoregressive":
            raise ValueError(
                f"first_steps={self.first_steps} needs order='autoregressive', not {self.order!r}"
            )
        if self.context_t and self.commit != "clean":
            raise ValueError(
                f"context_t={self.context_t} is the level of clean commits; with"
                f" commit={self.commit!r} set it to 0"
            )
        if self.order == "full_sequence" and self.commit != "none":
            raise ValueError("order='full_sequence' has no context; set commit='none'")
        if self.order == "rolling" and self.commit == "reuse":
            raise ValueError(
                "commit='reuse' keeps keys of whole forwards, not of a rolling one; set 'clean'"
            )
        joint_frames = self.chunk_frames * (self.num_steps if self.order == "rolling" else 1)
        if self.window_frames is not None and self.window_frames < self.sink_frames + joint_frames:
            raise ValueError(
                f"window_frames={self.window_frames} cannot hold {self.sink_frames} sink frames and"
                f" the {joint_frames} being denoised; use at least"
                f" {self.sink_frames + joint_frames}"
            )

    def to_json(self) -> str:
        """The text of a ``stream_config.json``."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> StreamConfig:
        """The configuration that ``to_json`` wrote; absent keys have their defaults.

        Raises:
            ValueError: on text that is no JSON object, an unknown key, or what the constructor
                refuses.
        """
        values = parse_json(text)  # a JSONDecodeError is a ValueError with line and column
        if not isinstance(values, dict):
            raise ValueError(
                f"a stream configuration is a JSON object, not a {type(values).__name__}"
            )
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                (nearest,) = difflib.get_close_matches(key, known, n=1, cutoff=0)
                raise ValueError(
                    f"unknown key {key!r} in the stream configuration; the nearest is {nearest!r}"
                )
        return cls(**values)


def build_schedule(config: StreamConfig, num_chunks: int | None = None) -> Iterator[Denoise]:
    """The schedule that a configuration describes; ``num_chunks`` None streams for ever.

    Raises:
        ValueError: if a full sequence has no ``num_chunks``.
    """
    if config.step_table:
        return table(config.step_table, num_chunks)
    times = step_times(config.num_steps, config.shift)
    if config.order == "rolling":
        return rolling(times, num_chunks)
    if config.order == "full_sequence":
        if num_chunks is None:
            raise ValueError("order='full_sequence' denoises all chunks together; give it a length")
        return full_sequence(times, num_chunks)
    first_times = (
        None if config.first_steps is None else step_times(config.first_steps, config.shift)
    )
    return autoregressive(times, num_chunks, first_times)


def chunk_times(config: StreamConfig, num_chunks: int) -> list[list[float]]:
    """The times at which a stream denoises each of its first chunks."""
    times: list[list[float]] = [[] for _ in range(num_chunks)]
    for event in build_schedule(config, num_chunks):
        for chunk, t in zip(event.chunks, event.t):
            times[chunk].append(t)
    return times


def _expect(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r}, expected {expected}")


def _check_integer(name: str, value: Any, least: int, most: int) -> None:
    if value is None and name in _OPTIONAL:
        return
    ok = type(value) is int and value >= least  # a bool is no integer here
    _expect(
        ok,
        name,
        value,
        f"an integer of at least {least}" + (" or null" if name in _OPTIONAL else ""),
    )
    _expect(value <= most, name, value, f"at most {most:,}")


def _checked_table(rows: Any) -> tuple[tuple[float, ...], ...]:
    is_table = isinstance(rows, (list, tuple)) and all(
        isinstance(row, (list, tuple)) for row in rows
    )
    numbers = is_table and all(type(t) in (int, float) for row in rows for t in row)
    _expect(numbers, "step_table", rows, "a list of lists of times")
    if len(rows) > _MOST_ROWS or any(len(row) > _MOST["num_steps"] for row in rows):
        raise ValueError(
            f"step_table has {len(rows):,} rows, expected at most {_MOST_ROWS:,} of"
            f" {_MOST['num_steps']:,} times"
        )
    for row in rows:
        _check_times(row)
    return tuple(tuple(float(t) for t in row) for row in rows)
