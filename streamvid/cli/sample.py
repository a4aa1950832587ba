"""Make clips with a student, as a stream or as files.

    streamvid sample --prompt "a small red circle moves up quickly" --out clip.mp4
    streamvid sample --prompts prompts.txt --num-frames 321 --steps 2 --out clips/
    streamvid sample --prompt "..." --student runs/dmd/student --num-frames 0 --stream --out pngs/
    streamvid sample --prompt "..." --teacher streamvid/assets/teacher --steps 50 --out teacher.gif
    streamvid sample --script configs/script/switches.yaml --out switches.mp4
    streamvid sample --prompt "..." --start first.png --out clip.mp4

With --prompt or --script, --out is a file (.mp4, .webm, .gif) or a folder of PNGs; with --prompts,
a folder of .mp4 files, or a pattern such as clips/{}.gif, or for one prompt a file. Prompt i has
the seed --seed + i.

A script says prompt, seed, size and steps, what changes at which chunk, and how many chunks there
are; --num-frames ends it earlier. One that a live session recorded gives its frames bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from streamvid.command_line import Parser, run_tool, say, sides

if TYPE_CHECKING:
    import torch

    from streamvid.codecs.base import VideoCodec
    from streamvid.codecs.text import PromptEncoder
    from streamvid.rollout.runner import Runner
    from streamvid.students.clips import Exported
    from streamvid.students.folder import Student
    from streamvid.students.script import Script

SLOWEST = 0.01  # frames per second that players know
FASTEST = 1000.0
SIZE = (64, 64)
NUM_FRAMES = 33


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__, "sample")
    model = options.add_mutually_exclusive_group()
    prompt = options.add_mutually_exclusive_group(required=True)
    model.add_argument("--student", help="a student folder; by default the shipped student")
    model.add_argument(
        "--teacher", help="a teacher folder: sample the teacher instead, all frames together"
    )
    options.add_argument(
        "--components",
        help="folder of vae/, text_encoder/ and tokenizer/, if the student's lacks them",
    )
    options.add_argument(
        "--codec",
        help="another codec of the same latents: a folder with vae/, or a TAEHV file for speed",
    )
    options.add_device()
    options.add_argument(
        "--dtype",
        choices=("float32", "bf16"),
        default="float32",
        help="of the transformer (default float32)",
    )
    options.add_engine()
    prompt.add_argument("--prompt", help="one prompt")
    prompt.add_argument("--prompts", help="a UTF-8 text file with one prompt per line")
    prompt.add_argument(
        "--script",
        help="a .yaml or .jsonl file of timed changes (docs/live.md), as a stream of one",
    )
    options.add_argument(
        "--first-chunk",
        type=int,
        help="of a script: the first chunk that is written, from 0, as of a recording begun later",
    )
    options.add_argument(
        "--start",
        help="an image, a clip or a folder of PNGs of the clip's size that the stream goes on from",
    )
    options.add_argument(
        "--num-frames",
        type=int,
        help=f"pixel frames (default {NUM_FRAMES}); of a script at most, by default all",
    )
    options.add_argument(
        "--steps", type=int, help="steps per chunk; by default the student's own, 50 for a teacher"
    )
    options.add_argument(
        "--schedule",
        help=(
            "autoregressive or rolling (as many chunks together as there are steps), or a"
            " stream_config.json in place of the student's"
        ),
    )
    options.add_argument(
        "--window", type=int, help="latent frames that the student sees; by default its own"
    )
    options.add_argument(
        "--sink",
        type=int,
        help="first latent frames kept in the window; by default the student's own",
    )
    options.add_argument("--guidance", type=float, help="of a teacher (default 2); 1 is none")
    options.add_argument("--seed", type=int, help="of the noise (default 0)")
    options.add_argument("--fps", type=float, default=16)
    options.add_argument(
        "--size",
        type=sides("HxW"),
        metavar="HxW",
        help="height and width in pixels (default 64x64)",
    )
    options.add_argument(
        "--stream",
        action="store_true",
        help="PNGs are there as they come, Ctrl-C keeps what there is; --num-frames 0 never ends",
    )
    options.add_argument("--out", required=True)
    return options


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_tool(
        lambda: sample(args), "interrupted; the clip under way is not kept (--stream keeps it)"
    )


def sample(args: argparse.Namespace) -> None:
    """Write one clip per prompt, or that of a script; what can be found wrong is found before
    anything is loaded.
    """
    from streamvid.students.clips import name_outs
    from streamvid.video import ensure_writable

    check_options(args)
    scripts = [read_script(args)] if args.script else scripts_of_prompts(args)
    outs = name_outs(args.out, len(scripts), bool(args.prompts))
    for out in outs:
        ensure_writable(out)
    if args.script or args.start:
        play_scripts(args, scripts, outs)
    else:
        stream_prompts(args, scripts, outs)


def check_options(args: argparse.Namespace) -> None:
    """A ValueError for options out of range or that contradict each other."""
    if args.num_frames is not None and args.num_frames < (
        0 if args.stream and not args.teacher else 1
    ):
        raise ValueError(
            f"--num-frames {args.num_frames}: a clip has at least 1 frame; 0 goes with --stream and"
            " a student"
        )
    if not SLOWEST <= args.fps <= FASTEST:
        raise ValueError(
            f"--fps {args.fps:g}: expected {SLOWEST:g} to {FASTEST:g} frames per second"
        )
    for name in ("seed", "steps", "size") if args.script else ():
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} contradicts --script, which says it; change the script")
    if args.first_chunk is not None and not (args.script and args.first_chunk >= 0):
        raise ValueError(
            f"--first-chunk {args.first_chunk}: expected a chunk of a --script, counted from 0"
        )
    if args.schedule == "rolling" and (args.script or args.start):
        raise ValueError(
            "--schedule rolling: --script and --start need a stream chunk after chunk; use"
            " autoregressive"
        )
    for name in ("script", "start"):
        if args.teacher and getattr(args, name):
            raise ValueError(f"--{name} is of students; a teacher denoises all frames together")


def read_script(args: argparse.Namespace) -> Script:
    """The script of ``--script``."""
    from streamvid.students.script import Script

    script = Script.load(args.script)
    if script.num_chunks is None and args.num_frames is None:
        raise ValueError(
            f"script {args.script} has no num_chunks; add it, or say --num-frames (0 with --stream"
            " never ends)"
        )
    if script.start and not args.start:
        raise ValueError(f"script {args.script} began from frames; give them with --start")
    return script


def scripts_of_prompts(args: argparse.Namespace) -> list[Script]:
    """For each prompt a script in which nothing changes; prompt i has the seed ``--seed`` + i."""
    from streamvid.data.prompts import read_prompts
    from streamvid.students.script import Script

    prompts = read_prompts(args.prompts) if args.prompts else [args.prompt]
    seed, (height, width) = args.seed or 0, args.size or SIZE
    if not -(2**63) <= seed < 2**63 - len(prompts):
        raise ValueError(f"--seed {seed}: expected a number of at most 63 bits")
    return [Script(prompt, height, width, seed + i) for i, prompt in enumerate(prompts)]


def stream_prompts(args: argparse.Namespace, scripts: list[Script], outs: list[str]) -> None:
    """Clips from noise, by a student or a teacher."""
    from streamvid.students.clips import export_clip
    from streamvid.students.folder import choose_device

    device = choose_device(args.device)
    num_frames = NUM_FRAMES if args.num_frames is None else args.num_frames
    runner, codec, encoder = build_runner(args, num_frames, device)
    for script, out in zip(scripts, outs):
        made = export_clip(
            runner.model,
            codec,
            encoder.encode([script.prompt]).to(device),
            runner.stream,
            out,
            seed=script.seed,
            size=(script.height, script.width),
            num_frames=num_frames or None,
            fps=args.fps,
            live=args.stream,
        )
        passes, commits = made.cost.nfe * runner.passes, made.cost.commits
        say_written(out, made, f"{passes} forwards + {commits} commits")


def play_scripts(args: argparse.Namespace, scripts: list[Script], outs: list[str]) -> None:
    """Clips of live sessions, by a student."""
    from streamvid.students.clips import export_script, read_start
    from streamvid.students.folder import choose_device

    size = scripts[0].height, scripts[0].width
    start = read_start(args.start, *size) if args.start else None
    student = open_student(args, choose_device(args.device))
    num_frames = args.num_frames
    if num_frames is None and not args.script:
        num_frames = NUM_FRAMES
    for script, out in zip(scripts, outs):
        made = export_script(
            student,
            script,
            out,
            num_frames=num_frames or None,
            fps=args.fps,
            first_chunk=args.first_chunk or 0,
            start=start,
            live=args.stream,
        )
        say_written(out, made, f"{made.num_chunks} chunks")


def say_written(out: str, made: Exported, work: str) -> None:
    """Tell what is there now, and what it took."""
    say(
        f"wrote {out}: {made.num_frames} frames in {made.seconds:.2f} s, first frames after"
        f" {1000 * made.first_frame_s:.0f} ms, {work}"
    )


def build_runner(
    args: argparse.Namespace, num_frames: int, device: torch.device
) -> tuple[Runner, VideoCodec, PromptEncoder]:
    """The model as it will run, its codec and its prompt encoder."""
    import torch

    from streamvid.codecs.base import latent_frames_of
    from streamvid.codecs.load import open_codec
    from streamvid.rollout.runner import student_runner, teacher_runner

    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    if args.teacher:
        for name in ("schedule", "window", "sink"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} is of students; a teacher denoises all frames together")
        if args.engine:
            raise ValueError("--engine is of students; leave it out for a teacher")
        # a second of imports that a student needs not
        from streamvid.teachers.load import open_teacher

        teacher = open_teacher(args.teacher, torch_dtype=dtype, device=device)
        codec = open_codec(args.codec or args.components or args.teacher, device)
        steps = 50 if args.steps is None else args.steps
        guidance = 2.0 if args.guidance is None else args.guidance
        frames = latent_frames_of(num_frames, codec.temporal_ratio)
        return (
            teacher_runner("teacher", teacher, steps, guidance, frames),
            codec,
            teacher.prompt_encoder,
        )
    student = open_student(args, device)
    runner = student_runner("student", student.transformer, student.stream)
    return runner, student.codec, student.prompts


def open_student(args: argparse.Namespace, device: torch.device) -> Student:
    """The student, to be streamed as the options say."""
    import torch

    from streamvid.students.engine import engine_options, prepare
    from streamvid.students.folder import TINY_STUDENT, deployed, load_student

    if args.guidance is not None:
        raise ValueError("--guidance is of teachers; a student has it distilled in")
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    student = load_student(args.student or TINY_STUDENT, args.components, device, dtype, args.codec)
    student = prepare(student, engine_options(args.engine))
    stream = deployed(student.stream, args.schedule, args.steps, args.window, args.sink)
    return replace(student, stream=stream)


if __name__ == "__main__":
    sys.exit(main())
