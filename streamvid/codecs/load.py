"""Opening a codec: a folder's `vae/config.json` says which class it is, and a single file is a
TAEHV.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import nn

from streamvid.codecs.base import VideoCodec
from streamvid.hub import resolve_checkpoint
from streamvid.weights import TENSOR_SUFFIXES, load_strictly, not_finite, read_json

CODECS: dict[str, tuple[str, str]] = {
    "AutoencoderTinyVideo": ("streamvid.codecs.tiny_vae", "AutoencoderTinyVideo"),
    "AutoencoderKLWan": ("streamvid.codecs.wan_vae", "StreamingAutoencoderKLWan"),
    "AutoencoderTAEHV": ("streamvid.codecs.taehv", "AutoencoderTAEHV"),
}
"""Module and class, by the class name in `config.json`. Modules are imported when they are needed:
Wan's brings all networks of diffusers along, a second of every start."""


def codec_class(name: str) -> type[nn.Module]:
    """The class of a name in ``CODECS``."""
    module, cls = CODECS[name]
    return getattr(importlib.import_module(module), cls)


def open_codec(path: str | Path, device: torch.device | str | None = None) -> VideoCodec:
    """The codec in `path/vae`, or the TAEHV in the file `path`; frozen, in float32.

    Args:
        path: a folder in the diffusers layout or its name on the hub, or a `.safetensors`, `.pth`
            or `.pt` file as TAEHV publishes them.

    Raises:
        ValueError: one line, if it is missing, damaged, or of a class that has no streaming decoder
            here.
    """
    path = Path(path) if Path(path).suffix in TENSOR_SUFFIXES else resolve_checkpoint(path, ["vae"])
    codec = _open_file(path) if path.suffix in TENSOR_SUFFIXES else _open_folder(path / "vae")
    _check_finite(path, codec)
    codec = codec.requires_grad_(False).eval()
    # diffusers' own `to` looks for hooks that nothing here sets, and imports peft for that
    return nn.Module.to(codec, device)


def _check_finite(path: Path, codec: nn.Module) -> None:
    """Refuse weights that would make black or white frames; decoders end in a clamp, behind which
    they can't be told.
    """
    bad = not_finite(codec.state_dict())
    if bad is not None:
        raise ValueError(
            f"{path}: the codec's {bad} is not finite (NaN or infinite); it is damaged, copy it"
            " again"
        )


def _open_file(file: Path) -> nn.Module:
    from streamvid.codecs.taehv import AutoencoderTAEHV

    return AutoencoderTAEHV.from_file(file)


def _open_folder(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected a diffusers folder with vae/")
    name = read_json(folder / "config.json").get("_class_name")
    if not isinstance(name, str) or name not in CODECS:
        raise ValueError(f"{folder} is a {name}; expected one of {', '.join(CODECS)}")
    return load_strictly(codec_class(name), folder)
