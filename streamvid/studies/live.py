"""How well a server serves: viewers who watch together, viewers who come and go, one who stays.

- ``measure_viewers``: so many viewers for a time, each with its own prompt and seed;
- ``measure_churn``: visits that end at random moments, after which nothing may be left;
- ``measure_endurance``: one long stream, whose last tenth should be as its first.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from websockets.exceptions import WebSocketException

from streamvid.reports import markdown
from streamvid.serving.load import Server, Visit, Wishes, begin, play, receive, watch

MB = 1e6
SETTLE_S = 60.0
"""A server that still has streams so long after the last viewer has left keeps them."""
VISITORS = 4  # at once, of churn
WARM_VISITS = 12  # before churn is measured: threads and memory that a server keeps
LONGEST_VISIT_S = 1.5  # of churn, after its first frame
OWN = ("median", "p95", "p99")


@dataclass(frozen=True)
class Load:
    """What all viewers have in common."""

    prompts: Sequence[str]
    fps: float
    buffer_s: float = 0.2
    """That a viewer holds back before it plays, in seconds."""
    switch_every_s: float | None = 15.0
    settings: dict[str, Any] = field(default_factory=dict)

    def wishes(self, number: int, switches: bool = True) -> Wishes:
        """What the viewer of a number asks for."""
        turn = number % len(self.prompts)
        prompts = [*self.prompts[turn:], *self.prompts[:turn]]
        every_s = self.switch_every_s if switches else None
        return Wishes(prompts, seed=number, switch_every_s=every_s, settings=self.settings)


@dataclass
class Samples:
    """What a server said of itself, over time."""

    times_s: list[float] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)

    async def take(self, server: Server) -> dict[str, float]:
        """One more."""
        figures = await asyncio.to_thread(server.figures)
        self.times_s.append(time.perf_counter())
        self.figures.append(figures)
        return figures

    async def keep_taking(self, server: Server, every_s: float = 1.0) -> None:
        """More, until cancelled; a server too busy to answer is asked again."""
        while True:
            with suppress(ValueError):
                await self.take(server)
            await asyncio.sleep(every_s)

    @property
    def memory_mb(self) -> list[float]:
        return [figures["memory_bytes"] / MB for figures in self.figures]

    @property
    def growth_mb(self) -> float:
        """Memory of the process per minute: the slope of a line through the later half of the
        samples, because caches fill up at first.
        """
        half = len(self.times_s) // 2
        times_s, memory = np.array(self.times_s[half:]), np.array(self.memory_mb[half:])
        if len(times_s) < 3 or not np.isfinite(memory).all():
            return math.nan
        return 60 * float(np.polyfit(times_s - times_s[0], memory, 1)[0])


# ---------------------------------------------------------------- viewers who watch together


async def measure_viewers(server: Server, load: Load, viewers: int, seconds: float) -> dict:
    """The service levels of so many viewers, a row of the report."""
    visits = [Visit(load.fps) for _ in range(viewers)]
    samples = Samples()
    sampling = asyncio.create_task(samples.keep_taking(server))
    try:
        await asyncio.gather(
            *(
                watch(server, visit, load.wishes(number), seconds)
                for number, visit in enumerate(visits)
            )
        )
    finally:
        sampling.cancel()
    await wait_until_empty(server)
    return {
        "viewers": viewers,
        "seconds": seconds,
        **service_levels(visits, load.buffer_s, samples),
    }


def service_levels(visits: Sequence[Visit], buffer_s: float, samples: Samples) -> dict:
    """Figures of viewers who watched together; those of frames are over all of them."""
    plays = [play(visit, buffer_s) for visit in visits]
    shares = [p.in_time / max(1, p.due) for p in plays]
    rates = [len(visit.sequences) / max(1e-9, visit.ended_s - visit.asked_s) for visit in visits]
    switches = [switch for visit in visits for switch in visit.switches]
    delays_s = [s.seen_s - s.asked_s for s in switches if s.seen_s is not None]
    errors = sum((visit.errors for visit in visits), Counter())
    watched_s = sum(p.watched_s for p in plays)
    return {
        "first_frame_s": spread(visit.first_frame_s for visit in visits),
        "first_chunk_s": spread(visit.first_chunk_s for visit in visits),
        "interval_s": spread(x for visit in visits for x in visit.intervals_s),
        "age_s": spread(x for visit in visits for x in visit.ages_s),
        "late_age_s": spread(x for visit in visits for x in last_quarter(visit.ages_s)),
        "in_time": statistics.mean(shares),
        "in_time_worst": min(shares),
        "stalls_per_minute": 60 * sum(p.stalls for p in plays) / max(1e-9, watched_s),
        "stalled": sum(p.stall_s for p in plays) / max(1e-9, watched_s),
        "fps_least": min(rates),
        "fps_most": max(rates),
        "switches_asked": len(switches),
        "switches_seen": len(delays_s),
        "switch_s": spread(delays_s),
        "switch_chunks": spread(s.chunks for s in switches if s.seen_s is not None),
        "dropped": sum(visit.dropped for visit in visits),
        "waited": sum(visit.waited for visit in visits),
        "without_frames": sum(not visit.sequences for visit in visits),
        "memory_mb": max(samples.memory_mb, default=math.nan),
        "memory_growth_mb": samples.growth_mb,
        "errors": dict(errors),
    }


def spread(values: Any) -> dict[str, float] | None:
    """Median, 95th and 99th percentile and the greatest; None of nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    percentiles = np.percentile(known, (50, 95, 99)).tolist()
    return {**dict(zip(OWN, percentiles)), "most": float(max(known))}


def last_quarter(values: Sequence[float]) -> Sequence[float]:
    """The last ones; against all of them they tell whether a figure grows."""
    return values[len(values) * 3 // 4 :]


async def wait_until_empty(server: Server) -> dict[str, float]:
    """What the server says of itself once it has no stream, or ``SETTLE_S`` later."""
    patience_s = time.monotonic() + SETTLE_S
    while True:
        figures = await asyncio.to_thread(server.figures)
        if figures["sessions"] + figures["waiting"] == 0 or time.monotonic() > patience_s:
            return figures
        await asyncio.sleep(0.2)


# ---------------------------------------------------------------- viewers who come and go


async def measure_churn(server: Server, load: Load, visits: int, seed: int = 0) -> dict:
    """Visits that end at random moments, and what the server holds before and after."""
    await come_and_go(server, load, WARM_VISITS, seed + 1)
    before = await wait_until_empty(server)
    started = time.perf_counter()
    samples = Samples()
    sampling = asyncio.create_task(samples.keep_taking(server))
    try:
        ends, errors = await come_and_go(server, load, visits, seed)
    finally:
        sampling.cancel()
    seconds = time.perf_counter() - started
    after = await wait_until_empty(server)
    held = ("sessions", "waiting", "cache_bytes")
    returned = all(after[name] == 0 for name in held) and all(
        not after[name] > before[name] for name in ("threads", "open_files")
    )
    return {
        "visits": visits,
        "seconds": seconds,
        "ends": dict(ends),
        "before": before,
        "after": after,
        "most": {
            name: max((f[name] for f in samples.figures), default=math.nan) for name in before
        },
        "returned": returned,
        "memory_growth_mb": (after["memory_bytes"] - before["memory_bytes"]) / MB,
        "errors": dict(errors),
    }


async def come_and_go(
    server: Server, load: Load, visits: int, seed: int
) -> tuple[Counter[str], Counter[str]]:
    """How the visits ended, and what went wrong."""
    chance = random.Random(seed)
    ways = [chance.choice(list(WAYS)) for _ in range(visits)]
    moments = [chance.random() for _ in range(visits)]
    errors: Counter[str] = Counter()
    places = asyncio.Semaphore(VISITORS)

    async def visit(number: int) -> None:
        async with places:
            seen = Visit(load.fps)
            try:
                await pay_visit(server, load.wishes(number), seen, ways[number], moments[number])
            except (WebSocketException, OSError, asyncio.TimeoutError) as error:
                seen.errors[type(error).__name__] += 1
            errors.update(seen.errors)

    await asyncio.gather(*map(visit, range(visits)))
    return Counter(ways), errors


WAYS = {
    "closed before a start": "before",
    "aborted in the first chunk": "abort_early",
    "aborted later": "abort",
    "closed later": "close",
    "stopped and closed": "stop",
}
"""How a visit of churn may end."""


async def pay_visit(server: Server, wishes: Wishes, seen: Visit, end: str, moment: float) -> None:
    """One visit; ``moment`` in [0, 1) is when it ends."""
    how = WAYS[end]
    async with server.connect() as socket:
        if how == "before":
            return
        await begin(socket, seen, wishes)
        if how == "abort_early":
            await asyncio.sleep(0.3 * moment)
            socket.transport.abort()
            return
        watching = asyncio.create_task(receive(socket, seen))
        try:
            while not seen.sequences and not watching.done():
                await asyncio.sleep(0.01)
            await asyncio.sleep(LONGEST_VISIT_S * moment)
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        if how == "abort":
            socket.transport.abort()
        elif how == "stop":
            await socket.send(json.dumps({"type": "session.stop"}))


# ---------------------------------------------------------------- one who stays


async def measure_endurance(server: Server, load: Load, seconds: float, result: dict) -> None:
    """One stream for a long time; an interruption leaves in ``result`` what came until then."""
    visit, samples = Visit(load.fps), Samples()
    sampling = asyncio.create_task(samples.keep_taking(server, every_s=max(1.0, seconds / 1000)))
    try:
        await watch(server, visit, load.wishes(0, switches=False), seconds)
    finally:
        sampling.cancel()
        result.update(first_against_last(visit, samples))


def first_against_last(visit: Visit, samples: Samples) -> dict:
    """The first tenth of a stream's chunks and of the samples against the last."""
    return {
        "seconds": visit.ended_s - visit.asked_s,
        "chunks": len(visit.chunk_starts),
        "frames": len(visit.sequences),
        "fps": len(visit.sequences) / max(1e-9, visit.ended_s - visit.asked_s),
        "work_ms": [spread(part) for part in ends(visit.work_ms)],
        "interval_s": [spread(part) for part in ends(visit.intervals_s)],
        "memory_mb": [statistics.mean(part) if part else None for part in ends(samples.memory_mb)],
        "cache_mb": [
            statistics.mean(part) if part else None
            for part in ends([figures["cache_bytes"] / MB for figures in samples.figures])
        ],
        "memory_growth_mb": samples.growth_mb,
        "dropped": visit.dropped,
        "errors": dict(visit.errors),
    }


def ends(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """The first and the last tenth, at least one value each."""
    count = max(1, len(values) // 10)
    return values[:count], values[-count:]


# ---------------------------------------------------------------- the whole, and the report


def measure(
    server: Server,
    load: Load,
    report: dict[str, Any],
    *,
    viewers: Sequence[int] = (),
    seconds: float = 120.0,
    churn: int = 0,
    endurance: float = 0.0,
    endurance_load: Load | None = None,
    process: subprocess.Popen[str] | None = None,
    say: Any = print,
) -> None:
    """Measure one thing after the other into ``report``, where all that is complete stays also
    after an interruption.

    Args:
        process: of the server; one that ends meanwhile is an error.

    Raises:
        ValueError: if the server ends.
    """
    try:
        for count in viewers:
            say(f"{plural(count, 'viewer')}, {seconds:g} s")
            row = asyncio.run(measure_viewers(server, load, count, seconds))
            report.setdefault("viewers", []).append(row)
        if churn:
            say(f"{churn} visits")
            report["churn"] = asyncio.run(measure_churn(server, load, churn))
        if endurance:
            say(f"one stream, {endurance:g} s")
            asyncio.run(
                measure_endurance(
                    server, endurance_load or load, endurance, report.setdefault("endurance", {})
                )
            )
    finally:
        if process is not None and process.poll() is not None:
            raise ValueError(f"the server ended meanwhile, with exit code {process.returncode}")


def went_well(report: dict[str, Any]) -> bool:
    """Whether every viewer had frames and no error, and churn left nothing."""
    rows = [*report.get("viewers", ()), *(report.get(k, {}) for k in ("churn", "endurance"))]
    return not any(
        row.get("errors") or row.get("without_frames") or row.get("returned") is False
        for row in rows
    )


def write_text(report: dict[str, Any]) -> str:
    """The report in words and tables."""
    load = report["load"]
    parts = [
        "# Live streams under load",
        f"Viewers over real WebSockets, which confirm frames as they come. Played at"
        f" {load['fps']:g} frames per second by a simulated player that holds"
        f" {1000 * load['buffer_s']:g} ms back. Server: {report['server']}.",
    ]
    if report.get("viewers"):
        parts += [
            "## Viewers who watch together",
            VIEWERS_NOTES.format(every=switch_words(load["switch_every_s"])),
            markdown(viewer_table(report["viewers"])),
        ]
    if report.get("churn"):
        parts += ["## Viewers who come and go", *churn_text(report["churn"])]
    if report.get("endurance"):
        parts += ["## One stream for long", *endurance_text(report["endurance"])]
    return "\n\n".join(parts)


VIEWERS_NOTES = """\
Each has its own prompt and seed, and asks for another prompt {every}.

- *in time*: share of the frames that should have been shown and had come by then. A frame is due
  `1 / fps` after the one before; after a stall all are due later by as much;
- *stalled*: share of the time for which the player stood still;
- *age*: from when a chunk was finished to when its first frame came; *late age* is of each stream's
  last quarter, so a growing queue would show as a difference;
- *switch*: from sending a prompt to its first frame, and the chunks of the old one that came
  meanwhile. One that a later one overtakes is not seen before that one, and may be counted with
  it.
- *frames per second*: from asking for the stream to the end, of the viewer with the fewest and the
  one with the most."""


def switch_words(every_s: float | None) -> str:
    return "never" if every_s is None else f"every {every_s:g} s"


def viewer_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A column per number of viewers."""

    def ms(row: dict, name: str, *points: str) -> str:
        values = row[name]
        return " / ".join(f"{1000 * values[p]:.0f}" for p in points) if values else "-"

    lines = {
        "seconds": lambda r: f"{r['seconds']:g}",
        "first frame, ms (median / most)": lambda r: ms(r, "first_frame_s", "median", "most"),
        "first chunk, ms (median / most)": lambda r: ms(r, "first_chunk_s", "median", "most"),
        "between chunks, ms (p50 / p95 / p99)": lambda r: ms(r, "interval_s", *OWN),
        "in time (mean / worst viewer)": lambda r: f"{r['in_time']:.3f} / {r['in_time_worst']:.3f}",
        "stalls per minute and viewer": lambda r: f"{r['stalls_per_minute']:.2f}",
        "stalled": lambda r: f"{r['stalled']:.3f}",
        "frames per second (least / most)": lambda r: f"{r['fps_least']:.1f} / {r['fps_most']:.1f}",
        "age, ms (p50 / p95)": lambda r: ms(r, "age_s", "median", "p95"),
        "late age, ms (p50 / p95)": lambda r: ms(r, "late_age_s", "median", "p95"),
        "switch, ms (p50 / p95)": lambda r: ms(r, "switch_s", "median", "p95"),
        "switch, chunks (p50 / most)": lambda r: points(r["switch_chunks"], "median", "most"),
        "switches, asked / seen": lambda r: f"{r['switches_asked']} / {r['switches_seen']}",
        "frames left out": lambda r: str(r["dropped"]),
        "memory of the server, MB": lambda r: number(r["memory_mb"], 0),
        "its growth in the later half, MB per minute": lambda r: number(r["memory_growth_mb"], 2),
        "errors": lambda r: error_words(r["errors"]),
    }
    head = ["", *(plural(row["viewers"], "viewer") for row in rows)]
    return [head, *([name, *map(cell, rows)] for name, cell in lines.items())]


def churn_text(churn: dict[str, Any]) -> list[str]:
    """What is said of visits that end at random moments."""
    ways = ", ".join(f"{count} {words}" for words, count in sorted(churn["ends"].items()))
    verdict = "All came back to the start." if churn["returned"] else "NOT all came back."
    lines = [["", "before", "most", "after"]]
    for name in ("sessions", "waiting", "threads", "open_files"):
        lines.append([name.replace("_", " "), *(number(churn[k][name], 0) for k in MOMENTS)])
    for name in ("cache_bytes", "memory_bytes"):
        words = name.replace("_bytes", ", MB")
        lines.append([words, *(number(churn[k][name] / MB, 1) for k in MOMENTS)])
    return [
        f"{churn['visits']} visits in {churn['seconds']:.0f} s, {VISITORS} at once: {ways}."
        f" {verdict} Errors: {error_words(churn['errors'])}.",
        markdown(lines),
    ]


MOMENTS = ("before", "most", "after")


def endurance_text(long: dict[str, Any]) -> list[str]:
    """What is said of one long stream."""

    def row(name: str, values: Sequence[Any], digits: int, scale: float = 1.0) -> list[str]:
        return [name, *("-" if v is None else f"{scale * v:.{digits}f}" for v in values)]

    def point(name: str, which: str) -> list[float | None]:
        return [part and part[which] for part in long[name]]

    lines = [["", "first tenth", "last tenth"]]
    lines.append(row("model per chunk, ms (p50)", point("work_ms", "median"), 1))
    lines.append(row("model per chunk, ms (p99)", point("work_ms", "p99"), 1))
    lines.append(row("between chunks, ms (p50)", point("interval_s", "median"), 1, 1000))
    lines.append(row("between chunks, ms (p99)", point("interval_s", "p99"), 1, 1000))
    lines.append(row("memory of the server, MB", long["memory_mb"], 1))
    lines.append(row("caches, MB", long["cache_mb"], 2))
    return [
        f"{long['seconds']:.0f} s, {long['chunks']} chunks, {long['fps']:.1f} frames per second;"
        f" in its later half memory grew by {number(long['memory_growth_mb'], 2)} MB per minute,"
        f" {long['dropped']} frames were left out. Errors: {error_words(long['errors'])}.",
        markdown(lines),
    ]


def points(values: dict[str, float] | None, *names: str) -> str:
    return " / ".join(f"{values[name]:g}" for name in names) if values else "-"


def number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def plural(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")


def error_words(errors: dict[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in sorted(errors.items())) or "none"
