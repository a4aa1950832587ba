"""The file of a session's snapshot: tensors and facts in one safetensors file, no pickle.

The facts are JSON in the file's metadata, with a checksum of all that the file says. A snapshot
belongs to the student that made it: a fingerprint of the weights is kept, and another student's is
refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from streamvid.codecs.base import flatten_state, rebuild_state
from streamvid.files import atomic_file
from streamvid.rollout.schedule import StreamConfig
from streamvid.students.stream_state import Blend, Context, StreamState
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


def pack_state(state: StreamState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state as tensors and facts, for ``write_snapshot``."""
    layout, decoder = flatten_state(state.decoder)
    tensors = {
        "embedding": state.cond,
        **({"blend": state.blend.origin} if state.blend else {}),
        **{f"context.{i}": context.latents for i, context in enumerate(state.contexts)},
        **{f"decoder.{i}": tensor for i, tensor in enumerate(decoder)},
    }
    facts = {
        "stream": state.config.to_json(),
        "index": state.index,
        "scene": state.scene,
        "seed": state.seed,
        "prompt": state.prompt,
        "blend": state.blend and {f.name: getattr(state.blend, f.name) for f in fields(Blend)[1:]},
        "context_t": [context.t for context in state.contexts],
        "decoder": layout,
    }
    return tensors, facts


def unpack_state(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> StreamState:
    """The state that ``pack_state`` was given.

    Raises:
        KeyError, TypeError, ValueError: if a part is missing or is something else.
    """
    contexts, decoder = named(tensors, "context."), named(tensors, "decoder.")
    return StreamState(
        index=facts["index"],
        scene=facts["scene"],
        seed=facts["seed"],
        prompt=facts["prompt"],
        cond=tensors["embedding"],
        blend=facts["blend"] and Blend(tensors["blend"], **facts["blend"]),
        config=StreamConfig.from_json(facts["stream"]),
        contexts=tuple(Context(contexts[str(i)], t) for i, t in enumerate(facts["context_t"])),
        decoder=rebuild_state(facts["decoder"], [decoder[str(i)] for i in range(len(decoder))]),
    )


def check_maker(facts: Mapping[str, Any], own: str, stream: StreamConfig) -> None:
    """A ValueError unless a snapshot is of the student that has the fingerprint ``own`` and the
    stream configuration.
    """
    if facts["student"] != own:
        raise ValueError("it is of another student, codec or precision; open the one that made it")
    if facts["own_stream"] != stream.to_json():
        raise ValueError(
            "it is of this student under another stream configuration; open it with the same"
            " schedule, window and sink"
        )


def named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name begins with a prefix, named without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


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
