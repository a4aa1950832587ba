"""Score students, and a teacher, on held-out prompts of the verifiable world.

    python tools/evaluate.py --suite world --out report.json
    python tools/evaluate.py --student runs/tiny_dmd/student --prompts 200 --seeds 3 --long 10 --out report.json
    python tools/evaluate.py --student A --student B --teacher streamvid/assets/teacher --teacher-steps 50,4 --out r.json

Writes the report as JSON, as Markdown and as a contact sheet (.png) beside it, and prints the table. `forwards`
are student forwards + commits a clip, `work` the latent frames that they push through the transformer, the times
are medians at batch 1, the speed-up is that of a whole clip, decoding included, over the first teacher row.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=["world"], default="world")
    parser.add_argument("--student", action="append", help="a student folder, may be repeated; default: start and student as shipped")
    parser.add_argument("--teacher", help="a teacher folder; default: the shipped one")
    parser.add_argument("--teacher-steps", default="50", help="Euler steps, comma-separated (default 50; '' leaves it out)")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the teacher (default 3)")
    parser.add_argument("--prompts", type=int, default=200, help="number of held-out prompts (default 200)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the students (default 1)")
    parser.add_argument("--num-frames", type=int, default=33)
    parser.add_argument("--long", type=int, default=0, metavar="K", help="also stream K times as long, scored by windows")
    parser.add_argument("--long-prompts", type=int, default=40, help="prompts of the long streams (default 40)")
    parser.add_argument("--out", required=True, help="the report, .json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        evaluate(args)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def evaluate(args: argparse.Namespace) -> None:
    from streamvid.codecs.base import latent_frames_of
    from streamvid.evaluation.report import result_row, table, write_report
    from streamvid.evaluation.runs import held_out_prompts, make_clips, measure_cost, score_by_seed, student_runner, teacher_runner
    from streamvid.serving.student import TINY_START, TINY_STUDENT, TINY_TEACHER, load_student
    from streamvid.teachers.wan import WanTeacher
    from streamvid.video import contact_sheet

    out = Path(args.out)
    if out.suffix != ".json":
        raise ValueError(f"--out {out}: the report is a .json file")
    if args.prompts < 1 or args.seeds < 1:
        raise ValueError(f"--prompts {args.prompts} and --seeds {args.seeds} must be at least 1")
    students = [load_student(path) for path in args.student or (TINY_START, TINY_STUDENT)]
    labels = [str(path) for path in args.student or ("start", "student")]
    codec, prompts = students[0].codec, held_out_prompts(args.prompts)
    embeddings = students[0].prompts.encode(prompts)
    runners = [(student_runner(f"{label}, {s.stream.num_steps} steps", s.transformer, s.stream), args.seeds) for label, s in zip(labels, students)]
    if args.teacher_steps:
        teacher = WanTeacher.from_pretrained(args.teacher or TINY_TEACHER)
        frames = latent_frames_of(args.num_frames, codec.temporal_ratio)
        steps = [int(text) for text in args.teacher_steps.split(",")]
        runners = [(teacher_runner(f"teacher, {n} steps", teacher, n, args.guidance, frames), 1) for n in steps] + runners
    rows, reference = [], None
    for runner, num_seeds in runners:
        scores = score_by_seed(runner, codec, embeddings, prompts, range(num_seeds), args.num_frames)
        cost = measure_cost(runner, codec, embeddings[:1], args.num_frames)
        reference = reference or cost
        rows.append(result_row(runner.label, scores, cost, reference))
        print(table(rows[-1:]), file=sys.stderr)
    long = {"long": long_streams(args, students, labels, codec, embeddings, prompts)} if args.long else {}
    write_report(out, rows, **long)
    clips = [(r.label, make_clips(r, codec, embeddings[:4], range(4), args.num_frames)) for r, _ in runners]
    groups = [(prompts[i], [(label, each[i]) for label, each in clips]) for i in range(min(4, len(prompts)))]
    contact_sheet(groups, out.with_suffix(".png"))
    print(table(rows))
    for line in long.get("long", "").splitlines():
        print(line)


def long_streams(args, students, labels, codec, embeddings, prompts) -> str:
    """World score of the first and the last window of long streams, one line a student."""
    from streamvid.evaluation.runs import score_windows, student_runner

    window, lines = args.num_frames - 1, []
    chunk = 4 * students[0].stream.chunk_frames
    num_frames = 1 + 4 * (students[0].stream.chunk_frames - 1) + -(-args.long * window // chunk) * chunk
    for label, student in zip(labels, students):
        runner = student_runner(label, student.transformer, student.stream)
        n = min(args.long_prompts, len(prompts))
        windows = score_windows(runner, codec, embeddings[:n], prompts[:n], 0, num_frames, window, batch_size=8)
        scores = " ".join(f"{each['overall']:.3f}" for each in windows)
        lines.append(f"{label}: {num_frames} frames, {n} prompts, overall by window of {window} frames: {scores}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
