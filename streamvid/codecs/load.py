"""Opening a codec: a folder's `vae/config.json` says which class it is, and a single file is a
TAEHV.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from streamvid.codecs.base import VideoCodec
from streamvid.codecs.taehv import AutoencoderTAEHV
from streamvid.codecs.tiny_vae import AutoencoderTinyVideo
from streamvid.codecs.wan_vae import StreamingAutoencoderKLWan
from streamvid.hub import resolve_checkpoint
from streamvid.weights import TENSOR_SUFFIXES, load_strictly, not_finite, read_json

CODECS: dict[str, type[nn.Module]] = {
    "AutoencoderTinyVideo": AutoencoderTinyVideo,
    "AutoencoderKLWan": StreamingAutoencoderKLWan,
    "AutoencoderTAEHV": AutoencoderTAEHV,
}
"""By the class name in `config.json`."""


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
    codec = (
        AutoencoderTAEHV.from_file(path)
        if path.suffix in TENSOR_SUFFIXES
        else _open_folder(path / "vae")
    )
    _check_finite(path, codec)
    return codec.requires_grad_(False).eval().to(device)


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


def _open_folder(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected a diffusers folder with vae/")
    name = read_json(folder / "config.json").get("_class_name")
    if not isinstance(name, str) or name not in CODECS:
        raise ValueError(f"{folder} is a {name}; expected one of {', '.join(CODECS)}")
    return load_strictly(CODECS[name], folder)
