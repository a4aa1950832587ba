"""Train and compare many students, unattended: what each method is worth.

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
from pathlib import Path

from streamvid.command_line import Parser, run_tool, tell

SUITES = Path(__file__).parents[2] / "configs" / "study"
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
    from streamvid.studies.report import restore_results, write_report
    from streamvid.studies.study import TEACHER, all_jobs, find_unfinished, forecast, load_study
    from streamvid.video import ensure_place

    path = (
        Path(args.suite)
        if args.suite.endswith((".yaml", ".yml"))
        else SUITES / f"{args.suite}.yaml"
    )
    config = load_study(path, [*(QUICK if args.quick else ()), *args.overrides])
    folder = Path(args.folder or f"runs/study/{path.stem}") / ("quick" if args.quick else "")
    out = Path(args.out or folder / "report.json")
    if out.suffix != ".json" or args.jobs < 1:
        raise ValueError(
            f"--out {out} --jobs {args.jobs}: the report is a .json file, and there is at least"
            " one job"
        )
    ensure_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    ensure_place(out)
    jobs = all_jobs(config, path.parent, folder.absolute())
    names = names_of("only", args.only, config) or list(config.variants)
    redo = set(names_of("redo", args.redo, config))
    for job in jobs:
        if job.name in redo:
            job.result_file.unlink(missing_ok=True)
            shutil.rmtree(job.run_dir, ignore_errors=True)
    kept = restore_results(out, jobs, redo)
    wanted = [job for job in jobs if job.name in (TEACHER, *names)]
    left = (
        [] if args.report else find_unfinished(wanted, jobs, kept if args.only is None else set())
    )
    failed = []
    if left:
        hours, most = forecast(left, args.jobs)
        tell(
            f"{len(left)} runs to do, in about {hours:.1f} h on {args.jobs} threads, {most:.1f} at"
            " most"
        )
        stages = [
            [job for job in left if (job.variant.after is None) is first] for first in (True, False)
        ]
        for index, line in enumerate(
            (line for stage in stages for line in done(stage, args.jobs)), 1
        ):
            tell(f"[{index}/{len(left)}] {line}")
            failed += [line] if ": error: " in line else []
            write_report(out, config, jobs)
    print(write_report(out, config, jobs))
    return 1 if failed else 0


def names_of(option: str, value: str | None, config) -> list[str]:
    """Variants that an option names."""
    names = [name.strip() for name in value.split(",")] if value else []
    for name in names:
        if name not in config.variants:
            raise ValueError(f"--{option} {name}: expected some of {', '.join(config.variants)}")
    return names


def done(jobs: list, num_at_once: int):
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
