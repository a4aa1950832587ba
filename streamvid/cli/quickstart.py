"""Distil the shipped causal start, stream it, and compare, in a few minutes.

    make quickstart            (or: streamvid quickstart)
    streamvid quickstart --minutes 2 --num-prompts 24

Writes runs/quickstart/: student/ (the distilled student), four streamed clips (.mp4),
contact_sheet.png (teacher, student before, student after; same prompts, same seeds), report.json
and report.md, and prints the table. Each time anew: what an earlier quickstart wrote is removed,
and nothing else.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from streamvid.command_line import Parser, in_repository, log_to_stderr, run_tool

REPORTS = ["contact_sheet.png", "report.json", "report.md"]
WRITTEN = ["checkpoints", "student", "exported.json", "metrics.jsonl", *REPORTS, "config.yaml"]
NUM_FRAMES = 33
LATENT_FRAMES = 9  # of a clip of NUM_FRAMES
TEACHER_STEPS = 50
GUIDANCE = 2.0


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__, "quickstart")
    options.add_argument("--minutes", type=float, default=4.0, help="of training (default 4)")
    options.add_argument(
        "--num-prompts", type=int, default=48, help="held-out prompts to score (default 48)"
    )
    options.add_argument("--output-dir", type=Path, default=Path("runs"))
    options.renamed("--prompts", "--num-prompts N")
    return options


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    log_to_stderr()
    return run_tool(
        lambda: run(args.minutes, args.num_prompts, args.output_dir),
        "interrupted; the same command begins anew",
    )


def run(minutes: float, num_prompts: int, output_dir: Path) -> None:
    from streamvid.experiment.build import build_trainer
    from streamvid.experiment.config import load_run

    if num_prompts < 1:
        raise ValueError(f"--num-prompts={num_prompts}, expected at least 1")
    config = load_run(
        in_repository("configs/run/quickstart.yaml"),
        [f"train.max_minutes={minutes}", f"train.output_dir={output_dir}"],
    )
    run_dir = output_dir / config.train.name
    clear(run_dir)
    evaluation_s = 3 + num_prompts * 2.0
    print(
        f"Distilling for {minutes:g} minutes, then about {evaluation_s / 60:.0f} minutes of"
        " sampling and scoring."
    )
    started = time.monotonic()
    build_trainer(config).train()
    print(
        f"Trained in {time.monotonic() - started:.0f} s. Sampling {num_prompts} held-out prompts."
    )
    compare(run_dir, num_prompts)
    print(f"Everything is in {run_dir}/, after {(time.monotonic() - started) / 60:.1f} minutes.")


def clear(run_dir: Path) -> None:
    """Remove what an earlier quickstart wrote into its folder.

    Raises:
        ValueError: if the folder holds something and is no run, or one that is being trained;
            nothing is removed then.
    """
    from streamvid.training.launch import LOCK_FILE, RunLock

    entries = {path.name for path in run_dir.iterdir()} - {LOCK_FILE} if run_dir.is_dir() else set()
    if not entries:
        return
    if "config.yaml" not in entries:
        held = f"{run_dir} holds {min(entries)} and no config.yaml"
        raise ValueError(f"{held}, so it is no run of quickstart; name another --output-dir")
    lock = RunLock(run_dir)
    for path in [run_dir / name for name in WRITTEN] + sorted(run_dir.glob("clip_[0-3].mp4")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    lock.release()


def compare(run_dir: Path, num_prompts: int) -> None:
    """Clips, the contact sheet and the table of teacher, student before and student after."""
    from streamvid.evaluation.report import result_row, table, write_report
    from streamvid.evaluation.runs import (
        held_out_prompts,
        make_clips,
        measure_cost,
        score_clips,
    )
    from streamvid.evaluation.world_score import mean_scores
    from streamvid.rollout.runner import student_runner, teacher_runner
    from streamvid.students.folder import TINY_START, TINY_TEACHER, load_student
    from streamvid.teachers.wan import WanTeacher
    from streamvid.video import contact_sheet, write_video

    before, after = load_student(TINY_START), load_student(run_dir / "student")
    teacher = WanTeacher.from_pretrained(TINY_TEACHER)
    prompts = held_out_prompts(num_prompts)
    cond = teacher.encode_prompt(prompts)
    runners = [
        teacher_runner("teacher", teacher, TEACHER_STEPS, GUIDANCE, LATENT_FRAMES),
        student_runner("student before", before.transformer, before.stream),
        student_runner("student after", after.transformer, after.stream),
    ]
    clips, rows, reference = {}, [], None
    for runner in runners:
        clips[runner.label] = make_clips(runner, before.codec, cond, range(num_prompts), NUM_FRAMES)
        cost = measure_cost(runner, before.codec, cond[:1], NUM_FRAMES)
        reference = reference or cost
        rows.append(
            result_row(
                runner.label,
                [mean_scores(score_clips(clips[runner.label], prompts))],
                cost,
                reference,
            )
        )
    shown = min(4, num_prompts)
    for index in range(shown):
        write_video(clips["student after"][index], run_dir / f"clip_{index}.mp4", 16)
    groups = [
        (prompts[i], [(label, each[i]) for label, each in clips.items()]) for i in range(shown)
    ]
    contact_sheet(groups, run_dir / "contact_sheet.png")
    write_report(run_dir / "report.json", rows)
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
