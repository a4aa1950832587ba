"""Measure and check what we want to know of a GPU.

Machine, correctness, speed, memory and training turns, in one command:

    streamvid gpu-check --out runs/gpu.json
    streamvid gpu-check --parts machine,stream_1.3b --out runs/gpu.json
    streamvid gpu-check --tiny --out runs/rehearsal.json

Needs no checkpoint and no network: weights are random. Each part runs in a process of its own with
its own time limit, so that a failure loses no other part; the report and its Markdown are rewritten
after each. --tiny rehearses all parts on the CPU at small sizes. Exits with 1 if a part was not
whole.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from streamvid.command_line import Parser, run_tool


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__, "gpu-check")
    options.add_argument("--parts", help="comma-separated; by default all")
    options.add_argument(
        "--minutes",
        type=float,
        default=7.0,
        help="for all; parts that find no time are skipped (default 7)",
    )
    options.add_argument("--tiny", action="store_true", help="a rehearsal on the CPU")
    options.add_argument(
        "--out", default="runs/gpu.json", help="the report, .json (default runs/gpu.json)"
    )
    options.add_argument(
        "--list", action="store_true", help="name the parts and their time limits, and end"
    )
    return options


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_tool(lambda: check(args))


def check(args: argparse.Namespace) -> int:
    from streamvid.gpu_check.check import chosen, run_parts

    parts = chosen(args.parts)
    if args.list:
        print("\n".join(f"{part.name:14}{part.limit_s:4.0f} s" for part in parts))
        return 0
    if not args.out.endswith(".json"):
        raise ValueError(f"--out {args.out}: the report is a .json file")
    if args.minutes <= 0:
        raise ValueError(f"--minutes {args.minutes:g} must be above 0")
    results = run_parts(parts, Path(args.out).absolute(), args.minutes, args.tiny)
    print(f"\nwritten to {args.out}")
    return 0 if all(result.status == "ok" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
