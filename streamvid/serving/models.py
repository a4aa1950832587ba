"""The models of a server: students, which stream and make clips, and teachers, which make clips."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from fastapi import APIRouter, HTTPException
from pydantic import BaseModel
from torch import Tensor

from streamvid.codecs.base import VideoCodec, latent_frames_of
from streamvid.rollout.loop import rollout_passes
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.passes import Pass, next_result
from streamvid.rollout.runner import Runner, teacher_runner
from streamvid.rollout.sampler import check_finite, latent_shape_of
from streamvid.rollout.schedule import build_schedule
from streamvid.serving.errors import refusals
from streamvid.students.batch import Decode
from streamvid.students.script import Script
from streamvid.video import to_uint8

TEACHER_STEPS = 50
TEACHER_GUIDANCE = 2.0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ServedModel:
    """A model as clients see it, and how the worker opens it."""

    id: str
    open_session: Callable[..., Any]
    """``open_session(prompt, seed=, height=, width=, steps=)`` gives a session."""
    steps: int
    """Per chunk, or per clip of a teacher, where a client says nothing."""
    kind: Literal["student", "teacher"] = "student"
    device: torch.device = CPU
    num_frames: int | None = None
    """Pixel frames of every clip; None leaves them to the client."""
    options: Sequence[str] = ()
    """Of `streamvid sample`, which open the same model there."""
    restore: Callable[[Path], Any] | None = None
    """Makes a session of a snapshot's file; None if there are none."""
    warm_up: Callable[[], None] | None = None
    """Called by the worker before it serves."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def live(self) -> bool:
        """Whether it streams."""
        return self.kind == "student"

    def check_clip(self, steps: int | None, num_frames: int | None) -> None:
        """Refuse other steps and lengths than those that the model is bound to.

        Args:
            num_frames: pixel frames that the client asks for; None if it says nothing.
        """
        if self.live:
            return
        if steps is not None:
            raise ValueError(f"steps: {self.id} is a teacher with steps of its own; leave it out")
        if num_frames not in (None, self.num_frames):
            raise ValueError(
                f"{num_frames} frames: {self.id} is a teacher, whose clips have {self.num_frames};"
                " leave seconds and num_frames out"
            )


class ServedModels:
    """The models of a server by their ids; the first one is the default.

    Raises:
        ValueError: if two have the same id.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.id: model for model in models}
        if len(self._models) < len(models):
            raise ValueError(f"two of the models {', '.join(m.id for m in models)} share an id")

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    @property
    def default(self) -> ServedModel:
        """What a client gets that names none."""
        return next(iter(self))

    def find(self, model_id: str | None) -> ServedModel:
        """The model of an id.

        Raises:
            ValueError: if there is none.
        """
        if model_id is None:
            return self.default
        if model_id not in self._models:
            raise ValueError(f"model: this server has {', '.join(self._models)}; name one of them")
        return self._models[model_id]

    def find_live(self, model_id: str | None) -> ServedModel:
        """The model of an id, which has to stream.

        Raises:
            ValueError: if there is none, or it makes clips only.
        """
        model = self.find(model_id)
        if not model.live:
            raise ValueError(
                f"model: {model.id} is a teacher, which makes clips only; ask for one with"
                " POST /v1/videos"
            )
        return model


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, with a number after each that was there before."""
    unique: list[str] = []
    for name in names:
        number, made = 1, name
        while made in unique:
            number += 1
            made = f"{name}-{number}"
        unique.append(made)
    return unique


def name_of(path: str | Path) -> str:
    """A model's name: that of its folder, or of the run that the folder is in."""
    path = Path(path).resolve()
    name = path.parent.name if path.name in ("student", "teacher") else path.name
    return name or "model"


# ---- teachers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherChunk:
    """A whole clip."""

    frames: Tensor  # [1, T, 3, H, W] in [0, 1]

    @property
    def images(self) -> np.ndarray:
        """The frames as bytes ``[T, H, W, 3]``."""
        return to_uint8(self.frames[0])


class TeacherClip:
    """A teacher's clip, in the calls of a session; its one chunk is the clip.

    Args:
        runner: the guided teacher and its steps.
        network: says which sizes its patches divide, see ``latent_shape_of``.
        codec: of its latents.
        encode: prompts to embeddings ``[B, L, D]``.
        steps: what the script says; the runner has its own.
    """

    def __init__(
        self,
        runner: Runner,
        network: Any,
        codec: VideoCodec,
        encode: Callable[[list[str]], Tensor],
        prompt: str,
        *,
        seed: int,
        height: int,
        width: int,
        steps: int | None = None,
    ) -> None:
        self._runner = runner
        self._codec = codec
        self._encode = encode
        self._latent_shape = latent_shape_of(codec, network, height, width)
        self.script = Script(prompt, height, width, seed, steps)

    def chunk_passes(self) -> Generator[Pass | Decode, Any, TeacherChunk]:
        """The clip, see ``Session.chunk_passes``."""
        stream = self._runner.stream
        cond = self._encode([self.script.prompt])
        rollout = rollout_passes(
            self._runner.model,
            cond,
            build_schedule(stream, 1),
            KeyedNoise([self.script.seed]),
            latent_shape=self._latent_shape,
            chunk_frames=stream.chunk_frames,
            commit=stream.commit,
            stepper=stream.stepper,
        )
        result = yield from next_result(rollout)
        state = self._codec.new_decoder_state()
        frames, _ = yield Decode(self._codec, result.latents, state)
        check_finite(cond, result.latents, frames)
        return TeacherChunk(frames)

    def close(self) -> None:
        """There is nothing to free."""


def serve_teacher(
    model_id: str,
    path: str | Path,
    num_frames: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    codec: str | Path | None = None,
) -> ServedModel:
    """Open a teacher's folder, complete with its codec, to be served.

    Args:
        num_frames: pixel frames of the clips that it was trained on.
        codec: another codec of the same latents, a folder or a TAEHV file.

    Raises:
        ValueError: one line, if a part is missing or damaged, or the codec makes no clips of this
            length.
    """
    from streamvid.codecs.load import open_codec
    from streamvid.teachers.load import open_teacher

    opened = open_codec(codec or path, device)
    latent_frames = latent_frames_of(num_frames, opened.temporal_ratio)
    teacher = open_teacher(path, torch_dtype=dtype, device=device)
    runner = teacher_runner("teacher", teacher, TEACHER_STEPS, TEACHER_GUIDANCE, latent_frames)
    patch = teacher.transformer.config.patch_size  # one number for all sides, or one for each
    network = runner.model if isinstance(patch, int) else teacher.transformer

    def encode(prompts: list[str]) -> Tensor:
        return teacher.encode_prompt(prompts).to(device)

    return ServedModel(
        model_id,
        partial(TeacherClip, runner, network, opened, encode),
        steps=TEACHER_STEPS,
        kind="teacher",
        device=device,
        num_frames=num_frames,
    )


# ---- GET /v1/models ------------------------------------------------------------------------------


class ModelInfo(BaseModel):
    """A model, as OpenAI's clients read it, and what it does here."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "streamvid"
    kind: Literal["student", "teacher"]
    live: bool
    steps: int
    height: int
    width: int
    fps: float
    num_frames: int | None


class ModelList(BaseModel):
    """All models; the first one is the default."""

    object: str = "list"
    data: list[ModelInfo]


def model_routes(models: ServedModels, height: int, width: int, fps: float) -> APIRouter:
    """The routes of ``/v1/models``."""
    router = APIRouter(
        prefix="/v1/models",
        tags=["models"],
        responses=refusals({404: "There is no such model.", 413: "The body is too large."}),
    )

    def describe(model: ServedModel) -> ModelInfo:
        return ModelInfo(
            id=model.id,
            created=model.created,
            kind=model.kind,
            live=model.live,
            steps=model.steps,
            height=height,
            width=width,
            fps=fps,
            num_frames=model.num_frames,
        )

    @router.get("", response_model=ModelList)
    async def list_models() -> ModelList:
        """The models of this server."""
        return ModelList(data=[describe(model) for model in models])

    @router.get("/{model_id}", response_model=ModelInfo)
    async def retrieve(model_id: str) -> ModelInfo:
        """One of them."""
        try:
            return describe(models.find(model_id))
        except ValueError as error:
            raise HTTPException(404, str(error)) from None

    return router
