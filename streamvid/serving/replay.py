"""Make a stream again from its script, bit for bit, as a file.

    python -m streamvid.serving.replay stream.yaml --out clip.mp4
    python -m streamvid.serving.replay stream.yaml --student runs/tiny_dmd/student --out frames/

The script is what the page saves: prompt, seed, size, and every change with its chunk.
"""

from __future__ import annotations

import argparse
import sys

from streamvid.command_line import Parser, run_tool, say


def main(argv: list[str] | None = None) -> int:
    """Read a script, play it, write the clip."""
    parser = Parser(__doc__)
    parser.add_argument("script", help="a .yaml or .jsonl file")
    parser.add_argument("--student", help="the student that streamed; by default the shipped one")
    parser.add_argument("--components", help="where parts come from that its folder lacks")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--fps", type=float, default=16.0, help="of playback (default 16)")
    parser.add_argument("--out", required=True, help="a file (.mp4, .webm, .gif) or a folder")
    args = parser.parse_args(argv)
    return run_tool(lambda: replay(args))


def replay(args: argparse.Namespace) -> None:
    """Write the stream of a script.

    Raises:
        ValueError: if the script does not say how long the stream was, or began from frames.
    """
    from streamvid.students.folder import TINY_STUDENT, choose_device, load_student
    from streamvid.students.play import play_script
    from streamvid.students.script import Script
    from streamvid.video import VideoWriter

    script = Script.load(args.script)
    if not script.num_chunks:
        raise ValueError(f"{args.script} has no num_chunks; say how many chunks to make")
    device = choose_device(args.device)
    student = load_student(args.student or TINY_STUDENT, args.components, device)
    with VideoWriter(args.out, args.fps) as writer:
        for chunk in play_script(student, script):
            writer.append(chunk.frames[0])
    say(f"wrote {args.out}: {writer.num_frames} frames")


if __name__ == "__main__":
    sys.exit(main())
