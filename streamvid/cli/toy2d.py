"""Compare all objectives in the plane, on small analytic teachers.

    streamvid toy2d
    streamvid toy2d --only dmd,sid --targets ring,moons --seeds 0,1,2 --out runs/few.json
    streamvid toy2d --list

Finished runs are kept in --folder and skipped, so that the same command goes on where it was
stopped. Writes the report as JSON, as Markdown and as a picture beside it, and prints the table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path

from streamvid.command_line import Parser, names_of, run_tool, seeds, tell


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__, "toy2d")
    options.add_argument("--only", help="objectives, comma-separated; by default all")
    options.add_argument(
        "--targets", help="ring, moons or prompts, comma-separated; by default all"
    )
    options.add_argument(
        "--seeds", type=seeds, default=[0], help="of training, such as 0,1,2 or 0-9 (default 0)"
    )
    options.add_runs("runs/toy2d")
    options.add_argument(
        "--quick", action="store_true", help="a few updates only: proves the wiring"
    )
    options.add_argument(
        "--list", action="store_true", help="print all objectives with their papers, and stop"
    )
    return options


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_tool(
        lambda: compare(args),
        f"interrupted; the same command goes on from what is in {args.folder}",
    )


def compare(args: argparse.Namespace) -> None:
    """Run what is not finished, and write and print the report."""
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
    names = names_of("--only", args.only, list(known))
    targets = names_of("--targets", args.targets, list(TARGETS))
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} must be at least 1")
    if Path(args.out).suffix != ".json":
        raise ValueError(f"--out {args.out}: the report is a .json file")
    ensure_place(args.out)
    folder = Path(args.folder)
    effort = Effort()
    if args.quick:
        folder = folder / "quick"
        effort = QUICK
    folder.mkdir(parents=True, exist_ok=True)
    extra = [] if args.targets else list(COVERAGE)
    for target in [*targets, *extra]:
        load_start({**TARGETS, **COVERAGE}[target](), effort, folder)
    pairs = [(name, target) for name in names for target in targets]
    pairs += [
        (name, target) for name in names for target in extra if name == "dmd" or known[name].covers
    ]
    jobs = [(name, target, seed, folder, effort) for name, target in pairs for seed in args.seeds]
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


if __name__ == "__main__":
    sys.exit(main())
