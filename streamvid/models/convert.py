"""Checkpoints as the published causal students come, mostly in the original Wan naming: names,
containers, LoRA.

The original Wan repository and what descends from it (CausVid, Self-Forcing, Causal-Forcing,
LongLive, DiagDistill, Krea realtime) name the same tensors otherwise than diffusers does, and save
them in the wrapping of their trainer: a `generator` and a `generator_ema` in one pickled
dictionary, names with a `model.` before them, and pieces of FSDP, activation checkpointing or
`torch.compile` inside them. `open_original` unwraps, renames, merges a LoRA and checks that every
tensor of the model is there, in its shape, and no other. Names that are diffusers' already, as
FastVideo publishes its students, stay.

The table of names is that of `scripts/convert_wan_to_diffusers.py` in huggingface/diffusers; its
trap is that what Wan calls norm3 (before the attention to text) is norm2 in diffusers, and the
other way round.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.weights import (
    TORCH_SUFFIXES,
    check_kinds,
    check_weights,
    parse_json,
    read_json,
    read_pickled,
    read_shard_names,
    read_tensors,
)

HEAD_DIM = 128
"""Size of a head in every published Wan; a checkpoint's shapes say only how wide all heads are
together."""

CONTAINERS = ("generator_ema", "generator", "model", "state_dict")
"""Keys under which trainers save the student, the one that is taken if there are several first."""
LORA_CONTAINERS = ("generator_lora",)
# what a flat file may have before the names instead of containers
ROLES = ("generator_ema", "generator", "critic")
INDEX_SUFFIX = ".safetensors.index.json"

_WRAPPINGS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_PREFIX = re.compile(r"^(?:(?:model|module|base_model|diffusion_model|transformer)\.)+")
_BLOCK = re.compile(r"^(blocks\.\d+\.)(.*)$")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# of a configuration, what no shape shows
_UNSEEN = ("attention_head_dim", "eps", "rope_max_seq_len")
_SHOWN = 3  # names of a kind that an error shows

# original module or parameter -> diffusers'
_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
_PROJECTIONS = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_IN_BLOCK = {
    **{
        f"{a}.{p}": f"{_ATTENTIONS[a]}.{_PROJECTIONS[p]}" for a in _ATTENTIONS for p in _PROJECTIONS
    },
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_OUTSIDE_BACK = {new: old for old, new in _OUTSIDE.items()}
_IN_BLOCK_BACK = {new: old for old, new in _IN_BLOCK.items()}


# ---- names ---------------------------------------------------------------------------------------


def diffusers_name(name: str) -> str | None:
    """Diffusers' name of a module or parameter in the original naming, without wrapping; None if
    there is none.
    """
    return _renamed(name, _OUTSIDE, _IN_BLOCK)


def original_name(name: str) -> str | None:
    """The inverse of ``diffusers_name``."""
    return _renamed(name, _OUTSIDE_BACK, _IN_BLOCK_BACK)


def original_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the original names.

    Raises:
        ValueError: for a name that diffusers' Wan text-to-video transformer does not have.
    """
    names = {name: original_name(name) for name in tensors}
    unknown = [name for name, old in names.items() if old is None]
    if unknown:
        raise ValueError(f"{_few(unknown)}: not of diffusers' Wan text-to-video transformer")
    return {names[name]: tensor for name, tensor in tensors.items()}


def bare_name(name: str) -> str:
    """A name without what FSDP, checkpointing, compilation and the trainer's own modules put around
    it.
    """
    for wrapping in _WRAPPINGS:
        name = name.replace(wrapping, "")
    return _PREFIX.sub("", name)


def _renamed(name: str, outside: Mapping[str, str], in_block: Mapping[str, str]) -> str | None:
    block = _BLOCK.match(name)
    place, rest, table = (block[1], block[2], in_block) if block else ("", name, outside)
    if rest in table:  # a parameter without a module of its own
        return place + table[rest]
    module, dot, parameter = rest.rpartition(".")
    return f"{place}{table[module]}{dot}{parameter}" if module in table else None


# ---- files ---------------------------------------------------------------------------------------


def open_original(
    path: str | Path, which: str | None = None, lora: str | Path | None = None
) -> CausalWanTransformer3DModel:
    """A student of a checkpoint in the original or in diffusers' naming, in the precision that the
    file has, on the CPU.

    Weights stay in the file (memory-mapped) until they are used; those that a LoRA changes are
    read.

    Args:
        path: a .pt, .pth or .safetensors file, a .safetensors.index.json, or a folder with
            .safetensors, in it or in its transformer/.
        which: the container of the file to take; None is the first of ``CONTAINERS`` that is there.
        lora: a file of low-rank updates to merge.

    Raises:
        ValueError: one line, if a file is missing, damaged or holds code, if a name is missing,
            unknown or of another shape, or if the weights are of an image-to-video model.
    """
    path = _weights_place(Path(path))
    tensors, unknown, shown = _read_renamed(path, which)
    said = _diffusers_config(path) if shown is str else {"attention_head_dim": _head_dim(path)}
    config = {**said, **geometry(tensors, str(path), said["attention_head_dim"], shown)}
    _check_text_to_video(str(path), config)
    with torch.device("meta"):
        model = CausalWanTransformer3DModel(**config)
    _check_strictly(str(path), tensors, unknown, model.state_dict(), shown)
    if lora is not None:
        tensors = merge_lora(tensors, read_lora(lora), str(lora))
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def read_checkpoint(path: str | Path, which: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names that its file has for them, without its
    container.

    Args: see ``open_original``.

    Raises:
        ValueError: see ``open_original``.
    """
    path = _weights_place(Path(path))
    if path.is_dir() or path.name.endswith(INDEX_SUFFIX):
        return _unpacked(_read_shards(path), CONTAINERS, which, path)
    table = read_pickled(path) if path.suffix in TORCH_SUFFIXES else read_tensors(path)
    return _unpacked(table, CONTAINERS, which, path)


def _weights_place(path: Path) -> Path:
    """Where the transformer's files are: of a whole diffusers folder its transformer/, else the
    path itself.

    Raises:
        ValueError: for a folder of two experts, half of which would be lost.
    """
    if not (path / "transformer").is_dir():
        return path
    if (path / "transformer_2").is_dir():
        raise ValueError(
            f"{path} has two experts, a student is one; name {path / 'transformer'} or"
            f" {path / 'transformer_2'}"
        )
    return path / "transformer"


def _read_renamed(
    path: Path, which: str | None
) -> tuple[dict[str, Tensor], list[str], Callable[[str], str | None]]:
    """Tensors by diffusers' names, the file's own names that have none, and what the file calls a
    name of diffusers.
    """
    tensors: dict[str, Tensor] = {}
    unknown = []
    table = read_checkpoint(path, which)
    names = {wrapped: bare_name(wrapped) for wrapped in table}
    in_diffusers = any(name.startswith("condition_embedder.") for name in names.values())
    for wrapped, old in names.items():
        new = diffusers_name(old)
        if in_diffusers:
            new = old if original_name(old) else None
        if new is None:
            unknown.append(old)
        elif new in tensors:
            raise ValueError(
                f"{path} has {old} twice, the second time as {wrapped}; expected each tensor once"
            )
        else:
            tensors[new] = table[wrapped]
    return tensors, unknown, str if in_diffusers else original_name


def _read_shards(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder of .safetensors, or of those that an index names."""
    folder = path if path.is_dir() else path.parent
    check_weights(folder)
    indices = [path] if path != folder else sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) == 1:
        files = sorted(folder / name for name in read_shard_names(indices[0]))
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files or (len(files) > 1 and len(indices) != 1):
        raise ValueError(
            f"{path} holds {len(files)} .safetensors files and {len(indices)} indices; name the one"
            " to take"
        )
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def _unpacked(
    table: Mapping[str, Any], containers: Iterable[str], which: str | None, path: Path
) -> dict[str, Tensor]:
    """The tensors in the container ``which``, or in the first of ``containers`` that is there, or
    in no container.
    """
    there = {
        str(key): value for key, value in table.items() if isinstance(value, Mapping)
    } or _roles(table)
    if which is None:
        which = next((name for name in containers if name in there), None)
    if which is not None:
        if which not in there:
            raise ValueError(
                f"{path} has no {which}; it has"
                f" {', '.join(there) or 'no containers, its tensors are bare'}"
            )
        table = there[which]
    elif there and not any(isinstance(value, Tensor) for value in table.values()):
        raise ValueError(
            f"{path} has {', '.join(there)}, expected one of {', '.join(containers)}; name one with"
            " --which"
        )
    # such as {"state_dict": {"model": ...}}
    if any(isinstance(value, Mapping) for value in table.values()):
        return _unpacked(table, containers, None, path)
    strange = [
        str(name)
        for name, value in table.items()
        if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    if strange or not table:
        raise ValueError(
            f"{path}: expected named tensors, got"
            f" {f'{_few(strange)} besides' if strange else 'none'}"
        )
    return dict(table)


def _roles(table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Containers that a format without nesting has written into all names:
    `generator_ema.model.blocks...`.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, value in table.items():
        role, _, rest = str(name).partition(".")
        if role not in ROLES:
            return {}
        found.setdefault(role, {})[rest] = value
    return found


# ---- geometry ------------------------------------------------------------------------------------


def geometry(
    tensors: Mapping[str, Tensor],
    source: str,
    head_dim: int = HEAD_DIM,
    shown: Callable[[str], str | None] = original_name,
) -> dict[str, Any]:
    """The configuration that a model of these tensors, by diffusers' names, has where it differs
    from the class's defaults.

    Args:
        source: what an error calls them.
        head_dim: the size of a head, which no shape shows.
        shown: what an error calls a tensor, by its name in diffusers.

    Raises:
        ValueError: if the tensors that tell it are missing, or of impossible shapes.
    """
    told = {
        name: _shape(tensors, name, dimensions, source, shown)
        for name, dimensions in {
            "patch_embedding.weight": 5,
            "condition_embedder.text_embedder.linear_1.weight": 2,
            "condition_embedder.time_embedder.linear_1.weight": 2,
            "blocks.0.ffn.net.0.proj.weight": 2,
            "proj_out.weight": 2,
        }.items()
    }
    (dim, in_channels, *patch), text, time, ffn, head = told.values()
    if dim % head_dim or head[0] % math.prod(patch):
        raise ValueError(
            f"{source}: width {dim} is no multiple of heads of {head_dim}, or the head makes"
            f" {head[0]} numbers for a patch {tuple(patch)}; expected a Wan transformer"
        )
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": head[0] // math.prod(patch),
        "text_dim": text[1],
        "freq_dim": time[1],
        "ffn_dim": ffn[0],
        "num_layers": _count_blocks(tensors, source),
    }


def _count_blocks(tensors: Mapping[str, Tensor], source: str) -> int:
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    gap = next(number for number in itertools.count() if number not in blocks)
    if gap != len(blocks):
        raise ValueError(
            f"{source} has nothing of blocks.{gap} but has a later block; is one of its files"
            " missing?"
        )
    return gap


def _shape(
    tensors: Mapping[str, Tensor],
    name: str,
    dimensions: int,
    source: str,
    shown: Callable[[str], str | None],
) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(
            f"{source} has no {shown(name)}; expected a checkpoint in Wan's original naming or in"
            " diffusers'"
        )
    if tensors[name].ndim != dimensions:
        shape = tuple(tensors[name].shape)
        raise ValueError(f"{source}: {shown(name)} is {shape}, expected {dimensions} dimensions")
    return tuple(tensors[name].shape)


def _diffusers_config(path: Path) -> dict[str, Any]:
    """What a diffusers config.json beside the weights says that no shape shows."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {"attention_head_dim": HEAD_DIM}
    check_kinds(CausalWanTransformer3DModel, file)
    config = {"attention_head_dim": HEAD_DIM, **read_json(file)}
    if not config["attention_head_dim"]:
        raise ValueError(
            f"{file} has attention_head_dim={config['attention_head_dim']}, expected such as"
            f" {HEAD_DIM}"
        )
    return {name: config[name] for name in _UNSEEN if config.get(name) is not None}


def _head_dim(path: Path) -> int:
    """What an original Wan folder's own config.json says, or that of the published models."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not (path.is_dir() or path.name.endswith(INDEX_SUFFIX)) or not file.is_file():
        return HEAD_DIM
    config = read_json(file)
    if not {"dim", "num_heads"} <= config.keys():
        return HEAD_DIM
    dim, heads = config["dim"], config["num_heads"]
    if type(dim) is not int or type(heads) is not int or heads < 1 or dim % heads:
        raise ValueError(
            f"{file} has dim={dim!r} and num_heads={heads!r}, expected a multiple of a number of"
            " heads"
        )
    return dim // heads


def _check_text_to_video(source: str, config: Mapping[str, Any]) -> None:
    """A ValueError for a model that sees more than the latents that it makes: an image and its mask
    beside them.
    """
    sees, makes = config["in_channels"], config["out_channels"]
    if sees != makes:
        raise ValueError(
            f"{source} takes {sees} channels and makes {makes}: it holds image-to-video weights,"
            " which see an image beside the latents; take text-to-video ones"
        )


def _check_strictly(
    source: str,
    tensors: Mapping[str, Tensor],
    unknown: list[str],
    expected: Mapping[str, Tensor],
    shown: Callable[[str], str | None],
) -> None:
    """A ValueError of one line with everything that is missing, unknown or of another shape or kind
    of number.
    """
    missing = [shown(name) for name in expected if name not in tensors]
    unknown = unknown + [shown(name) for name in tensors if name not in expected]
    wrong = [
        f"{shown(name)} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    numbers = [
        f"{shown(name)} {tensor.dtype}"
        for name, tensor in tensors.items()
        if tensor.dtype not in _FLOATS
    ]
    kinds = {
        "missing": missing,
        "unknown": unknown,
        "of another shape": wrong,
        "no 16- or 32-bit floats": numbers,
    }
    faults = [f"{len(names)} {kind}: {_few(names)}" for kind, names in kinds.items() if names]
    if faults:
        seen = any("img" in name or "image_embedder" in name for name in unknown)
        image = "; it is an image-to-video model, take a text-to-video one" if seen else ""
        raise ValueError(
            f"{source} is no Wan text-to-video transformer: {'; '.join(faults)}{image}"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )


# ---- LoRA ----------------------------------------------------------------------------------------

_LORA_KEY = re.compile(r"^(.+)\.(lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.(weight|bias)$")
_SIDES = {
    ("lora_A", "weight"): "down",
    ("lora_down", "weight"): "down",
    ("lora_B", "weight"): "up",
    ("lora_up", "weight"): "up",
    ("lora_B", "bias"): "bias",
    ("lora_up", "bias"): "bias",
}
# lightx2v's, of whole parameters
_DIFFERENCES = {".diff": ".weight", ".diff_b": ".bias", ".diff_m": ".modulation"}
_FLAT = "lora_unet_"  # kohya's and musubi's names, which have _ for every dot
_FLAT_NAMES = {
    name.replace(".", "_"): name
    for table in (_IN_BLOCK, _OUTSIDE)
    for name in (*table, *table.values())
}


@dataclass(frozen=True)
class LowRank:
    """An update of a weight [O, I]: ``scale * up @ down``; up [O, R], down [R, I] (LoRA, arXiv
    2106.09685).

    Of a convolution I is several axes, and up [O, R, 1, ..].
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    def value(self) -> Tensor:
        return self.scale * (self.up.flatten(1).float() @ self.down.flatten(1).float()).view(
            self.shape
        )


@dataclass(frozen=True)
class Difference:
    """An update of a whole parameter: ``scale * values``."""

    values: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def value(self) -> Tensor:
        return self.scale * self.values.float()


Update = LowRank | Difference


def read_lora(file: str | Path) -> dict[str, Update]:
    """The updates in a file, see ``lora_updates``; without an alpha of the layers' own, that of
    peft's configuration beside the file, or in its header, counts.
    """
    file = Path(file)
    table = read_pickled(file) if file.suffix in TORCH_SUFFIXES else read_tensors(file)
    return lora_updates(
        _unpacked(table, LORA_CONTAINERS, None, file), str(file), _adapter_alpha(file)
    )


def lora_updates(
    tensors: Mapping[str, Tensor], source: str, alpha: float | None = None
) -> dict[str, Update]:
    """The updates in the published forms: a ``LowRank`` by its module, a ``Difference`` by its
    parameter, in either naming.

    The forms are PEFT's (`lora_A`, `lora_B`, with a bias or none), ComfyUI's (`lora_down`,
    `lora_up`), lightx2v's `.diff`, `.diff_b` and `.diff_m` of whole weights, biases and
    modulations, and kohya's and musubi's names (`lora_unet_..`). The scale of a pair, and of its
    bias, is alpha / R. Alpha is a module's own `.alpha`, else ``alpha``, else R, as LongLive's
    files have it, which say nothing.

    Args:
        source: what an error calls them.

    Raises:
        ValueError: one line, if an update is not whole, a name is of no update, or there is none.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    updates: dict[str, Update] = {}
    unknown = []
    for wrapped, tensor in tensors.items():
        name = _dotted(bare_name(wrapped))
        key = _LORA_KEY.match(name)
        side = _SIDES.get((key[2], key[3])) if key else None
        ending = next((end for end in _DIFFERENCES if name.endswith(end)), None)
        if side is not None:
            _put(sides.setdefault(key[1], {}), side, tensor, source, wrapped)
        elif name.endswith(".alpha"):
            _put(
                sides.setdefault(name.removesuffix(".alpha"), {}), "alpha", tensor, source, wrapped
            )
        elif ending is not None:
            _put(
                updates,
                name.removesuffix(ending) + _DIFFERENCES[ending],
                Difference(tensor),
                source,
                wrapped,
            )
        else:
            unknown.append(wrapped)
    halves = [name for name, side in sides.items() if not {"up", "down"} <= side.keys()]
    if unknown or halves or not (sides or updates):
        kind = (
            f"{len(unknown or halves)} {'unknown' if unknown else 'without their other half'}:"
            f" {_few(unknown or halves)}"
        )
        raise ValueError(
            f"{source} is no LoRA that can be merged:"
            f" {kind if unknown or halves else 'it is empty'}"
        )
    for module, side in sides.items():
        rank = side["down"].shape[0]
        scale = float(side["alpha"] if "alpha" in side else rank if alpha is None else alpha) / rank
        updates[module] = LowRank(side["down"], side["up"], scale)
        if "bias" in side:
            _put(
                updates,
                f"{module}.bias",
                Difference(side["bias"], scale),
                source,
                f"a second bias of {module}",
            )
    return updates


def _put(table: dict[str, Any], key: str, value: Any, source: str, name: str) -> None:
    if key in table:
        raise ValueError(f"{source} has {name} twice, expected each tensor once")
    table[key] = value


def _dotted(name: str) -> str:
    """A name of kohya's form with its dots; one of another form, or one that is not known, as it
    is.
    """
    if not name.startswith(_FLAT):
        return name
    flat, dot, ending = name.removeprefix(_FLAT).partition(".")
    block = re.match(r"^blocks_(\d+)_(.+)$", flat)
    place, rest = (f"blocks.{block[1]}.", block[2]) if block else ("", flat)
    return f"{place}{_FLAT_NAMES[rest]}{dot}{ending}" if rest in _FLAT_NAMES else name


def _adapter_alpha(file: Path) -> float | None:
    """`lora_alpha` of PEFT's configuration, beside the file or, as diffusers writes it, in its
    header; None if not there.
    """
    place, config = file.parent / "adapter_config.json", {}
    if place.is_file():
        config = read_json(place)
    elif file.suffix == ".safetensors":
        place = file
        with safe_open(file, "pt") as opened:
            saved = parse_json((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        config = {key.removeprefix("transformer."): value for key, value in saved.items()}
    for option in ("use_rslora", "use_dora", "alpha_pattern"):
        if config.get(option):
            raise ValueError(f"{place} has {option}, which is not merged here; merge it with peft")
    return config.get("lora_alpha")


def resolved_updates(
    tensors: Mapping[str, Tensor], updates: Mapping[str, Update], source: str
) -> list[tuple[str, Update]]:
    """Updates with the names of the weights by diffusers' names that they are of.

    Args:
        source: what an error calls the updates.

    Raises:
        ValueError: if an update is of a weight that is not there, or of another shape: it is for
            another model.
    """
    found, strange = [], []
    for key, update in updates.items():
        own = f"{key}.weight" if isinstance(update, LowRank) else key
        name = own if own in tensors else diffusers_name(own)
        pair = (
            not isinstance(update, LowRank) or update.up.flatten(1).shape[1] == update.down.shape[0]
        )
        if name not in tensors:
            strange.append(f"{key} is not there")
        elif not pair or tensors[name].shape != update.shape:
            strange.append(f"{key} {update.shape} instead of {tuple(tensors[name].shape)}")
        else:
            found.append((name, update))
    if strange:
        raise ValueError(f"{source} is a LoRA of another model: {_few(strange)}")
    return found


def merge_lora(
    tensors: Mapping[str, Tensor], updates: Mapping[str, Update], source: str
) -> dict[str, Tensor]:
    """Weights by diffusers' names with updates by either naming: the sum in float32, then in the
    weight's kind; see ``resolved_updates``.
    """
    sums: dict[str, Tensor] = {}
    for name, update in resolved_updates(tensors, updates, source):
        sums[name] = sums.get(name, tensors[name].float()) + update.value()
    return {**tensors, **{name: value.to(tensors[name].dtype) for name, value in sums.items()}}
