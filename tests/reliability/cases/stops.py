"""Kills, signals and full disks in the midst of a training, and whether it goes on as if nothing
had been.
"""

from __future__ import annotations

import json
import shutil
import signal
from functools import partial
from pathlib import Path

from tests.reliability.runner import Case, NotHeld, Outcome, Place, Stroke, decent, refused, worked

KILLS, SIGNALS, DISK = "kill -9 and resume", "signals", "full disk"
CHECKPOINT = r"checkpoints/\.step-0000004\.tmp-"
# Where in a run of 6 steps that saves every second: the event of Python's audit hooks, a pattern of
# its path, which one.
MOMENTS: dict[str, tuple[str, str, int]] = {
    "load": ("open", r"text_encoder/config\.json", 1),
    "first step": ("open", r"metrics\.jsonl", 1),
    "a step after a checkpoint": ("open", r"metrics\.jsonl.* 'a'|metrics\.jsonl a", 3),
    "the checkpoint begins": ("os.mkdir", CHECKPOINT, 1),
    "the checkpoint's counters": ("open", CHECKPOINT + r".*/trainer\.json", 1),
    "the checkpoint is renamed": ("os.rename", CHECKPOINT, 1),
    "the first old checkpoint goes": ("os.remove", r"step-0000002|student\.safetensors", 1),
    "in the midst of an old checkpoint's going": (
        "os.remove",
        r"step-0000002|safetensors|rank-0\.pt",
        4,
    ),
    "the export begins": ("os.mkdir", r"runs/run/\.student\.tmp-", 1),
    "the export's codec": ("open", r"\.student\.tmp-.*model_index\.json", 1),
    "the export is renamed": ("os.rename", r"\.student\.tmp-", 1),
}


def train(place: Place, folder: str = "runs", **options: object) -> Outcome:
    command = [
        "--config",
        place.parts / "run.yaml",
        "train.max_steps=6",
        f"train.output_dir={folder}",
    ]
    return place.run("train", *command, **options)


def same_run(place: Place, run: Path, undisturbed: Path) -> None:
    """The same metrics but for the clock, and the same bits in the last checkpoint and the
    export.
    """
    own, other = (
        [_without_clock(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
        for home in (run, undisturbed)
    )
    if own != other:
        raise NotHeld(f"metrics differ: steps {[line['step'] for line in own]}")
    names = [
        file.relative_to(undisturbed)
        for file in sorted(undisturbed.rglob("*.safetensors"))
        if not {"step-0000002", "step-0000004"} & set(file.parts)
    ]
    for name in names:
        if (
            not (run / name).is_file()
            or (run / name).read_bytes() != (undisturbed / name).read_bytes()
        ):
            raise NotHeld(f"{name} differs from an undisturbed run's")
    # a stop saves in between, at step 5 for one
    there = sorted(path for path in (run / "checkpoints").iterdir())
    whole = [len(list(path.iterdir())) for path in there]
    if len(there) != 2 or there[1].name != "step-0000006" or whole[0] != whole[1]:
        raise NotHeld(
            "checkpoints/ holds"
            f" {', '.join(f'{path.name} of {num} files' for path, num in zip(there, whole))}"
        )
    hidden = [path.name for path in run.iterdir() if ".tmp-" in path.name]
    if hidden:
        raise NotHeld(f"{hidden[0]} is left behind")


def _without_clock(line: str) -> dict:
    return {key: value for key, value in json.loads(line).items() if key != "seconds"}


def undisturbed(place: Place) -> Path:
    """The run without a disturbance, in another folder under the same name."""
    worked(train(place, "whole"))
    return place.folder / "whole" / "run"


def killed(place: Place, moment: str) -> None:
    event, pattern, nth = MOMENTS[moment]
    first = train(place, stroke=Stroke(signal.SIGKILL, event, pattern, nth))
    if first.code != -signal.SIGKILL:
        raise NotHeld(f"the case's event did not come: {first.said()}")
    worked(train(place))
    same_run(place, place.folder / "runs" / "run", undisturbed(place))


def signalled(place: Place, number: signal.Signals, moment: str) -> None:
    """It ends as shells expect, with one line and no traceback, and resumes to the same bits."""
    event, pattern, nth = MOMENTS[moment]
    first = train(place, stroke=Stroke(number, event, pattern, nth))
    decent(first)
    if first.code == 0 and "export" in moment:
        return same_run(place, place.folder / "runs" / "run", undisturbed(place))
    # there is nothing to save: it may just end
    at_once = moment in ("load", "the export's codec") and number != signal.SIGINT
    if first.code != 128 + number and not (at_once and first.code == -number):
        raise NotHeld(f"expected exit {128 + number}, got {first.said()}")
    saved = sorted(
        path.name for path in (place.folder / "runs" / "run" / "checkpoints").glob("step-*")
    )
    if moment in ("first step", "a step after a checkpoint") and not saved:
        raise NotHeld(f"nothing was saved: {first.said()}")
    worked(train(place))
    same_run(place, place.folder / "runs" / "run", undisturbed(place))


def disk_full(place: Place, largest_file: int) -> None:
    """No file can grow past a size: one line, nothing half-written, and with room again the run
    goes on.
    """
    first = train(place, largest_file=largest_file)
    refused(first)
    run = place.folder / "runs" / "run"
    hidden = [path.name for path in run.rglob(".*.tmp-*")] if run.exists() else []
    if hidden:
        raise NotHeld(f"{hidden[0]} is left behind")
    worked(train(place))
    same_run(place, run, undisturbed(place))


def disk_full_of_clip(place: Place) -> None:
    command = [
        "--student",
        place.parts / "student",
        "--prompt",
        "a",
        "--num-frames",
        5,
        "--size",
        "64x64",
        "--out",
        "clip.mp4",
    ]
    refused(place.run("sample", *command, largest_file=200))
    left = [path.name for path in place.folder.glob("*clip*")]
    if left:
        raise NotHeld(f"{left[0]} is left behind")


def disk_full_of_latents(place: Place) -> None:
    settings = ["data.kind=clips", f"data.path={place.parts / 'clips'}", "data.clips.num_frames=9"]
    refused(place.run("train", "--config", place.parts / "flow.yaml", *settings, largest_file=2000))
    left = [path.name for path in place.folder.rglob(".*.tmp-*")]
    if left:
        raise NotHeld(f"{left[0]} is left behind")


def sample_killed(place: Place) -> None:
    """What a killed clip leaves goes with the next clip to the same place."""
    command = [
        "--student",
        place.parts / "student",
        "--prompt",
        "a",
        "--num-frames",
        5,
        "--size",
        "16x16",
        "--out",
        "out/clip.gif",
    ]
    first = place.run("sample", *command, stroke=Stroke(signal.SIGKILL, "os.rename", r"clip", 1))
    if first.code != -signal.SIGKILL:
        raise NotHeld(f"the case's event did not come: {first.said()}")
    worked(place.run("sample", *command), place.folder / "out" / "clip.gif")
    left = [path.name for path in (place.folder / "out").iterdir() if path.name != "clip.gif"]
    if left:
        raise NotHeld(f"{left[0]} is left behind")


def read_only(place: Place) -> None:
    """A run folder that turns into a file while training."""
    shutil.copytree(place.parts / "done", place.folder / "runs" / "run")
    shutil.rmtree(place.folder / "runs" / "run" / "checkpoints")
    (place.folder / "runs" / "run" / "checkpoints").write_text("x")
    refused(train(place))


def cases() -> list[Case]:
    found = [Case(KILLS, name, partial(killed, moment=name)) for name in MOMENTS]
    found.append(Case(KILLS, "sample.py before its clip is renamed", sample_killed))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        for moment in (
            "load",
            "a step after a checkpoint",
            "the checkpoint's counters",
            "the export's codec",
        ):
            run = partial(signalled, number=number, moment=moment)
            found.append(Case(SIGNALS, f"{number.name} in {moment}", run))
    for size in (100, 2000, 10_000, 50_000, 1_000_000):
        found.append(
            Case(DISK, f"files of at most {size} bytes", partial(disk_full, largest_file=size))
        )
    found.append(Case(DISK, "a clip", disk_full_of_clip))
    found.append(Case(DISK, "encoded clips", disk_full_of_latents))
    found.append(Case(DISK, "checkpoints/ is a file", read_only))
    return found
