"""Measure what things cost on this machine: streaming, and the terms of the loss core.

    streamvid bench --suite stream --out benchmarks/stream.json
    streamvid bench --suite stream --cases narrow --against diffusers,recompute --out stream.json
    streamvid bench --suite stream --student runs/tiny_dmd/student --steps 1,2,4 --out stream.json
    streamvid bench --suite losses --latent-shape 16x21x60x104 --out benchmarks/losses.json

Writes JSON and the same as Markdown beside it, with the machine, the versions and the command. All
figures are medians; what is compared is measured in turns in one run. `stream` takes CPU time of
one thread on a CPU, and the wall's on a GPU: of a student with its codec, of two layers of Wan 1.3B
and, on a GPU, of all of it, with random weights. `losses` gives forward and backward of each term
on a video latent [1, C, T, h, w], and its peak memory, as multiples of a plain MSE's.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

from streamvid.command_line import Parser, counts, names_of, run_tool, sides

MOST_NUMBERS = 10**9  # of the latent; each term keeps several of its size
COMPARED = ("diffusers", "self-forcing-style", "recompute")


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__, "bench")
    options.add_argument("--suite", choices=["stream", "losses"], required=True)
    options.add_argument(
        "--cases",
        help="stream: comma-separated: student, narrow, 1.3b, or one of their names such as"
        " 'narrow bf16 12/3'; by default all, 1.3b where there is a GPU",
    )
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
        help="stream: steps per chunk, comma-separated; by default the student's own, and 4",
    )
    options.add_argument(
        "--size",
        type=sides("HxW"),
        default=(64, 64),
        metavar="HxW",
        help="stream: height and width of the student's frames in pixels (default 64x64)",
    )
    options.add_argument(
        "--ages",
        type=counts,
        default=[10, 100, 1000],
        help="stream: chunks that a stream has been going for (default 10,100,1000)",
    )
    options.add_argument(
        "--against",
        help=f"stream: other ways to stream, comma-separated: {', '.join(COMPARED)}",
    )
    options.add_argument(
        "--engine", action="store_true", help="stream: the engine's options, one by one too"
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
        help="stream: of the student's transformer",
    )
    options.add_argument("--out", required=True, help="the report, .json")
    options.renamed("--frame-size", "--size HxW")
    options.renamed("--num-frames", "--repeats, chunks that are measured,")
    return options


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_tool(lambda: bench(args))


def bench(args: argparse.Namespace) -> None:
    """Measure a suite, and write and print its report."""
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
    compared = names_of("--against", args.against, COMPARED) if args.against else []
    ensure_place(args.out)
    device = choose_device(args.device)
    if args.suite == "losses":
        from streamvid.evaluation import bench_suites, report

        rows = bench_suites.losses((1, *args.latent_shape), device, args.repeats)
        print(report.write_bench(args.out, rows))
    else:
        measure_streams(args, compared, device)


def measure_streams(args: argparse.Namespace, compared: list[str], device: Any) -> None:
    """The suite ``stream``; the report is written anew after each case."""
    from streamvid.bench import report
    from streamvid.bench.cases import names_in
    from streamvid.bench.ceiling import matrix_ceiling
    from streamvid.bench.suite import against, aging, engine, pace
    from streamvid.bench.timing import one_thread

    names = names_in(args.cases, device.type == "cuda")
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in report.TITLES}
    with one_thread(device):
        ceiling = matrix_ceiling(device)
        text = ""
        for name in names:
            case = open_case(args, name, device)
            steps = args.steps or [case.config.num_steps]
            paced = [case.with_steps(n) for n in steps]
            tables["pace"] += [pace(each, ceiling, args.repeats) for each in paced]
            tables["aging"] += aging(case, args.ages)
            if args.engine:
                tables["engine"] += engine(paced[-1], args.repeats)
            if compared:
                tables["against"] += against(paced[-1], compared, args.repeats)
            text = report.write(args.out, ceiling, tables)
    print(text)


def open_case(args: argparse.Namespace, name: str, device: Any) -> Any:
    """The case of a name."""
    import torch

    from streamvid.bench.cases import STUDENT, geometry_case, student_case
    from streamvid.students.folder import TINY_STUDENT, load_student

    if name != STUDENT:
        return geometry_case(name, device)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    student = load_student(args.student or TINY_STUDENT, args.components, device, dtype)
    return student_case(student, args.size)


if __name__ == "__main__":
    sys.exit(main())
