"""What distillation asks of a teacher.

A family is one file beside this one. It converts its own conventions to those of ``core.process`` and tells
with ``provides`` what it can give; a method tells with ``needs`` what it asks for.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from streamvid.core.guidance import guide


class Teacher(Protocol):
    """A frozen model of the data, which can give its score."""

    provides: frozenset[str]
    """Of "score", "features", "clips"."""
    uncond: Tensor | None
    """Embedding ``[L, D]`` of the negative prompt; None if none could be made."""

    def predict(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """The velocity at ``x_t [B, C, T, h, w]``.

        Args:
            x_t: noisy latents.
            t: noise levels in [0, 1], ``[B]`` or ``[B, T]``.
            cond: prompt embeddings ``[B, L, D]``.
        """

    def encode_prompt(self, prompts: list[str]) -> Tensor:
        """Embeddings ``[B, L, D]``."""


def predict_guided(teacher: Teacher, x_t: Tensor, t: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """The teacher's velocity under guidance, see ``core.guidance``; a scale of 1 runs no second pass.

    Raises:
        ValueError: if guidance is asked of a teacher without ``uncond``.
    """
    velocity = teacher.predict(x_t, t, cond)
    if guidance_scale == 1:
        return velocity
    if teacher.uncond is None:
        raise ValueError(f"guidance_scale={guidance_scale} needs the teacher's uncond embedding, which is not there")
    uncond = teacher.uncond.to(cond).expand(len(cond), -1, -1)
    return guide(velocity, teacher.predict(x_t, t, uncond), guidance_scale)


def check_needs(method: Any, teacher: Any) -> None:
    """Check that a teacher gives what a method (its class or an instance) asks for.

    Raises:
        ValueError: if something is missing.
    """
    missing = sorted(method.needs - teacher.provides)
    if not missing:
        return
    names = [getattr(x, "__name__", type(x).__name__) for x in (method, teacher)]
    raise ValueError(
        f"the method {names[0]} needs {' and '.join(missing)} of its teacher, but {names[1]} provides only "
        f"{', '.join(sorted(teacher.provides)) or 'nothing'}; choose another teacher or another method"
    )
