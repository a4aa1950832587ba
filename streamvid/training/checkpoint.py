"""Checkpoints of a run: `checkpoints/step-0000123/`, complete or not there at all.

    student.safetensors             every parameter and buffer of the network
    student.optimizer.safetensors   what the optimiser remembers, by parameter name
    student.ema.safetensors         the averaged weights, if there are any
    method.safetensors              other tensors of the method that change in training, if there are any
    rank-0.pt ...                   random states and running means of each process
    trainer.json                    the step and other counters

A folder is written under a temporary name and renamed when complete; older ones are removed only after that.
Nothing in it is unpickled except `rank-*.pt`, with weights_only.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamvid.files import atomic_folder
from streamvid.training.sharding import cut_like


@dataclass
class Snapshot:
    """What a checkpoint holds, on the way to the disk or back."""

    counters: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]  # by file: "student", "student.optimizer", "student.ema", "method"
    ranks: list[dict[str, Any]]  # what differs between processes


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints, oldest first; what a crash left behind has a hidden name and is not among them."""
    found = [path for path in Path(folder).glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def write_checkpoint(folder: str | Path, step: int, snapshot: Snapshot, keep: int) -> Path:
    """Writes one checkpoint and then removes all but the newest `keep`."""
    path = Path(folder) / f"step-{step:07d}"
    with atomic_folder(path) as temporary:
        for name, tensors in snapshot.tensors.items():
            contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, temporary / f"{name}.safetensors")
        for rank, state in enumerate(snapshot.ranks):
            torch.save(state, temporary / f"rank-{rank}.pt")
        (temporary / "trainer.json").write_text(json.dumps(snapshot.counters, indent=1))
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def read_counters(path: Path) -> dict[str, Any]:
    return _read(path / "trainer.json", lambda file: json.loads(file.read_text()))


def read_checkpoint(path: Path, names: list[str], rank: int) -> Snapshot:
    """Reads the files `names` and the state of process `rank` alone.

    Raises ValueError with one line if a file is missing or unreadable.
    """
    counters = read_counters(path)
    tensors = {name: _read(path / f"{name}.safetensors", load_file) for name in names}
    own = _read(path / f"rank-{rank}.pt", lambda file: torch.load(file, weights_only=True, map_location="cpu"))
    return Snapshot(counters, tensors, [own])


def _read(file: Path, reader: Any) -> Any:
    if not file.is_file():
        raise damaged(file.parent, f"{file.name} is missing")
    try:
        return reader(file)
    except (SafetensorError, ValueError, OSError, RuntimeError, EOFError) as error:
        raise damaged(file.parent, f"{file.name} can't be read ({' '.join(str(error).split())[:120]})") from None
    except Exception as error:  # a truncated .pt raises pickle.UnpicklingError, zipfile errors and others
        raise damaged(file.parent, f"{file.name} can't be read ({type(error).__name__})") from None


def damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"checkpoint {path} is damaged: {what}; delete that folder to resume from the one before it")


@torch.no_grad()
def restore_tensors(live: dict[str, Tensor], saved: dict[str, Tensor], path: Path, name: str) -> None:
    """Copies saved tensors into those that are in use; names and shapes must be the same."""
    for key in sorted(live.keys() ^ saved.keys()):
        raise damaged(path, f"{name}.safetensors {'lacks' if key in live else 'has the unknown'} {key}")
    for key, tensor in live.items():
        if tensor.shape != saved[key].shape:
            shapes = f"{tuple(saved[key].shape)}, expected {tuple(tensor.shape)}"
            raise damaged(path, f"{key} of {name}.safetensors has shape {shapes}")
        tensor.copy_(cut_like(saved[key], tensor))


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every global generator that this process may draw from."""
    kind, words, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, words.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Undoes `random_state`; to be called last, since loading may draw."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
