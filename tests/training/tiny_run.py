"""A method of two linear networks and a source of numbers; also a script, for tests in other
processes:

python tiny_run.py OUTPUT_DIR [key=value ...]
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field

import torch
from torch import nn

from streamvid.config import load_config
from streamvid.seeding import keyed_generator, keyed_normal
from streamvid.training.config import TrainConfig
from streamvid.training.ema import EMAConfig
from streamvid.training.launch import launch_all_processes
from streamvid.training.optimizers import OptimizerConfig
from streamvid.training.trainer import Trainer, TrainingError


@dataclass
class Knobs:
    """What a test wants of the fake method."""

    student_every: int = 3
    seconds_per_loss: float = 0.0
    nan_at: int = -1  # the step whose student loss is not a number
    global_noise: bool = False  # draw from torch's global generator as well
    path: str = ""  # of something that a run reads


@dataclass
class RunConfig:
    train: TrainConfig
    knobs: Knobs = field(default_factory=Knobs)


class TwoLinears:
    """A fake score that fits the student's output, and a student that is drawn to a target and the
    fit.
    """

    needs = frozenset()

    def __init__(self, knobs):
        self.knobs, self.updates, self.decisions = knobs, [], []
        generator = torch.Generator().manual_seed(0)
        self.student, self.fake_score = nn.Linear(3, 2), nn.Linear(2, 2)
        self.reference = nn.Linear(3, 2).requires_grad_(False)
        with torch.no_grad():
            for p in (
                *self.student.parameters(),
                *self.fake_score.parameters(),
                *self.reference.parameters(),
            ):
                p.copy_(torch.randn(p.shape, generator=generator))

    def networks(self):
        return {"student": self.student, "fake_score": self.fake_score}

    def turns(self, step):
        return (
            ("fake_score", "student") if step % self.knobs.student_every == 0 else ("fake_score",)
        )

    def loss(self, turn, batch, step):
        time.sleep(self.knobs.seconds_per_loss)
        level = torch.rand((), generator=keyed_generator(0, "decision", step, turn)).item()
        self.decisions.append(level)
        out = self.student(batch["x"]) + level * batch["noise"]
        if self.knobs.global_noise:
            out = out + 0.1 * torch.randn(out.shape)
        loss = (self.fake_score(out.detach()) - out.detach()).square().mean()
        if turn == "student":
            target = batch["x"][:, :2] + self.reference(batch["x"])
            loss = (out - target).square().mean() + (self.fake_score(out) - target).square().mean()
            loss = loss * float("nan") if step == self.knobs.nan_at else loss
        return loss, {"level": level}

    def after_step(self, turn, step):
        self.updates.append(turn)
        if turn == "student":
            self.reference.weight.lerp_(self.student.weight.detach(), 0.1)

    def extra_state(self):
        return {"reference.weight": self.reference.weight}


class Numbers:
    """Sample i of a joint batch depends on nothing but its key."""

    def batch(self, step, turn, micro, indices):
        keys = [hash((step, len(turn), micro, i)) % 2**31 for i in indices]
        x = torch.stack([keyed_normal((3,), "x", key) for key in keys])
        return {
            "x": x,
            "noise": torch.stack([keyed_normal((2,), "noise", key) for key in keys]),
            "keys": keys,
        }


def make_config(output_dir, overrides=()):
    """Twelve steps of two samples, both networks with every device of the trainer."""
    train = TrainConfig(
        name="tiny",
        output_dir=str(output_dir),
        max_steps=12,
        batch_size=2,
        log_every=5,
        save_every=4,
        optimizers={
            "student": OptimizerConfig(lr=0.02, schedule="cosine", warmup_steps=2, clip_norm=0.5),
            "fake_score": OptimizerConfig(lr=0.05, betas=(0.0, 0.99), schedule="linear"),
        },
        ema={"student": EMAConfig(decay=0.5, start_step=1)},
    )
    return load_config(RunConfig, None, list(overrides), default=RunConfig(train))


def make_trainer(output_dir, *overrides, **options):
    config = make_config(output_dir, overrides)
    method = TwoLinears(config.knobs)
    return Trainer(config.train, method, Numbers(), resolved=config, progress=False, **options)


def everything(trainer):
    """All tensors of a run, by name."""
    return {
        f"{file}/{key}": t.clone()
        for file, ts in trainer._tensors().items()
        for key, t in ts.items()
    }


def signal_itself(method, number, step):
    """Sends the signal `number` to this process in the student's loss of a step, so that no test
    need be in time for it.
    """
    loss = method.loss

    def signalling(turn, batch, at):
        if at == step and turn == "student":
            os.kill(os.getpid(), number)
        return loss(turn, batch, at)

    method.loss = signalling


def main():
    launch_all_processes()
    torch.set_num_threads(1)
    trainer = make_trainer(*sys.argv[1:])
    signal_itself(trainer.method, *map(int, os.environ.get("SIGNAL_IN_STEP", "0 -1").split()))
    try:
        trainer.train()
    except TrainingError as error:
        sys.exit(f"error: {error}")
    rank = trainer.accelerator.process_index
    seen = {"decisions": trainer.method.decisions, "processes": trainer.accelerator.num_processes}
    (trainer.run_dir / f"seen-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
