"""What runs keep beside checkpoints: prompt embeddings and latent sets, damaged or of other
settings.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.reliability.cases.damage import emptied, flipped, retensored, truncated
from tests.reliability.runner import Case, NotHeld, Place, refused, worked, worked_or_refused

AREA = "prompt caches and latent sets"


def one_tensor(
    file: Path, name: str, *shape: int, dtype: str = "float32", fill: float = 0.5
) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({name: torch.full(shape, fill).to(getattr(torch, dtype))}, file)


CACHES: dict[str, Callable[[Path], None]] = {
    "emptied": emptied,
    "truncated": truncated,
    "a flipped bit": partial(flipped, at=0.7),
    "a flipped bit in the header": partial(flipped, at=0.0),
    "999 tokens": lambda file: one_tensor(file, "embedding", 999, 64),
    "another width": lambda file: one_tensor(file, "embedding", 5, 32),
    "one axis": lambda file: one_tensor(file, "embedding", 64),
    "another name": lambda file: one_tensor(file, "embeddings", 5, 64),
    "integers": lambda file: one_tensor(file, "embedding", 5, 64, dtype="int8"),
    "NaN": lambda file: one_tensor(file, "embedding", 5, 64, fill=float("nan")),
}


def with_cache(place: Place, damage: Callable[[Path], None]) -> None:
    """The damaged embedding is refused by its file, or made anew; in no case does it stay."""
    cache = place.part("prompts")
    for file in sorted(cache.glob("*.safetensors")):
        damage(file)
    damaged = {file.name: file.read_bytes() for file in cache.glob("*.safetensors")}
    outcome = place.run(
        "train", "--config", place.parts / "run.yaml", "prompt_cache=prompts", "train.max_steps=1"
    )
    if outcome.code == 2:
        return refused(outcome, "prompts/")
    worked(outcome)
    if any(
        (cache / name).is_file() and (cache / name).read_bytes() == content
        for name, content in damaged.items()
    ):
        raise NotHeld("a damaged embedding is taken silently")


LATENTS: dict[str, Callable[[Path], None]] = {
    "emptied": emptied,
    "truncated": truncated,
    "a flipped bit in the header": partial(flipped, at=0.001),
    "latents as int8": partial(retensored, change="to int8"),
    "NaN": partial(retensored, change="nan"),
    "without embeddings": lambda file: one_tensor(file, "latents", 2, 16, 3, 8, 8),
    "only embeddings": lambda file: one_tensor(file, "embeddings", 2, 1, 5, 64),
}


def with_latents(place: Place, damage: Callable[[Path], None]) -> None:
    damage(place.part("latents.safetensors"))
    refused(train_on(place), "latents.safetensors")


def train_on(place: Place, *overrides: str):  # noqa: ANN201
    return place.run(
        "train", "--config", place.parts / "flow.yaml", "data.path=latents.safetensors", *overrides
    )


def remade(place: Place, change: Callable[[dict, dict], None]) -> None:
    """A latent set with other tensors or other metadata than its own."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file = place.part("latents.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata=metadata
    )
    refused(train_on(place), "latents.safetensors")


REMADE: dict[str, Callable[[dict, dict], None]] = {
    "no metadata": lambda tensors, metadata: metadata.clear(),
    "captions that are no JSON": lambda tensors, metadata: metadata.update(captions="[["),
    "captions of fewer clips": lambda tensors, metadata: metadata.update(
        captions=json.dumps([["a"]])
    ),
    "captions that are numbers": lambda tensors, metadata: metadata.update(captions="7"),
    "latents of 8 channels": lambda tensors, metadata: tensors.update(
        latents=tensors["latents"][:, :8]
    ),
    "latents of four axes": lambda tensors, metadata: tensors.update(latents=tensors["latents"][0]),
    "embeddings of another width": lambda tensors, metadata: tensors.update(
        embeddings=tensors["embeddings"][..., :32]
    ),
    "no clips": lambda tensors, metadata: tensors.update(
        latents=tensors["latents"][:0], embeddings=tensors["embeddings"][:0]
    ),
    "more embeddings than latents": lambda tensors, metadata: tensors.update(
        latents=tensors["latents"][:1]
    ),
}
WORLDS = {
    "more clips": "data.world.num_clips=3",
    "another first seed": "data.world.first_seed=500",
    "other lengths": "data.world.num_frames=13",
    "held out": "data.world.held_out=true",
    "more paraphrases": "data.world.paraphrases=3",
}


def of_other_settings(place: Place, override: str) -> None:
    """A world set that is there and of another world is made anew beside it, or refused."""
    settings = [
        "data.kind=world",
        "data.path=world.safetensors",
        "data.world.num_clips=2",
        "data.world.num_frames=9",
    ]
    command = ["--config", place.parts / "flow.yaml", *settings]
    worked(place.run("train", *command, "train.name=first"))
    made = {file.name for file in place.folder.rglob("*.safetensors") if "runs" not in file.parts}
    second = place.run("train", *command, override, "train.name=second")
    if second.code == 2:
        return refused(second, "world.safetensors")
    worked(second)
    if {
        file.name for file in place.folder.rglob("*.safetensors") if "runs" not in file.parts
    } == made:
        raise NotHeld("clips of other settings are taken silently")


def of_another_length(place: Place) -> None:
    place.part("latents.safetensors")
    refused(train_on(place, "data.latent_frames=7"), "latent_frames")


def leftovers(place: Place) -> None:
    """What a killed process left beside a latent set is of no harm."""
    shutil.copy(
        place.parts / "latents.safetensors", place.folder / ".latents.tmp-00000000.safetensors"
    )
    place.part("latents.safetensors")
    worked_or_refused(train_on(place))


def cases() -> list[Case]:
    found = [
        Case(AREA, f"prompt cache: {name}", partial(with_cache, damage=damage))
        for name, damage in CACHES.items()
    ]
    found += [
        Case(AREA, f"latent set: {name}", partial(with_latents, damage=damage))
        for name, damage in LATENTS.items()
    ]
    found += [
        Case(AREA, f"latent set: {name}", partial(remade, change=change))
        for name, change in REMADE.items()
    ]
    found += [
        Case(AREA, f"world set: {name}", partial(of_other_settings, override=text))
        for name, text in WORLDS.items()
    ]
    found.append(Case(AREA, "latent set: shorter than latent_frames", of_another_length))
    found.append(Case(AREA, "latent set: leftovers beside it", leftovers))
    return found
