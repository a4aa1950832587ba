"""Frames of a clip on disk, one after another: upright, in RGB, each with the time at which it
begins.

PyAV reads every container, codec and GIF, Pillow animated WebP. A clip is read in order from its
first frame, never by seeking, whose results depend on container and codec, and one frame at a time,
so that its length costs no memory. What a player applies is applied: the display matrix (rotation
and mirror), the shape of a pixel, and the colour matrix, which for large pictures without a tag is
BT.709 and for small ones BT.601. High dynamic range is not tone-mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.stream import VideoStream

MAX_PIXELS = 2**25
"""Of a frame; just above 7680 x 4320. A file may claim any size, and one frame is held at the size
of the file."""
# others, such as playlists, may open further files
DEMUXERS = "mov,matroska,webm,avi,asf,mpeg,mpegts,gif,flv,ogg"
# containers that store when to decode, or either in no order: see ``_av_frames``
WITHOUT_TIMES = ("avi", "asf")
NUM_THREADS = 4  # each of which holds frames
# swscale's SWS_BICUBIC, SWS_FULL_CHR_H_INT and SWS_ACCURATE_RND; not all named in PyAV 17
EXACT = 0x4 | 0x2000 | 0x40000
LIMITED, FULL = 1, 2  # libav's numbers of the ranges of a colour value
LEADING_S = 2.0  # how far the frames of a file may be from the order of their times


@dataclass(frozen=True)
class Frame:
    """A frame that is converted when its picture is asked for."""

    start: float
    """Seconds at which it begins, by the clip's own clock, whose zero may be anywhere."""
    picture: Callable[[], np.ndarray]
    """Gives RGB bytes ``[H, W, 3]``, upright."""
    pixel_aspect: float = 1.0
    """Width of a pixel over its height, in the upright picture."""


def clip_frames(path: str | Path) -> Iterator[Frame]:
    """All frames of a file in the order in which they are shown, read as they are asked for.

    Raises:
        ValueError: of one line, when a file or frame can't be read, is damaged or too large, or
            times are missing or fall.
    """
    path = Path(path)
    before = -np.inf
    with _one_line(path):
        for number, frame in enumerate(
            _webp_frames(path) if path.suffix.lower() == ".webp" else _av_frames(path)
        ):
            if frame.start < before:
                raise ValueError(
                    f"the time of frame {number} is before that of the frame that it follows"
                )
            before = frame.start
            yield frame


def clip_starts(path: str | Path, until: float) -> list[float]:
    """When frames begin, in rising seconds, up to at least ``until`` seconds after the first one if
    the clip is that long.

    From the container's index; of the pictures only the first is decoded, to see that it can be.

    Raises:
        ValueError: as ``clip_frames``.
    """
    path = Path(path)
    first = next(clip_frames(path), None)
    if first is None:
        raise unreadable(path, "it has no frames")
    if path.suffix.lower() == ".webp":  # keeps its times beside its pictures
        return _until(clip_frames(path), until)
    with _one_line(path), _open(path) as stream:
        clock, starts = _Clock(stream), []
        for number, packet in enumerate(
            packet for packet in stream.container.demux(stream) if packet.size
        ):
            starts.append(clock.start(number, packet.dts if clock.only_order else packet.pts))
            if starts[-1] - min(starts) > until + LEADING_S:
                break
        return sorted(starts)


def count_frames(path: str | Path) -> int:
    """Frames of a video file, by its packets, of which none is decoded; 0 if it can't be opened."""
    import av

    try:
        with av.open(str(path)) as container:
            return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))
    except (av.error.FFmpegError, IndexError):
        return 0


def unreadable(path: Path, reason: object) -> ValueError:
    """The error of a file that is no clip, in one line."""
    reason = " ".join(str(getattr(reason, "strerror", None) or reason).split())[-160:]
    return ValueError(
        f"{path} can't be read as a video ({reason}); remove it with its caption, or convert it"
    )


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        if not path.is_file():
            raise FileNotFoundError
        if not path.stat().st_size:
            raise ValueError("the file is empty")
        yield
    except FileNotFoundError:
        raise ValueError(f"no clip at {path}") from None
    except Exception as error:  # libraries have their own kinds
        raise unreadable(path, error) from error


def _until(frames: Iterator[Frame], until: float) -> list[float]:
    starts: list[float] = []
    for frame in frames:
        starts.append(frame.start)
        if starts[-1] - starts[0] > until:
            break
    return starts


def _check_pixels(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(
            f"its frames are {width} x {height}, expected at most {MAX_PIXELS:,} pixels"
        )


# ---- PyAV ----------------------------------------------------------------------------------------


@contextmanager
def _open(path: Path) -> Iterator[VideoStream]:
    import av  # here, so that who reads no clips needs it not

    try:
        opened = av.open(
            str(path.resolve()),
            container_options={"format_whitelist": DEMUXERS},
            metadata_errors="replace",
        )
    except av.error.ArgumentError:
        raise ValueError("its container is none of those that are read here") from None
    with opened as container:
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError("it has no pictures")
        if stream.codec_context is None:
            raise ValueError("its codec is not known here")
        if stream.width and stream.height:  # some containers leave them to the first frame
            _check_pixels(stream.width, stream.height)
        stream.thread_type, stream.thread_count = "AUTO", NUM_THREADS
        yield stream


def _av_frames(path: Path) -> Iterator[Frame]:
    from av.video.reformatter import VideoReformatter

    with _open(path) as stream:
        aspect = float(stream.sample_aspect_ratio or 1)
        convert = VideoReformatter().reformat
        clock, number = _Clock(stream), 0
        # times of packets; in a container without times for showing, a frame has the earliest
        waiting: list[int] = []
        for packet in stream.container.demux(stream):
            if packet.size and packet.dts is not None:
                heappush(waiting, packet.dts)
            for frame in packet.decode():
                earliest = heappop(waiting) if waiting else None
                start = clock.start(number, earliest if clock.only_order else frame.pts)
                yield _av_frame(frame, number, start, aspect, convert)
                number += 1


class _Clock:
    """When the frames of a stream begin. One without a time of its own follows the last one that
    has by the frame rate.
    """

    def __init__(self, stream: VideoStream):
        self.only_order = stream.container.format.name in WITHOUT_TIMES
        self.unit, self.rate = stream.time_base, stream.average_rate or stream.guessed_rate
        self._known = (0, 0.0)  # number and time

    def start(self, number: int, ticks: int | None) -> float:
        """Seconds, of a frame in the order of decoding or of showing."""
        if ticks is not None and self.unit:
            self._known = (number, float(ticks * self.unit))
            return self._known[1]
        if not self.rate:
            raise ValueError(f"frame {number} has no time, and the file no frame rate")
        return self._known[1] + float((number - self._known[0]) / self.rate)


def _av_frame(
    frame: VideoFrame, number: int, start: float, aspect: float, convert: Callable
) -> Frame:
    if frame.is_corrupt:
        raise ValueError(f"frame {number} is damaged")
    _check_pixels(frame.width, frame.height)
    turn = _display_turn(frame)
    if turn is not None and turn[0]:  # lies on its side
        aspect = 1 / aspect
    return Frame(start, lambda: _turned(_rgb(frame, convert), turn), aspect)


def _rgb(frame: VideoFrame, convert: Callable) -> np.ndarray:
    """RGB ``[H, W, 3]`` as stored, in the colours that the tags mean."""
    if frame.format.is_rgb or frame.format.has_palette:
        return convert(frame, format="rgb24", interpolation=EXACT).to_ndarray()
    matrix, levels = _colour_matrix(frame), FULL if frame.color_range == FULL else LIMITED
    return convert(
        frame, format="rgb24", interpolation=EXACT, src_colorspace=matrix, src_color_range=levels
    ).to_ndarray()


def _colour_matrix(frame: VideoFrame) -> int:
    """swscale's number of the matrix between RGB and YUV. libav's numbers of tags are those of
    ITU-T H.273.
    """
    tagged = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}.get(frame.colorspace)
    return tagged or (1 if is_large(frame.width, frame.height) else 5)


def is_large(width: int, height: int) -> bool:
    """Whether pictures of this size have the colours of BT.709 if nothing says otherwise, and not
    those of BT.601.
    """
    return width >= 1280 or height >= 720


def _display_turn(frame: VideoFrame) -> tuple[bool, bool, bool] | None:
    """What brings the stored picture upright: (transpose, then mirror left and right, then mirror
    up and down).

    The matrix ``[[a, b, u], [c, d, v], [x, y, w]]`` of 16.16 fixed numbers takes the row (p, q, 1)
    of a pixel's place to where it is shown.
    """
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return None
    matrix = np.frombuffer(bytes(data), dtype=np.int32).reshape(3, 3)[:2, :2] / 2**16
    (a, b), (c, d) = matrix.round().tolist()
    if np.abs(matrix - matrix.round()).max() < 0.01 and b == c == 0 != a * d:
        return False, a < 0, d < 0
    if np.abs(matrix - matrix.round()).max() < 0.01 and a == d == 0 != b * c:
        return True, c < 0, b < 0
    raise ValueError("it is to be shown turned by an angle that is no quarter")


def _turned(picture: np.ndarray, turn: tuple[bool, bool, bool] | None) -> np.ndarray:
    if turn is None:
        return picture
    transpose, mirror, flip = turn
    picture = picture.swapaxes(0, 1) if transpose else picture
    return picture[:: -1 if flip else 1, :: -1 if mirror else 1]


# ---- Pillow --------------------------------------------------------------------------------------


def _webp_frames(path: Path) -> Iterator[Frame]:
    """Animated WebP, which FFmpeg does not decode. Pillow keeps one picture, which is therefore
    converted at once.
    """
    with Image.open(path, formats=("WEBP",)) as image:
        _check_pixels(*image.size)
        start = 0.0
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            picture = np.array(image.convert("RGB"))
            yield Frame(start, lambda picture=picture: picture)
            start += (image.info.get("duration") or 100) / 1000
