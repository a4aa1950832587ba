"""Trajectories of a teacher's sampler on disk: the states of each clip at a few times, from noise
to data.

A set is a folder of parts ``part-00000-of-00016.safetensors``, each with

    states      [N, K, C, T, h, w]  float16, at K falling times, the last of which is 0
    embeddings  [N, L, D]           float16
    metadata "about"                JSON: ``times``, ``captions``, ``settings`` (how it was made)

A part appears when it is complete, so that an interrupted job goes on with the first missing one,
and several processes may do one job in one folder. Parts may also lie in folders inside the set's:
shares of one job that several machines did, or whole sets that were made in the same way with other
prompts or seeds. A set is read from the disk as it is needed, it may be larger than memory.
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

from streamvid.data.parts import make_parts
from streamvid.files import atomic_file
from streamvid.seeding import key_to_seed, keyed_generator
from streamvid.weights import parse_json

SAME_TIME = 1e-6  # times closer than this are one time
# settings in which joined sets may differ
WHICH_CLIPS = {"first_seed", "clips_per_part", "num_clips", "prompts"}
# settings that say where something lay, and what tells it by its content
PLACES = {"teacher": "teacher_weights"}
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
    share: tuple[int, int] = (1, 1),
) -> None:
    """Solve one trajectory a prompt and write the set; parts that are there, or that another
    process makes, are left to it.

    Args:
        folder: of the set; made if needed.
        prompts: one a clip; clip i has the seed ``first_seed`` + i.
        times: falling, the last one 0.
        embed: prompts to embeddings ``[B, L, D]``.
        solve: embeddings ``[B, L, D]`` and seeds to states ``[B, K, C, T, h, w]`` at ``times``.
        settings: what else the states depend on, kept with the set; plain JSON values.
        clips_per_part: what an interruption may lose.
        batch_size: clips that are solved together.
        share: (k, n) takes every n-th part, beginning with the k-th.

    Raises:
        ValueError: if the times do not fall to 0, the folder holds parts made with other settings,
            or there is no such share.
    """
    times, prompts = check_falling(times), list(prompts)
    if not 1 <= share[0] <= share[1]:
        raise ValueError(
            f"share {share[0]}/{share[1]}, expected a part such as 1/4, 2/4, 3/4 or 4/4"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made_of = {**settings, "first_seed": first_seed, "clips_per_part": clips_per_part}
    made_of |= {"num_clips": len(prompts), "prompts": key_to_seed(*prompts)}
    made_of = json.loads(json.dumps(made_of))
    _check_same_settings(folder, list(times), made_of)
    count = -(-len(prompts) // clips_per_part)
    every = [folder / f"part-{number:05d}-of-{count:05d}.safetensors" for number in range(count)]
    own = range(share[0] - 1, len(every), share[1])
    texts_of = {
        number: prompts[number * clips_per_part : (number + 1) * clips_per_part] for number in own
    }
    there = sum(len(texts_of[number]) for number in own if every[number].exists())
    total = sum(map(len, texts_of.values()))
    with tqdm(total=total, initial=there, desc="solving trajectories", unit="clip") as bar:

        def make(place: int) -> None:
            number = own[place]
            texts, start = texts_of[number], first_seed + number * clips_per_part
            states, embeddings = [], []
            for i in range(0, len(texts), batch_size):
                batch = texts[i : i + batch_size]
                cond = embed(batch)
                states.append(
                    solve(cond, list(range(start + i, start + i + len(batch)))).half().cpu()
                )
                embeddings.append(cond.half().cpu())
                bar.update(len(batch))
            about = {"times": list(times), "captions": texts, "settings": made_of}
            tensors = {
                "states": torch.cat(states).contiguous(),
                "embeddings": torch.cat(embeddings).contiguous(),
            }
            with atomic_file(every[number]) as temporary:
                # one key: safetensors shuffles
                save_file(tensors, temporary, metadata={"about": json.dumps(about)})

        make_parts([every[number] for number in own], make)


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
        paths = _complete_parts(Path(path))
        self._parts, abouts = zip(*map(_open_part, paths))
        for part, about in zip(paths, abouts):
            first = abouts[0]["settings"] | {"times": abouts[0]["times"]}
            name = _differing(first, about["settings"] | {"times": about["times"]}, WHICH_CLIPS)
            if name is not None:
                raise ValueError(
                    f"{part} and {paths[0]} are of different sets ({name}); keep each set in a"
                    " folder of its own"
                )
        self.times: tuple[float, ...] = tuple(abouts[0]["times"])
        self.settings: dict[str, Any] = abouts[0]["settings"]
        self._rows = [
            (k, i, text)
            for k, about in enumerate(abouts)
            for i, text in enumerate(about["captions"])
        ]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def latent_channels(self) -> int:
        """The channels of the teacher's latents."""
        return self._parts[0].get_slice("states").get_shape()[2]

    @property
    def text_dim(self) -> int:
        """Width of the embeddings."""
        return self._parts[0].get_slice("embeddings").get_shape()[-1]

    @property
    def fingerprint(self) -> str:
        """Changes with what the batches are made of."""
        made_by = {name: value for name, value in self.settings.items() if name not in PLACES}
        captions = [text for *_, text in self._rows]
        told = json.dumps([self.times, made_by, captions], sort_keys=True)
        return f"{key_to_seed(told):016x}"

    def batch(self, step: int, turn: str, micro: int, indices: range) -> dict:
        """Samples ``indices`` of the joint batch: states ``[B, K, C, T, h, w]``, their times ``[B,
        K]``, cond ``[B, L, D]`` (all float32), prompts, and ``keys``, one seed per sample.
        """
        keys = [key_to_seed(self.seed, "trajectory", step, turn, micro, index) for index in indices]
        rows = [
            self._rows[int(torch.randint(len(self), (), generator=keyed_generator("row", key)))]
            for key in keys
        ]
        return {
            "states": self._read("states", rows),
            "times": torch.tensor(self.times).repeat(len(rows), 1),
            "cond": self._read("embeddings", rows),
            "prompts": [text for _, _, text in rows],
            "keys": keys,
        }

    def _read(self, name: str, rows: list[tuple[int, int, str]]) -> Tensor:
        return torch.cat(
            [self._parts[part].get_slice(name)[i : i + 1] for part, i, _ in rows]
        ).float()


def time_indices(stored: Sequence[float], wanted: Sequence[float]) -> list[int]:
    """Where the wanted times are among the stored ones.

    Raises:
        ValueError: if one of them is not stored.
    """
    nearest = [min(range(len(stored)), key=lambda i: abs(stored[i] - t)) for t in wanted]
    missing = [t for t, i in zip(wanted, nearest) if abs(stored[i] - t) > SAME_TIME]
    if missing:
        raise ValueError(
            f"the trajectories have no states at t={_listed(missing)}, which the student's stream"
            f" asks for, only at {_listed(stored)}; make them with the student's step list, see"
            " streamvid trajectories --help"
        )
    return nearest


def check_falling(times: Sequence[float]) -> tuple[float, ...]:
    """The times, if they fall to 0.

    Raises:
        ValueError: if they do not.
    """
    times = tuple(float(t) for t in times)
    if (
        len(times) < 2
        or any(b >= a for a, b in zip(times, times[1:]))
        or times[0] > 1
        or times[-1] != 0
    ):
        raise ValueError(
            f"times {_listed(times)}, expected at least two, falling from at most 1 to 0"
        )
    return times


def _listed(times: Sequence[float]) -> str:
    return ", ".join(f"{t:.6g}" for t in times)


def _parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*-of-*.safetensors"))


def _complete_parts(folder: Path) -> list[Path]:
    """The parts of all sets in a folder and those in it, in an order that does not depend on where
    they lie.
    """
    inner = [
        path
        for path in sorted(folder.glob("*/"))
        if path.is_dir() and not path.name.startswith(".")
    ]
    parts = [part for place in (folder, *inner) for part in _parts_of(place)]
    if not parts:
        raise ValueError(f"no trajectories in {folder}; make them with streamvid trajectories")
    sets: dict[str, list[Path]] = {}
    for part in parts:
        about = _open_part(part)[1]["settings"]
        sets.setdefault(
            json.dumps({name: about.get(name) for name in sorted(WHICH_CLIPS)}), []
        ).append(part)
    for own in sets.values():
        expected = int(re.search(r"-of-(\d+)", own[0].name).group(1))
        names = {part.name for part in own}
        if len(names) < len(own):
            raise ValueError(
                f"{folder} holds {len(own) - len(names)} parts twice, such as {own[0].name}; remove"
                " one of each"
            )
        if len(names) != expected:
            raise ValueError(
                f"{own[0].parent} has {len(own)} of {expected} parts; the command that made them"
                " goes on with the others"
            )
    return [part for key in sorted(sets) for part in sorted(sets[key], key=lambda part: part.name)]


def _differing(
    was: dict[str, Any], now: dict[str, Any], free: set[str] = frozenset()
) -> str | None:
    """A setting of two sets that is not the same; what one of them, of an older version, does not
    know is not compared.
    """
    known = (was.keys() & now.keys()) - free
    known -= {place for place, content in PLACES.items() if content in known}
    return next((name for name in now if name in known and was[name] != now[name]), None)


def _open_part(path: Path) -> tuple[Any, dict[str, Any]]:
    """A part, whose tensors are read later, and what it is about; a file cut short does not
    open.
    """
    try:
        part = safe_open(path, "pt")
        about = parse_json(part.metadata()["about"])
        states, embeddings = part.get_slice("states"), part.get_slice("embeddings")
        expected = [len(about["captions"]), len(about["times"])]
        if (
            states.get_shape()[:2] != expected
            or embeddings.get_shape()[:1] != expected[:1]
            or "settings" not in about
        ):
            shapes = f"states of {states.get_shape()} and embeddings of {embeddings.get_shape()}"
            raise ValueError(f"{shapes} for {expected[0]} captions")
        if not {states.get_dtype(), embeddings.get_dtype()} <= {"F16", "BF16", "F32"}:
            raise ValueError(
                f"states are {states.get_dtype()}, embeddings {embeddings.get_dtype()}"
            )
        return part, about
    except Exception as error:  # safetensors raises its own kind
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged ({reason}); delete it and make it again") from error


def _check_same_settings(folder: Path, times: list[float], settings: dict[str, Any]) -> None:
    for path in _parts_of(folder):
        _, about = _open_part(path)
        was = about["settings"] | {"times": about["times"]}
        now = settings | {"times": times}
        key = _differing(was, now)
        if key is not None:
            raise ValueError(
                f"{folder} holds trajectories made with other settings ({key} was {was.get(key)},"
                f" now {now[key]}); choose another folder"
            )
