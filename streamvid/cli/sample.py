"""Make clips with a student, as a stream or as files.

    streamvid sample --prompt "a small red circle moves up quickly" --out clip.mp4
    streamvid sample --prompts prompts.txt --num-frames 321 --steps 2 --out clips/
    streamvid sample --prompt "..." --student runs/dmd/student --num-frames 0 --stream --out pngs/
    streamvid sample --prompt "..." --teacher streamvid/assets/teacher --steps 50 --out teacher.gif

With --prompt, --out is a file (.mp4, .webm, .gif) or a folder of PNGs; with --prompts, a folder of
.mp4 files, or a pattern such as clips/{}.gif, or for one prompt a file. Prompt i has the seed
--seed + i.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from streamvid.command_line import Parser, run_tool, say, sides

if TYPE_CHECKING:
    import torch

    from streamvid.codecs.base import VideoCodec
    from streamvid.codecs.text import PromptEncoder
    from streamvid.rollout.runner import Runner

SLOWEST = 0.01  # frames per second that players know
FASTEST = 1000.0


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
    prompt.add_argument("--prompt", help="one prompt")
    prompt.add_argument("--prompts", help="a UTF-8 text file with one prompt per line")
    options.add_argument("--num-frames", type=int, default=33, help="pixel frames (default 33)")
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
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--fps", type=float, default=16)
    options.add_argument(
        "--size",
        type=sides("HxW"),
        default=(64, 64),
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
    """Write one clip per prompt; what can be found wrong is found before anything is loaded."""
    from streamvid.data.prompts import read_prompts
    from streamvid.students.clips import export_clip, name_outs
    from streamvid.students.folder import choose_device
    from streamvid.video import ensure_writable

    prompts = read_prompts(args.prompts) if args.prompts else [args.prompt]
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty; say what to show")
    if args.num_frames < (0 if args.stream and not args.teacher else 1):
        raise ValueError(
            f"--num-frames {args.num_frames}: a clip has at least 1 frame; 0 goes with --stream and"
            " a student"
        )
    if not SLOWEST <= args.fps <= FASTEST:
        raise ValueError(
            f"--fps {args.fps:g}: expected {SLOWEST:g} to {FASTEST:g} frames per second"
        )
    if not -(2**63) <= args.seed < 2**63 - len(prompts):
        raise ValueError(f"--seed {args.seed}: expected a number of at most 63 bits")
    outs = name_outs(args.out, len(prompts), bool(args.prompts))
    for out in outs:
        ensure_writable(out)
    device = choose_device(args.device)
    runner, codec, encoder = build_runner(args, device)
    for index, (prompt, out) in enumerate(zip(prompts, outs)):
        made = export_clip(
            runner.model,
            codec,
            encoder.encode([prompt]).to(device),
            runner.stream,
            out,
            seed=args.seed + index,
            size=args.size,
            num_frames=args.num_frames or None,
            fps=args.fps,
            live=args.stream,
        )
        say(
            f"wrote {out}: {made.num_frames} frames in {made.seconds:.2f} s, first frames after"
            f" {1000 * made.first_frame_s:.0f} ms, {made.cost.nfe * runner.passes} forwards +"
            f" {made.cost.commits} commits"
        )


def build_runner(
    args: argparse.Namespace, device: torch.device
) -> tuple[Runner, VideoCodec, PromptEncoder]:
    """The model as it will run, its codec and its prompt encoder."""
    import torch

    from streamvid.codecs.base import latent_frames_of
    from streamvid.codecs.load import open_codec
    from streamvid.rollout.runner import student_runner, teacher_runner
    from streamvid.students.folder import TINY_STUDENT, deployed, load_student
    from streamvid.teachers.load import open_teacher

    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    if args.teacher:
        for name in ("schedule", "window", "sink"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} is of students; a teacher denoises all frames together")
        teacher = open_teacher(args.teacher, torch_dtype=dtype, device=device)
        codec = open_codec(args.codec or args.components or args.teacher, device)
        steps = 50 if args.steps is None else args.steps
        guidance = 2.0 if args.guidance is None else args.guidance
        frames = latent_frames_of(args.num_frames, codec.temporal_ratio)
        return (
            teacher_runner("teacher", teacher, steps, guidance, frames),
            codec,
            teacher.prompt_encoder,
        )
    if args.guidance is not None:
        raise ValueError("--guidance is of teachers; a student has it distilled in")
    student = load_student(args.student or TINY_STUDENT, args.components, device, dtype, args.codec)
    return (
        student_runner(
            "student",
            student.transformer,
            deployed(student.stream, args.schedule, args.steps, args.window, args.sink),
        ),
        student.codec,
        student.prompts,
    )


if __name__ == "__main__":
    sys.exit(main())
