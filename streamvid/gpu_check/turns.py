"""What the turns of published recipes cost: seconds and memory, against the dry run, with random
weights and prompts.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from streamvid.experiment.build import build_fake_score, build_method, share_teacher
from streamvid.experiment.config import DTYPES, RunConfig, load_run
from streamvid.experiment.estimate import estimate
from streamvid.experiment.on_meta import sizes_of, text_tokens_of
from streamvid.gpu_check.check import ROOT
from streamvid.gpu_check.measure import (
    Report,
    peak_gib,
    random_network,
    reset_peak,
    student_sizes,
)
from streamvid.metering import GIB, seconds_of
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.lora import adapt
from streamvid.seeding import keyed_normal
from streamvid.teachers.wan import WanTeacher
from streamvid.training.trainer import Trainer

PUBLISHED_NAME = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
TINY_CLIP = ["latent_size=[8,8]", "rollout.num_chunks=2"]


def train_24gb(report: Report) -> None:
    """The part ``train_24gb``: adapters on one set of frozen weights."""
    turns_of_recipe(report, "wan1.3b_dmd_24gb.yaml")


def train_full(report: Report) -> None:
    """The part ``train_full``: all of student and fake score is trained."""
    turns_of_recipe(report, "wan1.3b_dmd.yaml")


def turns_of_recipe(report: Report, file: str) -> None:
    """Each turn of one accumulation pass, where the rollout ends at its first step and at its
    last.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(report, file, Path(folder))
        trainer = build(config, report)
        report.measurements["accumulate"] = "1 here, as against the recipe's own"
        last = trainer.method.num_steps - 1
        for turn in ("fake_score", "student"):
            report.attempt(
                f"{turn}, warm-up_s", lambda: run_turn(trainer, turn, last, report)["seconds"]
            )
            report.attempt(f"{turn}, gradient", lambda: gradient_of(trainer, turn, last))
            for exit_index in (last, 0):
                report.attempt(
                    f"{turn}, exit {exit_index}",
                    lambda: run_turn(trainer, turn, exit_index, report),
                )
        report.attempt("estimate", lambda: _estimated(config))


def config_of(report: Report, file: str, folder: Path) -> RunConfig:
    path = PUBLISHED_NAME
    if report.tiny:
        path = str(folder)
        (folder / "transformer").mkdir()
        sizes = {**student_sizes(tiny=True), "_class_name": "WanTransformer3DModel"}
        (folder / "transformer" / "config.json").write_text(json.dumps(sizes))
    options = [f"student.path={path}", f"teacher.path={path}", f"train.output_dir={folder}"]
    options += TINY_CLIP if report.tiny else []
    options += [f"train.optimizers.{name}.accumulate=1" for name in ("student", "fake_score")]
    return load_run(ROOT / "configs" / "run" / file, options)


def build(config: RunConfig, report: Report) -> Trainer:
    """As ``build_trainer``, with random weights in place of a checkpoint's."""
    sizes, lora = sizes_of(config.student.path, "student.path"), config.student.lora
    teacher = WanTeacher(
        random_network(WanTransformer3DModel, sizes, DTYPES[config.teacher.dtype], report.device),
        None,
        shift=1.0,
    )
    student = random_network(CausalWanTransformer3DModel, sizes, DTYPES[lora.dtype], report.device)
    student.load_state_dict(teacher.transformer.state_dict())
    if lora.rank:
        student = adapt(student, lora, config.train.seed, "student")
        share_teacher(config, student, teacher)
    teacher.uncond = keyed_normal(
        (text_tokens_of(config), int(sizes["text_dim"])), "gpu check", "uncond"
    ).to(report.device)
    fake_score = build_fake_score(config, teacher)
    method = build_method(config, student, teacher.uncond, teacher, fake_score)
    report.free()
    source = RandomPrompts(text_tokens_of(config), int(sizes["text_dim"]))
    trainer = Trainer(config.train, method, source, progress=False)
    method.teacher.to(trainer.accelerator.device)
    return trainer


class RandomPrompts:
    """Embeddings of random numbers, keyed as a source must be."""

    def __init__(self, tokens: int, width: int) -> None:
        self.shape = (tokens, width)

    def batch(self, step: int, turn: str, micro: int, indices: range) -> dict[str, Any]:
        return {
            "cond": torch.stack([keyed_normal(self.shape, "gpu check", i) for i in indices]),
            "keys": list(indices),
        }


def _step_of(trainer: Trainer, turn: str, exit_index: int) -> int:
    """A step of the run whose rollout ends there."""
    return next(
        i
        for i in itertools.count()
        if trainer.method.step_of(turn, None, i).decide().exit_index == exit_index
    )


def run_turn(trainer: Trainer, turn: str, exit_index: int, report: Report) -> dict[str, Any]:
    """The trainer's own turn, with its optimiser and its average."""
    trainer.step = _step_of(trainer, turn, exit_index)
    reset_peak(report.device)
    seconds = seconds_of(lambda: trainer._run_turn(turn, 0), report.device)
    numbers = {
        key: value
        for key, value in trainer.means.take().items()
        if key.endswith(("loss", "grad_norm"))
    }
    return {"seconds": seconds, "peak_gib": peak_gib(report.device), **numbers}


def gradient_of(trainer: Trainer, turn: str, exit_index: int) -> dict[str, Any]:
    """Whether every parameter has a finite gradient."""
    trainer.step, learner = _step_of(trainer, turn, exit_index), trainer.learners[turn]
    trainer._require_gradients_of([turn])
    trainer._backward(learner, turn, 0, 0)
    gradients: dict[str, Tensor | None] = {name: p.grad for name, p in learner.parameters.items()}
    learner.optimizer.zero_grad(set_to_none=True)
    present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    return {
        "parameters": len(gradients),
        "without_gradient": len(gradients) - len(present),
        "not_finite": sum(not bool(gradient.isfinite().all()) for gradient in present.values()),
        "zero": sum(not bool(gradient.any()) for gradient in present.values()),
    }


def _estimated(config: RunConfig) -> dict[str, Any]:
    """The dry run's figures where rollouts end at their last step, in GiB and TFLOP."""
    whole = estimate(replace(config, rollout=replace(config.rollout, exit="last")))
    turns = {
        turn.name: {"peak_beyond_gib": turn.peak / GIB, "tflop": turn.flops / 1e12}
        for turn in whole.turns
    }
    return {"networks_gib": whole.state_bytes / GIB, "peak_gib": whole.peak_bytes / GIB, **turns}
