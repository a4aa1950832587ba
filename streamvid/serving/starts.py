"""Images and clips that streams begin from: uploaded, decoded elsewhere, kept for a while.

A file of a stranger is never decoded in the server's own process: ``decoding`` does that in another
one, whose memory and time are bound. What the server reads is what that process wrote.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import streamvid
from streamvid.frames import clip_frames
from streamvid.printing import printable
from streamvid.serving.decoding import Decoded, Job
from streamvid.serving.limits import Limits

START_TYPES = {".png": "image/png", ".mkv": "video/x-matroska"}
"""Suffixes of what was decoded, with their media types."""


class StartFile:
    """Frames on the server's disk, without loss; the file goes with the last who holds this."""

    def __init__(self, path: Path):
        self.path = path
        weakref.finalize(self, path.unlink, missing_ok=True)

    @property
    def name(self) -> str:
        """What a client calls it: ``start.png`` of one frame, ``start.mkv`` of several."""
        return f"start{self.path.suffix}"

    def images(self) -> np.ndarray:
        """The frames, bytes ``[T, H, W, 3]``."""
        if self.path.suffix == ".png":
            with Image.open(self.path, formats=("PNG",)) as image:
                return np.asarray(image.convert("RGB"))[None].copy()
        return np.stack([frame.picture() for frame in clip_frames(self.path)])


@dataclass(frozen=True)
class Start:
    """What a stream may begin from."""

    id: str
    num_frames: int
    height: int
    width: int
    expires_at: int
    """Seconds since 1970."""
    file: StartFile

    @property
    def kind(self) -> str:
        """``image`` or ``clip``."""
        return "image" if self.num_frames == 1 else "clip"


class StartStore:
    """Starts by id, in a folder that holds nothing else.

    Args:
        folder: of the files; it is made if it is not there.
        most: starts that are kept; the oldest goes first.
        life_s: seconds for which one is kept.
    """

    def __init__(self, folder: Path, most: int, life_s: float):
        self.folder = folder
        self._most = most
        self._life_s = life_s
        self._starts: OrderedDict[str, Start] = OrderedDict()
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def new_id(self) -> str:
        """A name that nobody guesses."""
        return f"start_{secrets.token_hex(16)}"

    def add(self, start_id: str, decoded: Decoded, height: int, width: int) -> Start:
        """Keep what was decoded to ``folder/start_id``; the oldest make room."""
        file = StartFile(self.folder / f"{start_id}{decoded.suffix}")
        expires_at = int(time.time() + self._life_s)
        start = Start(start_id, decoded.num_frames, height, width, expires_at, file)
        with self._lock:
            self._starts[start_id] = start
            while len(self._starts) > self._most:
                self._starts.popitem(last=False)
            self._forget_old()
        return start

    def get(self, start_id: str) -> Start | None:
        """The start of an id, or None."""
        with self._lock:
            self._forget_old()
            return self._starts.get(start_id)

    def remove(self, start_id: str) -> bool:
        """Forget a start; False if there is none. A stream that began from it goes on."""
        with self._lock:
            return self._starts.pop(start_id, None) is not None

    def adopt(self, path: Path) -> StartFile:
        """A copy of a file of frames that belongs to nobody else."""
        own = self.folder / f"{self.new_id()}{path.suffix}"
        link_or_copy(path, own)
        return StartFile(own)

    def _forget_old(self) -> None:
        now = time.time()
        for start in [old for old in self._starts.values() if old.expires_at <= now]:
            del self._starts[start.id]


def link_or_copy(source: Path, target: Path) -> None:
    """Another name of a file that is never written to again, or a copy on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def plan_job(
    source: Path,
    target: Path,
    height: int,
    width: int,
    fps: float,
    kind: str | None,
    limits: Limits,
) -> Job:
    """How to decode a file within the limits.

    Args:
        source: with the suffix of its content.
        target: without a suffix.
        height, width, fps: of the stream.
        kind: "image" takes the first picture only.
    """
    return Job(
        source=str(source),
        target=str(target),
        height=height,
        width=width,
        fps=fps,
        only_first=kind == "image",
        max_frames=limits.start_frames,
        max_seconds=limits.start_seconds,
        max_pixels=limits.start_pixels,
        memory_bytes=limits.start_decode_bytes,
        cpu_seconds=limits.start_decode_seconds,
    )


def decode_file(job: Job) -> Decoded:
    """Do a job in a process of its own, and wait for it.

    Raises:
        ValueError: one line, if the file can't be decoded, or not in memory and time.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "streamvid.serving.decoding", json.dumps(asdict(job))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=job.cpu_seconds,
            env=child_environment(os.environ),
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"the file took longer than {job.cpu_seconds:g} seconds to decode; give a smaller one"
        ) from None
    return read_answer(done.stdout if done.returncode == 0 else b"", job.max_frames)


def read_answer(said: bytes, max_frames: int) -> Decoded:
    """What the process says, which a hostile file may have taken over.

    Raises:
        ValueError: one line, if it could not decode the file, or says nothing that makes sense.
    """
    useless = ValueError("the file can't be decoded with little memory and time; give another one")
    try:
        plain: dict[str, Any] = dict(json.loads(said))
    except (ValueError, TypeError):  # killed, by a bound or by a fault in a library
        raise useless from None
    if "error" in plain:
        raise ValueError(f"the file can't be used: {printable(plain['error'])}")
    suffix, num_frames = str(plain.get("suffix")), plain.get("num_frames")
    if suffix not in START_TYPES or type(num_frames) is not int:
        raise useless
    if not 1 <= num_frames <= max_frames:
        raise useless
    return Decoded(suffix, num_frames)


def child_environment(own: Mapping[str, str]) -> dict[str, str]:
    """What the process needs: no secrets of the server, one thread."""
    kept = {name: own[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in own}
    package = str(Path(streamvid.__file__).parents[1])
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [own.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def remove_decoded(target: Path) -> None:
    """Remove what a process that was killed has left of its job."""
    for path in target.parent.glob(f"{target.name}*"):
        path.unlink(missing_ok=True)
