"""The file of a session's snapshot: tensors and facts in one safetensors file, no pickle.

The facts are JSON in the file's metadata, with a checksum of all that the file says. A snapshot
belongs to the student that made it: a fingerprint of the weights is kept, and another student's is
refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from streamvid.files import atomic_file
from streamvid.weights import parse_json

FORMAT = "streamvid session 1"
SAMPLED = 64  # numbers of each parameter that its fingerprint looks at


def write_snapshot(
    path: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write a snapshot at once: a crash leaves the old file or the new one.

    Args:
        tensors: on any device; copied, so that shared memory does not matter.
        facts: what JSON can hold.
    """
    own = {name: _on_cpu(tensor) for name, tensor in tensors.items()}
    text = json.dumps(dict(facts))
    said = {"format": FORMAT, "facts": text, "checksum": _checksum(own, text)}
    with atomic_file(path) as temporary:
        save_file(own, temporary, metadata=said)


def read_snapshot(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the facts that ``write_snapshot`` wrote.

    Raises:
        ValueError: one line, if the file is missing, damaged, or no snapshot.
    """
    if not Path(path).is_file():
        raise ValueError(f"no snapshot {path}; expected a file that Session.snapshot wrote")
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            if said.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is no snapshot of a session (format {said.get('format')!r}, expected"
                    f" {FORMAT!r})"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"snapshot {path} is damaged ({reason}); copy it again") from error
    text = said.get("facts", "")
    if said.get("checksum") != _checksum(tensors, text):
        raise ValueError(f"snapshot {path} is damaged (its checksum differs); copy it again")
    return tensors, parse_json(text)


def fingerprint(*modules: Any) -> str:
    """Names the weights of a student: their names, shapes, precision and a sample of their numbers.

    A sample, because a snapshot is taken while viewers wait; a step of an optimiser changes nearly
    all numbers. What is not a module of torch is left out.
    """
    digest = hashlib.blake2b(digest_size=16)
    for module in modules:
        for name, parameter in module.named_parameters() if isinstance(module, nn.Module) else ():
            flat = parameter.detach().reshape(-1)
            count = min(SAMPLED, flat.numel())
            places = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long()
            numbers = flat[places.to(flat.device)].double().cpu()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()


def _on_cpu(tensor: Tensor) -> Tensor:
    """A contiguous copy."""
    own = torch.empty(tensor.shape, dtype=tensor.dtype)
    return own.copy_(tensor.detach())


def _checksum(tensors: Mapping[str, Tensor], facts: str) -> str:
    digest = hashlib.blake2b(facts.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
