"""Solve a teacher's probability flow for many prompts and keep the states at a student's times.

    python tools/make_trajectories.py --num 500 --student-steps 4 --student-shift 5 --out
    data/trajectories python tools/make_trajectories.py --teacher Wan2.1-T2V-1.3B-Diffusers
    --prompts prompts.txt --num 1500 \\
        --latent-frames 21 --latent-size 60 104 --guidance 6 --steps 50 --dtype bf16 --device cuda
        --out data/wan_ode

The Euler grid of --steps steps (at --shift) is made to pass the student's times exactly: those that
are not on it are added. With --student-shift equal to --shift and --steps a multiple of
--student-steps, none is. The same command goes on where it was interrupted, and started several
times at once, such as on each GPU of a machine (CUDA_VISIBLE_DEVICES=1 python ... &), its processes
divide the work. Machines without a common disk take --share 1/4, 2/4, ... each; put their folders
into one. `data.kind=trajectories data.path=OUT method=trajectory` trains on it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from streamvid.command_line import Parser, log_to_stderr, run_tool, say

TINY_TEACHER = str(Path(__file__).parents[1] / "streamvid" / "assets" / "teacher")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__, may_be_empty=["negative_prompt"])
    parser.add_argument(
        "--teacher",
        default=TINY_TEACHER,
        help="a diffusers folder, or its name on the hub; the tiny teacher",
    )
    parser.add_argument("--out", required=True, help="folder for the trajectories")
    parser.add_argument(
        "--prompts", help="text file, a prompt a line, repeated as needed; captions of the world"
    )
    parser.add_argument("--num", type=int, default=500, help="clips (%(default)s)")
    parser.add_argument(
        "--first-seed", type=int, default=0, help="seed of the first clip (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=48, help="steps of the teacher (%(default)s)")
    parser.add_argument(
        "--shift", type=float, help="timestep shift of the teacher's grid; the checkpoint's"
    )
    parser.add_argument("--guidance", type=float, default=4.0, help="u + s (c - u) (%(default)s)")
    parser.add_argument(
        "--negative-prompt", default="", help="what guidance leads away from; the empty prompt"
    )
    parser.add_argument(
        "--student-steps", type=int, default=4, help="steps of the student (%(default)s)"
    )
    parser.add_argument(
        "--student-shift", type=float, default=5.0, help="its timestep shift (%(default)s)"
    )
    parser.add_argument(
        "--times", help="its times instead, after the shift, such as 1,0.9375,0.8333333,0.625"
    )
    parser.add_argument(
        "--latent-frames", type=int, default=9, help="length of a clip (%(default)s)"
    )
    parser.add_argument(
        "--latent-size", type=int, nargs=2, default=(8, 8), metavar=("H", "W"), help="8 8"
    )
    parser.add_argument(
        "--batch-size", type=int, default=4, help="clips solved together (%(default)s)"
    )
    parser.add_argument("--clips-per-part", type=int, default=64, help="clips a file (%(default)s)")
    parser.add_argument(
        "--share",
        default="1/1",
        metavar="K/N",
        help="the K-th of N shares of the parts (%(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bf16", "fp16"), default="float32", help="of the teacher"
    )
    parser.add_argument(
        "--device", default="cpu", help="of the teacher: cpu, cuda, or auto (%(default)s)"
    )
    return parser


def make(args: argparse.Namespace) -> None:
    """Open the teacher, choose prompts and times, and write the set."""
    import torch

    from streamvid.core.times import step_times
    from streamvid.data.parts import checkpoint_key
    from streamvid.data.prompts import read_prompts, world_prompts
    from streamvid.data.trajectories import check_falling, write_trajectories
    from streamvid.hub import resolve_checkpoint
    from streamvid.objectives.trajectory import grid_through, solve_trajectories
    from streamvid.students.folder import choose_device
    from streamvid.teachers.wan import WanTeacher
    from streamvid.video import ensure_place

    for name in ("num", "latent_frames", "batch_size", "clips_per_part"):
        if getattr(args, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)}, expected at least 1"
            )
    share = read_share(args.share)
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise ValueError(f"--out {args.out} is a file; expected a folder for the set")
    ensure_place(Path(args.out) / "part")
    device = choose_device(args.device)
    student_times = (
        read_times(args.times) if args.times else step_times(args.student_steps, args.student_shift)
    )
    times = check_falling((*student_times, 0.0))
    prompts = (
        read_prompts(args.prompts) if args.prompts else world_prompts(args.num, args.first_seed)
    )
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    home = resolve_checkpoint(args.teacher)
    teacher = WanTeacher.from_pretrained(home, dtype, device, args.negative_prompt)
    patch = teacher.transformer.config.patch_size[1:]
    if not all(side >= 1 and side % unit == 0 for side, unit in zip(args.latent_size, patch)):
        raise ValueError(
            f"--latent-size {args.latent_size[0]} {args.latent_size[1]}, expected multiples of"
            f" {patch[0]} and {patch[1]}"
        )
    own = step_times(args.steps, args.shift) if args.shift else teacher.step_times(args.steps)
    grid = grid_through(student_times, own)
    logging.info("%d clips, %d teacher steps each, states at t = %s", args.num, len(grid), times)
    solve = partial(
        solve_trajectories,
        teacher,
        times=times,
        grid=grid,
        guidance_scale=args.guidance,
        latent_shape=(teacher.latent_channels, *args.latent_size),
        latent_frames=args.latent_frames,
    )
    settings = {
        "teacher": (
            str(Path(args.teacher).resolve()) if Path(args.teacher).exists() else args.teacher
        ),
        "teacher_weights": checkpoint_key(home, "transformer", "transformer_2"),
        "text_encoder": checkpoint_key(home, "text_encoder", "tokenizer"),
        "dtype": args.dtype,
        "grid": grid,
        "guidance": args.guidance,
        "negative_prompt": args.negative_prompt,
        "latent_frames": args.latent_frames,
        "latent_size": list(args.latent_size),
    }
    write_trajectories(
        args.out,
        list(islice(cycle(prompts), args.num)),
        times,
        teacher.encode_prompt,
        lambda cond, seeds: solve(cond.to(teacher.device), seeds),
        settings,
        args.first_seed,
        args.clips_per_part,
        args.batch_size,
        share,
    )


def read_times(text: str) -> tuple[float, ...]:
    """Times that are separated by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--times {text}, expected numbers separated by commas, such as 1,0.9375,0.625"
        ) from None


def read_share(text: str) -> tuple[int, int]:
    """K and N of K/N."""
    try:
        part, parts = map(int, text.split("/"))
        return part, parts
    except ValueError:
        raise ValueError(f"--share {text}, expected a part of the work such as 1/4") from None


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    log_to_stderr()
    code = run_tool(
        lambda: make(args), "interrupted; the same command goes on from the parts that are there"
    )
    if not code:
        say(f"wrote {args.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
