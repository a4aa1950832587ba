"""Weight files that are damaged, lie about themselves, or hold code; each is converted, and used as
codec, adapter and student.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.reliability.cases.damage import Evil
from tests.reliability.runner import Case, Place, refused

AREA = "weight files"
Write = Callable[[Path, Place], None]


def safetensors(header: object, body: bytes = b"", length: int | None = None) -> Write:
    """A file with this header, or with these bytes for one; `length` is what it says of the
    header's size.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(text) if length is None else length) + text + body
    return lambda file, place: file.write_bytes(content)


def tensor(dtype: str = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def pickled(what: Callable[[Place], object], protocol: int = 2) -> Write:
    return lambda file, place: file.write_bytes(pickle.dumps(what(place), protocol))


def zipped(what: Callable[[Place], object]) -> Write:
    """As torch.save writes, with a pickle of anything."""

    def write(file: Path, place: Place) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(what(place), 2))
            archive.writestr("archive/version", "3")

    return write


def saved(what: Callable[[], object]) -> Write:
    def write(file: Path, place: Place) -> None:
        import torch

        buffer = io.BytesIO()
        torch.save(what(), buffer)
        file.write_bytes(buffer.getvalue())

    return write


def endless() -> object:
    table: dict = {}
    table["self"] = table
    return table


def huge_stride() -> object:
    import torch

    return {"weight": torch.zeros(1).expand(400_000_000_000)}


def many_tensors() -> object:
    import torch

    return {f"blocks.{i}.weight": torch.zeros(1) for i in range(20_000)}


def zip_bomb(file: Path, place: Place) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"\x00" * 300_000_000)


def fifo(file: Path, place: Place) -> None:
    os.mkfifo(file)


def folder(file: Path, place: Place) -> None:
    file.mkdir()


def link_to_itself(file: Path, place: Place) -> None:
    file.symlink_to(file.name)


SAFETENSORS: dict[str, Write] = {
    "empty": lambda file, place: file.write_bytes(b""),
    "no file format": lambda file, place: file.write_bytes(b"hello " * 100),
    "header of 2^63 bytes": safetensors(b"{}", length=2**63),
    "header longer than the file": safetensors(b"{}", length=1000),
    "header is no JSON": safetensors(b"{nonsense"),
    "header is a list": safetensors([1, 2]),
    "deep header": safetensors(b'{"a":' * 20_000),
    "offsets beyond the file": safetensors({"a": tensor(offsets=(0, 10**15))}, b"0" * 16),
    "offsets that fall": safetensors({"a": tensor(offsets=(16, 0))}, b"0" * 16),
    "offsets that overlap": safetensors({"a": tensor(), "b": tensor(offsets=(8, 24))}, b"0" * 24),
    "shape of 10^18": safetensors({"a": tensor(shape=(10**9, 10**9), offsets=(0, 16))}, b"0" * 16),
    "negative shape": safetensors({"a": tensor(shape=(-2, -2))}, b"0" * 16),
    "unknown dtype": safetensors({"a": tensor(dtype="F128")}, b"0" * 16),
    "an escape in a name": safetensors({"\x1b[31mred\nerror: all is lost": tensor()}, b"0" * 16),
    "a pickle inside": pickled(lambda place: Evil(place.marker)),
    "no tensors": safetensors({}),
    "a folder": folder,
    "a FIFO": fifo,
    "a link to itself": link_to_itself,
}
PICKLES: dict[str, Write] = {
    "code": pickled(lambda place: Evil(place.marker)),
    "code, protocol 4": pickled(lambda place: {"generator": Evil(place.marker)}, 4),
    "code in an archive": zipped(lambda place: {"weight": Evil(place.marker)}),
    "truncated archive": lambda file, place: file.write_bytes(b"PK\x03\x04" + b"\x00" * 40),
    "a list": saved(lambda: [1, 2]),
    "texts for tensors": saved(lambda: {"a": "b"}),
    "a table that holds itself": saved(endless),
    "a stride of 0 that claims 1.5 TB": saved(huge_stride),
    "20,000 unknown tensors": saved(many_tensors),
    "a bomb": zip_bomb,
    "empty": lambda file, place: file.write_bytes(b""),
}


def converted(place: Place, write: Write, suffix: str) -> None:
    file = place.folder / f"weights{suffix}"
    write(file, place)
    refused(place.run("convert", file, "--from", "self-forcing", "--to", "out"))


def as_codec(place: Place, write: Write, suffix: str) -> None:
    file = place.folder / f"weights{suffix}"
    write(file, place)
    refused(sample(place, place.parts / "student", "--codec", file))


def as_student(place: Place, write: Write, suffix: str) -> None:
    """In the folder of the transformer, under the name that diffusers looks for."""
    home = place.part("student")
    own = home / "transformer" / "diffusion_pytorch_model.safetensors"
    own.unlink()
    write(own if suffix == ".safetensors" else own.with_suffix(".bin"), place)
    refused(sample(place, home))


def sample(place: Place, student: Path, *arguments: object):  # noqa: ANN201
    command = [
        "--student",
        student,
        "--prompt",
        "a red circle",
        "--num-frames",
        1,
        "--size",
        "16x16",
        "--out",
        "clip.gif",
    ]
    return place.run("sample", *command, *arguments)


def cases() -> list[Case]:
    found = []
    for suffix, files in {".safetensors": SAFETENSORS, ".pth": PICKLES}.items():
        for name, write in files.items():
            for use in (converted, as_codec, as_student):
                found.append(
                    Case(
                        AREA,
                        f"{use.__name__} {suffix}: {name}",
                        partial(use, write=write, suffix=suffix),
                    )
                )
    return found
