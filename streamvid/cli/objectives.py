"""Train every objective on the world from one start, and compare them.

    streamvid objectives --updates 60 --out benchmarks/objectives.json
    streamvid objectives --updates 40 --longer 200
    streamvid objectives --only sid,cd --updates 200 --jobs 1
    streamvid objectives --report

Each run is a training of configs/run/tiny_objective.yaml with one objective, and the score of its
student on held-out prompts beside that of the start. Clips and the teacher's pairs are made first,
if they are not there. Finished runs are kept in --folder and skipped, so that the same command goes
on where it was stopped. Writes the report as JSON and as Markdown beside it, and prints it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from streamvid.command_line import Parser, names_of, run_tool, tell

if TYPE_CHECKING:
    from streamvid.studies.objectives import Job

RUN_FILE = Path(__file__).parents[2] / "configs" / "run" / "tiny_objective.yaml"
NUM_PAIRS = 128


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__, "objectives")
    options.add_argument("--only", help="objectives, comma-separated; by default all")
    options.add_argument(
        "--updates", type=int, default=60, help="of the student, in each run (default 60)"
    )
    options.add_argument(
        "--longer",
        type=int,
        help="updates in a second run of the objectives that do not improve the start",
    )
    options.add_argument(
        "--num-prompts", type=int, default=32, help="held-out prompts of a score (default 32)"
    )
    options.add_argument("--seed", type=int, default=0, help="of training (default 0)")
    options.add_runs("runs/objectives")
    options.add_argument(
        "--plane",
        default="benchmarks/toy2d.json",
        help="report of `streamvid toy2d`, shown beside (default benchmarks/toy2d.json)",
    )
    options.add_argument(
        "--report", action="store_true", help="only write the report of what is finished"
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
    from streamvid.shipped import TINY_START
    from streamvid.studies.objectives import (
        Job,
        finished,
        improved,
        read_plane,
        score_start,
        video_objectives,
        write_report,
    )
    from streamvid.video import ensure_place

    for name in ("updates", "longer", "num_prompts", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(args, name)}, expected at least 1")
    if Path(args.out).suffix != ".json":
        raise ValueError(f"--out {args.out}: the report is a .json file")
    if not RUN_FILE.is_file():
        raise ValueError(f"{RUN_FILE.name} is not installed; run this command from a clone")
    folder = Path(args.folder)
    names = names_of("--only", args.only, list(video_objectives()))
    jobs = [
        Job(name, args.seed, args.updates, args.num_prompts, RUN_FILE, folder) for name in names
    ]
    folder.mkdir(parents=True, exist_ok=True)
    ensure_place(args.out)
    if not args.report:
        make_pairs(folder / "trajectories")
        run_jobs(jobs, args.jobs)
    start = score_start(jobs, TINY_START)
    longer = []
    if args.longer:
        better = improved(finished(jobs), start)
        left = [job for job in jobs if job.name not in better and job.kind.role == "complete"]
        longer = [replace(job, updates=args.longer) for job in left]
        if not args.report:
            run_jobs(longer, args.jobs)
    plane = read_plane(Path(args.plane))
    print(write_report(Path(args.out), jobs, start, plane, longer))


def run_jobs(jobs: list[Job], processes: int) -> None:
    """Train and score what is not finished, so many at once."""
    from streamvid.studies.objectives import remove_checkpoints, run_job

    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for index, line in enumerate(pool.imap_unordered(run_job, jobs), 1):
            tell(f"[{index}/{len(jobs)}] {line}")
    remove_checkpoints(jobs)


def make_pairs(folder: Path) -> None:
    """Pairs of noise and the guided teacher's clip, if they are not there."""
    from streamvid.cli import trajectories

    options = {
        "--out": folder,
        "--num-clips": NUM_PAIRS,
        "--steps": 24,
        "--student-steps": 1,
        "--student-shift": 8,
        "--guidance": 2,
    }
    words = [str(word) for option in options.items() for word in option]
    if trajectories.main(words):
        raise ValueError(f"the pairs in {folder} could not be made; see above")


if __name__ == "__main__":
    sys.exit(main())
