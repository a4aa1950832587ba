"""Every container and codec gives its frames in the order, at the times, upright and in the colours of a player."""

import subprocess

import av
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from streamvid import frames as frames_module
from streamvid.data.clips import ClipFormat, check_clip, read_clip
from streamvid.frames import clip_frames, clip_starts

HEIGHT, WIDTH, RATE, COUNT = 48, 64, 30, 40
FORM = ClipFormat(fps=16.0, num_frames=20, height=HEIGHT, width=WIDTH)
WANTED = [min(range(COUNT), key=lambda n: (round(abs(n / RATE - k / 16), 4), n)) for k in range(20)]


def picture(number, height=HEIGHT, width=WIDTH):
    """A frame with its number in it, a bit in each of eight columns."""
    bits = [(number >> place) & 1 for place in range(8)]
    row = np.repeat(np.array(bits, np.uint8) * 215 + 20, width // 8)
    return np.broadcast_to(row[None, :, None], (height, width // 8 * 8, 3)).copy()


def number_in(frame):
    """The number of a frame ``[3, H, W]`` in [0, 1]."""
    columns = frame.mean(dim=(0, 1)).unflatten(0, (8, -1))
    return sum(int(value > 0.5) << place for place, value in enumerate(columns[:, columns.shape[1] // 2].tolist()))


def write(path, codec, pixels="yuv420p", times=None, rate=RATE, count=COUNT, size=(HEIGHT, WIDTH), pictures=None, **options):
    """A clip made by PyAV; ``times`` are those of the frames, in ticks of 1 / 1000 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        if times is not None:
            stream.codec_context.time_base = stream.time_base = av.time_base and __import__("fractions").Fraction(1, 1000)
        for number in range(count):
            image = picture(number, *size) if pictures is None else pictures[number]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], stream.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


B_FRAMES = {"bf": "2"}
QUICK = [
    ("mp4", "libx264", "yuv420p", {}), ("avi", "libx264", "yuv420p", B_FRAMES), ("avi", "mpeg4", "yuv420p", B_FRAMES),
    ("mpg", "mpeg2video", "yuv420p", B_FRAMES), ("mkv", "mpeg2video", "yuv420p", B_FRAMES), ("mp4", "mpeg4", "yuv420p", B_FRAMES),
    ("wmv", "wmv2", "yuv420p", {}), ("ts", "libx264", "yuv420p", {}), ("m2ts", "mpeg2video", "yuv420p", B_FRAMES),
    ("mov", "mjpeg", "yuvj420p", {}), ("webm", "libvpx-vp9", "yuv420p", {}), ("mkv", "ffv1", "yuv444p10le", {}),
    ("gif", "gif", "rgb8", {}),
]  # fmt: skip
EVERY_CODEC = [
    ("libx264", "yuv420p"), ("libx265", "yuv420p"), ("libvpx", "yuv420p"), ("libvpx-vp9", "yuv420p"), ("libsvtav1", "yuv420p"),
    ("mpeg4", "yuv420p"), ("msmpeg4", "yuv420p"), ("mpeg2video", "yuv420p"), ("mpeg1video", "yuv420p"), ("wmv1", "yuv420p"),
    ("wmv2", "yuv420p"), ("flv", "yuv420p"), ("h263p", "yuv420p"), ("theora", "yuv420p"), ("mjpeg", "yuvj420p"),
    ("prores_ks", "yuv422p10le"), ("ffv1", "yuv420p"), ("huffyuv", "yuv422p"), ("rawvideo", "rgb24"),
]  # fmt: skip
EVERY_SUFFIX = ("mp4", "mov", "m4v", "3gp", "mkv", "webm", "avi", "wmv", "mpg", "mpeg", "ts", "m2ts", "mts", "flv", "ogv")


def check_numbers(path):
    check_clip(path, FORM)
    assert [number_in(frame) for frame in read_clip(path, FORM)] == WANTED
    every = list(clip_frames(path))
    assert len(every) == COUNT
    starts = np.array([frame.start for frame in every])
    assert np.abs(starts - starts[0] - np.arange(COUNT) / RATE).max() < 0.011  # a GIF counts hundredths


@pytest.mark.parametrize("suffix, codec, pixels, options", QUICK, ids=[f"{codec}.{suffix}" for suffix, codec, *_ in QUICK])
def test_frames_come_in_order_and_at_their_times(tmp_path, suffix, codec, pixels, options):
    """A reader that sought gave frame 0 for all frames of .avi and .mpg, and was off by up to 96 frames in .ts."""
    check_numbers(write(tmp_path / f"clip.{suffix}", codec, pixels, **options))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", EVERY_SUFFIX)
@pytest.mark.parametrize("codec, pixels", EVERY_CODEC, ids=[codec for codec, _ in EVERY_CODEC])
@pytest.mark.parametrize("options", [{}, B_FRAMES], ids=["", "B frames"])
def test_every_pair_that_can_be_made_is_read(tmp_path, suffix, codec, pixels, options):
    path = tmp_path / f"clip.{suffix}"
    try:
        with av.open(str(path), "w") as container:
            known = {codec, av.Codec(codec, "w").canonical_name} & container.supported_codecs
        if not known:
            pytest.skip("this container has no such codec")
        write(path, codec, pixels, **options)
    except (av.FFmpegError, ValueError) as error:
        pytest.skip(f"can't be made here: {error}")
    check_numbers(path)
