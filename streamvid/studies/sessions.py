"""What it brings to advance several live sessions as one batch, against one after another. A
Markdown table is written beside the JSON file.

    python -m streamvid.studies.sessions --out benchmarks/sessions.json

All sessions have other prompts and seeds and full windows, the state that a stream is in for nearly
all of its life. A round makes the next chunk of each session, decoded, once one after another and
once as a batch; which comes first changes from round to round, so that both meet the same load.

- *frames per second*: of all sessions together, from the median round;
- *ratio*: median over the rounds of the time one after another by that of the batch;
- *ratio of CPU time*: the same of the process's time on the processor, on which other processes
  have no part; on a CPU only;
- *difference*: the largest one in a pixel, in [0, 1], between a chunk made in a batch and one made
  alone from the same state.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from streamvid.command_line import Parser, counts, run_tool, say, sides
from streamvid.data.world import caption, sample_spec
from streamvid.files import atomic_file
from streamvid.reports import environment
from streamvid.rollout.sampler import now_s
from streamvid.students.batch import Batch
from streamvid.students.folder import TINY_STUDENT, Student, choose_device, load_student
from streamvid.students.session import Session, SessionChunk

FIRST_SEED = 7_000_000
WARM_ROUNDS = 1


def measure_sessions(
    student: Student, num_sessions: int, rounds: int, height: int, width: int
) -> dict[str, Any]:
    """Times of so many sessions, in seconds per round, and their difference."""
    device = next(student.transformer.parameters()).device
    sessions = [
        Session(student, caption(sample_spec(seed), seed), seed=seed, height=height, width=width)
        for seed in range(FIRST_SEED, FIRST_SEED + num_sessions)
    ]
    fill = (student.stream.window_frames or 0) // student.stream.chunk_frames + 1
    chunks = [make_joined(sessions) for _ in range(fill)][-1]
    seconds: dict[str, list[float]] = {"alone": [], "batch": []}
    cpu_seconds: dict[str, list[float]] = {"alone": [], "batch": []}
    ways = {"alone": make_alone, "batch": make_joined}
    for number in range(WARM_ROUNDS + rounds):
        for name in sorted(ways, reverse=bool(number % 2)):
            started, cpu_started = now_s(device), time.process_time()
            ways[name](sessions)
            if number >= WARM_ROUNDS:
                seconds[name].append(now_s(device) - started)
                cpu_seconds[name].append(time.process_time() - cpu_started)
    twins = [session.branch() for session in sessions]
    pairs = zip(make_alone(twins), make_joined(sessions), strict=True)
    frames = chunks[0].frames.shape[1] * num_sessions
    return {
        "sessions": num_sessions,
        "seconds": seconds,
        "frames_per_second": {
            name: frames / statistics.median(measured) for name, measured in seconds.items()
        },
        "ratio": median_ratio(seconds),
        "cpu_ratio": median_ratio(cpu_seconds) if device.type == "cpu" else None,
        "difference": max(float((a.frames - b.frames).abs().max()) for a, b in pairs),
    }


def median_ratio(seconds: dict[str, list[float]]) -> float:
    """How many times as long the rounds one after another take."""
    return statistics.median(a / b for a, b in zip(seconds["alone"], seconds["batch"]))


def make_alone(sessions: Sequence[Session]) -> list[SessionChunk]:
    """The next chunk of each, one after another."""
    return [session.next_chunk() for session in sessions]


def make_joined(sessions: Sequence[Session]) -> list[SessionChunk]:
    """The next chunk of each, as one batch."""
    made: dict[Session, Any] = {}
    batch = Batch(sessions)
    while batch:
        made |= dict(batch.step())
    for outcome in made.values():
        if isinstance(outcome, Exception):
            raise outcome
    return [made[session] for session in sessions]


def markdown(report: dict[str, Any]) -> str:
    """The report's table, in words that need no JSON."""
    heads = ["sessions", "frames per second, one after another", "as a batch", "ratio"]
    heads += ["ratio of CPU time", "difference"]
    lines = ["# Sessions in a batch", "", __doc__.partition("\n\n")[2].partition("\n\n")[2].strip()]
    lines += ["", f"Student: {report['student']}. Settings: {report['settings']}.", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in report["table"]:
        rate = row["frames_per_second"]
        cells = [str(row["sessions"]), f"{rate['alone']:.0f}", f"{rate['batch']:.0f}"]
        cells += [f"{row['ratio']:.2f}"]
        cells += ["-" if row["cpu_ratio"] is None else f"{row['cpu_ratio']:.2f}"]
        cells += [f"{row['difference']:.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    where = report["environment"]
    machine = ", ".join(f"{name} {where[name]}" for name in sorted(where) if name != "command")
    return "\n".join([*lines, "", f"{machine}.", "", f"Command: `{where['command']}`", ""])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out", required=True, help="a .json file; the .md is written beside it")
    parser.add_argument("--student", help="a student folder; by default the shipped student")
    parser.add_argument("--components", help="of a student that lacks its codec or text encoder")
    parser.add_argument(
        "--sessions",
        type=counts,
        default=[1, 2, 4, 8],
        help="numbers of sessions (default 1,2,4,8)",
    )
    parser.add_argument("--rounds", type=int, default=7, help="of each (default 7)")
    parser.add_argument("--size", type=sides("HxW"), default=(64, 64), metavar="HxW")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    parser.add_device()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_tool(lambda: study(args))


def study(args: argparse.Namespace) -> None:
    """Measure each number of sessions, and write the report."""
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}, expected at least 1")
    out = Path(args.out)
    if out.suffix != ".json":
        raise ValueError(f"--out {out}, expected a .json file")
    device = choose_device(args.device)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    student = load_student(args.student or TINY_STUDENT, args.components, device, dtype)
    height, width = args.size
    begun = time.monotonic()
    table = [
        measure_sessions(student, num_sessions, args.rounds, height, width)
        for num_sessions in tqdm(args.sessions, desc="sessions")
    ]
    command = shlex.join(["python", "-m", "streamvid.studies.sessions", *sys.argv[1:]])
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    report = {
        "student": args.student or "the shipped tiny student",
        "settings": (
            f"{student.stream.num_steps} steps per chunk, {height} x {width}, {args.dtype},"
            f" {device.type}{threads}, medians of {args.rounds} rounds"
        ),
        "table": table,
        "environment": {**environment(), "command": command},
    }
    with atomic_file(out) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    with atomic_file(out.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(report))
    say(f"wrote {out} and {out.with_suffix('.md')} in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
