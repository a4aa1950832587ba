"""How a student is run for streaming: options that make it faster and change no more than rounding.

    student = prepare(load_student(folder), engine_options("prepacked,attention=auto"))

Every option is off by default, and a student without options is the one that was loaded, bit for
bit. With an option its outputs differ by rounding; how much is in docs/engine.md. Options concern
inference: a prepared student that is asked for a gradient computes as before.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from streamvid.codecs.base import VideoCodec
from streamvid.codecs.taehv import AutoencoderTAEHV
from streamvid.codecs.tiny_vae import AutoencoderTinyVideo
from streamvid.models.attention import resolve_backend
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.linear import prepack
from streamvid.printing import one_line
from streamvid.students.folder import Student

LARGE_CHUNK = 1024
"""Tokens of the chunk that ``describe_engine`` speaks of."""


@dataclass(frozen=True)
class EngineOptions:
    """What is switched on. ``engine_options`` reads the same from a text."""

    attention: str = ""
    """A backend of ``models.attention`` by name ("auto", "products"), or of diffusers ("flash",
    "_flash_3", "sage", "_native_cudnn", "xformers", ...). "" is what torch chooses, or flash_attn
    where it is installed."""
    prepacked: bool = False
    """Linear layers on a CPU run oneDNN's kernels on weights in its own layout, made once; they
    take twice the memory."""
    compile: bool = False
    """Transformer blocks run through torch.compile, made anew for each length of the context: the
    first chunks take seconds longer."""
    joint_decode: bool = False
    """The codec decodes the latent frames of a chunk in one call, not one after the other."""
    same_precision: bool = False
    """The codec computes in the precision of the transformer, not in float32."""

    @property
    def names(self) -> tuple[str, ...]:
        """What is on, as ``engine_options`` takes it."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return tuple(
            name if value is True else f"{name}={value}" for name, value in given.items() if value
        )


def engine_options(text: str) -> EngineOptions:
    """Options from names with commas between: "prepacked,compile,attention=auto"; "" is none.

    Raises:
        ValueError: for a name that is none of ``EngineOptions``.
    """
    known = {each.name: each for each in fields(EngineOptions)}
    given: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        if name not in known:
            raise ValueError(f"engine option {name!r}; expected some of {', '.join(known)}")
        takes_value = isinstance(known[name].default, str)
        if takes_value != bool(value):
            form = f"{name}=NAME" if takes_value else name
            raise ValueError(f"engine option {item!r}; write {form}")
        given[name] = value if takes_value else True
    return replace(EngineOptions(), **given)


def prepare(student: Student, options: EngineOptions) -> Student:
    """The student as the options run it; the one given stays as it is and shares its weights.

    Raises:
        ValueError: one line, for an option that cannot be had here.
    """
    if options == EngineOptions():
        return student
    if options.prepacked and options.compile:
        raise ValueError(
            "prepacked and compile exclude each other, because torch.compile cannot read oneDNN's"
            " layout; use prepacked for a wide transformer, compile for a narrow one"
        )
    transformer = _twin(student.transformer)
    if options.attention:
        _set_attention(transformer, options.attention)
    if options.prepacked:
        prepack(transformer)
    if options.compile:
        transformer.compile_repeated_blocks()
    codec = _prepare_codec(student, options)
    return replace(student, transformer=transformer, codec=codec)


def _prepare_codec(student: Student, options: EngineOptions) -> VideoCodec:
    codec: Any = student.codec
    if codec is None and (options.same_precision or options.joint_decode):
        raise ValueError("joint_decode and same_precision are of a codec, and there is none")
    if options.same_precision:
        codec = copy.deepcopy(codec).to(student.transformer.patch_embedding.weight.dtype)
    if not options.joint_decode:
        return codec
    if not isinstance(codec, (AutoencoderTinyVideo, AutoencoderTAEHV)):
        raise ValueError(
            f"joint_decode: {type(codec).__name__} decodes one latent frame at a time; leave the"
            " option out, or name a TAEHV with --codec"
        )
    codec = _twin(codec)
    codec.latents_per_call = student.stream.chunk_frames
    return codec


def describe_engine(student: Student) -> str:
    """One line: the device, the precision, and the attention that a chunk of many tokens gets."""
    transformer = student.transformer
    weight = transformer.patch_embedding.weight
    asked = transformer.blocks[0].attn1.processor._attention_backend
    shape = (1, LARGE_CHUNK, 1, transformer.config.attention_head_dim)
    q = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    chosen = resolve_backend(q, q, None, asked)
    because = f" ({asked})" if asked == "auto" else ""
    return f"{weight.device}, {str(weight.dtype)[6:]}, attention: {chosen}{because}"


def _set_attention(transformer: CausalWanTransformer3DModel, backend: str) -> None:
    try:
        transformer.set_attention_backend(backend)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"attention={backend}: {one_line(error)}") from error


def _twin(module: nn.Module) -> Any:
    """A copy of a module that shares its parameters and buffers."""
    shared = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
