"""Reading and writing clips: frames ``[T, 3, H, W]`` in [0, 1] to and from files.

Written: .mp4 and .webm (H.264 and VP9, by imageio's ffmpeg), .gif, or a folder of numbered PNGs (a path without a
suffix). A file appears under its name when it is complete. Read: by decord where it is installed, else by imageio.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageSequence
from torch import Tensor

from streamvid.files import atomic_folder

CODECS = {".mp4": "libx264", ".webm": "libvpx-vp9"}
SUFFIXES = (*CODECS, ".gif", "")


def to_uint8(frames: Tensor) -> np.ndarray:
    """Frames ``[T, 3, H, W]`` in [0, 1] to ``[T, H, W, 3]`` bytes, rounded."""
    return (frames.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def ensure_writable(path: str | Path) -> Path:
    """Check a clip's path before anything is computed for it.

    Raises:
        ValueError: if the suffix is unknown or the place can't be written to.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join(suffix or "no suffix (a folder of PNGs)" for suffix in SUFFIXES)
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; use one of {known}")
    if path.suffix and path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    if not path.suffix and path.is_file():
        raise ValueError(f"{path} is a file; a path without a suffix names a folder of PNGs")
    place = path.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"cannot write {path}: {place} is not a folder that you may write to")
    return path


class VideoWriter:
    """Writes frames as they come; a context manager. On an error nothing is left behind.

    Args:
        path: see ``ensure_writable``.
        fps: frames a second.

    Raises:
        ValueError: for a path that can't be written, or frames of an odd size in .mp4 and .webm.
    """

    def __init__(self, path: str | Path, fps: float):
        self.path = ensure_writable(path)
        self.fps = fps
        self.num_frames = 0
        self._writer = None
        self._folder = None
        self._temporary = self.path.with_name(f".{self.path.stem}.tmp-{os.getpid()}{self.path.suffix}")

    def __enter__(self) -> VideoWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        suffix = self.path.suffix.lower()
        if suffix in CODECS:
            self._writer = imageio.get_writer(
                self._temporary, fps=self.fps, codec=CODECS[suffix], macro_block_size=1, ffmpeg_log_level="error",
                output_params=["-pix_fmt", "yuv420p", "-crf", "16"],
            )
        elif suffix == ".gif":
            self._writer = imageio.get_writer(self._temporary, duration=1000 / self.fps, loop=0)
        else:
            self._folder = atomic_folder(self.path)
            self._temporary = self._folder.__enter__()
        return self

    def append(self, frames: Tensor) -> None:
        """The next frames ``[T, 3, H, W]``."""
        height, width = frames.shape[2:]
        if self.path.suffix.lower() in CODECS and (height % 2 or width % 2):
            raise ValueError(f"{self.path.suffix} needs an even size, got {width} x {height}; use .gif or a folder of PNGs")
        for image in to_uint8(frames):
            if self._folder is not None:
                imageio.imwrite(self._temporary / f"{self.num_frames:06d}.png", image)
            else:
                self._writer.append_data(image)
            self.num_frames += 1

    def __exit__(self, kind, error, trace) -> None:
        if self._folder is not None:
            self._folder.__exit__(kind, error, trace)
            return
        self._writer.close()
        if kind is None and self.num_frames:
            os.replace(self._temporary, self.path)
        self._temporary.unlink(missing_ok=True)


def write_video(frames: Tensor, path: str | Path, fps: float) -> None:
    """Write frames ``[T, 3, H, W]`` in [0, 1]; see ``VideoWriter``."""
    with VideoWriter(path, fps) as writer:
        writer.append(frames)


def read_video(path: str | Path) -> tuple[Tensor, float]:
    """All frames ``[T, 3, H, W]`` in [0, 1] of a file or a folder of PNGs, and its frames a second (PNGs: 0).

    Raises:
        ValueError: if it is missing or no video.
    """
    path = Path(path)
    if path.is_dir():
        images = [np.asarray(Image.open(file).convert("RGB")) for file in sorted(path.glob("*.png"))]
        if not images:
            raise ValueError(f"{path} holds no PNGs")
        return _from_uint8(np.stack(images)), 0.0
    if not path.is_file():
        raise ValueError(f"no video at {path}")
    try:
        frames, fps = _decode(path)
    except Exception as error:  # each backend has its own kinds
        raise ValueError(f"{path} can't be read as a video: {str(error).strip().splitlines()[-1][:120]}") from error
    return _from_uint8(frames), fps


def _decode(path: Path) -> tuple[np.ndarray, float]:
    if path.suffix.lower() == ".gif":  # decord does not read it
        image = Image.open(path)
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
        return np.stack(frames), 1000 / (image.info.get("duration") or 100)
    try:
        import decord
    except ImportError:
        reader = imageio.get_reader(path)
        return np.stack(list(reader)), float(reader.get_meta_data().get("fps", 0.0))
    reader = decord.VideoReader(str(path), num_threads=1)
    return reader.get_batch(range(len(reader))).asnumpy(), float(reader.get_avg_fps())


def _from_uint8(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(frames[..., :3].copy()).permute(0, 3, 1, 2).float() / 255


def contact_sheet(
    groups: Iterable[tuple[str, list[tuple[str, Tensor]]]], path: str | Path, columns: int = 9, scale: int = 2
) -> None:
    """A picture of clips: for each group (a prompt) a title and a labelled row of frames for each clip.

    Args:
        groups: (title, [(label, frames ``[T, 3, H, W]``), ...]).
        columns: frames shown of each clip, evenly spaced.
        scale: how much a frame is enlarged.
    """
    groups, margin, line = list(groups), 130, 18
    height, width = groups[0][1][0][1].shape[2:]
    row = height * scale + 4
    size = (margin + columns * (width * scale + 2), sum(line + len(clips) * row for _, clips in groups))
    sheet = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for title, clips in groups:
        draw.text((4, top + 3), title, fill="black")
        top += line
        for label, frames in clips:
            draw.text((4, top + row // 2 - 8), label, fill="black")
            picks = np.linspace(0, len(frames) - 1, columns).round().astype(int)
            for place, image in enumerate(to_uint8(frames[torch.as_tensor(picks)])):
                cell = Image.fromarray(image).resize((width * scale, height * scale), Image.NEAREST)
                sheet.paste(cell, (margin + place * (width * scale + 2), top))
            top += row
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}.png")
    sheet.save(temporary)
    os.replace(temporary, path)
