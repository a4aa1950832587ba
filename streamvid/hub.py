"""Checkpoints that are named as on the Hugging Face hub: every place that takes a folder takes such
a name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name
HUB_FILES = ["model_index.json", "stream_config.json", "README.md"]
# of transformer/ and the like; no pickles, no code
PART_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]


def resolve_checkpoint(path: str | Path, parts: Sequence[str] | None = None) -> Path:
    """The folder of a checkpoint; one that is named as on the hub is fetched, or found in the hub's
    own cache.

    Args:
        path: a folder, which comes first, or a name such as ``Wan-AI/Wan2.1-T2V-1.3B-Diffusers``.
        parts: what of it is needed, such as ``["vae"]``; None is all of it.

    Raises:
        ValueError: if it is a name on the hub that cannot be had. A path that is no such name is
            returned as it is.
    """
    if Path(path).exists() or not HUB_NAME.fullmatch(str(path)):
        return Path(path)
    from huggingface_hub import snapshot_download

    patterns = HUB_FILES + [f"{part}/{file}" for part in parts or ["*"] for file in PART_FILES]
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # of the hub, the network or the disk
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"no folder {path} here, and it cannot be fetched from the hub ({type(error).__name__}:"
            f" {reason}); name the folder of a copy"
        ) from error
