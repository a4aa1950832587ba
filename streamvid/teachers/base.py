"""What distillation asks of a teacher.

A family is one file beside this one. It converts its own conventions to those of ``core.process``
and tells with ``provides`` what it can give; an objective tells with ``needs`` what it asks for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from streamvid.core.guidance import guide
from streamvid.weights import read_json

if TYPE_CHECKING:
    from streamvid.codecs.text import PromptEncoder

TIMESTEPS = 1000  # of Wan's own time


@dataclass(frozen=True)
class VideoCond:
    """A prompt with the first frame of the clip, what an image-to-video teacher is conditioned
    on.
    """

    embeddings: Tensor
    """Embeddings of the prompts, ``[B, L, D]``."""
    first_frame: Tensor
    """Latents of the first frame, ``[B, C, 1, h, w]`` or, where the family says so, with what
    follows it."""
    image_embeds: Tensor | None = None
    """Embeddings of the first frame, ``[B, tokens, D']``, for a family that looks at it through an
    image encoder."""

    def rows(self, index: Tensor) -> VideoCond:
        """A part of the batch."""
        image = None if self.image_embeds is None else self.image_embeds[index]
        return VideoCond(self.embeddings[index], self.first_frame[index], image)


class Teacher(Protocol):
    """A frozen model of the data, which can give its score."""

    provides: frozenset[str]
    """Some of "score", "features", "clips"."""
    uncond: Tensor | None
    """Embedding ``[L, D]`` of the negative prompt; None if none could be made."""

    def predict(self, x_t: Tensor, t: Tensor, cond: Tensor | VideoCond) -> Tensor:
        """The velocity at ``x_t [B, C, T, h, w]``.

        Args:
            x_t: noisy latents.
            t: noise levels in [0, 1], ``[B]`` or ``[B, T]``.
            cond: prompt embeddings ``[B, L, D]``; with the first frame for an image-to-video
                teacher.
        """

    def encode_prompt(self, prompts: list[str]) -> Tensor:
        """Embeddings ``[B, L, D]``."""


class ModelTeacher(Teacher, Protocol):
    """A teacher with a network of its own, on a checkpoint."""

    transformer: nn.Module

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that it takes."""

    @property
    def text_dim(self) -> int:
        """Width of the embeddings that it takes."""

    def step_times(self, num_steps: int) -> tuple[float, ...]:
        """The times of its own sampler, falling, without the final 0."""

    def to(self, device: torch.device | str) -> ModelTeacher:
        """Move its networks."""

    def trainable_copy(self) -> nn.Module:
        """Its network in float32, to be trained as a score: what ``score_velocity`` takes."""


def score_velocity(network: Any, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """The velocity that a trainable score says, in the conventions of ``Teacher.predict``.

    Args:
        network: one with ``predict(x_t, t, cond)``, which has its family's border inside, or with
            the call of ``diffusers.WanTransformer3DModel``, whose only border is that of the time.
        t: ``[B]``.
    """
    if hasattr(network, "predict"):
        return network.predict(x_t, t, cond)
    return network(x_t, TIMESTEPS * t, cond, return_dict=False)[0]


def predict_guided(
    teacher: Teacher, x_t: Tensor, t: Tensor, cond: Tensor | VideoCond, guidance_scale: float
) -> Tensor:
    """The teacher's velocity under guidance, see ``core.guidance``; a scale of 1 runs no second
    pass.

    A first frame is known with and without the prompt.

    Raises:
        ValueError: if guidance is asked of a teacher without ``uncond``.
    """
    velocity = teacher.predict(x_t, t, cond)
    if guidance_scale == 1:
        return velocity
    if teacher.uncond is None:
        raise ValueError(
            f"guidance_scale={guidance_scale} needs the teacher's uncond embedding, which is not"
            " there"
        )
    embeddings = cond.embeddings if isinstance(cond, VideoCond) else cond
    uncond = teacher.uncond.to(embeddings).expand(len(embeddings), -1, -1)
    without = replace(cond, embeddings=uncond) if isinstance(cond, VideoCond) else uncond
    return guide(velocity, teacher.predict(x_t, t, without), guidance_scale)


# ---- opening a checkpoint ------------------------------------------------------------------------


def transformer_class(path: Path) -> str:
    """The class of ``path/transformer``, which tells the families apart.

    Raises:
        ValueError: if there is no such folder, or it does not say.
    """
    if not path.is_dir():
        raise ValueError(
            f"no teacher folder at {path}; expected a checkpoint in the diffusers layout"
        )
    file = path / "transformer" / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{path} has no transformer/config.json; expected a checkpoint in the diffusers layout"
        )
    name = read_json(file).get("_class_name")
    if not isinstance(name, str):
        raise ValueError(
            f"{file} has no _class_name; expected a checkpoint in the diffusers layout"
        )
    return name


def check_family(path: Path, class_name: str) -> None:
    """A ValueError unless the folder holds a transformer of that class."""
    found = transformer_class(path)
    if found != class_name:
        raise ValueError(
            f"{path} is of another family: its transformer is a {found}, expected a {class_name}"
        )


def open_prompts(
    path: Path,
    text_dim: int,
    cache_dir: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> PromptEncoder:
    """The prompt encoder of a checkpoint, whose embeddings have the width that its transformer
    takes.

    Raises:
        ValueError: if it is missing or damaged, or makes embeddings of another width.
    """
    # transformers takes seconds to import, and an objective's options need none of it
    from streamvid.codecs.text import PromptEncoder

    encoder = PromptEncoder.from_pretrained(path, cache_dir=cache_dir, dtype=dtype, device=device)
    check_width(path, encoder, text_dim)
    return encoder


def check_width(path: str | Path, encoder: PromptEncoder, text_dim: int) -> None:
    """A ValueError unless the embeddings of a text encoder have the width that the transformer of
    ``path`` takes.
    """
    if encoder.embedding_dim != text_dim:
        raise ValueError(
            f"{path}: the text encoder makes embeddings of {encoder.embedding_dim} numbers, the"
            f" transformer takes {text_dim}; they are from different checkpoints"
        )
