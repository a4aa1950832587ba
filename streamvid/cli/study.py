"""Train and compare many students, unattended: what each objective is worth.

    streamvid study --suite methods
    streamvid study --suite methods --only dmd_4,asd --jobs 1
    streamvid study --suite methods --quick
    streamvid study --suite my_study.yaml --out my_study.json prompts=50 minutes_per_run=30

A suite is a file of configs/study, or a path. Writes a report as JSON, as Markdown and as a
picture. Finished runs are kept in --folder and in the report and skipped, an interrupted training
goes on from its checkpoint: the same command continues, with the report alone also on another
machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamvid.command_line import Parser, in_repository, names_of, run_tool, tell

QUICK = (
    "prompts=2",
    "max_steps=2",
    "max_seeds=1",
    "minutes_per_run=1",
    "long_times=2",
    "long_prompts=1",
)


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__, "study")
    options.add_argument(
        "--suite", default="methods", help="the study, a name or a file (default methods)"
    )
    options.add_argument("--only", help="variants, comma-separated; by default all")
    options.add_argument(
        "--redo", default="", help="variants whose trainings and results are thrown away first"
    )
    options.add_argument(
        "--jobs",
        type=int,
        default=2,
        help="runs at a time, of several each has one thread (default 2)",
    )
    options.add_argument(
        "--folder", help="where runs and results are kept (default runs/study/SUITE)"
    )
    options.add_argument("--out", help="the report, .json (default FOLDER/report.json)")
    options.add_argument(
        "--quick",
        action="store_true",
        help="two steps and one seed of each: proves the wiring in minutes",
    )
    options.add_argument(
        "--report", action="store_true", help="only write the report of what is finished"
    )
    options.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the study file's"
    )
    return options


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    return run_tool(lambda: study(args), "interrupted; the same command goes on")


def study(args: argparse.Namespace) -> int:
    """Run what is not finished, and write the report after each run; 1 if one of them failed."""
    from streamvid.studies.report import restore_results, write_report
    from streamvid.studies.study import TEACHER, all_jobs, find_unfinished, load_study
    from streamvid.video import ensure_place

    path = suite_file(args.suite)
    config = load_study(path, [*(QUICK if args.quick else ()), *args.overrides])
    folder = Path(args.folder or f"runs/study/{path.stem}")
    if args.quick:
        folder = folder / "quick"
    out = Path(args.out or folder / "report.json")
    if out.suffix != ".json":
        raise ValueError(f"--out {out}: the report is a .json file")
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} must be at least 1")
    ensure_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    ensure_place(out)
    jobs = all_jobs(config, path.parent, folder.absolute())
    variants = list(config.variants)
    only = names_of("--only", args.only, variants)
    redo = set(names_of("--redo", args.redo, variants)) if args.redo else set()
    for job in jobs:
        if job.name in redo:
            job.result_file.unlink(missing_ok=True)
            shutil.rmtree(job.run_dir, ignore_errors=True)
    kept = restore_results(out, jobs, redo)
    wanted = [job for job in jobs if job.name in (TEACHER, *only)]
    left: list[Any] = []
    if not args.report:
        left = find_unfinished(wanted, jobs, kept if args.only is None else set())
    num_failed = 0
    for index, line in enumerate(run_in_stages(left, args.jobs), 1):
        tell(f"[{index}/{len(left)}] {line}")
        num_failed += ": error: " in line
        write_report(out, config, jobs)
    print(write_report(out, config, jobs))
    return 1 if num_failed else 0


def suite_file(suite: str) -> Path:
    """The file of a suite, which is its path or its name in configs/study."""
    if suite.endswith((".yaml", ".yml")):
        return Path(suite)
    return in_repository(f"configs/study/{suite}.yaml")


def run_in_stages(jobs: list[Any], num_at_once: int) -> Iterator[str]:
    """A line about each run, as it ends; what starts from another's student comes second."""
    from streamvid.studies.study import forecast

    if not jobs:
        return
    hours, most = forecast(jobs, num_at_once)
    tell(
        f"{len(jobs)} runs to do, in about {hours:.1f} h on {num_at_once} threads, {most:.1f} at"
        " most"
    )
    yield from run_all([job for job in jobs if job.variant.after is None], num_at_once)
    yield from run_all([job for job in jobs if job.variant.after is not None], num_at_once)


def run_all(jobs: list[Any], num_at_once: int) -> Iterator[str]:
    """A line about each run, as it ends; several at once have a process and a thread each."""
    import torch

    from streamvid.studies.study import run_job

    if num_at_once == 1:
        yield from map(run_job, jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(num_at_once, torch.set_num_threads, (1,), maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(run_job, jobs)
        pool.close()
        pool.join()


def ensure_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ValueError("a study's picture needs matplotlib; run pip install 'streamvid[plots]'")


if __name__ == "__main__":
    sys.exit(main())
