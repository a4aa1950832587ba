"""Reading and writing clips: frames ``[T, 3, H, W]`` in [0, 1] to and from files.

Written: .mp4 and .webm (H.264 and VP9, by imageio's ffmpeg), .gif, or a folder of numbered PNGs (a
path without a suffix, or one that ends with a slash). A file or folder appears under its name when
it is complete. Read: what ``streamvid.frames`` reads, and folders of PNGs.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from streamvid.files import atomic_file, atomic_folder
from streamvid.frames import clip_frames, count_frames, is_large

CODECS = {".mp4": "libx264", ".webm": "libvpx-vp9"}
SUFFIXES = (*CODECS, ".gif", "")
LARGE = (  # players take large pictures for BT.709, ffmpeg makes BT.601 of any size
    "-vf",
    "scale=out_color_matrix=bt709:out_range=tv",
    "-colorspace",
    "bt709",
    "-color_primaries",
    "bt709",
    "-color_trc",
    "bt709",
    "-color_range",
    "tv",
)
# what a writer of PNGs, or its crash, leaves in its folder
OWN_PNG = re.compile(r"\d{6}\.png|\.\d{6}\.tmp-\w+\.png")


def to_uint8(frames: Tensor) -> np.ndarray:
    """Frames ``[T, 3, H, W]`` in [0, 1] to ``[T, H, W, 3]`` bytes, rounded."""
    return (
        (frames.detach().float().clamp(0, 1) * 255)
        .round()
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .cpu()
        .numpy()
    )


def from_uint8(images: np.ndarray) -> Tensor:
    """Bytes ``[T, H, W, 3]`` to frames ``[T, 3, H, W]`` in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def suffix_of(path: str | Path) -> str:
    """The suffix that says what to write, in lower case; "" for a folder."""
    return "" if str(path).endswith("/") else Path(path).suffix.lower()


def ensure_place(path: str | Path) -> None:
    """Check that something can be written beside ``path``, by writing; folders that are not there
    yet are not made.

    Raises:
        ValueError: with the reason.
    """
    place = Path(path).parent
    while not place.exists():
        place = place.parent
    try:
        # asking for permission is not enough: root may do all, /proc nothing
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {place}: {(error.strerror or str(error)).lower()}"
        ) from error


def ensure_writable(path: str | Path) -> Path:
    """Check a clip's path before anything is computed for it.

    Raises:
        ValueError: if the suffix is unknown, the place can't be written to, or a folder of PNGs
            would replace one that holds anything else.
    """
    suffix, place = suffix_of(path), Path(path)
    if suffix not in SUFFIXES:
        known = ", ".join(suffix or "no suffix (a folder of PNGs)" for suffix in SUFFIXES)
        raise ValueError(f"{place}: unknown suffix {suffix!r}; use one of {known}")
    if suffix and place.is_dir():
        raise ValueError(f"{place} is a folder; give the name of a file")
    if not suffix:
        _ensure_folder_of_pngs(place)
    ensure_place(place)
    return place


def _ensure_folder_of_pngs(folder: Path) -> None:
    if folder.name in ("", ".."):
        raise ValueError(f"{folder}: name a new folder for the PNGs")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a path without a suffix names a folder of PNGs")
    others = (
        [file.name for file in folder.iterdir() if not OWN_PNG.fullmatch(file.name)]
        if folder.exists()
        else []
    )
    if others:
        raise ValueError(
            f"{folder} holds {others[0]}, which writing PNGs there would remove; name a new folder"
        )


class VideoWriter:
    """Writes frames as they come; a context manager. On an error nothing is left behind.

    Args:
        path: see ``ensure_writable``.
        fps: frames per second.
        live: a folder of PNGs is there from the start and each PNG as soon as it is complete; they
            stay on an error.

    Raises:
        ValueError: for a path that can't be written, frames of an odd size in .mp4 and .webm
            (nothing is resized or padded), frames that change their size, or no frames at all.
    """

    def __init__(self, path: str | Path, fps: float, live: bool = False):
        if not fps > 0:
            raise ValueError(f"fps={fps}, expected a positive number of frames per second")
        self.path = ensure_writable(path)
        self.suffix = suffix_of(path)
        self.fps = fps
        self.live = live
        self.num_frames = 0
        self._size: tuple[int, int] | None = None

    def __enter__(self) -> VideoWriter:
        with ExitStack() as stack:
            self._target = stack.enter_context(self._place())
            self._writer = None  # opened when the size is known
            self._stack = stack.pop_all()
        return self

    def _place(self) -> AbstractContextManager[Path]:
        if self.suffix:
            return atomic_file(self.path)
        if not self.live:
            return atomic_folder(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        # of a clip before; ensure_writable has seen that there is nothing else
        for file in self.path.iterdir():
            file.unlink()
        return nullcontext(self.path)

    def _open(self, height: int, width: int) -> Any:
        if self.suffix == ".gif":
            return imageio.get_writer(self._target, duration=1000 / self.fps, loop=0)
        return imageio.get_writer(
            self._target,
            fps=self.fps,
            codec=CODECS[self.suffix],
            macro_block_size=1,
            ffmpeg_log_level="error",
            output_params=[
                "-pix_fmt",
                "yuv420p",
                "-crf",
                "16",
                *(LARGE if is_large(width, height) else ()),
            ],
        )

    def append(self, frames: Tensor) -> None:
        """The next frames ``[T, 3, H, W]`` in [0, 1]."""
        self.append_images(to_uint8(frames))

    def append_images(self, images: np.ndarray) -> None:
        """The next frames ``[T, H, W, 3]``, bytes."""
        self._check_size(*images.shape[1:3])
        for image in images:
            self._write(image)
            self.num_frames += 1

    def _check_size(self, height: int, width: int) -> None:
        if self.suffix in CODECS and (height % 2 or width % 2):
            raise ValueError(
                f"{self.suffix} needs an even size, got {width} x {height}; use .gif or a folder of"
                " PNGs"
            )
        self._size = self._size or (height, width)
        if (height, width) != self._size:
            raise ValueError(
                f"{self.path}: frames of {height} x {width} after frames of {self._size[0]} x"
                f" {self._size[1]}"
            )

    def _write(self, image: np.ndarray) -> None:
        if self.suffix:
            if self._writer is None:
                self._writer = self._stack.enter_context(closing(self._open(*image.shape[:2])))
            self._writer.append_data(image)
            return
        name = self._target / f"{self.num_frames:06d}.png"
        with atomic_file(name) if self.live else nullcontext(name) as file:
            imageio.imwrite(file, image)

    def __exit__(self, kind, error, trace) -> None:
        if kind is None and not self.num_frames:
            empty = ValueError(f"{self.path}: no frames came, nothing is written")
            self._stack.__exit__(ValueError, empty, None)
            raise empty
        if kind is None and self.suffix in CODECS:
            try:
                self._finish()
            except BaseException as fault:
                self._stack.__exit__(type(fault), fault, fault.__traceback__)
                raise
        self._stack.__exit__(kind, error, trace)

    def _finish(self) -> None:
        """End the file; ffmpeg, a process of its own, does not say that its disk was full.

        Raises:
            OSError: if what it wrote does not hold all frames.
        """
        self._writer.close()
        written = count_frames(self._target)
        if written < self.num_frames:
            raise OSError(
                f"{self.path} could not be written: {written} of {self.num_frames} frames arrived;"
                " is the disk full?"
            )


def write_video(frames: Tensor, path: str | Path, fps: float) -> None:
    """Write frames ``[T, 3, H, W]`` in [0, 1]; see ``VideoWriter``."""
    with VideoWriter(path, fps) as writer:
        writer.append(frames)


def read_video(path: str | Path) -> tuple[Tensor, float]:
    """All frames ``[T, 3, H, W]`` in [0, 1], of square pixels, of a file or a folder of PNGs, and
    its frames per second on average (PNGs and single frames: 0).

    Raises:
        ValueError: if it is missing, damaged or no video.
    """
    path = Path(path)
    if path.is_dir():
        return _read_pngs(path), 0.0
    pictures, starts, aspect = [], [], 1.0
    for frame in clip_frames(path):
        pictures.append(frame.picture())
        starts.append(frame.start)
        aspect = frame.pixel_aspect
    if not pictures:
        raise ValueError(f"{path} has no frames")
    frames = from_uint8(np.stack(pictures))
    if aspect != 1:
        size = frames.shape[2], max(1, round(frames.shape[3] * aspect))
        frames = interpolate(
            frames, size, mode="bilinear", antialias=True, align_corners=False
        ).clamp(0, 1)
    passed = starts[-1] - starts[0]
    return frames, (len(starts) - 1) / passed if passed else 0.0


def _read_pngs(folder: Path) -> Tensor:
    files = sorted(folder.glob("*.png"))
    if not files:
        raise ValueError(f"{folder} holds no PNGs")
    try:
        return from_uint8(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"{folder} can't be read as a video: {' '.join(str(error).split())[-120:]}"
        ) from error


def contact_sheet(
    groups: Iterable[tuple[str, list[tuple[str, Tensor]]]],
    path: str | Path,
    columns: int = 9,
    scale: int = 2,
) -> None:
    """A picture of clips: for each group (a prompt) a title and a labelled row of frames for each
    clip.

    Args:
        groups: (title, [(label, frames ``[T, 3, H, W]``), ...]).
        columns: frames shown of each clip, evenly spaced.
        scale: how much a frame is enlarged.
    """
    groups, line = list(groups), 18
    height, width = groups[0][1][0][1].shape[2:]
    row = height * scale + 4
    font = ImageFont.load_default()
    texts = [font.getlength(label) for _, clips in groups for label, _ in clips]
    margin = 12 + int(max(texts))
    size = (
        margin + columns * (width * scale + 2),
        sum(line + len(clips) * row for _, clips in groups),
    )
    sheet = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for title, clips in groups:
        draw.text((4, top + 3), title, fill="black", font=font)
        top += line
        for label, frames in clips:
            draw.text((4, top + row // 2 - 8), label, fill="black", font=font)
            picks = np.linspace(0, len(frames) - 1, columns).round().astype(int)
            for place, image in enumerate(to_uint8(frames[torch.as_tensor(picks)])):
                cell = Image.fromarray(image).resize((width * scale, height * scale), Image.NEAREST)
                sheet.paste(cell, (margin + place * (width * scale + 2), top))
            top += row
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG")
