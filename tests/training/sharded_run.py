"""What each of two processes of `test_sharding.py` runs; the same functions make the unsharded
runs.

torchrun --nproc_per_node 2 sharded_run.py OUTPUT_DIR TEACHER_DIR
"""

import sys
from pathlib import Path

import torch

from streamvid.experiment.build import build_method, build_student, build_trainer
from streamvid.experiment.config import load_run
from streamvid.seeding import keyed_normal
from streamvid.training.trainer import Trainer

RUNS = Path(__file__).parents[2] / "configs" / "run"
# Adam without eps would turn rounding into steps
SMOOTH = "{lr: 1e-3, eps: 1e-3, clip_norm: 0.05, accumulate: %d}"


class Power(Exception):
    """It went."""


class UntilStep:
    """A source that fails at a step, as a crash would."""

    def __init__(self, source, step):
        self.source, self.step = source, step

    def batch(self, step, *rest):
        if step == self.step:
            raise Power
        return self.source.batch(step, *rest)


class Latents:
    """Teacher clips and prompts of noise; sample i of a joint batch depends on nothing but its
    key.
    """

    def batch(self, step, turn, micro, indices):
        keys = [1000 * step + 10 * len(turn) + i for i in indices]
        latents = torch.stack([keyed_normal((16, 6, 4, 4), "x", key) for key in keys])
        cond = torch.stack([keyed_normal((5, 64), "cond", key) for key in keys])
        return {
            "latents": latents,
            "cond": cond,
            "offset": torch.zeros(len(keys), dtype=torch.long),
            "keys": keys,
        }


def config_of(method, output_dir, teacher, name, networks, accumulate, *more):
    """Three steps of four samples; two processes take one at a time, and one takes all
    (`accumulate` 1).
    """
    return load_run(
        RUNS / f"tiny_{method}.yaml",
        [
            f"train.name={name}",
            f"train.output_dir={output_dir}",
            f"teacher.path={teacher}",
            f"student.path={teacher}",
            f"components={teacher}",
            f"train.batch_size={1 if accumulate == 2 else 4}",
            "train.max_steps=3",
            "train.log_every=1",
            "train.save_every=2",
            "latent_size=[4, 4]",
            "options.student_start_step=0",
            "stream.chunk_frames=3",
            "stream.num_steps=2",
            "train.ema={student: {decay: 0.5}}",
            *(f"train.optimizers.{name}={SMOOTH % accumulate}" for name in networks),
            *more,
        ],
    )


def dmd(output_dir, teacher, name, accumulate, *more):
    options = ["rollout.num_chunks=2", "options.fake_updates_per_student=1", "data.num_prompts=4"]
    networks = ("student", "fake_score")
    config = config_of("dmd", output_dir, teacher, name, networks, accumulate, *options, *more)
    return build_trainer(config, progress=False)


def afd(output_dir, teacher, name, accumulate, *more):
    """Without accumulation: a clip's advantage depends on the others of its pass."""
    more = (
        "options.group_size=2",
        "train.max_steps=2",
        f"train.batch_size={4 // accumulate}",
        *more,
    )
    config = config_of("afd", output_dir, teacher, name, ("student", "discriminator"), 1, *more)
    method = build_method(config, build_student(config.student), torch.zeros(5, 64))
    return Trainer(config.train, method, Latents(), resolved=config, progress=False)


def train(trainer):
    """Without leaving the process group, as accelerate does at a run's end."""
    trainer.accelerator.end_training = lambda: None
    trainer.train()


def main():
    torch.set_num_threads(1)
    output_dir, teacher = sys.argv[1:]
    sharded = ("train.shard=full", "train.gradient_checkpointing=true")
    train(dmd(output_dir, teacher, "dmd", 2, *sharded))
    broken = dmd(output_dir, teacher, "parts", 2, *sharded)
    broken.source = UntilStep(broken.source, 2)
    try:
        train(broken)
    except Power:
        train(dmd(output_dir, teacher, "parts", 2, *sharded))
    train(afd(output_dir, teacher, "afd", 2, *sharded))


if __name__ == "__main__":
    main()
