"""The suite ``stream``: what streaming costs, beside the machine's ceiling in the same run.

- ``pace``: frames per second, the first frame, and operations against the ceiling.
- ``aging``: time and memory of a chunk against the age of its stream.
- ``engine``: the options of ``students.engine``, one by one and all together.
- ``against``: other ways to stream the same geometry.

On a CPU all of it is CPU time of one thread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from streamvid.bench.cases import Case
from streamvid.bench.ceiling import best
from streamvid.bench.comparators import COMPARATORS
from streamvid.bench.counting import count, forwards_per_chunk
from streamvid.bench.timing import clock, in_turns, percentile
from streamvid.gpu_check.measure import allocated_mib
from streamvid.metering import MIB
from streamvid.rollout.schedule import StreamConfig
from streamvid.students.engine import EngineOptions, engine_options, prepare

Row = dict[str, Any]

OURS, AGAIN = "ours", "ours, again"
FIRST_FRAMES = 3  # streams that are begun for the time to the first frame
NEAR_AGE = 7  # chunks at an age whose median is taken
GIGA = 1e9


# ---- pace ----------------------------------------------------------------------------------------


def pace(case: Case, ceiling: dict[str, float], rounds: int) -> Row:
    """A stream whose window is full, and the first chunk of one that begins.

    Args:
        ceiling: of ``matrix_ceiling``.
        rounds: chunks that are measured.
    """
    device = case.cond.device
    next(case.stream())  # to warm up
    firsts = [_seconds_of_next(case.stream(), device) for _ in range(min(rounds, FIRST_FRAMES))]
    chunks = case.steady_stream()
    seconds = [_seconds_of_next(chunks, device) for _ in range(rounds)]
    counted = count(lambda: next(chunks))
    median = statistics.median(seconds)
    forwards = forwards_per_chunk(case.config)
    dtype = case.network.patch_embedding.weight.dtype
    return {
        "": f"{case.name}, {_steps_of(case.config)}",
        "first frame ms": 1000 * statistics.median(firsts),
        "chunk ms": 1000 * median,
        "p95 ms": 1000 * percentile(seconds, 0.95),
        "frames/s": case.frames_per_chunk / median,
        "forwards/frame": forwards / case.frames_per_chunk,
        "GFLOP": counted.flops / GIGA,
        "GFLOP/s": counted.flops / median / GIGA,
        "of ceiling": counted.flops / median / best(ceiling, dtype),
        "GB moved": counted.bytes / GIGA,
        "cache MiB": _cache_mib(case),
    }


def _steps_of(config: StreamConfig) -> str:
    if config.step_table:
        return "a table of steps"
    return "1 step" if config.num_steps == 1 else f"{config.num_steps} steps"


def _seconds_of_next(chunks: Iterator[Any], device: torch.device) -> float:
    started = clock(device)
    next(chunks)
    return clock(device) - started


@torch.no_grad()
def _cache_mib(case: Case) -> float:
    """Of a full window, as it is while a chunk is denoised."""
    if case.config.commit == "none":
        return 0.0
    cache = case.full_cache()
    next(case.latents_over(cache))
    return cache.memory_bytes() / MIB


# ---- age -----------------------------------------------------------------------------------------


def aging(case: Case, ages: Sequence[int]) -> list[Row]:
    """Time and memory of a chunk of one step against the age of its stream in chunks.

    A case with a codec is streamed for so long. The cache of a geometry, whose window is full, is
    set to the age: what depends on it is then measured, and what would pile up is not.
    """
    case = case.with_steps(1)
    streamed = case.size is not None or case.config.window_frames is None
    rows = list(_streamed(case, ages) if streamed else _set(case, ages))
    for row in rows:
        row["time / first"] = row["chunk ms"] / rows[0]["chunk ms"]
        row["memory / first"] = row["process MiB"] / rows[0]["process MiB"]
    return rows


def _streamed(case: Case, ages: Sequence[int]) -> Iterator[Row]:
    device, chunks, made = case.cond.device, case.stream(), 0
    for age in sorted(ages):
        for _ in range(max(0, age - made)):
            next(chunks)
        seconds = [_seconds_of_next(chunks, device) for _ in range(NEAR_AGE)]
        made = max(made, age) + NEAR_AGE
        yield _age_row(case, age, "streamed", seconds)


def _set(case: Case, ages: Sequence[int]) -> Iterator[Row]:
    device = case.cond.device
    for age in sorted(ages):
        chunks = case.latents_over(case.full_cache(age))
        next(chunks)  # the first one commits nothing
        seconds = [_seconds_of_next(chunks, device) for _ in range(NEAR_AGE)]
        yield _age_row(case, age, "set", seconds)


def _age_row(case: Case, age: int, how: str, seconds: list[float]) -> Row:
    return {
        "": case.name,
        "age, chunks": age,
        "reached by": how,
        "chunk ms": 1000 * statistics.median(seconds),
        "process MiB": allocated_mib(case.cond.device),
    }


# ---- comparisons ---------------------------------------------------------------------------------


def compare(
    works: dict[str, Callable[[], Any]], case: Case, rounds: int, refused: dict[str, str]
) -> list[Row]:
    """A row for each piece of work: its time, and over that of the first. All run in turns.

    Args:
        works: by name; the first is what the others are compared with.
        refused: names that cannot be had here, and why.
    """
    seconds = in_turns(works, case.cond.device, rounds)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    reference = next(iter(medians.values()))
    rows: list[Row] = [
        {
            "": case.name,
            "what": name,
            "chunk ms": 1000 * median,
            "p95 ms": 1000 * percentile(seconds[name], 0.95),
            "time / ours": median / reference,
        }
        for name, median in medians.items()
    ]
    absent = {"chunk ms": "-", "p95 ms": "-", "time / ours": "-"}
    return rows + [
        {"": case.name, "what": name, **absent, "why": reason} for name, reason in refused.items()
    ]


def engine(case: Case, rounds: int, texts: Sequence[str] | None = None) -> list[Row]:
    """Engine options, each by itself and all together, beside the student without any.

    Args:
        texts: as ``engine_options`` takes them; None is all that there are.
    """
    works, refused = {}, {}
    for text in ["", "", *(each_option() if texts is None else texts)]:
        name = text or (AGAIN if OURS in works else OURS)
        try:
            student = prepare(case.student, engine_options(text))
            chunks = replace(case, student=student).steady_stream()
        except ValueError as error:
            refused[name] = str(error)
            continue
        works[name] = lambda chunks=chunks: next(chunks)
    return compare(works, case, rounds, refused)


def each_option() -> list[str]:
    """Every engine option by itself, then all but compilation; of an option that is a name, "auto"
    is taken.
    """
    names = [
        each.name if isinstance(each.default, bool) else f"{each.name}=auto"
        for each in fields(EngineOptions)
    ]
    return [*names, ",".join(name for name in names if name != "compile")]


def against(case: Case, names: Sequence[str], rounds: int) -> list[Row]:
    """Other ways to stream latents of the same geometry, decoding left out.

    Args:
        names: of ``COMPARATORS``.
    """
    plain = replace(case, size=None)
    works: dict[str, Callable[[], Any]] = {}
    for name in (OURS, AGAIN):
        chunks = plain.steady_stream()
        works[name] = lambda chunks=chunks: next(chunks)
    for name in names:
        other = iter(COMPARATORS[name](case.network, case.cond, case.config, case.latent_shape))
        # diffusers' always stands at the last chunk of its window
        for _ in range(1 if name == "diffusers" else case.filling):
            next(other)
        works[name] = lambda other=other: next(other)
    return compare(works, case, rounds, {})
