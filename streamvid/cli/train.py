"""Train a network by an objective: a teacher, a causal start, or a distilled student.

    streamvid train --config configs/run/tiny_dmd.yaml
    streamvid train --config configs/run/tiny_dmd.yaml train.max_steps=200 train.name=trial
    accelerate launch --cpu --num_processes 2 -m streamvid.cli.train --config run.yaml

A run writes runs/NAME/: config.yaml, metrics.jsonl, checkpoints/ and, at the end, student/. The
same command resumes it. `--dry-run` prints the resolved configuration, and what the run will need:
the memory of each network and of each turn at its peak, floating-point operations per step, and
room on the disk; nothing is loaded, fetched or written for that. One process, or one launch, trains
a run at a time. Ctrl-C, SIGTERM and SIGHUP save and stop; the launcher's end does too.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress

import yaml

from streamvid.command_line import Parser, log_to_stderr, run_tool
from streamvid.config import read_config, to_plain
from streamvid.training.launch import launch_all_processes


def parser() -> Parser:
    """The options."""
    options = Parser(__doc__, "train")
    options.add_argument(
        "--config", required=True, help="a run file, such as configs/run/tiny_dmd.yaml"
    )
    options.add_argument("--dry-run", action="store_true", help="print what would run, then stop")
    options.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the run file's"
    )
    return options


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    log_to_stderr()
    return run_tool(
        lambda: train(args),
        "stopped; the same command starts anew, or resumes from the last checkpoint",
    )


def train(args: argparse.Namespace) -> None:
    """Train, or say what that would take; what can be refused at once is refused first."""
    read_config(args.config, args.overrides)
    launch_all_processes()
    from streamvid.experiment.config import load_run

    config = load_run(args.config, args.overrides)
    # diffusers and transformers, which take seconds, for a run that is right so far
    from streamvid.experiment.build import build_trainer, check_run
    from streamvid.experiment.estimate import ensure_memory, estimate
    from streamvid.experiment.room import ensure_room, room_of
    from streamvid.students.folder import choose_device

    check_run(config)
    if args.dry_run:
        settings = yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)
        needs = [estimate(config).table(), room_of(config).line()]
        print(settings, *needs, sep="\n")
        return
    ensure_memory(config, choose_device())
    ensure_room(config)
    trainer = build_trainer(config)
    run_dir = trainer.train()
    if trainer.is_main:
        with suppress(OSError):  # the terminal may be gone
            print(f"wrote {run_dir}/student", flush=True)


if __name__ == "__main__":
    sys.exit(main())
