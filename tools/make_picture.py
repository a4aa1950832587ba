"""Make the moving picture of the README: teacher, causal start and student, side by side.

    python tools/make_picture.py --out docs/images/hero

Writes hero.webp, which moves, and hero.png, one moment of it. All models get the same prompts and
the same noise, and the picture is the same each time it is made.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from streamvid.command_line import Parser, run_tool, say

SCENES = {  # held-out combinations of attributes, and the seed of their noise
    "a red circle moves rightwards quickly and passes behind a yellow square": 0,
    "the ball is small and purple, falls drifting to the left and is very bouncy": 0,
    "a fast small blue triangle moves up and to the left and bounces off the walls": 0,
}
NUM_FRAMES, LATENT_FRAMES, GUIDANCE = 33, 9, 2.0
FRAME_MS = 62  # 16 frames per second
HOLD = 8  # frames for which the end stays, so that the eye sees where the loop begins
SCALE, GAP, HEADER, CAPTION, MARGIN = 3, 12, 70, 26, 18  # pixels, but for the first
BACK, BRIGHT, DIM = (17, 17, 21), (240, 240, 245), (150, 150, 162)
STILL = 13  # the frame of the PNG


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--out", default="docs/images/hero", help="path without a suffix")
    parser.add_argument("--scale", type=int, default=SCALE, help="of the frames (default 3)")
    args = parser.parse_args(argv)
    return run_tool(lambda: make_picture(args))


def make_picture(args: argparse.Namespace) -> None:
    from streamvid.files import atomic_file

    columns = make_columns()
    pictures = [draw(columns, frame, args.scale) for frame in range(NUM_FRAMES)]
    durations = [FRAME_MS] * (NUM_FRAMES - 1) + [FRAME_MS * HOLD]
    movie = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    with atomic_file(f"{args.out}.webp") as file:
        pictures[0].save(file, "WEBP", quality=90, method=4, **movie)
    with atomic_file(f"{args.out}.png") as file:
        pictures[STILL].save(file, "PNG", optimize=True)
    say(f"wrote {args.out}.webp and {args.out}.png")


def make_columns() -> list[tuple[str, str, list]]:
    """For each model its name, what it costs, and its clips ``[T, 3, H, W]``."""
    from streamvid.evaluation.runs import make_clips
    from streamvid.rollout.runner import student_runner, teacher_runner
    from streamvid.rollout.schedule import build_schedule, cost_of
    from streamvid.students.folder import TINY_START, TINY_STUDENT, TINY_TEACHER, load_student
    from streamvid.teachers.wan import WanTeacher

    start, student = load_student(TINY_START), load_student(TINY_STUDENT)
    teacher = WanTeacher.from_pretrained(TINY_TEACHER)
    one_step = replace(student.stream, num_steps=1)
    runners = [
        teacher_runner("teacher", teacher, 50, GUIDANCE, LATENT_FRAMES),
        student_runner("causal start", start.transformer, start.stream),
        student_runner("student", student.transformer, student.stream),
        student_runner("student", student.transformer, one_step),
    ]
    cond = student.prompts.encode(list(SCENES))
    columns = []
    for runner, steps in zip(runners, ("50 steps", "4 steps", "4 steps", "1 step")):
        chunks = LATENT_FRAMES // runner.stream.chunk_frames
        cost = cost_of(
            build_schedule(runner.stream, chunks), runner.stream.chunk_frames, runner.stream.commit
        )
        forwards = cost.nfe * runner.passes + cost.commits
        clips = [
            make_clips(runner, student.codec, cond[i : i + 1], [seed], NUM_FRAMES)[0]
            for i, seed in enumerate(SCENES.values())
        ]
        columns.append((runner.label, f"{steps}, {forwards} forwards", clips))
    return columns


def draw(columns: list[tuple[str, str, list]], frame: int, scale: int):
    """One moment of all clips: a column per model, a row per prompt."""
    from PIL import Image, ImageDraw, ImageFont

    from streamvid.video import to_uint8

    side = columns[0][2][0].shape[-1] * scale
    row = CAPTION + side + GAP
    width = 2 * MARGIN + len(columns) * (side + GAP) - GAP
    height = HEADER + len(SCENES) * row + MARGIN - GAP
    picture = Image.new("RGB", (width, height), BACK)
    pen = ImageDraw.Draw(picture)
    large, small = ImageFont.load_default(19), ImageFont.load_default(14)
    for column, (name, cost, clips) in enumerate(columns):
        left = MARGIN + column * (side + GAP)
        pen.text((left, 15), name, BRIGHT, large)
        pen.text((left, 39), cost, DIM, small)
        for index, clip in enumerate(clips):
            cell = Image.fromarray(to_uint8(clip[frame : frame + 1])[0])
            top = HEADER + index * row + CAPTION
            picture.paste(cell.resize((side, side), Image.BICUBIC), (left, top))
    for index, prompt in enumerate(SCENES):
        pen.text((MARGIN, HEADER + index * row + 5), f"“{prompt}”", DIM, small)
    return picture


if __name__ == "__main__":
    sys.exit(main())
