"""A finished run whose newest checkpoint, metrics or configuration is damaged, and which is to go
on to step 6.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.reliability.cases.damage import (
    Evil,
    changed_json,
    emptied,
    flipped,
    retensored,
    truncated,
)
from tests.reliability.runner import Case, NotHeld, Outcome, Place, refused, worked

AREA = "checkpoints"
NETWORKS = ("student", "fake_score")
TENSORS = ("student", "student.optimizer", "student.ema", "fake_score", "fake_score.optimizer")
FILES = (*(f"{name}.safetensors" for name in TENSORS), "rank-0.pt", "trainer.json")

Damage = Callable[[Path, Place], None]  # of the checkpoint's folder


def resumed(place: Place, damage: Damage) -> tuple[Path, Outcome]:
    """The run folder, and the same command as before with two more steps."""
    run = shutil.copytree(place.parts / "done", place.folder / "runs" / "run")
    damage(run / "checkpoints" / "step-0000004", place)
    return run, place.run("train", "--config", place.parts / "run.yaml", "train.max_steps=6")


def is_refused(place: Place, damage: Damage, *words: str) -> None:
    """One line that names the checkpoint and says what to delete; nothing of the run is touched."""
    run, outcome = resumed(place, damage)
    refused(outcome, "step-0000004", "delete", *words)
    if len((run / "metrics.jsonl").read_text().splitlines()) != 4:
        raise NotHeld("metrics.jsonl was changed by a run that was refused")


def goes_on(place: Place, damage: Damage, steps: list[int]) -> None:
    """The run ends, and its metrics have these steps."""
    run, outcome = resumed(place, damage)
    worked(outcome, run / "student" / "transformer", run / "checkpoints" / "step-0000006")
    there = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    if there != steps:
        raise NotHeld(f"metrics.jsonl has the steps {there}, expected {steps}")


def says_what_is_wrong(place: Place, damage: Damage, *words: str) -> None:
    refused(resumed(place, damage)[1], *words)


def of_file(name: str, change: Callable[[Path], None]) -> Damage:
    return lambda folder, place: change(folder / name)


def from_other(source: str, target: str) -> Damage:
    """A file, or with "" all of them, of a run with another seed."""

    def damage(folder: Path, place: Place) -> None:
        other = place.parts / "other" / "checkpoints" / "step-0000004"
        if source:
            shutil.copy(other / source, folder / target)
        else:
            shutil.copytree(other, folder, dirs_exist_ok=True)

    return damage


def swapped(one: str, two: str) -> Damage:
    def damage(folder: Path, place: Place) -> None:
        (folder / one).rename(folder / "x")
        (folder / two).rename(folder / one)
        (folder / "x").rename(folder / two)

    return damage


def pickled(what: Callable[[Place], object]) -> Damage:
    def damage(folder: Path, place: Place) -> None:
        (folder / "rank-0.pt").write_bytes(pickle.dumps(what(place)))

    return damage


def torch_saved(what: object) -> Damage:
    def damage(folder: Path, place: Place) -> None:
        import torch

        torch.save(what, folder / "rank-0.pt")

    return damage


def lines(change: Callable[[list[str]], list[str]]) -> Damage:
    """Of metrics.jsonl, whose lines are of the steps 1 to 4."""

    def damage(folder: Path, place: Place) -> None:
        file = folder.parents[1] / "metrics.jsonl"
        text = "\n".join(change(file.read_text().splitlines()))
        file.write_bytes(text.encode("utf-8", "surrogateescape"))

    return damage


def configuration(content: bytes | Callable[[Place], bytes]) -> Damage:
    def damage(folder: Path, place: Place) -> None:
        (folder.parents[1] / "config.yaml").write_bytes(
            content(place) if callable(content) else content
        )

    return damage


def bad_checkpoints() -> Iterator[tuple[str, Damage]]:
    for file in FILES:
        for change in (emptied, truncated, flipped, Path.unlink):
            yield f"{file} {getattr(change, '__name__', change)}", of_file(file, change)
    for name in TENSORS:
        yield (
            f"{name} with a flipped bit near the end",
            of_file(f"{name}.safetensors", partial(flipped, at=0.999)),
        )
    for name in ("student", "fake_score.optimizer"):
        yield (
            f"{name} with a flipped bit in the header",
            of_file(f"{name}.safetensors", partial(flipped, at=0.001)),
        )
    for dtype in ("int32", "bfloat16", "float64"):
        yield (
            f"student as {dtype}",
            of_file("student.safetensors", partial(retensored, change=f"to {dtype}")),
        )
    for name in TENSORS[:4]:
        yield f"{name} with NaN", of_file(f"{name}.safetensors", partial(retensored, change="nan"))
    for change in ("missing", "unknown", "shape"):
        yield (
            f"student, a tensor {change}",
            of_file("student.safetensors", partial(retensored, change=change)),
        )
    for file in (
        "student.safetensors",
        "student.optimizer.safetensors",
        "trainer.json",
        "rank-0.pt",
    ):
        yield f"{file} of another run", from_other(file, file)
    yield "all files of another run", from_other("", "")
    yield (
        "the other network in place of the student",
        swapped("student.safetensors", "fake_score.safetensors"),
    )
    yield (
        "the average in place of the student",
        swapped("student.safetensors", "student.ema.safetensors"),
    )
    for key, value in {
        "step": -5,
        "step ": 3,
        "step  ": 1e30,
        "step   ": "4",
        "updates": {},
        "updates ": [],
        "scalers": None,
        "samples": None,
        "seconds": "NaN",
        "num_processes": "two",
    }.items():
        yield (
            f"trainer.json with {key.strip()}={value!r}",
            of_file("trainer.json", partial(changed_json, key=key.strip(), value=value)),
        )
    for key in ("step", "num_processes", "updates", "scalers", "samples", "seconds"):
        yield f"trainer.json without {key}", of_file("trainer.json", partial(changed_json, key=key))
    for name, text in {
        "a list": "[]",
        "null": "null",
        "deep": "[" * 100_000,
        "a number": "7",
    }.items():
        yield (
            f"trainer.json is {name}",
            of_file("trainer.json", lambda file, text=text: file.write_text(text)),
        )
    yield "rank-0.pt with code", pickled(lambda place: Evil(place.marker))
    yield "rank-0.pt is a list", torch_saved([1, 2])
    yield "rank-0.pt without random states", torch_saved({"means": {"sums": {}, "counts": {}}})
    yield (
        "rank-0.pt with wrong random states",
        torch_saved({"random": {"python": 1}, "means": {"sums": {}, "counts": {}}}),
    )


def as_folder(folder: Path, place: Place) -> None:
    file = folder.parents[1] / "config.yaml"
    file.unlink()
    file.mkdir()


GOOD_METRICS = {
    "a broken line in the middle": (
        lines(lambda had: [had[0], '{"step": 2, "stu', *had[2:]]),
        [1, 3, 4, 5, 6],
    ),
    "a list as a line": (lines(lambda had: [had[0], "[1, 2]", *had[1:]]), [1, 2, 3, 4, 5, 6]),
    "a line without step": (lines(lambda had: [*had, '{"loss": 1}']), [1, 2, 3, 4, 5, 6]),
    "a step that is a text": (lines(lambda had: ['{"step": "two"}', *had]), [1, 2, 3, 4, 5, 6]),
    "a torn last line": (lines(lambda had: [*had, '{"step": 5, "st']), [1, 2, 3, 4, 5, 6]),
    "bytes that are no text": (
        lines(lambda had: [*had[:2], "\udcff\udcfe\udc80", *had[2:]]),
        [1, 2, 3, 4, 5, 6],
    ),
    "lines beyond the checkpoint": (
        lines(lambda had: [*had, '{"step": 5}', '{"step": 9}']),
        [1, 2, 3, 4, 5, 6],
    ),
    "nothing": (lines(lambda had: []), [5, 6]),
}
BAD_CONFIGURATIONS: dict[str, Damage] = {
    "a list": configuration(b"- 1\n"),
    "no text": configuration(b"\xff\xfe\x00a"),
    "a tag with code": configuration(
        lambda place: f'a: !!python/object/apply:os.system ["touch {place.marker}"]\n'.encode()
    ),
    "deep": configuration(b"a: " + b"[" * 5000),
    "a folder": as_folder,
    "another run's": lambda folder, place: shutil.copy(
        place.parts / "other" / "config.yaml", folder.parents[1]
    ),
    "with keys that are no texts": configuration(b"1: 2\nnull: 3\n"),
}


def cases() -> list[Case]:
    found = [
        Case(AREA, name, partial(is_refused, damage=damage)) for name, damage in bad_checkpoints()
    ]
    for name, (damage, steps) in GOOD_METRICS.items():
        found.append(
            Case(AREA, f"metrics.jsonl: {name}", partial(goes_on, damage=damage, steps=steps))
        )
    for name, damage in BAD_CONFIGURATIONS.items():
        found.append(
            Case(
                AREA,
                f"config.yaml: {name}",
                lambda place, damage=damage: says_what_is_wrong(place, damage),
            )
        )
    undamaged = partial(goes_on, damage=lambda folder, place: None, steps=[1, 2, 3, 4, 5, 6])
    return [Case(AREA, "undamaged", undamaged), *found]
