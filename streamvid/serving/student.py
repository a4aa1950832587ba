"""A student on disk: `transformer/` and `stream_config.json`, with or without its own codec and text encoder.

A folder that lacks `vae/`, `text_encoder/` or `tokenizer/` borrows them from a components folder, by default the
shipped teacher. `model_index.json` names the classes of what it has, as in every diffusers folder, for
`serving.pipeline` and the hub; nothing here reads it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch

from streamvid.codecs.base import VideoCodec
from streamvid.codecs.load import CODECS, open_codec
from streamvid.codecs.text import RECIPES, PromptEncoder
from streamvid.files import atomic_folder
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.rollout.schedule import STREAM_CONFIG_FILE, StreamConfig
from streamvid.weights import check_weights, load_strictly, not_finite, read_json

ASSETS = Path(__file__).parents[1] / "assets"
TINY_TEACHER = ASSETS / "teacher"
TINY_START = ASSETS / "start"
TINY_STUDENT = ASSETS / "student"
TEXT_PARTS = ("text_encoder", "tokenizer")
COMPONENTS = ("vae", *TEXT_PARTS)
CARD_FILE = "README.md"
INDEX_FILE = "model_index.json"
OWN_ENTRIES = {"transformer", "scheduler", "lora", *COMPONENTS, STREAM_CONFIG_FILE, CARD_FILE, INDEX_FILE}
"""Of a student folder: what a new student replaces."""


def choose_device(name: str = "auto") -> torch.device:
    """A device that is there; "auto" is the first CUDA device, or the CPU.

    Raises:
        ValueError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"there is no device {name} here ({reason}); use cpu, or auto for the best there is") from error


@dataclass(frozen=True)
class Student:
    """Everything that streaming needs."""

    transformer: CausalWanTransformer3DModel
    stream: StreamConfig
    codec: VideoCodec
    prompts: PromptEncoder


def load_student(
    path: str | Path,
    components: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    codec: str | Path | None = None,
) -> Student:
    """Open a student folder.

    Args:
        components: where parts that the folder lacks come from; None is the shipped teacher.
        codec: another codec of the same latents, a folder with vae/ or a TAEHV file; None is the folder's.
        device: of the transformer and the codec; prompts are encoded on the CPU.
        dtype: of the transformer, whatever the file has; the codec and the text encoder are float32.

    Raises:
        ValueError: one line, if a part is missing, damaged or does not fit the others.
    """
    path, components = Path(path), Path(components or TINY_TEACHER)
    if not path.is_dir():
        raise ValueError(f"no student folder at {path}; it should hold transformer/ and {STREAM_CONFIG_FILE}")
    stream = load_stream_config(path)
    transformer = load_transformer(path, dtype)
    text_home, vae_home = _home(path, components, TEXT_PARTS), codec or _home(path, components, ("vae",))
    check_weights(text_home / "text_encoder")
    prompts, codec = PromptEncoder.from_pretrained(text_home), open_codec(vae_home, device)
    if prompts.embedding_dim != transformer.config.text_dim:
        raise ValueError(
            f"{path}: the transformer takes embeddings of {transformer.config.text_dim} numbers, the text encoder of "
            f"{text_home} makes {prompts.embedding_dim}; name the folder of the right one with --components"
        )
    if codec.latent_channels != transformer.config.in_channels:
        raise ValueError(
            f"{path}: the transformer takes latents of {transformer.config.in_channels} channels, the codec of "
            f"{vae_home} has {codec.latent_channels}; name the right one with --components or --codec"
        )
    return Student(transformer.to(device).eval(), stream, codec, prompts)


def _home(path: Path, components: Path, parts: tuple[str, ...]) -> Path:
    """The folder that parts which belong together are taken from."""
    there = [part for part in parts if (path / part).is_dir()]
    if there and len(there) < len(parts):
        raise ValueError(f"{path} has {there[0]}/ but not all of {', '.join(parts)}, which belong together; add the rest")
    home = path if there else components
    for part in parts:
        if not (home / part).is_dir():
            raise ValueError(f"{home} has no folder {part}/, nor has {path}; name one that has with --components")
    return home


def load_transformer(path: str | Path, dtype: torch.dtype = torch.float32) -> CausalWanTransformer3DModel:
    """`path/transformer` as a causal student.

    Raises:
        ValueError: one line, if it is missing, damaged or of other shapes than its configuration says.
    """
    return load_strictly(CausalWanTransformer3DModel, Path(path) / "transformer", dtype)


def load_stream_config(path: str | Path) -> StreamConfig:
    """`path/stream_config.json`."""
    file = Path(path) / STREAM_CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{path} has no {STREAM_CONFIG_FILE}; it says how the student is streamed")
    try:
        return StreamConfig.from_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def deployed(
    config: StreamConfig, schedule: str | None = None, steps: int | None = None, window: int | None = None,
    sink: int | None = None,
) -> StreamConfig:
    """A student's own configuration with what is asked otherwise.

    Args:
        schedule: "autoregressive", "rolling", or a ``stream_config.json`` that stands in for the student's.
        steps: a chunk; a table of times, which would win over the number, is dropped.
        window, sink: in latent frames.

    Raises:
        ValueError: if there is no such schedule, or what ``StreamConfig`` refuses.
    """
    order = schedule if schedule in ("autoregressive", "rolling") else None
    if schedule and not order:
        if not Path(schedule).is_file():
            raise ValueError(f"no schedule {schedule}: neither autoregressive nor rolling nor a .json file that exists")
        config = StreamConfig.from_json(Path(schedule).read_text(encoding="utf-8"))
    table = None if steps is None else ()
    given = {"order": order, "num_steps": steps, "step_table": table, "window_frames": window, "sink_frames": sink}
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def save_student(
    path: str | Path, transformer: CausalWanTransformer3DModel, stream: StreamConfig,
    components: str | Path | None = None, card: str = "",
) -> None:
    """Write a student folder at once; with ``components``, their copies make it complete in itself.

    Args:
        card: text of the folder's README.md: method, teacher, schedule, scores.

    A student that is there already is replaced; what else its folder holds stays.

    Raises:
        ValueError: if ``components`` lacks a part, or a weight is not finite; nothing is written then.
    """
    for part in COMPONENTS if components else ():
        if not (Path(components) / part).is_dir():
            raise ValueError(f"{components} has no folder {part}/; expected vae/, text_encoder/ and tokenizer/")
    check_finite(transformer)
    with atomic_folder(path) as temporary:
        keep_others(Path(path), temporary)
        transformer.save_pretrained(temporary / "transformer")
        (temporary / STREAM_CONFIG_FILE).write_text(stream.to_json())
        (temporary / CARD_FILE).write_text(card or "A streamvid student; see stream_config.json.\n")
        for part in COMPONENTS if components else ():
            shutil.copytree(Path(components) / part, temporary / part)
        (temporary / INDEX_FILE).write_text(json.dumps(model_index(temporary), indent=2) + "\n")


def save_teacher(path: str | Path, transformer: torch.nn.Module) -> None:
    """Write ``path/transformer`` at once; what else a folder holds that is there already stays.

    Raises:
        ValueError: if a weight is not finite; nothing is written then.
    """
    check_finite(transformer)
    with atomic_folder(path) as temporary:
        keep_others(Path(path), temporary)
        transformer.save_pretrained(temporary / "transformer")


def check_finite(transformer: torch.nn.Module) -> None:
    """Refuse weights that would make black clips of every prompt."""
    bad = not_finite(transformer.state_dict())
    if bad is not None:
        raise ValueError(f"{bad} of the transformer is not finite (NaN or infinite); nothing was saved")


def keep_others(old: Path, new: Path) -> None:
    """Copy what a student folder holds besides a student, such as a user's notes, into the one that will replace it."""
    for entry in old.iterdir() if old.is_dir() else ():
        if entry.name in OWN_ENTRIES:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def model_index(folder: Path) -> dict[str, object]:
    """What ``model_index.json`` of a student folder says: the module and class of each part, null for borrowed ones."""
    files = [folder / name for name in ("vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json")]
    codec, encoder, tokenizer = (read_json(file) if file.is_file() else {} for file in files)
    codec_class, recipe = CODECS.get(codec.get("_class_name")), RECIPES.get(encoder.get("model_type"))
    tokenizer_class = tokenizer.get("tokenizer_class")
    return {
        "_class_name": "StreamVidPipeline",
        "_diffusers_version": diffusers.__version__,
        "text_encoder": ["transformers", recipe.encoder_class] if recipe else [None, None],
        "tokenizer": ["transformers", tokenizer_class] if tokenizer_class else [None, None],
        "transformer": [CausalWanTransformer3DModel.__module__, CausalWanTransformer3DModel.__name__],
        "vae": [codec_class.__module__, codec_class.__name__] if codec_class else [None, None],
    }
