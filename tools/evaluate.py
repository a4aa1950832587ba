"""Score students, and a teacher, on held-out prompts of the verifiable world.

    python tools/evaluate.py --suite world --out report.json python tools/evaluate.py --student
    runs/tiny_dmd/student --prompts 200 --seeds 3 --long 10 --out report.json python
    tools/evaluate.py --student A --student B --label before --label after --teacher-steps 50,4
    --out r.json

Writes a report (JSON, Markdown, contact sheet) and prints its table: forwards + commits of the
student a clip, work (latent frames pushed through the transformer; a guided teacher counts twice),
times (medians at batch 1), and the speed-up of a whole clip, decoding included, over the first
teacher row. The first row is the true clips after the codec.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from streamvid.command_line import Parser, run_tool
from streamvid.printing import printable

NUM_SHOWN = 4


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, may_be_empty=["teacher_steps"])
    parser.add_argument("--suite", choices=["world"], default="world")
    parser.add_argument(
        "--student",
        action="append",
        help="a student folder, may be repeated; default: start and student as shipped",
    )
    parser.add_argument(
        "--label",
        action="append",
        help="name of a student in the report, one a --student; default: its folder and steps",
    )
    parser.add_argument(
        "--components",
        help="folder of vae/, text_encoder/ and tokenizer/ for students that lack them",
    )
    parser.add_argument("--teacher", help="a teacher folder; default: the shipped one")
    parser.add_argument(
        "--teacher-steps",
        default="50",
        help="Euler steps, comma-separated (default 50; '' leaves it out)",
    )
    parser.add_argument("--guidance", type=float, default=2.0, help="of the teacher (default 2)")
    parser.add_argument(
        "--prompts", type=int, default=200, help="number of held-out prompts (default 200)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the students (default 1)")
    parser.add_argument("--num-frames", type=int, default=33)
    parser.add_argument(
        "--long",
        type=int,
        default=0,
        metavar="K",
        help="also stream K times as long, scored by windows",
    )
    parser.add_argument(
        "--long-prompts", type=int, default=40, help="prompts of the long streams (default 40)"
    )
    parser.add_argument(
        "--card", action="store_true", help="also write the scores into each student's model card"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1; by default a GPU where there is one"
    )
    parser.add_argument("--out", required=True, help="the report, .json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_tool(lambda: evaluate(args), "interrupted; nothing was written")


def check(args: argparse.Namespace) -> None:
    """What can be found wrong before anything is loaded."""
    from streamvid.video import ensure_place

    if Path(args.out).suffix != ".json" or Path(args.out).is_dir():
        raise ValueError(f"--out {args.out}: the report is a .json file")
    ensure_place(args.out)
    for name, least in {"prompts": 1, "seeds": 1, "long": 0, "long_prompts": 1}.items():
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
    if not all(
        text.strip().isdecimal() and int(text)
        for text in args.teacher_steps.split(",")
        if args.teacher_steps
    ):
        raise ValueError(f"--teacher-steps {args.teacher_steps}: expected numbers such as 50,4")


def evaluate(args: argparse.Namespace) -> None:
    from streamvid.codecs.base import latent_frames_of
    from streamvid.codecs.load import open_codec
    from streamvid.evaluation import report, runs
    from streamvid.evaluation.world_score import mean_scores
    from streamvid.rollout.runner import student_runner, teacher_runner
    from streamvid.students.card import add_scores
    from streamvid.students.folder import (
        TINY_START,
        TINY_STUDENT,
        TINY_TEACHER,
        choose_device,
        load_student,
    )
    from streamvid.teachers.load import open_teacher
    from streamvid.video import contact_sheet

    check(args)
    out, prompts, home = (
        Path(args.out),
        runs.held_out_prompts(args.prompts),
        args.teacher or TINY_TEACHER,
    )
    device, paths = choose_device(args.device), args.student or (TINY_START, TINY_STUDENT)
    students = [load_student(path, args.components, device) for path in paths]
    folders = zip(args.student or ["start", "student"], students)
    labels = [
        printable(label)
        for label in args.label
        or (f"{folder}, {s.stream.num_steps} steps" for folder, s in folders)
    ]
    jobs, codec = [], students[0].codec  # of each model: runner, codec, embeddings, number of seeds
    if args.teacher_steps:
        teacher, codec = open_teacher(home, device=device), open_codec(home, device)
        embeddings, frames = (
            teacher.encode_prompt(prompts).to(device),
            latent_frames_of(args.num_frames, codec.temporal_ratio),
        )
        for n in map(int, args.teacher_steps.split(",")):
            runner = teacher_runner(f"teacher, {n} steps", teacher, n, args.guidance, frames)
            jobs.append((runner, codec, embeddings, 1))
    for label, s in zip(labels, students):
        runner = student_runner(label, s.transformer, s.stream)
        jobs.append((runner, s.codec, s.prompts.encode(prompts).to(device), args.seeds))
    # also finds what can't run
    costs = [runs.measure_cost(job[0], job[1], job[2][:1], args.num_frames) for job in jobs]
    window, num = args.num_frames - 1, args.long_prompts
    long = [
        runs.score_long(runner, codec, embeddings[:num], prompts[:num], args.long, window)
        for runner, codec, embeddings, _ in jobs
        if args.long and runner.stream.commit != "none"
    ]
    true_clips = runs.reconstructed_clips(codec, args.prompts, args.num_frames)
    truth = report.result_row(
        "true clips", [mean_scores(runs.score_clips(true_clips, prompts))], None
    )
    rows, shown = [], [("true clips", true_clips[:NUM_SHOWN])]
    for (runner, codec, embeddings, num_seeds), cost in zip(jobs, costs):
        scores, first = [], None
        for clips in runs.clips_by_seed(
            runner, codec, embeddings, range(num_seeds), args.num_frames
        ):
            scores.append(mean_scores(runs.score_clips(clips, prompts)))
            first = clips[:NUM_SHOWN] if first is None else first
        against = (
            (costs[0], rows[0]["scores"]["overall"] if rows else None)
            if args.teacher_steps
            else (None, None)
        )
        rows.append(report.result_row(runner.label, scores, cost, *against))
        shown.append((runner.label, first))
        print(report.table(rows[-1:]), file=sys.stderr)
    groups = [
        (prompts[i], [(label, clips[i]) for label, clips in shown])
        for i in range(min(NUM_SHOWN, len(prompts)))
    ]
    contact_sheet(groups, out.with_suffix(".png"))
    report.write_report(out, rows, truth, long)
    for path, row in zip(paths if args.card else (), rows[-len(students) :]):
        add_scores(
            path,
            row["scores"],
            [
                f"{args.prompts} held-out prompts of the verifiable world, {row['seeds']} noise"
                " seeds"
            ],
        )
    print(report.table([truth, *rows]), *([report.window_table(long)] if long else []), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
