"""Opening a codec from a folder: `vae/config.json` says which class it is."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from streamvid.codecs.base import VideoCodec
from streamvid.codecs.tiny_vae import AutoencoderTinyVideo

CODECS = {cls.__name__: cls for cls in (AutoencoderTinyVideo,)}


def open_codec(path: str | Path, device: torch.device | str | None = None) -> VideoCodec:
    """The codec in `path/vae`, frozen, in float32.

    Raises:
        ValueError: if it is missing, damaged, or of a class that has no streaming decoder here.
    """
    folder = Path(path) / "vae"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected a diffusers folder with vae/")
    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    if name not in CODECS:
        raise ValueError(f"{folder} is a {name}; expected one of {', '.join(CODECS)}")
    try:
        codec = CODECS[name].from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot load the codec {folder}: {' '.join(str(error).split())[:200]}") from error
    return codec.requires_grad_(False).eval().to(device)
