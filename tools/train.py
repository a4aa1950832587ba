"""Train a network by a method: a teacher, a causal start, or a distilled student.

    python tools/train.py --config configs/run/tiny_dmd.yaml
    python tools/train.py --config configs/run/tiny_dmd.yaml train.max_steps=200 train.name=trial
    accelerate launch --cpu --num_processes 2 tools/train.py --config configs/run/tiny_dmd.yaml

A run writes runs/NAME/: config.yaml, metrics.jsonl, checkpoints/ and, at the end, student/. The same command
resumes it. `--dry-run` prints the resolved configuration, and what the run will need: the memory of each network and
of each turn at its peak, and floating-point operations a step; nothing is loaded or fetched for that.
"""

from __future__ import annotations

import argparse
import sys

import yaml

from streamvid.command_line import log_to_stderr, tell
from streamvid.printing import one_line
from streamvid.training.processes import launch_all_processes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a run file, such as configs/run/tiny_dmd.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, then stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the run file's")
    args = parser.parse_intermixed_args(argv)
    launch_all_processes()
    log_to_stderr()

    from streamvid.config import to_plain
    from streamvid.serving.student import choose_device
    from streamvid.training.estimate import ensure_memory, estimate
    from streamvid.training.run import build_trainer, load_run
    from streamvid.training.trainer import TrainingError

    try:
        config = load_run(args.config, args.overrides)
        if args.dry_run:
            print(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True))
            print(estimate(config).table())
            return 0
        ensure_memory(config, choose_device())
        trainer = build_trainer(config)
        run_dir = trainer.train()
    except (ValueError, OSError, TrainingError) as error:
        tell(f"error: {one_line(error)}")
        return 2
    if trainer.is_main:
        print(f"wrote {run_dir}/student")
    return 0


if __name__ == "__main__":
    sys.exit(main())
