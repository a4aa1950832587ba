"""Make a student folder of a published checkpoint.

    streamvid convert --from self-forcing self_forcing_dmd.pt --to students/self_forcing
    streamvid convert --from longlive longlive_base.pt --lora lora.pt --to students/longlive
    streamvid convert --from krea krea-realtime-video-14b.safetensors --to students/krea \\
        --components Wan2.1-T2V-14B-Diffusers
    streamvid convert --from self-forcing SFWan2.1-T2V-1.3B-Diffusers/ --to students/fastvideo
    streamvid convert --from wan Wan2.1-T2V-1.3B/ --to students/wan

The file says nothing about how a student is streamed: --from does; `wan` makes a bidirectional
network to begin a training with. Weights have the names of the original Wan or of diffusers. Code
in a checkpoint is never run. A student that is already at --to is replaced.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from streamvid.command_line import Parser, run_tool, say

# Fields of StreamConfig as published. A list "1000, 750, 500, 250" is nominal, and is 4 steps at
# shift 5.
_SELF_FORCING = {
    "num_steps": 4,
    "shift": 5.0,
    "window_frames": 21,
    "positions": "window",
    "max_trained_frames": 21,
}
_FRAMEWISE = {**_SELF_FORCING, "chunk_frames": 1}
# as it streams: 1000, 933, 733, 357 of Wan's own time, after the shift
_DIAGONAL = (1.0, 0.933, 0.733, 5 / 14)
STREAMS: dict[str, dict] = {
    "self-forcing": _SELF_FORCING,
    "causal-forcing": _SELF_FORCING,
    "causal-forcing-framewise": _FRAMEWISE,
    "causal-forcing-2step": {**_FRAMEWISE, "num_steps": 2, "first_steps": 4},
    "causal-forcing-1step": {**_FRAMEWISE, "num_steps": 1, "first_steps": 4},
    # times as they are, not shifted: indices 0, 36 and 44 of 50 steps at shift 8
    "causvid": {**_SELF_FORCING, "shift": 8.0, "step_table": ((1.0, 0.757, 0.522),)},
    "longlive": {**_SELF_FORCING, "window_frames": 12, "sink_frames": 3, "max_trained_frames": 240},
    # 4-3-2-2-..., without a pass that writes the context
    "diagdistill": {
        **_SELF_FORCING,
        "window_frames": 12,
        "sink_frames": 3,
        "commit": "reuse",
        "step_table": (_DIAGONAL, (*_DIAGONAL[:2], _DIAGONAL[3]), (_DIAGONAL[0], _DIAGONAL[3])),
    },
    # the first frame, the last two and the chunk, at positions 0 to 5; the release also recomputes
    # the context, we don't
    "krea": {**_SELF_FORCING, "window_frames": 6, "sink_frames": 1, "max_trained_frames": 6},
    "wan": {
        "num_steps": 50,
        "stepper": "euler",
        "commit": "none",
        "order": "full_sequence",
        "max_trained_frames": 21,
    },
}


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__, "convert")
    options.add_argument(
        "checkpoint",
        help=(
            "a .pt, .pth or .safetensors file, its .safetensors.index.json, or a folder, "
            "which may be in diffusers' layout"
        ),
    )
    options.add_argument(
        "--from", dest="family", required=True, choices=STREAMS, help="what was published"
    )
    options.add_argument("--to", required=True, help="the student folder to write")
    options.add_argument(
        "--which",
        help="the weights in a file with several; by default generator_ema, or else generator",
    )
    options.add_argument("--lora", help="a LoRA file to merge, of any published form")
    options.add_argument(
        "--components",
        help=(
            "a Wan folder in diffusers' layout, whose vae/, text_encoder/ and tokenizer/ "
            "are copied; without it, name them when sampling"
        ),
    )
    return options


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_tool(lambda: convert(args), "interrupted; nothing was written")


def convert(args: argparse.Namespace) -> None:
    """Read the checkpoint and write the student."""
    from streamvid.models.convert import open_original, read_lora
    from streamvid.rollout.schedule import StreamConfig
    from streamvid.students.card import model_card, streamed
    from streamvid.students.folder import save_student

    check_target(Path(args.to))
    stream = StreamConfig(**STREAMS[args.family])
    model = open_original(args.checkpoint, args.which, args.lora)
    size, config = sum(p.numel() for p in model.parameters()), model.config
    source = f"{Path(args.checkpoint).name} ({args.family}), whose licence holds"
    facts = {"converted from": source, "parameters": f"{size:,}"}
    if args.lora:
        facts["merged"] = f"{Path(args.lora).name} ({len(read_lora(args.lora))} updates)"
    save_student(args.to, model, stream, args.components, model_card(args.family, facts, stream))
    say(
        f"wrote {args.to}: {size:,} parameters in {str(model.dtype).removeprefix('torch.')},"
        f" {config.num_layers} blocks of {config.num_attention_heads} heads; {streamed(stream)}"
        + (f"; merged {facts['merged']}" if args.lora else "")
    )


def check_target(folder: Path) -> None:
    """A ValueError if there is anything at `folder` but a student, which may be replaced, or an
    empty folder.
    """
    from streamvid.rollout.schedule import STREAM_CONFIG_FILE

    if not folder.exists() or (folder / STREAM_CONFIG_FILE).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise ValueError(f"{folder} is there and is no student; name another folder with --to")


if __name__ == "__main__":
    sys.exit(main())
