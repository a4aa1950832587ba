"""A model with the way in which it is sampled: a student as it streams, or a guided teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamvid.rollout.sampler import GuidedModel
from streamvid.rollout.schedule import StreamConfig


@dataclass(frozen=True)
class Runner:
    """A model and how it is sampled."""

    label: str
    model: Any
    """A causal student, or a ``GuidedModel``."""
    stream: StreamConfig
    passes: int = 1
    """Forwards of the network per call of the model; 2 with guidance."""


def student_runner(label: str, student: Any, config: StreamConfig) -> Runner:
    """A student as it streams."""
    return Runner(label, student, config)


def teacher_runner(
    label: str,
    teacher: Any,
    num_steps: int,
    guidance_scale: float,
    latent_frames: int,
    shift: float | None = None,
) -> Runner:
    """A teacher with Euler steps over the whole clip; ``shift`` None takes the times of the model's
    own sampler.
    """
    model = GuidedModel(teacher.predict, teacher.uncond[None], guidance_scale)
    times = (
        {"step_table": (teacher.step_times(num_steps),)}
        if shift is None
        else {"num_steps": num_steps, "shift": shift}
    )
    # one chunk, the clip
    config = StreamConfig(**times, chunk_frames=latent_frames, commit="none", stepper="euler")
    return Runner(label, model, config, 1 if guidance_scale == 1 else 2)
