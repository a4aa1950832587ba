"""Measure what things cost on this machine: streaming, and the terms of the loss core.

    python tools/bench.py --suite stream --out benchmarks/stream.json python tools/bench.py --suite
    stream --student runs/tiny_dmd/student --steps 1,2,4 --num-frames 321 --out stream.json python
    tools/bench.py --suite losses --size 16 21 60 104 --out benchmarks/losses.json

Writes JSON and the same as Markdown beside it, with the machine, the versions and the command. All
figures are medians; what is compared is measured in turns in one run. `losses` gives forward and
backward of each term on a video latent [1, C, T, h, w], and its peak memory, as multiples of a
plain MSE's.
"""

from __future__ import annotations

import argparse
import math
import sys

from streamvid.command_line import Parser, run_tool

MOST_NUMBERS = 10**9  # of the latent; each term keeps several of its size


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--suite", choices=["stream", "losses"], required=True)
    parser.add_argument(
        "--student", help="stream: a student folder; by default the shipped student"
    )
    parser.add_argument(
        "--components",
        help="stream: folder of vae/ and text_encoder/ for a student that lacks them",
    )
    parser.add_argument(
        "--steps", help="stream: steps a chunk, comma-separated; by default the student's own"
    )
    parser.add_argument(
        "--num-frames", type=int, default=129, help="stream: pixel frames of a stream (default 129)"
    )
    parser.add_argument(
        "--frame-size",
        type=int,
        nargs=2,
        default=(64, 64),
        metavar=("HEIGHT", "WIDTH"),
        help="stream: in pixels",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=4,
        default=(16, 21, 60, 104),
        metavar=("C", "T", "h", "w"),
        help="losses: of the latent; the default is a 5 s clip of Wan at 480p",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="rounds whose median is taken (default 5)"
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu (default), cuda, or auto: a GPU where there is one"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="stream: of the transformer",
    )
    parser.add_argument("--out", required=True, help="the report, .json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_tool(lambda: bench(args))


def bench(args: argparse.Namespace) -> None:
    import torch

    from streamvid.evaluation import bench_suites, report
    from streamvid.students.folder import choose_device
    from streamvid.video import ensure_place

    if not args.out.endswith(".json"):
        raise ValueError(f"--out {args.out}: the report is a .json file")
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats} must be at least 1")
    if args.repeats > 10_000:
        raise ValueError(f"--repeats {args.repeats} must be at most 10,000")
    if not all(1 <= side <= 100_000 for side in args.size) or math.prod(args.size) > MOST_NUMBERS:
        raise ValueError(
            f"--size {' '.join(map(str, args.size))}: expected sides of at least 1 and at most"
            f" {MOST_NUMBERS:,} numbers"
        )
    ensure_place(args.out)
    device = choose_device(args.device)
    if args.suite == "losses":
        rows = bench_suites.losses((1, *args.size), device, args.repeats)
    else:
        from streamvid.students.folder import TINY_STUDENT, load_student

        student = load_student(
            args.student or TINY_STUDENT, args.components, device, getattr(torch, args.dtype)
        )
        steps = [student.stream.num_steps] if args.steps is None else read_steps(args.steps)
        rows = bench_suites.streams(
            student, steps, args.num_frames, tuple(args.frame_size), device, args.repeats
        )
    print(report.write_bench(args.out, rows))


def read_steps(text: str) -> list[int]:
    if not all(
        part.strip().isdecimal() and len(part) < 10 and int(part) for part in text.split(",")
    ):
        raise ValueError(f"--steps {text}: expected numbers such as 1,2,4")
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
