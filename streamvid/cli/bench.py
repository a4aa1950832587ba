"""Measure what things cost on this machine: streaming, and the terms of the loss core.

    streamvid bench --suite stream --out benchmarks/stream.json
    streamvid bench --suite stream --student runs/tiny_dmd/student --steps 1,2,4 --out stream.json
    streamvid bench --suite losses --latent-shape 16x21x60x104 --out benchmarks/losses.json

Writes JSON and the same as Markdown beside it, with the machine, the versions and the command. All
figures are medians; what is compared is measured in turns in one run. `losses` gives forward and
backward of each term on a video latent [1, C, T, h, w], and its peak memory, as multiples of a
plain MSE's.
"""

from __future__ import annotations

import argparse
import math
import sys

from streamvid.command_line import Parser, counts, run_tool, sides

MOST_NUMBERS = 10**9  # of the latent; each term keeps several of its size


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__, "bench")
    options.add_argument("--suite", choices=["stream", "losses"], required=True)
    options.add_argument(
        "--student", help="stream: a student folder; by default the shipped student"
    )
    options.add_argument(
        "--components",
        help="stream: folder of vae/ and text_encoder/ for a student that lacks them",
    )
    options.add_argument(
        "--steps",
        type=counts,
        help="stream: steps per chunk, comma-separated; by default the student's own",
    )
    options.add_argument(
        "--num-frames", type=int, default=129, help="stream: pixel frames of a stream (default 129)"
    )
    options.add_argument(
        "--size",
        type=sides("HxW"),
        default=(64, 64),
        metavar="HxW",
        help="stream: height and width of a frame in pixels (default 64x64)",
    )
    options.add_argument(
        "--latent-shape",
        type=sides("CxTxHxW"),
        default=(16, 21, 60, 104),
        metavar="CxTxHxW",
        help="losses: of the latent; the default, 16x21x60x104, is a 5 s clip of Wan at 480p",
    )
    options.add_argument(
        "--repeats", type=int, default=5, help="rounds whose median is taken (default 5)"
    )
    options.add_device()
    options.add_argument(
        "--dtype",
        choices=["float32", "bf16"],
        default="float32",
        help="stream: of the transformer",
    )
    options.add_argument("--out", required=True, help="the report, .json")
    options.renamed("--frame-size", "--size HxW")
    return options


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_tool(lambda: bench(args))


def bench(args: argparse.Namespace) -> None:
    """Measure a suite, and write and print its report."""
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
    if math.prod(args.latent_shape) > MOST_NUMBERS:
        shape = "x".join(map(str, args.latent_shape))
        raise ValueError(f"--latent-shape {shape}: expected at most {MOST_NUMBERS:,} numbers")
    ensure_place(args.out)
    device = choose_device(args.device)
    if args.suite == "losses":
        rows = bench_suites.losses((1, *args.latent_shape), device, args.repeats)
    else:
        from streamvid.students.folder import TINY_STUDENT, load_student

        dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        student = load_student(args.student or TINY_STUDENT, args.components, device, dtype)
        steps = args.steps or [student.stream.num_steps]
        rows = bench_suites.streams(
            student, steps, args.num_frames, args.size, device, args.repeats
        )
    print(report.write_bench(args.out, rows))


if __name__ == "__main__":
    sys.exit(main())
