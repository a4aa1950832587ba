"""Ways to damage a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Evil:
    """Makes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def truncated(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flipped(file: Path, at: float = 0.6) -> None:
    """One bit of the byte at a fraction of the file."""
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 64
    file.write_bytes(content)


def changed_json(file: Path, key: str, value: Any = ...) -> None:
    """With another value of a key, or without the key."""
    content = json.loads(file.read_text())
    if value is ...:
        content.pop(key)
    else:
        content[key] = value
    file.write_text(json.dumps(content))


def edited_json(file: Path, change: Callable[[dict], Any]) -> None:
    content = json.loads(file.read_text())
    content = change(content) or content
    file.write_text(json.dumps(content))


def retensored(file: Path, change: str) -> None:
    """A safetensors file that can be read and holds something else."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    first = next(key for key in sorted(tensors) if tensors[key].ndim > 1)
    if change.startswith("to "):
        tensors = {key: tensor.to(getattr(torch, change[3:])) for key, tensor in tensors.items()}
    elif change in ("nan", "inf"):
        for tensor in tensors.values():
            tensor.view(-1)[:1] = float(change)
    elif change == "missing":
        del tensors[first]
    elif change == "unknown":
        tensors["unknown"] = torch.zeros(3)
    elif change == "shape":
        tensors[first] = torch.cat([tensors[first], tensors[first]])
    elif change == "transposed":
        tensors[first] = tensors[first].transpose(0, -1).contiguous()
    save_file(tensors, file, metadata=metadata)
