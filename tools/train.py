"""Train a network by a method: a teacher, a causal start, or a distilled student.

    python tools/train.py --config configs/run/tiny_dmd.yaml
    python tools/train.py --config configs/run/tiny_dmd.yaml train.max_steps=200 train.name=trial
    accelerate launch --cpu --num_processes 2 tools/train.py --config configs/run/tiny_dmd.yaml

A run writes runs/NAME/: config.yaml, metrics.jsonl, checkpoints/ and, at the end, student/. The
same command resumes it. `--dry-run` prints the resolved configuration, and what the run will need:
the memory of each network and of each turn at its peak, floating-point operations a step, and room
on the disk; nothing is loaded, fetched or written for that. One process, or one launch, trains a
run at a time. Ctrl-C, SIGTERM and SIGHUP save and stop; the launcher's end does too.
"""

from __future__ import annotations

import sys
from contextlib import suppress

import yaml

from streamvid.command_line import Parser, log_to_stderr, tell
from streamvid.printing import one_line
from streamvid.training.launch import launch_all_processes


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--config", required=True, help="a run file, such as configs/run/tiny_dmd.yaml"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, then stop")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the run file's"
    )
    args = parser.parse_intermixed_args(argv)
    log_to_stderr()
    try:
        launch_all_processes()
        return run(args.config, args.overrides, args.dry_run)
    except (ValueError, OSError) as error:
        return failed(error)
    except KeyboardInterrupt:
        tell("stopped; the same command starts anew, or resumes from the last checkpoint")
        return 130


def failed(error: Exception) -> int:
    tell(f"error: {one_line(error)}")
    return 2


def run(path: str, overrides: list[str], dry_run: bool) -> int:
    """Trains, or says what that would take; what can be refused at once is refused first."""
    from streamvid.config import to_plain
    from streamvid.experiment.build import build_trainer, check_run
    from streamvid.experiment.config import load_run
    from streamvid.experiment.estimate import ensure_memory, estimate
    from streamvid.experiment.room import ensure_room, room_of
    from streamvid.students.folder import choose_device
    from streamvid.training.trainer import TrainingError

    config = load_run(path, overrides)
    check_run(config)
    if dry_run:
        needs = estimate(config).table(), room_of(config).line()
        print(
            yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True), *needs, sep="\n"
        )
        return 0
    ensure_memory(config, choose_device())
    ensure_room(config)
    trainer = build_trainer(config)
    try:
        run_dir = trainer.train()
    except TrainingError as error:
        return failed(error)
    if trainer.is_main:
        with suppress(OSError):  # the terminal may be gone
            print(f"wrote {run_dir}/student", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
