"""Scripts: what is steered in a stream, and at which chunk.

A script is the beginning of a stream (prompt, seed, size) and its timed changes. A session records
one while it runs; ``play.play_script`` makes the same stream from it, bit for bit. As a file it
is YAML, to be written by hand:

    prompt: a small red circle moves up
    seed: 7
    height: 64
    width: 64
    changes:
    - {at: 12, prompt: a large blue square moves left, mode: blend, blend_chunks: 3}
    - {at: 20, steps: 2}

or JSON lines, the beginning first and then a change per line, to be appended to while a stream
runs. Prompts are texts and nothing else: no file reads or resolves what stands in them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from streamvid.config import build_config, to_plain
from streamvid.files import atomic_file
from streamvid.weights import parse_json

Mode = Literal["cut", "blend", "recache", "hard"]
Interpolation = Literal["linear", "spherical"]
MODES = get_args(Mode)
INTERPOLATIONS = get_args(Interpolation)
DEFAULT_MODE: Mode = "cut"
"""Measured on the shipped student (benchmarks/switches.md): of 24 switches all were obeyed in the
first chunk, with the position, the floor and the other looks kept, and it runs no extra pass.
``recache`` obeyed 23 of them as soon, and costs a pass per chunk of the window; ``blend`` takes two
to three chunks; ``hard`` puts the object elsewhere. A student that clings to its old prompt is what
``recache`` is for."""
BLEND_CHUNKS = 3
MOST_BITS = 63  # of a seed
MOST_STEPS = 1000  # per chunk, as many as published models know times
SUFFIXES = (".yaml", ".yml", ".jsonl")


@dataclass(frozen=True)
class Change:
    """What changes just before a chunk; None is unchanged.

    Raises:
        ValueError: one line, if a value is out of range, or an option goes with another mode.
    """

    at: int
    """The chunk that is the first to have the change, counted from 0."""
    prompt: str | None = None
    mode: Mode | None = None
    """How the prompt is switched, see ``Session.switch_prompt``; None is its default."""
    blend_chunks: int | None = None
    """Of mode "blend": chunks until the new prompt is reached, at least 1."""
    interpolation: Interpolation | None = None
    """Of mode "blend"."""
    keep_sink: bool | None = None
    """Of mode "recache"."""
    seed: int | None = None
    steps: int | None = None
    """Steps per chunk, at the student's own shift."""
    times: tuple[float, ...] | None = None
    """The falling noise levels of a chunk's steps, in (0, 1]; an empty list is the student's own
    schedule again."""

    def __post_init__(self) -> None:
        _expect(type(self.at) is int and self.at >= 0, "at", self.at, "a chunk, counted from 0")
        if self.prompt is not None:
            check_prompt(self.prompt)
        if self.seed is not None:
            check_seed(self.seed)
        if self.steps is not None:
            check_steps(self.steps)
        if self.steps is not None and self.times is not None:
            raise ValueError(f"steps={self.steps} and times at chunk {self.at}; give one of them")
        _check_times(self.times)
        self._check_switch()

    def _check_switch(self) -> None:
        _expect(self.mode in (None, *MODES), "mode", self.mode, f"one of {', '.join(MODES)}")
        _expect(
            self.interpolation in (None, *INTERPOLATIONS),
            "interpolation",
            self.interpolation,
            f"one of {', '.join(INTERPOLATIONS)}",
        )
        count = self.blend_chunks
        _expect(
            count is None or type(count) is int and count >= 1,
            "blend_chunks",
            count,
            "a whole number of at least 1",
        )
        needed = {
            "mode": None,
            "blend_chunks": "blend",
            "interpolation": "blend",
            "keep_sink": "recache",
        }
        for name, mode in needed.items():
            value = getattr(self, name)
            if value is None:
                continue
            if self.prompt is None:
                raise ValueError(f"{name}={value} at chunk {self.at} without a prompt; give one")
            if mode is not None and self.mode != mode:
                raise ValueError(
                    f"{name}={value} is of mode={mode}, not of mode={self.mode}; drop one of them"
                )

    def __or__(self, later: Change) -> Change:
        """Both changes at once; the later one wins, and its prompt comes with its own options."""
        switch = ("prompt", "mode", "blend_chunks", "interpolation", "keep_sink")
        pace = ("steps", "times")
        given = {name: value for name, value in vars(later).items() if value is not None}
        for group in (switch, pace):
            if any(name in given for name in group):
                given |= {name: getattr(later, name) for name in group}
        return replace(self, **given)

    def with_defaults(self) -> Change:
        """The change with every option of its switch said, so that a record does not depend on
        defaults.
        """
        if self.prompt is None:
            return self
        mode = self.mode or DEFAULT_MODE
        change = replace(self, mode=mode)
        if mode == "blend":
            return replace(
                change,
                blend_chunks=change.blend_chunks or BLEND_CHUNKS,
                interpolation=change.interpolation or "linear",
            )
        if mode == "recache" and change.keep_sink is None:
            return replace(change, keep_sink=True)
        return change

    def is_empty(self) -> bool:
        """Whether nothing changes."""
        return all(getattr(self, field.name) is None for field in fields(self)[1:])


@dataclass(frozen=True)
class Script:
    """A stream as data: how it begins and what changes when.

    Raises:
        ValueError: one line, if a value is out of range, or the changes are not in order.
    """

    prompt: str
    height: int
    """Of the frames, in pixels; so is ``width``."""
    width: int
    seed: int = 0
    steps: int | None = None
    """Steps per chunk at the beginning; None is the student's own schedule."""
    start: str | None = None
    """``contexts.digest_frames`` of the frames that the stream began from; None where it began from
    noise."""
    num_chunks: int | None = None
    """Chunks of the stream, those of ``start`` included; None where the script does not say."""
    changes: tuple[Change, ...] = ()
    """In order, at most one per chunk."""

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        check_seed(self.seed)
        if self.steps is not None:
            check_steps(self.steps)
        for name in ("height", "width", "num_chunks"):
            value = getattr(self, name)
            if not (name == "num_chunks" and value is None):
                _expect(type(value) is int and value >= 1, name, value, "a whole number above 0")
        for earlier, later in itertools.pairwise(self.changes):
            if later.at <= earlier.at:
                raise ValueError(
                    f"a change at chunk {later.at} after one at chunk {earlier.at}; write the"
                    " changes in order, those of one chunk as one"
                )

    @property
    def last_steps(self) -> int | None:
        """Steps per chunk at the end; None is the student's own schedule."""
        said = (change.steps for change in reversed(self.changes) if change.steps is not None)
        return next(said, self.steps)

    def to_plain(self) -> dict[str, Any]:
        """What JSON and YAML can hold, without what has its default."""
        plain = _without_none(to_plain(self))
        plain["changes"] = [_without_none(change) for change in plain["changes"]]
        return plain

    @classmethod
    def from_plain(cls, plain: Any) -> Script:
        """The script that ``to_plain`` gave.

        Raises:
            ValueError: one line, for an unknown key, a wrong type or a value out of range.
        """
        if not isinstance(plain, dict):
            raise ValueError(f"a script is a mapping of keys, got a {type(plain).__name__}")
        return build_config(cls, plain)

    def save(self, path: str | Path) -> None:
        """Write .yaml or .jsonl, as the suffix says."""
        path, plain = Path(path), self.to_plain()
        if _suffix(path) == ".jsonl":
            changes = plain.pop("changes")
            text = "".join(
                json.dumps(line, ensure_ascii=False) + "\n" for line in (plain, *changes)
            )
        else:
            text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Script:
        """Read .yaml or .jsonl.

        Raises:
            ValueError: one line that names the file, if it is missing or not a script.
        """
        path = Path(path)
        read = _read_lines if _suffix(path) == ".jsonl" else _read_yaml
        try:
            return cls.from_plain(read(path.read_text(encoding="utf-8")))
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"script {path}: {' '.join(str(reason).split())}") from error


def check_prompt(prompt: Any) -> None:
    """A ValueError unless it is a text that says something."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt={prompt!r}, expected a text that says what to show")


def check_seed(seed: Any) -> None:
    """A ValueError unless it is a whole number of at most 63 bits."""
    fits = type(seed) is int and -(2**MOST_BITS) <= seed < 2**MOST_BITS
    _expect(fits, "seed", seed, f"a whole number of at most {MOST_BITS} bits")


def check_steps(steps: Any) -> None:
    """A ValueError unless it is a number of steps per chunk."""
    fits = type(steps) is int and 1 <= steps <= MOST_STEPS
    _expect(fits, "steps", steps, f"a whole number from 1 to {MOST_STEPS}")


def _check_times(times: Sequence[float] | None) -> None:
    if not times:
        return
    falling = all(later < earlier for earlier, later in itertools.pairwise(times))
    _expect(
        falling and times[0] <= 1 and times[-1] > 0,
        "times",
        tuple(times),
        "falling noise levels in (0, 1]",
    )


def _expect(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r}, expected {expected}")


def _without_none(plain: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plain.items() if value is not None}


def _suffix(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"script {path}: unknown suffix; use one of {', '.join(SUFFIXES)}")
    return path.suffix


def _read_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is no YAML ({' '.join(str(error).split())[:200]})") from error


def _read_lines(text: str) -> Any:
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            lines.append(parse_json(line))
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON ({error})") from error
    if not lines or not isinstance(lines[0], dict):
        raise ValueError("the first line is the beginning of the stream, a JSON object")
    return {**lines[0], "changes": lines[1:]}
