"""Folders of captioned clips that are damaged, huge, wrongly captioned, or reach outside."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability.cases.damage import emptied, flipped, truncated
from tests.reliability.runner import (
    Case,
    NotHeld,
    Outcome,
    Place,
    refused,
    worked,
    worked_or_refused,
)

AREA = "clip folders"


def train_on(place: Place, folder: object = "clips", *overrides: str) -> Outcome:
    settings = [
        "data.kind=clips",
        f"data.path={folder}",
        "data.clips.num_frames=5",
        "data.clips.height=16",
        "data.clips.width=16",
    ]
    return place.run(
        "train", "--config", place.parts / "flow.yaml", *settings, "train.max_steps=1", *overrides
    )


# of the folder, which holds one.mp4, one.txt, two.mp4 and two.txt
Make = Callable[[Path, Place], Any]


def is_refused(place: Place, make: Make, *words: str) -> None:
    folder = place.part("clips")
    make(folder, place)
    refused(train_on(place), *words)


def works(place: Place, make: Make) -> None:
    folder = place.part("clips")
    make(folder, place)
    worked(train_on(place), place.folder / "runs" / "flow" / "student")


def either(place: Place, make: Make) -> None:
    folder = place.part("clips")
    make(folder, place)
    worked_or_refused(train_on(place))


def gif(file: Path, width: int, height: int, frames: int) -> None:
    """Frames of one colour, so that the file is small."""
    from PIL import Image

    black, white = (Image.new("L", (width, height), level) for level in (0, 255))
    black.save(
        file,
        save_all=True,
        append_images=[(white, black)[i % 2] for i in range(frames - 1)],
        duration=60,
    )
    file.with_suffix(".txt").write_text("a red circle")


def as_gif(*size: int) -> Make:
    return lambda folder, place: gif(folder / "three.gif", *size)


def video(file: Path, *size: int, fps: float = 16, frames: int = 9) -> None:
    import torch

    from streamvid.video import write_video

    write_video(torch.zeros(frames, 3, *size), file, fps)
    file.with_suffix(".txt").write_text("a red circle")


def content(name: str, data: bytes | Callable[[bytes], bytes]) -> Make:
    def make(folder: Path, place: Place) -> None:
        own = (folder / "one.mp4").read_bytes()
        (folder / name).write_bytes(data(own) if callable(data) else data)

    return make


def jsonl(*rows: object) -> Make:
    """metadata.jsonl of these objects, or of these texts as they are."""

    def make(folder: Path, place: Place) -> None:
        lines = [
            row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows
        ]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return make


def row(text: object = "a red circle", name: object = "one.mp4") -> dict[str, object]:
    return {"file_name": name, "text": text}


def table(*rows: tuple, head: tuple[str, ...] = ("file_name", "text")) -> Make:
    def make(folder: Path, place: Place) -> None:
        buffer = io.StringIO()
        csv.writer(buffer).writerows([head, *rows])
        (folder / "metadata.csv").write_text(buffer.getvalue(), encoding="utf-8")

    return make


def outside(folder: Path, place: Place) -> None:
    """A clip beside the folder, which the table names."""
    shutil.copy(folder / "one.mp4", place.folder / "secret.mp4")
    jsonl(row(name="../secret.mp4"))(folder, place)


def outside_whole(folder: Path, place: Place) -> None:
    shutil.copy(folder / "one.mp4", place.folder / "secret.mp4")
    jsonl(row(name=str(place.folder / "secret.mp4")))(folder, place)


def renamed(name: str) -> Make:
    def make(folder: Path, place: Place) -> None:
        (folder / "one.mp4").rename(folder / f"{name}.mp4")
        (folder / "one.txt").rename(folder / f"{name}.txt")

    return make


def no_captions(folder: Path, place: Place) -> None:
    for file in folder.glob("*.txt"):
        file.unlink()


def nothing(folder: Path, place: Place) -> None:
    for file in folder.iterdir():
        file.unlink()


def as_fifo(folder: Path, place: Place) -> None:
    (folder / "one.mp4").unlink()
    os.mkfifo(folder / "one.mp4")


def linked_to(target: str) -> Make:
    def make(folder: Path, place: Place) -> None:
        (folder / "one.mp4").unlink()
        (folder / "one.mp4").symlink_to(target)

    return make


def linked_round(folder: Path, place: Place) -> None:
    (folder / "round").symlink_to(".")


BAD: dict[str, tuple[Make, tuple[str, ...]]] = {
    "emptied": (lambda folder, place: emptied(folder / "one.mp4"), ("one.mp4",)),
    "truncated": (lambda folder, place: truncated(folder / "one.mp4"), ("one.mp4",)),
    "random bytes": (content("one.mp4", bytes(range(256)) * 100), ("one.mp4",)),
    "a text": (content("one.mp4", b"hello"), ("one.mp4",)),
    "HTML, as of a failed download": (
        content("one.mp4", b"<!DOCTYPE html><html>404</html>"),
        ("one.mp4",),
    ),
    "a picture": (content("one.mp4", b"\x89PNG\r\n\x1a\n" + bytes(100)), ("one.mp4",)),
    "a playlist of other files": (
        content("one.mkv", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"),
        ("one.mkv",),
    ),
    "a gif without frames": (
        content("one.gif", b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"),
        ("one.gif",),
    ),
    "no captions": (no_captions, ("caption",)),
    "one caption missing": (lambda folder, place: (folder / "two.txt").unlink(), ("two.mp4",)),
    "an empty caption": (lambda folder, place: emptied(folder / "one.txt"), ("one.mp4",)),
    "a caption of white space": (
        lambda folder, place: (folder / "one.txt").write_text(" \n\t"),
        ("one.mp4",),
    ),
    "a caption in latin-1": (content("one.txt", "grün".encode("latin-1")), ("one.txt",)),
    "no clips": (nothing, ("clips",)),
    "a FIFO": (as_fifo, ()),
    "a device": (linked_to("/dev/zero"), ()),
    "a link to nothing": (linked_to("nowhere.mp4"), ()),
    "a link to itself": (linked_to("one.mp4"), ()),
    "a folder as a clip": (
        lambda folder, place: ((folder / "one.mp4").unlink(), (folder / "one.mp4").mkdir()),
        (),
    ),
    "jsonl: emptied": (lambda folder, place: (folder / "metadata.jsonl").write_text(""), ()),
    "jsonl: no JSON": (jsonl("{nonsense"), ("metadata.jsonl",)),
    "jsonl: deep": (jsonl("[" * 100_000), ("metadata.jsonl",)),
    "jsonl: a list": (jsonl([1, 2]), ("metadata.jsonl",)),
    "jsonl: null": (jsonl("null"), ("metadata.jsonl",)),
    "jsonl: a caption that is a number": (jsonl(row(text=7)), ("metadata.jsonl",)),
    "jsonl: a name that is a list": (jsonl(row(name=["one.mp4"])), ("metadata.jsonl",)),
    "jsonl: an empty name": (jsonl(row(name="")), ()),
    "jsonl: a name with NUL": (jsonl(row(name="one\x00.mp4")), ()),
    "jsonl: a missing clip": (jsonl(row(name="nowhere.mp4")), ("nowhere.mp4",)),
    "jsonl: a missing clip with an escape": (jsonl(row(name="\x1b[31mred.mp4")), ()),
    "jsonl: a missing clip with a new line": (jsonl(row(name="a\nerror: all is lost.mp4")), ()),
    "jsonl: a name of 5,000 letters": (jsonl(row(name="n" * 5000 + ".mp4")), ()),
    "jsonl: outside, by ..": (outside, ("secret.mp4",)),
    "jsonl: outside, absolute": (outside_whole, ("secret.mp4",)),
    "jsonl: without text": (jsonl({"file_name": "one.mp4"}), ("metadata.jsonl",)),
    "jsonl: random bytes": (content("metadata.jsonl", bytes(range(128, 256))), ("metadata.jsonl",)),
    "jsonl: a number of 5,000 digits": (
        jsonl('{"file_name": "one.mp4", "text": ' + "9" * 5000 + "}"),
        ("metadata.jsonl",),
    ),
    "csv: other columns": (table(("one.mp4", "a"), head=("name", "caption")), ("metadata.csv",)),
    "csv: a row too short": (table(("one.mp4",)), ("metadata.csv",)),
    "csv: NUL": (content("metadata.csv", b"file_name,text\none.mp4,a\x00b\n\x00"), ()),
    "too short": (
        lambda folder, place: video(folder / "three.mp4", 16, 16, frames=2),
        ("three.mp4",),
    ),
}
GOOD: dict[str, Make] = {
    "as they are": lambda folder, place: None,
    "U+2028 in a caption": jsonl(row(text="a red\u2028circle")),
    "U+0085 in a caption": jsonl(row(text="a red\u0085circle")),
    "a csv caption of 200,000 letters": table(("one.mp4", "red " * 50_000)),
    "jsonl with blank lines and CRLF": jsonl(row(), "\r", "", row(name="two.mp4")),
    "umlauts and emoji in names": renamed("schöner 🎬 clip"),
    "spaces and quotes in names": renamed("a 'b' \"c\" %s {}"),
    "a hidden file": content(".DS_Store", b"\x00\x01"),
    "AppleDouble files": content("._one.mp4", b"\x00\x05\x16\x07"),
    "a subfolder": lambda folder, place: shutil.copytree(place.parts / "clips", folder / "more"),
    "a gif": as_gif(20, 20, 12),
}
EITHER: dict[str, Make] = {
    "a flipped bit": lambda folder, place: flipped(folder / "one.mp4", 0.5),
    "flipped bits in the index": lambda folder, place: flipped(folder / "one.mp4", 0.98),
    "an escape in a name": renamed("\x1b[31mred"),
    "a new line in a name": renamed("a\nerror: all is lost"),
    "a folder linked to itself": linked_round,
    "a gif bomb, 4000 x 4000 x 60": as_gif(4000, 4000, 60),
    "a gif of 20,000 x 20,000": as_gif(20_000, 20_000, 1),
    "a gif of 5,000 frames": as_gif(16, 16, 5000),
    "a clip of 2160 x 3840": lambda folder, place: video(
        folder / "three.mp4", 2160, 3840, frames=6
    ),
    "another container than the name says": content("three.avi", lambda own: own),
}


def no_folder(place: Place, path: str) -> None:
    (place.folder / "FILE").write_text("x")
    refused(train_on(place, path))


def of_a_format(place: Place, override: str) -> None:
    place.part("clips")
    refused(train_on(place, "clips", override))


def changed_clip_is_seen(place: Place) -> None:
    """A clip that is replaced is encoded anew."""
    folder = place.part("clips")
    worked(train_on(place, "clips", "train.name=first"))
    made = {file.name for file in (place.folder / ".cache").rglob("*.safetensors")}
    video(folder / "one.mp4", 32, 32)
    worked(train_on(place, "clips", "train.name=second"))
    if {file.name for file in (place.folder / ".cache").rglob("*.safetensors")} == made:
        raise NotHeld("the encoded clip of before is taken silently")


def cases() -> list[Case]:
    found = [
        Case(AREA, name, lambda place, make=make, words=words: is_refused(place, make, *words))
        for name, (make, words) in BAD.items()
    ]
    found += [
        Case(AREA, f"works: {name}", partial(works, make=make)) for name, make in GOOD.items()
    ]
    found += [
        Case(AREA, f"either: {name}", partial(either, make=make)) for name, make in EITHER.items()
    ]
    found += [
        Case(AREA, f"path {path!r}", partial(no_folder, path=path))
        for path in ("nowhere", "", "FILE", "FILE/x", "null")
    ]
    for override in (
        "height=0",
        "width=-16",
        "fps=0",
        "fps=nan",
        "fps=1e999",
        "num_frames=0",
        "num_frames=6",
        "height=17",
        "num_frames=1e9",
    ):
        found.append(
            Case(
                AREA,
                f"data.clips.{override}",
                partial(of_a_format, override=f"data.clips.{override}"),
            )
        )
    return [*found, Case(AREA, "a clip that is replaced", changed_clip_is_seen)]
