"""A student on disk: `transformer/` and `stream_config.json`, with or without its own codec and text encoder.

A folder that lacks `vae/`, `text_encoder/` or `tokenizer/` borrows them from a components folder, by default the
shipped teacher.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from streamvid.codecs.base import VideoCodec
from streamvid.codecs.load import open_codec
from streamvid.codecs.text import PromptEncoder
from streamvid.files import atomic_folder
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.rollout.schedule import STREAM_CONFIG_FILE, StreamConfig

ASSETS = Path(__file__).parents[1] / "assets"
TINY_TEACHER = ASSETS / "teacher"
TINY_START = ASSETS / "start"
TINY_STUDENT = ASSETS / "student"
COMPONENTS = ("vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class Student:
    """Everything that streaming needs."""

    transformer: CausalWanTransformer3DModel
    stream: StreamConfig
    codec: VideoCodec
    prompts: PromptEncoder


def load_student(
    path: str | Path, components: str | Path | None = None, device: torch.device | str | None = None
) -> Student:
    """Open a student folder, in float32.

    Raises:
        ValueError: one line, if a part is missing, damaged or of another shape.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no student folder at {path}; it should hold transformer/ and {STREAM_CONFIG_FILE}")
    transformer = load_transformer(path).to(device)
    homes = {part: path if (path / part).is_dir() else Path(components or TINY_TEACHER) for part in COMPONENTS}
    prompts = PromptEncoder.from_pretrained(homes["text_encoder"])
    if prompts.embedding_dim != transformer.config.text_dim:
        raise ValueError(
            f"{path}: the transformer takes embeddings of {transformer.config.text_dim} numbers, the text encoder of "
            f"{homes['text_encoder']} makes {prompts.embedding_dim}; name the right folder with --components"
        )
    return Student(transformer.eval(), load_stream_config(path), open_codec(homes["vae"], device), prompts)


def load_transformer(path: str | Path) -> CausalWanTransformer3DModel:
    """`path/transformer` as a causal student in float32."""
    folder = Path(path) / "transformer"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected a diffusers folder with transformer/")
    try:
        transformer, info = CausalWanTransformer3DModel.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # diffusers and safetensors raise many kinds for a damaged folder
        raise ValueError(f"cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise ValueError(f"cannot load {folder}: {wrong[0]} and {len(wrong) - 1} more are missing or unknown")
    return transformer


def load_stream_config(path: str | Path) -> StreamConfig:
    """`path/stream_config.json`."""
    file = Path(path) / STREAM_CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{path} has no {STREAM_CONFIG_FILE}; it says how the student is streamed")
    try:
        return StreamConfig.from_json(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def save_student(
    path: str | Path, transformer: CausalWanTransformer3DModel, stream: StreamConfig,
    components: str | Path | None = None, card: str = "",
) -> None:
    """Write a student folder at once; with ``components``, their copies make it complete in itself.

    Args:
        card: text of the folder's README.md: method, teacher, schedule, scores.
    """
    with atomic_folder(path) as temporary:
        transformer.save_pretrained(temporary / "transformer")
        (temporary / STREAM_CONFIG_FILE).write_text(stream.to_json())
        (temporary / "README.md").write_text(card or "A streamvid student; see stream_config.json.\n")
        for part in COMPONENTS if components else ():
            shutil.copytree(Path(components) / part, temporary / part)
