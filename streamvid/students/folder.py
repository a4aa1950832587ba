"""A student on disk: `transformer/` and `stream_config.json`, with or without its own codec and
text encoder.

A folder that lacks `vae/`, `text_encoder/` or `tokenizer/` borrows them from a components folder,
by default the shipped teacher. `model_index.json` names the classes of what it has, as in every
diffusers folder, for `serving.pipeline` and the hub; nothing here reads it.
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
from streamvid.hub import resolve_checkpoint
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.rollout.schedule import STREAM_CONFIG_FILE, StreamConfig
from streamvid.shipped import TINY_START as TINY_START
from streamvid.shipped import TINY_STUDENT as TINY_STUDENT
from streamvid.shipped import TINY_TEACHER as TINY_TEACHER
from streamvid.weights import check_weights, load_strictly, not_finite, read_json

TEXT_PARTS = ("text_encoder", "tokenizer")
COMPONENTS = ("vae", *TEXT_PARTS)
CARD_FILE = "README.md"
INDEX_FILE = "model_index.json"
OWN_ENTRIES = {
    "transformer",
    "scheduler",
    "lora",
    *COMPONENTS,
    STREAM_CONFIG_FILE,
    CARD_FILE,
    INDEX_FILE,
}
"""Of a student folder: what a new student replaces."""


def choose_device(name: str = "auto") -> torch.device:
    """A device that is there; "auto" is the first CUDA device, or the CPU.

    Raises:
        ValueError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=name).item()  # "meta" makes tensors, but without numbers
        return torch.device(name)
    # a build without CUDA asserts
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0].partition(". ")[0][:100]
        raise ValueError(
            f"there is no device {name} here ({reason}); use cpu, or auto for the best there is"
        ) from error


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
    """Open a student folder; each path may be a name on the hub.

    Args:
        components: where parts that the folder lacks come from; None is the shipped teacher.
        codec: another codec of the same latents, a folder with vae/ or a TAEHV file; None is the
            folder's.
        device: of the transformer and the codec; prompts are encoded on the CPU.
        dtype: of the transformer, whatever the file has; the codec and the text encoder are
            float32.

    Raises:
        ValueError: one line, if a part is missing, damaged or does not fit the others.
    """
    path, components = (
        resolve_checkpoint(path),
        resolve_checkpoint(components or TINY_TEACHER, COMPONENTS),
    )
    if not path.is_dir():
        raise ValueError(
            f"no student folder at {path}; it should hold transformer/ and {STREAM_CONFIG_FILE}"
        )
    stream = load_stream_config(path)
    transformer = load_transformer(path, dtype)
    text_home, vae_home = (
        _home(path, components, TEXT_PARTS),
        codec or _home(path, components, ("vae",)),
    )
    check_weights(text_home / "text_encoder")
    prompts, codec = PromptEncoder.from_pretrained(text_home), open_codec(vae_home, device)
    if prompts.embedding_dim != transformer.config.text_dim:
        raise ValueError(
            f"{path}: the transformer takes embeddings of {transformer.config.text_dim} numbers,"
            f" the text encoder of {text_home} makes {prompts.embedding_dim}; name the folder of"
            " the right one with --components"
        )
    if codec.latent_channels != transformer.config.in_channels:
        raise ValueError(
            f"{path}: the transformer takes latents of {transformer.config.in_channels} channels,"
            f" the codec of {vae_home} has {codec.latent_channels}; name the right one with"
            " --components or --codec"
        )
    torch.nn.Module.to(transformer, device)  # diffusers' own `to` would import peft
    return Student(transformer.eval(), stream, codec, prompts)


def _home(path: Path, components: Path, parts: tuple[str, ...]) -> Path:
    """The folder that parts which belong together are taken from."""
    there = [part for part in parts if (path / part).is_dir()]
    if there and len(there) < len(parts):
        raise ValueError(
            f"{path} has {there[0]}/ but not all of {', '.join(parts)}, which belong together; add"
            " the rest"
        )
    home = path if there else components
    for part in parts:
        if not (home / part).is_dir():
            raise ValueError(
                f"{home} has no folder {part}/, nor has {path}; name one that has with --components"
            )
    return home


def load_transformer(
    path: str | Path, dtype: torch.dtype = torch.float32
) -> CausalWanTransformer3DModel:
    """`path/transformer` as a causal student.

    Raises:
        ValueError: one line, if it is missing, damaged or of other shapes than its configuration
            says.
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
    config: StreamConfig,
    schedule: str | None = None,
    steps: int | None = None,
    window: int | None = None,
    sink: int | None = None,
) -> StreamConfig:
    """A student's own configuration with what is asked otherwise.

    Args:
        schedule: "autoregressive", "rolling", or a ``stream_config.json`` that stands in for the
            student's.
        steps: a chunk; a table of times, which would win over the number, is dropped.
        window, sink: in latent frames. A rolling order sees the chunks that it denoises together
            whatever the student's window was, unless ``window`` says otherwise.

    Raises:
        ValueError: if there is no such schedule, the student was not trained on as many frames as a
            rolling order denoises together, or what ``StreamConfig`` refuses.
    """
    order = schedule if schedule in ("autoregressive", "rolling") else None
    if schedule and not order:
        if not Path(schedule).is_file():
            raise ValueError(
                f"no schedule {schedule}: neither autoregressive nor rolling nor a .json file that"
                " exists"
            )
        config = StreamConfig.from_json(Path(schedule).read_text(encoding="utf-8"))
    table = None if steps is None else ()
    given = {
        "order": order,
        "num_steps": steps,
        "step_table": table,
        "window_frames": window,
        "sink_frames": sink,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return replace(
        config,
        **given,
        **(_rolling_room(config, steps, window, sink) if order == "rolling" else {}),
    )


def _rolling_room(
    config: StreamConfig, steps: int | None, window: int | None, sink: int | None
) -> dict[str, int | None]:
    """What else changes with a rolling order: the first chunk's steps, and the least window that
    holds all it denoises.
    """
    if config.step_table and steps is None:
        raise ValueError(
            "the student has times of its own for each chunk, a rolling order has the same for all;"
            " name --steps"
        )
    steps, sink = steps or config.num_steps, config.sink_frames if sink is None else sink
    room, trained = (
        sink + steps * config.chunk_frames,
        config.max_trained_frames or config.window_frames,
    )
    if config.positions == "window" and room > trained:
        most = (trained - sink) // config.chunk_frames
        raise ValueError(
            f"a rolling order of {steps} steps denoises {steps} chunks of {config.chunk_frames}"
            f" frames together, with the sink {room}, but the student was trained on {trained}; "
            + (f"use --steps {most} or fewer" if most > 0 else "use autoregressive")
        )
    widened = (
        {}
        if window is not None or config.window_frames is None
        else {"window_frames": max(config.window_frames, room)}
    )
    return {"first_steps": None, **widened}


def save_student(
    path: str | Path,
    transformer: CausalWanTransformer3DModel,
    stream: StreamConfig,
    components: str | Path | None = None,
    card: str = "",
) -> None:
    """Write a student folder at once; with ``components``, their copies make it complete in itself.

    Args:
        components: a folder, or its name on the hub.
        card: text of the folder's README.md: objective, teacher, schedule, scores.

    A student that is there already is replaced; what else its folder holds stays.

    Raises:
        ValueError: if ``components`` lacks a part or has links that lead out of it, or a weight is
            not finite; nothing is written then.
    """
    parts = _parts_to_copy(components)
    check_finite(transformer)
    with atomic_folder(path) as temporary:
        keep_others(Path(path), temporary)
        transformer.save_pretrained(temporary / "transformer")
        (temporary / STREAM_CONFIG_FILE).write_text(stream.to_json())
        (temporary / CARD_FILE).write_text(card or "A streamvid student; see stream_config.json.\n")
        for part in parts:
            shutil.copytree(part, temporary / part.name)
        (temporary / INDEX_FILE).write_text(json.dumps(model_index(temporary), indent=2) + "\n")


def save_teacher(
    path: str | Path, transformer: torch.nn.Module, shift: float, components: str | Path
) -> None:
    """Write a teacher folder at once, which ``teachers.load.open_teacher`` and ``--teacher`` open,
    complete in itself.

    What else a folder holds that is there already stays.

    Args:
        transformer: a bidirectional Wan.
        shift: timestep shift that it is to be sampled with.
        components: where its codec and its text encoder are copied from, a folder or its name on
            the hub.

    Raises:
        ValueError: see ``save_student``.
    """
    parts = _parts_to_copy(components)
    check_finite(transformer)
    with atomic_folder(path) as temporary:
        keep_others(Path(path), temporary)
        transformer.save_pretrained(temporary / "transformer")
        diffusers.FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(
            temporary / "scheduler"
        )
        for part in parts:
            shutil.copytree(part, temporary / part.name)
        index = {
            **model_index(temporary),
            "_class_name": "WanPipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "transformer": ["diffusers", "WanTransformer3DModel"],
        }
        (temporary / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def check_finite(transformer: torch.nn.Module) -> None:
    """Refuse weights that would make black clips of every prompt."""
    bad = not_finite(transformer.state_dict())
    if bad is not None:
        raise ValueError(
            f"{bad} of the transformer is not finite (NaN or infinite); nothing was saved"
        )


def keep_others(old: Path, new: Path) -> None:
    """Copy what a student folder holds besides a student, such as a user's notes, into the one that
    will replace it.
    """
    for entry in old.iterdir() if old.is_dir() else ():
        if entry.name in OWN_ENTRIES:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def _parts_to_copy(components: str | Path | None) -> list[Path]:
    """The folders of what makes a checkpoint complete; none for None.

    A folder may be a link, but what lies in it must not lead elsewhere: the file that a link points
    to would be published with the copy. The hub's own cache consists of such links, into ``blobs/``
    of the same checkpoint.
    """
    if components is None:
        return []
    home = resolve_checkpoint(components, COMPONENTS)
    for part in COMPONENTS:
        if not (home / part).is_dir():
            raise ValueError(
                f"{components} has no folder {part}/; expected vae/, text_encoder/ and tokenizer/"
            )
        places = [(home / part).resolve(), home.resolve().parent.parent / "blobs"]
        for file in (home / part).rglob("*"):
            if file.is_symlink() and not any(
                file.resolve().is_relative_to(place) for place in places
            ):
                raise ValueError(
                    f"{file} is a link out of its folder, and would be copied as {file.resolve()};"
                    " put a file there"
                )
    return [home / part for part in COMPONENTS]


def model_index(folder: Path) -> dict[str, object]:
    """What ``model_index.json`` of a student folder says: the module and class of each part, null
    for borrowed ones.
    """
    files = [
        folder / name
        for name in (
            "vae/config.json",
            "text_encoder/config.json",
            "tokenizer/tokenizer_config.json",
        )
    ]
    codec, encoder, tokenizer = (read_json(file) if file.is_file() else {} for file in files)
    recipe = RECIPES.get(encoder.get("model_type"))
    tokenizer_class = tokenizer.get("tokenizer_class")
    return {
        "_class_name": "StreamVidPipeline",
        "_diffusers_version": diffusers.__version__,
        "text_encoder": ["transformers", recipe.encoder_class] if recipe else [None, None],
        "tokenizer": ["transformers", tokenizer_class] if tokenizer_class else [None, None],
        "transformer": [
            CausalWanTransformer3DModel.__module__,
            CausalWanTransformer3DModel.__name__,
        ],
        "vae": list(CODECS.get(codec.get("_class_name"), (None, None))),
    }
