"""What a run leaves: the trained student, its model card, and which checkpoint it is of."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from streamvid.experiment.config import RunConfig, show_path
from streamvid.files import atomic_file
from streamvid.models.lora import is_adapted, save_adapter
from streamvid.students.card import model_card
from streamvid.students.folder import (
    save_student,
    save_teacher,
)
from streamvid.training.checkpoint import COUNTERS_FILE, checksum
from streamvid.training.trainer import Trainer

EXPORTED_FILE = "exported.json"  # of a run folder: the checkpoint that its export is of


def export(trainer: Trainer, run_dir: Path, config: RunConfig) -> Path:
    """Write `run_dir/student`, with the averaged weights where there are any. Every process calls
    it, the main one writes.

    A causal student is complete in itself and can be streamed from there, a teacher sampled and
    distilled. Adapters are merged into transformer/, and lie beside it in lora/. An export of this
    checkpoint that is there already stays as it is, with the scores that it was given since.

    Raises:
        ValueError: one line, if a weight is not finite; nothing is written then.
    """
    learner, target = trainer.learners["student"], run_dir / "student"
    origin = origin_of(trainer)
    if read_origin(run_dir) == origin and (target / "transformer" / "config.json").is_file():
        return target
    weights = trainer.ema_weights("student") if learner.ema is not None else nullcontext()
    with weights:
        network = trainer.whole("student")
        if not trainer.is_main:
            return target
        if config.student.kind == "causal":
            save_student(
                target, network, config.stream, config.components, card_of(trainer, config)
            )
        else:
            save_teacher(
                target,
                network,
                getattr(config.options, "shift", config.stream.shift),
                config.components,
            )
        if is_adapted(network):
            save_adapter(network, target / "lora")
    with atomic_file(run_dir / EXPORTED_FILE) as temporary:
        temporary.write_text(json.dumps(origin) + "\n")
    return target


def origin_of(trainer: Trainer) -> dict[str, Any]:
    """What tells a run's last checkpoint from any other, also of the same step: its checksums have
    one of their own.
    """
    last = trainer.checkpoints / f"step-{trainer.step:07d}" / COUNTERS_FILE
    return {"step": trainer.step, "checkpoint": checksum(last)}


def read_origin(run_dir: Path) -> Any:
    """The ``origin_of`` of the export of a run folder; None if there is none, or nothing says
    so.
    """
    try:
        return json.loads((run_dir / EXPORTED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def card_of(trainer: Trainer, config: RunConfig) -> str:
    """The model card of an exported student."""
    facts = {
        "method": (
            f"{config.method}, {trainer.step} steps of batch {config.train.batch_size}, seed"
            f" {config.train.seed}"
        ),
        "started from": show_path(config.student.path) if config.student.path else "random weights",
        "teacher": show_path(config.teacher.path),
        "data": (
            config.data.kind + (f" ({Path(config.data.path).name})" if config.data.path else "")
        ),
    }
    guidance = getattr(config.options, "guidance_scale", None)
    if guidance is not None:
        facts["guidance of the teacher"] = f"{guidance:g}"
    return model_card(config.train.name, facts, config.stream)
