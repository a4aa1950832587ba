"""Checkpoints of a run: `checkpoints/step-0000123/`, complete or not there at all.

    student.safetensors             every parameter and buffer of the network
    student.optimizer.safetensors   what the optimiser remembers, by parameter name
    student.ema.safetensors         the averaged weights, if there are any
    method.safetensors              other tensors of the method that change in training, if any
    rank-0.pt ...                   random states and running means of each process
    trainer.json                    the step and other counters, the run's fingerprint, a checksum
                                    of each file and of itself

A folder is written under a temporary name and renamed when complete; older ones are removed only
after that. Nothing in it is unpickled except `rank-*.pt`, with weights_only.

Checksums are CRC-32: they are for damage and mistakes, not for attacks, and every resumption waits
for them. One core does 4.2 GB/s of it, where sha256 does 1.8 and blake2b 0.9 (x86-64 with SHA
extensions), so that the 36 GB of a 1.3B run with two networks take 9 s of reading anew.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamvid.files import atomic_folder, remove_folder
from streamvid.training.sharding import cut_like
from streamvid.weights import not_finite

COUNTERS_FILE = "trainer.json"
CHUNK_BYTES = 2**24  # read at once for a checksum
COUNTED = ("step", "samples", "seconds")  # numbers that every checkpoint has


@dataclass
class Snapshot:
    """What a checkpoint holds, on the way to the disk or back."""

    counters: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    """By file: student, student.optimizer, student.ema, method."""
    ranks: list[dict[str, Any]]
    """State of each process: random generators, running means."""


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints, oldest first; what a crash left behind has a hidden name and is not
    among them.
    """
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
        files = {file.name: checksum(file) for file in sorted(temporary.iterdir())}
        counters = {**snapshot.counters, "files": files}
        counters["checksum"] = _checksum_of(counters)
        (temporary / COUNTERS_FILE).write_text(json.dumps(counters, indent=1))
    for old in list_checkpoints(folder)[:-keep]:
        remove_folder(old)
    return path


def checksum(file: Path) -> str:
    """CRC-32 of a file, as 8 hexadecimal digits."""
    value = 0
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def _checksum_of(counters: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(counters, sort_keys=True).encode()):08x}"


def read_counters(path: Path) -> dict[str, Any]:
    """What `trainer.json` says: the counters, and the checksums under "files".

    Raises ValueError with one line if it is missing, is not as it was written, or of another step.
    """
    counters = _read(
        path / COUNTERS_FILE, lambda file: json.loads(file.read_text(encoding="utf-8"))
    )
    if not isinstance(counters, dict):
        raise DamagedCheckpoint(
            path, f"{COUNTERS_FILE} holds a {type(counters).__name__}, expected a JSON object"
        )
    written = counters.pop("checksum", None)
    if written is None:
        raise DamagedCheckpoint(
            path, f"{COUNTERS_FILE} has no checksum (streamvid wrote none at first)"
        )
    if written != _checksum_of(counters):
        raise DamagedCheckpoint(path, f"{COUNTERS_FILE} is not as it was written, by its checksum")
    for key in COUNTED:
        value = counters.get(key)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise DamagedCheckpoint(
                path, f"{COUNTERS_FILE} has {key}={value!r}, expected a number of at least 0"
            )
    if counters["step"] != int(path.name[5:]):
        raise DamagedCheckpoint(path, f"{COUNTERS_FILE} is of step {counters['step']}")
    return counters


def read_checkpoint(path: Path, names: list[str], rank: int, verify: bool = True) -> Snapshot:
    """Reads the files `names` and the state of process `rank` alone.

    verify: whether the checksums of all files are compared first; one process of a launch is
    enough.

    Raises ValueError with one line if a file is missing, unreadable, or not as it was written.
    """
    counters = read_counters(path)
    files = counters.pop("files", None)
    needed = [f"{name}.safetensors" for name in names] + [f"rank-{rank}.pt"]
    if not isinstance(files, dict):
        files = {}
    unlisted = [file for file in needed if file not in files]
    if unlisted:
        raise DamagedCheckpoint(path, f"{COUNTERS_FILE} has no checksum of {unlisted[0]}")
    if verify:
        for name, expected in files.items():
            if _read(path / name, checksum) != expected:
                raise DamagedCheckpoint(path, f"{name} is not as it was written, by its checksum")
    tensors = {name: _read(path / f"{name}.safetensors", load_file) for name in names}
    own = _read(
        path / f"rank-{rank}.pt",
        lambda file: torch.load(file, weights_only=True, map_location="cpu"),
    )
    return Snapshot(counters, tensors, [own])


def _read(file: Path, reader: Any) -> Any:
    if not file.is_file():
        raise DamagedCheckpoint(file.parent, f"{file.name} is missing")
    with reading(file.parent, file.name):
        return reader(file)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Inside, an error in reading `what` of a checkpoint is one line that names both."""
    try:
        yield
    except DamagedCheckpoint:
        raise
    except (SafetensorError, ValueError, OSError, RuntimeError, EOFError) as error:
        raise DamagedCheckpoint(
            path, f"{what} can't be read ({' '.join(str(error).split())[:120]})"
        ) from None
    # a truncated .pt raises pickle.UnpicklingError, zipfile errors and others
    except Exception as error:
        raise DamagedCheckpoint(path, f"{what} can't be read ({type(error).__name__})") from None


class DamagedCheckpoint(ValueError):
    """A checkpoint that can't be resumed from. The message is one line for the user."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"checkpoint {path} is damaged: {what}; {way_back(path)}")


def way_back(path: Path) -> str:
    """What to do about a checkpoint that is of no use."""
    before = [
        other for other in list_checkpoints(path.parent) if int(other.name[5:]) < int(path.name[5:])
    ]
    where = (
        f"to resume from {before[-1].name}"
        if before
        else "to start the run anew, there is none before it"
    )
    return f"delete that folder {where}"


@torch.no_grad()
def restore_tensors(
    live: dict[str, Tensor], saved: dict[str, Tensor], path: Path, name: str
) -> None:
    """Copies saved tensors into those that are in use; names, shapes and dtypes must be the same,
    and all numbers finite.
    """
    lacking = sorted(live.keys() - saved.keys())
    if lacking:
        raise DamagedCheckpoint(path, f"{name}.safetensors lacks {lacking[0]}")
    unknown = sorted(saved.keys() - live.keys())
    if unknown:
        raise DamagedCheckpoint(path, f"{name}.safetensors has the unknown {unknown[0]}")
    for key, tensor in live.items():
        if tensor.shape != saved[key].shape:
            shapes = f"{tuple(saved[key].shape)}, expected {tuple(tensor.shape)}"
            raise DamagedCheckpoint(path, f"{key} of {name}.safetensors has shape {shapes}")
        if tensor.dtype != saved[key].dtype:
            raise DamagedCheckpoint(
                path, f"{key} of {name}.safetensors is {saved[key].dtype}, expected {tensor.dtype}"
            )
    check_finite(saved, path, name)
    for key, tensor in live.items():
        tensor.copy_(cut_like(saved[key], tensor))


def check_finite(saved: dict[str, Tensor], path: Path, name: str) -> None:
    """Refuses a checkpoint that would go on with numbers that are none."""
    bad = not_finite(saved)
    if bad is not None:
        raise DamagedCheckpoint(
            path, f"{bad} of {name}.safetensors is not finite (NaN or infinite)"
        )


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every global generator that this process may draw from."""
    numpy_state = np.random.get_state()
    assert isinstance(numpy_state, tuple)
    kind, words, position, has_gauss, gauss = numpy_state
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
