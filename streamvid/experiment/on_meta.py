"""A run without data: its objective on torch's meta device, where tensors have shapes alone, and a
batch of the run's shapes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from streamvid.codecs.base import latent_frames_of
from streamvid.experiment.build import (
    build_fake_score,
    build_method,
    build_student,
    needs_teacher,
    stands_on_teacher,
)
from streamvid.experiment.config import DTYPES, Geometry, RunConfig
from streamvid.hub import HUB_NAME
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.jump_embedding import add_jump_embedding
from streamvid.models.lora import adapt, share_weights
from streamvid.models.published import PUBLISHED
from streamvid.rollout.schedule import chunk_times
from streamvid.teachers.wan import WanTeacher
from streamvid.training.checks import check_names
from streamvid.training.method import Method
from streamvid.training.trainer import switch_on
from streamvid.weights import read_json

TEXT_TOKENS = 512  # of a published text encoder
TEMPORAL_RATIO = 4  # pixel frames per latent frame, of all codecs here


class UnknownSizes(ValueError):
    """The sizes of a network are not known here."""


def build_on_meta(config: RunConfig, depth: int | None = None) -> Method:
    """The objective of a run on networks without data; ``depth`` replaces their blocks'."""
    student, teacher = _student(config, depth), None
    if needs_teacher(config):  # of two experts the first, which costs what the other would
        dtype = DTYPES[config.teacher.dtype]
        teacher = WanTeacher(
            _transformer(config.teacher.path, "teacher.path", depth, dtype), None, shift=1.0
        )
        if stands_on_teacher(config):
            share_weights(teacher.transformer, student)
    fake_score = build_fake_score(
        config, teacher, lambda path, dtype: _transformer(path, "fake_score.path", depth, dtype)
    )
    uncond = torch.empty(text_tokens_of(config), int(student.config.text_dim), device="meta")
    if teacher is not None:
        teacher.uncond = uncond
    as_image = lambda latents: latents[:, :, -1:]  # the codec is not counted
    method = build_method(
        _move_layers(config, student, depth), student, uncond, teacher, fake_score, as_image
    )
    check_names(config.train, method.networks())
    for network in method.networks().values():
        network.to("meta").train()
    switch_on(method.networks(), replace(config.train, compile=False))
    return method


def sizes_of(path: str, option: str) -> dict[str, Any]:
    """The configuration of a folder's transformer, or a published one's.

    Raises:
        UnknownSizes: if there is neither, and none in the hub's own cache.
    """
    file = Path(path) / "transformer" / "config.json"
    if file.is_file():
        return read_json(file)
    if path in PUBLISHED:
        return PUBLISHED[path]
    cached = (
        try_to_load_from_cache(path, "transformer/config.json")
        if HUB_NAME.fullmatch(path)
        else None
    )
    if isinstance(cached, str):
        return read_json(Path(cached))
    raise UnknownSizes(
        f"{option}={path}: no transformer/config.json there, and no published name of which the"
        f" sizes are known ({', '.join(PUBLISHED)})"
    )


def _student(run: RunConfig, depth: int | None) -> Any:
    """The network that is trained, of a checkpoint's sizes or of those that the run gives."""
    config, jumps = run.student, "jumps" in run.options.needs
    if config.path is None:
        sizes = {name: getattr(config.geometry, name) for name in Geometry.__dataclass_fields__}
        smaller = replace(config, geometry=Geometry(**_with_depth(sizes, depth)))
        with torch.device("meta"):
            return build_student(smaller, jumps=jumps)
    is_causal = config.kind == "causal"
    dtype = DTYPES[config.lora.dtype]
    network = _transformer(config.path, "student.path", depth, dtype, is_causal)
    if jumps:
        add_jump_embedding(network)
    return adapt(network, replace(config.lora, path=None)) if config.lora.rank else network


def _transformer(
    path: str, option: str, depth: int | None, dtype: torch.dtype, causal: bool = False
) -> nn.Module:
    """A network of a checkpoint's sizes, in the precision that from_pretrained gives each of its
    parts.
    """
    from diffusers import WanTransformer3DModel

    sizes = sizes_of(path, option)
    name = sizes.get("_class_name", "WanTransformer3DModel")
    if name not in ("WanTransformer3DModel", "CausalWanTransformer3DModel"):
        raise UnknownSizes(
            f"{option}={path} is a {name}; only the cost of Wan transformers is known here"
        )
    with torch.device("meta"):
        network = (CausalWanTransformer3DModel if causal else WanTransformer3DModel).from_config(
            _with_depth(sizes, depth)
        )
    kept = tuple(network._keep_in_fp32_modules or ())
    for key, parameter in network.named_parameters():
        if not any(part in key for part in kept):
            parameter.data = parameter.data.to(dtype)
    return network


def _with_depth(sizes: dict[str, Any], depth: int | None) -> dict[str, Any]:
    return sizes if depth is None else {**sizes, "num_layers": depth}


def _move_layers(config: RunConfig, student: nn.Module, depth: int | None) -> RunConfig:
    """Blocks that discriminators read move with the depth."""
    named = {"layers", "discriminator_layers"} & set(vars(config.options))
    whole = depth_of(config)
    if depth is None or not named or whole is None:
        return config
    moved = {}
    for name in named:
        layers = getattr(config.options, name)
        moved[name] = layers and tuple(
            sorted({min(depth - 1, (layer + 1) * depth // whole) for layer in layers})
        )
    return replace(config, options=replace(config.options, **moved))


def depth_of(config: RunConfig) -> int | None:
    path = config.student.path
    return (
        config.student.geometry.num_layers
        if path is None
        else sizes_of(path, "student.path").get("num_layers")
    )


def batch_on_meta(config: RunConfig, method: Method) -> dict[str, Any]:
    """A batch of the shapes that the run's data has."""
    size = config.train.batch_size
    student: Any = method.networks()["student"]
    frames, channels = latent_frames_of_run(config), int(student.config.in_channels)
    latents = torch.empty(size, channels, frames, *config.latent_size, device="meta")
    batch: dict[str, Any] = {
        "cond": torch.empty(
            size, text_tokens_of(config), int(student.config.text_dim), device="meta"
        ),
        "keys": list(range(size)),
        "micro": 0,
    }
    if config.data.kind == "trajectories":
        times = sorted(
            {
                t
                for each in chunk_times(config.stream, frames // config.stream.chunk_frames)
                for t in each
            }
        )
        levels = torch.tensor([*reversed(times), 0.0], dtype=torch.float64)
        batch["states"] = latents[:, None].expand(-1, len(levels), -1, -1, -1, -1).contiguous()
        batch["times"] = levels.expand(size, -1)  # numbers, not shapes
    elif config.data.kind != "prompts":
        batch["latents"], batch["offset"] = latents, torch.zeros(size, dtype=torch.long)
    return batch


def text_tokens_of(config: RunConfig) -> int:
    """Tokens of an embedded prompt: the tokenizer's own limit, at most a published encoder's."""
    file = Path(config.components) / "tokenizer" / "tokenizer_config.json"
    limit = read_json(file).get("model_max_length", TEXT_TOKENS) if file.is_file() else TEXT_TOKENS
    return int(min(limit, TEXT_TOKENS))


def latent_frames_of_run(config: RunConfig) -> int:
    """Latent frames of a training clip, as far as the run file says: 21, Wan's 81 pixel frames,
    where it does not.
    """
    data = config.data
    pixels = {"world": data.world.num_frames, "clips": data.clips.num_frames}.get(data.kind)
    if data.kind in ("world", "clips", "latents") and data.latent_frames is not None:
        return data.latent_frames
    if pixels is not None:
        return latent_frames_of(pixels, TEMPORAL_RATIO)
    if config.options.role == "start":
        return 21
    return config.rollout.num_chunks * config.stream.chunk_frames
