"""Reading weights so that whatever is wrong with a file is one line that names it.

A diffusers folder holds `config.json` and one or more `.safetensors` files, with an index if there
are several. Published single files are `.safetensors`, or `.pth` and `.pt`, of which tensors are
read and no code is ever run.
"""

from __future__ import annotations

import inspect
import json
import math
import pickle
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
TORCH_SUFFIXES = (".pth", ".pt")
TENSOR_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
# transformers changes torch's own initialisers while it loads, for all threads
_LOADING = threading.Lock()
MOST = 1_000_000
"""Of any size in the configuration of a diffusers model; the largest are widths of some 10,000."""
MOST_NESTED = 20  # containers in containers of a published file; they have about three
_KINDS: dict[type, Any] = {
    bool: bool,
    int: int,
    float: (int, float),
    str: str,
    tuple: (list, tuple),
    list: (list, tuple),
}


def read_json(file: Path) -> dict:
    """A configuration file; a ValueError of one line if it holds anything but a JSON object."""
    if not file.is_file():
        raise ValueError(f"no file {file}")
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, expected a JSON object")
    return config


def parse_json(text: str) -> Any:
    """What a text of somebody else's says; a ``ValueError`` for whatever it can't be read for."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers does not print its coloured reports of what did not fit; the error says
    it.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:
        yield
        return
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def check_weights(folder: Path) -> None:
    """Check that all weight files of a folder are there and complete; reads their headers only.

    Raises:
        ValueError: if there are none, an index names one that is missing, or one ends early;
            safetensors' own words for it don't name the file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has no .safetensors file; the checkpoint is incomplete, copy it again"
        )
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = read_shard_names(index)
        missing = sorted(shards - {file.name for file in files})
        if missing:
            raise ValueError(
                f"{index} names {missing[0]}, which is not there ({len(missing)} of {len(shards)}"
                " files are missing); copy it again"
            )
    for file in files:
        check_safetensors(file)


def read_shard_names(index: Path) -> set[str]:
    """The files that an index names.

    Raises:
        ValueError: if its ``weight_map`` is anything but names of tensors and of files beside it.
    """
    shards = read_json(index).get("weight_map", {})
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in shards.values()
    ):
        raise ValueError(
            f"{index}: weight_map is no table of tensors and file names; copy it again"
        )
    return set(shards.values())


def check_safetensors(file: Path) -> None:
    """Check that one file is complete; reads its header only."""
    if not file.is_file():  # a pipe would be waited for
        raise ValueError(f"{file} is no regular file; copy the checkpoint again")
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); copy it again") from error


def load_strictly(cls: type[Model], folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    """A diffusers model from its folder, every weight of it and no other, in `dtype` whatever the
    file has.

    Args:
        cls: a `ModelMixin`.

    Raises:
        ValueError: one line, if the folder is missing, damaged, or of other names or shapes than
            its configuration says.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json; expected a diffusers folder with {folder.name}/"
        )
    check_weights(folder)
    check_kinds(cls, folder / "config.json")
    try:
        with _LOADING, quiet():
            model, info = cls.from_pretrained(
                folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # diffusers raises many kinds for a folder that does not fit
        raise ValueError(f"cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise ValueError(
            f"cannot load {folder}: {wrong[0]} and {len(wrong) - 1} more are missing or unknown"
        )
    return model


def check_kinds(cls: type[nn.Module], file: Path) -> None:
    """Check that a configuration's values are of the kinds of the defaults of the class, which are
    not asked when it is made.

    Raises:
        ValueError: for a text where a number belongs, a number that is not finite, and the like.
    """
    defaults = {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items()}
    for name, value in read_json(file).items():
        kind = type(defaults.get(name))
        if kind not in _KINDS or value is None:
            continue
        if (
            not isinstance(value, _KINDS[kind])
            or isinstance(value, bool) != (kind is bool)
            or _is_infinite(value)
        ):
            raise ValueError(
                f"{file}: {name} is {str(value)[:60]!r}, expected {kind.__name__}, such as"
                f" {defaults[name]}"
            )
        if kind is int and not 0 <= value <= MOST:
            raise ValueError(f"{file}: {name} is {value}, expected 0 to {MOST:,}")


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a published single file, on the CPU.

    Raises:
        ValueError: if it is missing, damaged, of another kind, or holds anything but named tensors.
    """
    if file.suffix not in TENSOR_SUFFIXES:
        raise ValueError(
            f"{file} ends in {file.suffix or 'nothing'}; expected one of"
            f" {', '.join(TENSOR_SUFFIXES)}"
        )
    if not file.is_file():
        raise ValueError(f"no file {file}")
    if file.suffix == ".safetensors":
        check_safetensors(file)
        return load_file(file)
    tensors = read_pickled(file)
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(
            f"{file} is no plain table of named tensors; take the published file as it is"
        )
    return tensors


def read_pickled(file: Path) -> dict[str, Any]:
    """What ``torch.save`` wrote, tensors and containers of them, memory-mapped where its format
    allows; code never runs.

    Raises:
        ValueError: if it is missing, damaged, holds code, or is no dictionary.
    """
    if not file.is_file():
        raise ValueError(f"no file {file}")
    try:
        table = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except pickle.UnpicklingError as error:  # its text advises to run the code
        raise ValueError(
            f"{file} is no checkpoint, is damaged, or holds code besides tensors, which is not run"
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{file} is truncated or damaged, or no checkpoint ({reason}); copy it again"
        ) from error
    if not isinstance(table, dict):
        raise ValueError(
            f"{file} holds a {type(table).__name__}, expected a dictionary of named tensors"
        )
    _check_held(file, table, ())
    return table


def _check_held(file: Path, part: Any, above: tuple[int, ...]) -> None:
    """Refuse containers within themselves, and tensors that claim more numbers than the file has
    for them.

    Those of stride 0 do: a few bytes become terabytes when they are copied.
    """
    if isinstance(part, Tensor):
        if part.layout is torch.strided and part.nbytes > part.untyped_storage().nbytes():
            raise ValueError(
                f"{file}: a tensor {tuple(part.shape)} claims more numbers than the file holds;"
                " save it whole"
            )
        return
    if not isinstance(part, (dict, list, tuple)):
        return
    if id(part) in above or len(above) > MOST_NESTED:
        raise ValueError(
            f"{file} holds containers within themselves or {MOST_NESTED} deep; it is no plain"
            " checkpoint"
        )
    for value in part.values() if isinstance(part, dict) else part:
        _check_held(file, value, (*above, id(part)))


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinite number; None if there is none.

    By the smallest and largest number, which are NaN where one is: no copy, and 90 times as fast as
    ``isfinite`` on a CPU.
    """
    for name, tensor in tensors.items():
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not all(map(math.isfinite, torch.stack(tensor.aminmax()).tolist()))
        ):
            return name
    return None
