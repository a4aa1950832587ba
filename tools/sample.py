"""Make clips with a student, as a stream or as files.

    python tools/sample.py --prompt "a small red circle moves up quickly" --out clip.mp4
    python tools/sample.py --prompts prompts.txt --num-frames 321 --steps 2 --out clips/
    python tools/sample.py --student runs/tiny_dmd/student --prompt "..." --stream --out frames/
    python tools/sample.py --teacher streamvid/assets/teacher --steps 50 --guidance 3 --prompt "..." --out teacher.gif

With one prompt, --out is a file (.mp4, .webm, .gif) or a folder of PNGs; with several, a folder of .mp4 files.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="a student folder; by default the shipped student")
    parser.add_argument("--teacher", help="a teacher folder: sample the teacher instead")
    parser.add_argument("--components", help="folder of vae/, text_encoder/ and tokenizer/, if the student's lacks them")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="one prompt")
    prompt.add_argument("--prompts", help="a UTF-8 text file with a prompt a line")
    parser.add_argument("--num-frames", type=int, default=33, help="pixel frames (default 33)")
    parser.add_argument("--steps", type=int, help="steps a chunk; by default the student's own, 50 for a teacher")
    parser.add_argument("--schedule", help="a stream_config.json that replaces the student's own")
    parser.add_argument("--guidance", type=float, default=3.0, help="of a teacher (default 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--stream", action="store_true", help="write frames as they come; --num-frames 0 never ends")
    parser.add_argument("--out", required=True)
    return parser.parse_args(argv)


def build_runner(args: argparse.Namespace):
    """The model as it will run, its codec and its prompt encoder."""
    from streamvid.codecs.base import latent_frames_of
    from streamvid.codecs.load import open_codec
    from streamvid.evaluation.runs import student_runner, teacher_runner
    from streamvid.rollout.schedule import StreamConfig
    from streamvid.serving.student import TINY_STUDENT, TINY_TEACHER, load_student
    from streamvid.teachers.wan import WanTeacher

    if args.teacher:
        teacher, codec = WanTeacher.from_pretrained(args.teacher), open_codec(args.components or args.teacher)
        frames = latent_frames_of(args.num_frames, codec.temporal_ratio)
        return teacher_runner("teacher", teacher, args.steps or 50, args.guidance, frames), codec, teacher.prompt_encoder
    student = load_student(args.student or TINY_STUDENT, args.components or TINY_TEACHER)
    config = student.stream
    if args.schedule:
        if not Path(args.schedule).is_file():
            raise ValueError(f"no schedule file at {args.schedule}; it is a stream_config.json")
        config = StreamConfig.from_json(Path(args.schedule).read_text())
    if args.steps:
        config = replace(config, num_steps=args.steps)
    return student_runner("student", student.transformer, config), student.codec, student.prompts


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        sample(args)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def sample(args: argparse.Namespace) -> None:
    from streamvid.data.prompts import read_prompts
    from streamvid.video import ensure_writable

    prompts = read_prompts(args.prompts) if args.prompts else [args.prompt]
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty; say what to show")
    if len(prompts) > 1 and Path(args.out).suffix:
        raise ValueError(f"--out {args.out} is one file for {len(prompts)} prompts; name a folder")
    outs = [Path(args.out) / f"{i:03d}.mp4" for i in range(len(prompts))] if len(prompts) > 1 else [Path(args.out)]
    for out in outs:
        ensure_writable(out)
    if args.num_frames < 1 and not args.stream:
        raise ValueError(f"--num-frames {args.num_frames}: a clip has at least 1 frame; 0 goes with --stream")
    runner, codec, encoder = build_runner(args)
    for index, (prompt, out) in enumerate(zip(prompts, outs)):
        write_clip(args, runner, codec, encoder.encode([prompt]), args.seed + index, out)


def write_clip(args: argparse.Namespace, runner, codec, embedding, seed: int, out: Path) -> None:
    """Stream one clip into its file and say what it took."""
    from streamvid.rollout.sampler import stream
    from streamvid.video import VideoWriter

    height, width = args.size
    started, first_s = time.perf_counter(), None
    chunks = stream(
        runner.model, codec, embedding, runner.stream, seeds=[seed], height=height, width=width,
        num_frames=args.num_frames or None,
    )
    with VideoWriter(out, args.fps) as writer, tqdm(total=args.num_frames or None, unit="frame", desc=out.name) as bar:
        for chunk in chunks:
            first_s = first_s or time.perf_counter() - started
            writer.append(chunk.frames[0])
            bar.update(chunk.frames.shape[1])
    seconds = time.perf_counter() - started
    print(f"wrote {out}: {writer.num_frames} frames in {seconds:.2f} s, first frames after {1000 * first_s:.0f} ms")


if __name__ == "__main__":
    sys.exit(main())
