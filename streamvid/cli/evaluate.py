"""Score students, and a teacher, on held-out prompts of the verifiable world.

    streamvid evaluate --suite world --out report.json
    streamvid evaluate --student runs/tiny_dmd/student --seeds 0,1,2 --long 10 --out report.json
    streamvid evaluate --student A --student B --label before --label after --out report.json

Writes a report (JSON, Markdown, contact sheet) and prints its table: forwards + commits of the
student per clip, work (latent frames pushed through the transformer; a guided teacher counts
twice), times (medians at batch 1), and the speed-up of a whole clip, decoding included, over the
first teacher row. The first row is the true clips after the codec.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamvid.command_line import Parser, counts, run_tool, seeds
from streamvid.printing import printable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from streamvid.codecs.base import VideoCodec
    from streamvid.rollout.runner import Runner
    from streamvid.students.folder import Student

NUM_SHOWN = 4


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__, "evaluate", may_be_empty=["teacher_steps"])
    options.add_argument("--suite", choices=["world"], default="world")
    options.add_argument(
        "--student",
        action="append",
        help="a student folder, may be repeated; default: start and student as shipped",
    )
    options.add_argument(
        "--label",
        action="append",
        help="name of a student in the report, one per --student; default: its folder and steps",
    )
    options.add_argument(
        "--components",
        help="folder of vae/, text_encoder/ and tokenizer/ for students that lack them",
    )
    options.add_argument("--teacher", help="a teacher folder; default: the shipped one")
    options.add_argument(
        "--teacher-steps",
        type=lambda text: counts(text) if text else [],
        default=[50],
        help="Euler steps, comma-separated (default 50; '' leaves it out)",
    )
    options.add_argument("--guidance", type=float, default=2.0, help="of the teacher (default 2)")
    options.add_argument(
        "--num-prompts", type=int, default=200, help="number of held-out prompts (default 200)"
    )
    options.add_argument(
        "--seeds",
        type=seeds,
        default=[0],
        help="of the students' noise, such as 0,1,2 or 0-9 (default 0)",
    )
    options.add_argument("--num-frames", type=int, default=33)
    options.add_argument(
        "--long",
        type=int,
        default=0,
        metavar="K",
        help="also stream K times as long, scored by windows",
    )
    options.add_argument(
        "--num-long-prompts", type=int, default=40, help="prompts of the long streams (default 40)"
    )
    options.add_argument(
        "--card", action="store_true", help="also write the scores into each student's model card"
    )
    options.add_device()
    options.add_argument("--out", required=True, help="the report, .json")
    options.renamed("--prompts", "--num-prompts N")
    options.renamed("--long-prompts", "--num-long-prompts N")
    return options


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_tool(lambda: evaluate(args), "interrupted; nothing was written")


def check(args: argparse.Namespace) -> None:
    """What can be found wrong before anything is loaded."""
    from streamvid.video import ensure_place

    if Path(args.out).suffix != ".json" or Path(args.out).is_dir():
        raise ValueError(f"--out {args.out}: the report is a .json file")
    ensure_place(args.out)
    for name, least in {"num_prompts": 1, "long": 0, "num_long_prompts": 1}.items():
        if getattr(args, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}"
            )
    labels = args.label or []
    if labels and (len(labels) != len(args.student or ()) or len(set(labels)) < len(labels)):
        raise ValueError(
            f"--label {' '.join(labels)}: give each of the {len(args.student or ())} --student one"
            " of its own"
        )


@dataclass(frozen=True)
class Job:
    """A model to score, with what it needs."""

    runner: Runner
    codec: VideoCodec
    cond: Tensor  # [B, L, D], one per prompt
    seeds: list[int]


def evaluate(args: argparse.Namespace) -> None:
    """Score all models, and write and print the report."""
    from streamvid.evaluation import report, runs
    from streamvid.rollout.runner import student_runner
    from streamvid.students.card import add_scores
    from streamvid.students.folder import choose_device, load_student
    from streamvid.video import contact_sheet

    check(args)
    out = Path(args.out)
    prompts = runs.held_out_prompts(args.num_prompts)
    device = choose_device(args.device)
    paths = student_folders(args)
    students = [load_student(path, args.components, device) for path in paths]
    teacher_jobs = teachers_of(args, prompts, device) if args.teacher_steps else []
    jobs = teacher_jobs + [
        Job(
            student_runner(label, student.transformer, student.stream),
            student.codec,
            student.prompts.encode(prompts).to(device),
            args.seeds,
        )
        for label, student in zip(labels_of(args, students), students)
    ]
    # also finds what can't run
    costs = [
        runs.measure_cost(job.runner, job.codec, job.cond[:1], args.num_frames) for job in jobs
    ]
    long = score_long_streams(args, jobs, prompts) if args.long else []
    true_clips = runs.reconstructed_clips(jobs[0].codec, args.num_prompts, args.num_frames)
    true_scores = mean_scores_of(true_clips, prompts)
    truth = report.result_row("true clips", [true_scores], None)
    rows: list[dict[str, Any]] = []
    shown = [("true clips", true_clips[:NUM_SHOWN])]
    for job, cost in zip(jobs, costs):
        scores, first = score(job, prompts, args.num_frames)
        reference = costs[0] if teacher_jobs else None
        reference_overall = rows[0]["scores"]["overall"] if teacher_jobs and rows else None
        rows.append(report.result_row(job.runner.label, scores, cost, reference, reference_overall))
        shown.append((job.runner.label, first))
        print(report.table(rows[-1:]), file=sys.stderr)
    groups = [
        (prompts[i], [(label, clips[i]) for label, clips in shown])
        for i in range(min(NUM_SHOWN, len(prompts)))
    ]
    contact_sheet(groups, out.with_suffix(".png"))
    report.write_report(out, rows, truth, long)
    if args.card:
        for path, row in zip(paths, rows[len(teacher_jobs) :]):
            told = f"{args.num_prompts} held-out prompts of the verifiable world"
            add_scores(path, row["scores"], [f"{told}, {row['seeds']} noise seeds"])
    print(report.table([truth, *rows]))
    if long:
        print(report.window_table(long))


def student_folders(args: argparse.Namespace) -> list[str | Path]:
    """The folders that are scored."""
    from streamvid.students.folder import TINY_START, TINY_STUDENT

    return args.student or [TINY_START, TINY_STUDENT]


def labels_of(args: argparse.Namespace, students: list[Student]) -> list[str]:
    """What each student is called in the report."""
    if args.label:
        return [printable(label) for label in args.label]
    folders = args.student or ["start", "student"]
    return [
        printable(f"{folder}, {student.stream.num_steps} steps")
        for folder, student in zip(folders, students)
    ]


def teachers_of(args: argparse.Namespace, prompts: list[str], device: torch.device) -> list[Job]:
    """The teacher at each of its numbers of steps."""
    from streamvid.codecs.base import latent_frames_of
    from streamvid.codecs.load import open_codec
    from streamvid.rollout.runner import teacher_runner
    from streamvid.students.folder import TINY_TEACHER
    from streamvid.teachers.load import open_teacher

    home = args.teacher or TINY_TEACHER
    teacher = open_teacher(home, device=device)
    codec = open_codec(home, device)
    cond = teacher.encode_prompt(prompts).to(device)
    frames = latent_frames_of(args.num_frames, codec.temporal_ratio)
    runners = [
        teacher_runner(f"teacher, {steps} steps", teacher, steps, args.guidance, frames)
        for steps in args.teacher_steps
    ]
    return [Job(runner, codec, cond, [0]) for runner in runners]


def mean_scores_of(clips: Tensor, prompts: list[str]) -> dict[str, float]:
    """Mean scores of clips ``[B, T, 3, H, W]``, by attribute."""
    from streamvid.evaluation.runs import score_clips
    from streamvid.evaluation.world_score import mean_scores

    return mean_scores(score_clips(clips, prompts))


def score(job: Job, prompts: list[str], num_frames: int) -> tuple[list[dict[str, float]], Tensor]:
    """Mean scores of each seed, and the first clips of the first seed."""
    from streamvid.evaluation.runs import clips_by_seed

    scores: list[dict[str, float]] = []
    for clips in clips_by_seed(job.runner, job.codec, job.cond, job.seeds, num_frames):
        if not scores:
            first = clips[:NUM_SHOWN]
        scores.append(mean_scores_of(clips, prompts))
    return scores, first


def score_long_streams(
    args: argparse.Namespace, jobs: list[Job], prompts: list[str]
) -> list[dict[str, Any]]:
    """Scores by window of streams ``--long`` times as long, of all that can stream."""
    from streamvid.evaluation.runs import score_long

    num = args.num_long_prompts
    window = args.num_frames - 1
    return [
        score_long(job.runner, job.codec, job.cond[:num], prompts[:num], args.long, window)
        for job in jobs
        if job.runner.stream.commit != "none"
    ]


if __name__ == "__main__":
    sys.exit(main())
