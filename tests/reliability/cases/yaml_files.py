"""Run files that are no YAML, too much of it, or hold code."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from tests.reliability.runner import Case, Place, refused, worked

AREA = "YAML"
Content = bytes | Callable[[Place], bytes]


def bomb(width: int = 10, depth: int = 9) -> bytes:
    """The billion laughs."""
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(rows).encode()


def tag(text: str) -> Content:
    return lambda place: (
        "train: {name: x}\nobjective: " + text.format(marker=place.marker)
    ).encode()


REFUSED: dict[str, Content] = {
    "billion laughs": bomb(),
    "billion laughs as a setting": b"train: {name: x}\n" + bomb() + b"\nobjective: *a8",
    "a mapping that holds itself": b"train: &a {name: x, optimizers: *a}",
    "a list that holds itself": b"train: {name: x, trackers: &a [*a]}",
    "400 lists deep": b"train: " + b"[" * 400 + b"]" * 400,
    "5,000 lists deep": b"train: " + b"[" * 5000,
    "100,000 mappings deep": b"{a: " * 100_000,
    "400 blocks deep": b"\n".join(b" " * i + b"a:" for i in range(400)),
    "os.system": tag('!!python/object/apply:os.system ["touch {marker}"]'),
    "subprocess": tag('!!python/object/apply:subprocess.check_output [["touch", "{marker}"]]'),
    "eval": tag("!!python/object/apply:eval [\"open('{marker}', 'w')\"]"),
    "python name": tag("!!python/name:os.system"),
    "python module": tag("!!python/module:os"),
    "python object": tag("!!python/object:pathlib.Path {{}}"),
    "python tuple": tag("!!python/tuple [1, 2]"),
    "unknown tag": tag("!evil x"),
    "binary": tag("!!binary aGVsbG8="),
    "timestamp": tag("2020-01-01"),
    "set": tag("!!set {{a, b}}"),
    "interpolation of a missing key": tag("${{nowhere}}"),
    "interpolation that goes round": b"train: {name: '${objective}'}\nobjective: '${train.name}'",
    "interpolation with code": tag("${{oc.env:HOME,${{python:1}}}}"),
    "resolver that is unknown": tag("${{eval:1+1}}"),
    "interpolation that is not closed": tag("${{a"),
    "empty": b"",
    "only a comment": b"# nothing\n",
    "null": b"null",
    "a list": b"- 1\n- 2",
    "a number": b"5",
    "a text": b"hello",
    "two documents": b"train: {name: x}\n---\nobjective: dmd",
    "tabs": b"train:\n\tname: x",
    "not closed": b"train: {name: x",
    "a colon too many": b"train: name: x",
    "a key twice": b"train: {name: x}\ntrain: {name: y}",
    "a key that is a number": b"train: {name: x}\n5: 6",
    "a key that is null": b"train: {name: x}\nnull: 6",
    "a key that is a list": b"train: {name: x}\n? [a, b]\n: 6",
    "a key with an escape": b'train: {name: x}\n"\\e[31mred": 1',
    "a key with a new line": b'train: {name: x}\n"a\\nerror: all is lost": 1',
    "a key of 100,000 characters": b"train: {name: x}\n? " + b"k" * 100_000 + b"\n: 1",
    "a number of 5,000 digits": b"train: {name: x, seed: " + b"9" * 5000 + b"}",
    "latin-1": "train: {name: x}\nobjective: dmdé".encode("latin-1"),
    "utf-16 without a mark": "train: {name: x}".encode("utf-16-le"),
    "NUL bytes": b"train: {name: x}\x00\x00",
    "random bytes": bytes(range(256)) * 4,
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "base: 5": b"base: 5\ntrain: {name: x}",
    "base: [5]": b"base: [5]\ntrain: {name: x}",
    "base is a mapping": b"base: {a: b}\ntrain: {name: x}",
    "base is itself": b"base: case.yaml\ntrain: {name: x}",
    "base is nowhere": b"base: nowhere.yaml\ntrain: {name: x}",
    "base is a folder": b"base: .\ntrain: {name: x}",
    "base is a device": b"base: /dev/zero\ntrain: {name: x}",
    "train is a list": b"train: [a]",
    "train is null": b"train: null",
    "optimizers is a list": b"train: {name: x, optimizers: [1]}",
    "options is a text": b"train: {name: x}\noptions: many",
}
PLACES: dict[str, Callable[[Place], str]] = {
    "a folder": lambda place: ".",
    "no file": lambda place: "nowhere.yaml",
    "a FIFO": lambda place: os.mkfifo(place.folder / "fifo") or "fifo",
    "/dev/zero": lambda place: "/dev/zero",
    "an empty name": lambda place: "",
    "a name with an escape": lambda place: "\x1b[31mred.yaml",
}
WORKS: dict[str, Callable[[bytes], bytes]] = {
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "CRLF": lambda text: text.replace(b"\n", b"\r\n"),
    "comments and blank lines": lambda text: b"# a\n\n\n" + text + b"\n# b\n",
}


def is_refused(place: Place, content: Content) -> None:
    (place.folder / "case.yaml").write_bytes(content(place) if callable(content) else content)
    refused(place.run("train", "--config", "case.yaml", "--dry-run"))


def place_is_refused(place: Place, name: Callable[[Place], str]) -> None:
    refused(place.run("train", "--config", name(place), "--dry-run"))


def is_read(place: Place, change: Callable[[bytes], bytes]) -> None:
    (place.folder / "case.yaml").write_bytes(change((place.parts / "run.yaml").read_bytes()))
    worked(place.run("train", "--config", "case.yaml", "--dry-run"))


def cases() -> list[Case]:
    found = [
        Case(AREA, name, partial(is_refused, content=content)) for name, content in REFUSED.items()
    ]
    found += [
        Case(AREA, f"the file is {name}", partial(place_is_refused, name=make))
        for name, make in PLACES.items()
    ]
    return found + [
        Case(AREA, f"works with {name}", partial(is_read, change=change))
        for name, change in WORKS.items()
    ]
