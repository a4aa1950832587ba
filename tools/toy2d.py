"""Distil small analytic teachers in the plane with every objective, and compare them.

    python tools/toy2d.py
    python tools/toy2d.py --only dmd,sid --targets ring,moons --seeds 0,1,2 --out runs/few.json
    python tools/toy2d.py --list

Finished runs are kept in --folder and skipped, so that the same command goes on where it was
stopped. Writes the report as JSON, as Markdown and as a picture beside it, and prints the table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path

from streamvid.command_line import Parser, run_tool, tell


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--only", help="objectives, comma-separated; by default all")
    parser.add_argument("--targets", help="ring, moons or prompts, comma-separated; by default all")
    parser.add_argument("--seeds", default="0", help="training seeds, comma-separated (default 0)")
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)"
    )
    parser.add_argument(
        "--folder", default="runs/toy2d", help="where finished runs are kept (default runs/toy2d)"
    )
    parser.add_argument("--out", default="runs/toy2d/report.json", help="the report, .json")
    parser.add_argument(
        "--quick", action="store_true", help="a few updates only: proves the wiring"
    )
    parser.add_argument(
        "--list", action="store_true", help="print all objectives with their papers, and stop"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_tool(
        lambda: compare(args),
        f"interrupted; the same command goes on from what is in {args.folder}",
    )


def compare(args: argparse.Namespace) -> None:
    from streamvid.objectives import all_objectives
    from streamvid.settings.targets import COVERAGE, TARGETS
    from streamvid.studies import plane_report as report
    from streamvid.studies.jobs import read_result, result_file
    from streamvid.studies.plane import (
        QUICK,
        Effort,
        baselines,
        for_target,
        load_start,
        plane_objectives,
        run_job,
    )
    from streamvid.video import ensure_place

    if args.list:
        for name, kind in all_objectives().items():
            print(f"{name:18} {kind.paper}  {(kind.__doc__ or '').splitlines()[0]}")
        return
    known = plane_objectives()
    names, targets = (
        chosen("--only", args.only, list(known)),
        chosen("--targets", args.targets, list(TARGETS)),
    )
    if not all(seed.strip().isdecimal() for seed in args.seeds.split(",")) or args.jobs < 1:
        raise ValueError(
            f"--seeds {args.seeds} --jobs {args.jobs}: expected numbers such as 0,1,2 and at least"
            " one job"
        )
    if Path(args.out).suffix != ".json":
        raise ValueError(f"--out {args.out}: the report is a .json file")
    ensure_place(args.out)
    folder, effort = (
        (Path(args.folder) / "quick", QUICK) if args.quick else (Path(args.folder), Effort())
    )
    folder.mkdir(parents=True, exist_ok=True)
    extra = [] if args.targets else list(COVERAGE)
    for target in [*targets, *extra]:
        load_start({**TARGETS, **COVERAGE}[target](), effort, folder)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    pairs = [(name, target) for name in names for target in targets]
    pairs += [
        (name, target) for name in names for target in extra if name == "dmd" or known[name].covers
    ]
    jobs = [(name, target, seed, folder, effort) for name, target in pairs for seed in seeds]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for index, line in enumerate(pool.imap_unordered(run_job, jobs), 1):
            tell(f"[{index}/{len(jobs)}] {line}")
    results = [
        result for target in targets for result in baselines(TARGETS[target](), effort, folder)
    ]
    files = [result_file(folder, *job[:3]) for job in jobs]
    results += [read_result(file) for file in files if file.exists()]
    made = {name: for_target(known[name], TARGETS["ring"]()) for name in names}
    print(report.write_report(Path(args.out), results, made))


def chosen(option: str, text: str | None, known: list[str]) -> list[str]:
    """The names of a comma-separated list, which must be known."""
    names = known if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {name}: expected some of {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
