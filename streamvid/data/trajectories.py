"""Trajectories of a teacher's sampler on disk: the states of each clip at a few times, from noise to data.

A set is a folder of parts ``part-00000-of-00016.safetensors``, each with

    states      [N, K, C, T, h, w]  float16, at K falling times, the last of which is 0
    embeddings  [N, L, D]           float16
    metadata "about"                JSON: ``times``, ``captions``, ``settings`` (how the set was made)

A part appears when it is complete, so that an interrupted job goes on with the first missing one. A set is read
from the disk as it is needed, it may be larger than memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from streamvid.files import atomic_file, remove_leftovers
from streamvid.seeding import key_to_seed, keyed_generator

SAME_TIME = 1e-6  # times closer than this are one time
Solve = Callable[[Tensor, list[int]], Tensor]


def write_trajectories(
    folder: str | Path,
    prompts: Sequence[str],
    times: Sequence[float],
    embed: Callable[[list[str]], Tensor],
    solve: Solve,
    settings: dict[str, Any],
    first_seed: int = 0,
    clips_per_part: int = 64,
    batch_size: int = 4,
) -> None:
    """Solve one trajectory a prompt and write the set; parts that are already there are kept.

    Args:
        folder: of the set; made if needed.
        prompts: one a clip; clip i has the seed ``first_seed`` + i.
        times: falling, the last one 0.
        embed: prompts to embeddings ``[B, L, D]``.
        solve: embeddings ``[B, L, D]`` and seeds to states ``[B, K, C, T, h, w]`` at ``times``.
        settings: what else the states depend on, kept with the set; plain JSON values.
        clips_per_part: what an interruption may lose.
        batch_size: clips that are solved together.

    Raises:
        ValueError: if the times do not fall to 0, or the folder holds parts made with other settings.
    """
    times, prompts = check_falling(times), list(prompts)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    made_of = {**settings, "first_seed": first_seed, "clips_per_part": clips_per_part}
    made_of |= {"num_clips": len(prompts), "prompts": key_to_seed(*prompts)}
    made_of = json.loads(json.dumps(made_of))
    _check_same_settings(folder, list(times), made_of)
    starts = range(0, len(prompts), clips_per_part)
    with tqdm(total=len(prompts), desc="solving trajectories", unit="clip") as bar:
        for number, start in enumerate(starts):
            path = folder / f"part-{number:05d}-of-{len(starts):05d}.safetensors"
            texts = prompts[start : start + clips_per_part]
            if path.exists():
                bar.update(len(texts))
                continue
            states, embeddings = [], []
            for i in range(0, len(texts), batch_size):
                batch = texts[i : i + batch_size]
                cond = embed(batch)
                seeds = [first_seed + start + i + k for k in range(len(batch))]
                states.append(solve(cond, seeds).half().cpu())
                embeddings.append(cond.half().cpu())
                bar.update(len(batch))
            about = {"times": list(times), "captions": texts, "settings": made_of}
            tensors = {"states": torch.cat(states).contiguous(), "embeddings": torch.cat(embeddings).contiguous()}
            with atomic_file(path) as temporary:
                save_file(tensors, temporary, metadata={"about": json.dumps(about)})  # one key: safetensors shuffles


class Trajectories:
    """Batches of trajectories, stateless: the same arguments always give the same batch.

    Args:
        path: a folder of ``write_trajectories``.
        seed: of the choice of clips.

    Raises:
        ValueError: if the set is missing, incomplete or damaged.
    """

    def __init__(self, path: str | Path, seed: int):
        self.seed = seed
        self._parts, abouts = zip(*(_open_part(part) for part in _complete_parts(Path(path))))
        if any((a["times"], a["settings"]) != (abouts[0]["times"], abouts[0]["settings"]) for a in abouts):
            raise ValueError(f"the parts of {path} are of different sets; keep each set in a folder of its own")
        self.times: tuple[float, ...] = tuple(abouts[0]["times"])
        self.settings: dict[str, Any] = abouts[0]["settings"]
        self._rows = [(k, i, text) for k, about in enumerate(abouts) for i, text in enumerate(about["captions"])]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, step: int, turn: str, micro: int, indices: range) -> dict:
        """Samples ``indices`` of the joint batch: states ``[B, K, C, T, h, w]``, their times ``[B, K]``, cond
        ``[B, L, D]`` (all float32), prompts, and ``keys``, a seed a sample."""
        keys = [key_to_seed(self.seed, "trajectory", step, turn, micro, index) for index in indices]
        rows = [self._rows[int(torch.randint(len(self), (), generator=keyed_generator("row", key)))] for key in keys]
        return {
            "states": self._read("states", rows),
            "times": torch.tensor(self.times).repeat(len(rows), 1),
            "cond": self._read("embeddings", rows),
            "prompts": [text for _, _, text in rows],
            "keys": keys,
        }

    def _read(self, name: str, rows: list[tuple[int, int, str]]) -> Tensor:
        return torch.cat([self._parts[part].get_slice(name)[i : i + 1] for part, i, _ in rows]).float()


def time_indices(stored: Sequence[float], wanted: Sequence[float]) -> list[int]:
    """Where the wanted times are among the stored ones.

    Raises:
        ValueError: if one of them is not stored.
    """
    nearest = [min(range(len(stored)), key=lambda i: abs(stored[i] - t)) for t in wanted]
    missing = [t for t, i in zip(wanted, nearest) if abs(stored[i] - t) > SAME_TIME]
    if missing:
        raise ValueError(
            f"the trajectories have no states at t={_listed(missing)}, which the student's stream asks for, only at "
            f"{_listed(stored)}; make them with the student's step list, see tools/make_trajectories.py --help"
        )
    return nearest


def check_falling(times: Sequence[float]) -> tuple[float, ...]:
    """The times, if they fall to 0.

    Raises:
        ValueError: if they do not.
    """
    times = tuple(float(t) for t in times)
    if len(times) < 2 or any(b >= a for a, b in zip(times, times[1:])) or times[0] > 1 or times[-1] != 0:
        raise ValueError(f"times {_listed(times)}, expected at least two, falling from at most 1 to 0")
    return times


def _listed(times: Sequence[float]) -> str:
    return ", ".join(f"{t:.6g}" for t in times)


def _parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*-of-*.safetensors"))


def _complete_parts(folder: Path) -> list[Path]:
    """The parts of a set, all of them."""
    parts = _parts_of(folder)
    if not parts:
        raise ValueError(f"no trajectories in {folder}; make them with tools/make_trajectories.py")
    expected = int(re.search(r"-of-(\d+)", parts[0].name).group(1))
    if len(parts) != expected:
        raise ValueError(
            f"{folder} has {len(parts)} of {expected} parts; the command that made them goes on with the others"
        )
    return parts


def _open_part(path: Path) -> tuple[Any, dict[str, Any]]:
    """A part, whose tensors are read later, and what it is about; a file cut short does not open."""
    try:
        part = safe_open(path, "pt")
        return part, json.loads(part.metadata()["about"])
    except Exception as error:  # safetensors raises its own kind
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}); delete it and make it again") from error


def _check_same_settings(folder: Path, times: list[float], settings: dict[str, Any]) -> None:
    for path in _parts_of(folder):
        _, about = _open_part(path)
        was = about["settings"] | {"times": about["times"]}
        now = settings | {"times": times}
        differing = [key for key in now if was.get(key) != now[key]]
        if differing:
            key = differing[0]
            raise ValueError(
                f"{folder} holds trajectories made with other settings ({key} was {was.get(key)}, now {now[key]}); "
                "choose another folder"
            )
