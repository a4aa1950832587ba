"""Every container and codec gives its frames in the order, at the times, upright and in the colours
of a player.
"""

import json
import os
import subprocess
import sys
from fractions import Fraction

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


def picture(number, height=HEIGHT, width=WIDTH):
    """A frame with its number in it, a bit in each of eight columns."""
    bits = [(number >> place) & 1 for place in range(8)]
    row = np.repeat(np.array(bits, np.uint8) * 215 + 20, width // 8)
    return np.broadcast_to(row[None, :, None], (height, width // 8 * 8, 3)).copy()


def number_in(frame):
    """The number of a frame ``[3, H, W]`` in [0, 1]."""
    columns = frame.mean(dim=(0, 1)).unflatten(0, (8, -1))
    return sum(
        int(value > 0.5) << place
        for place, value in enumerate(columns[:, columns.shape[1] // 2].tolist())
    )


def write(
    path,
    codec,
    pixels="yuv420p",
    times=None,
    rate=RATE,
    count=COUNT,
    size=(HEIGHT, WIDTH),
    pictures=None,
    **options,
):
    """A clip made by PyAV; ``times`` are those of the frames, in ticks of 1 / 1000 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
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
    ("mp4", "libx264", "yuv420p", {}),
    ("avi", "libx264", "yuv420p", B_FRAMES),
    ("avi", "mpeg4", "yuv420p", B_FRAMES),
    ("mpg", "mpeg2video", "yuv420p", B_FRAMES),
    ("mkv", "mpeg2video", "yuv420p", B_FRAMES),
    ("mp4", "mpeg4", "yuv420p", B_FRAMES),
    ("wmv", "wmv2", "yuv420p", {}),
    ("wmv", "mpeg4", "yuv420p", B_FRAMES),
    ("mpg", "libx264", "yuv420p", B_FRAMES),
    ("ts", "libx264", "yuv420p", {}),
    ("m2ts", "mpeg2video", "yuv420p", B_FRAMES),
    ("mov", "mjpeg", "yuvj420p", {}),
    ("webm", "libvpx-vp9", "yuv420p", {}),
    ("mkv", "ffv1", "yuv444p10le", {}),
    ("gif", "gif", "rgb8", {}),
]
EVERY_CODEC = [
    ("libx264", "yuv420p"),
    ("libx265", "yuv420p"),
    ("libvpx", "yuv420p"),
    ("libvpx-vp9", "yuv420p"),
    ("libsvtav1", "yuv420p"),
    ("mpeg4", "yuv420p"),
    ("msmpeg4", "yuv420p"),
    ("mpeg2video", "yuv420p"),
    ("mpeg1video", "yuv420p"),
    ("wmv1", "yuv420p"),
    ("wmv2", "yuv420p"),
    ("flv", "yuv420p"),
    ("h263p", "yuv420p"),
    ("theora", "yuv420p"),
    ("mjpeg", "yuvj420p"),
    ("prores_ks", "yuv422p10le"),
    ("ffv1", "yuv420p"),
    ("huffyuv", "yuv422p"),
    ("rawvideo", "rgb24"),
]
EVERY_SUFFIX = (
    "mp4",
    "mov",
    "m4v",
    "3gp",
    "mkv",
    "webm",
    "avi",
    "wmv",
    "mpg",
    "mpeg",
    "ts",
    "m2ts",
    "mts",
    "flv",
    "ogv",
)


def check_numbers(path):
    check_clip(path, FORM)
    for place, frame in enumerate(read_clip(path, FORM)):
        gaps = np.abs(np.arange(COUNT) / RATE - place / FORM.fps)
        # containers round times, so that either of two may be nearer
        assert gaps[number_in(frame)] < gaps.min() + 0.003
    every = list(clip_frames(path))
    assert len(every) == COUNT
    starts = np.array([frame.start for frame in every])
    # a GIF counts hundredths
    assert np.abs(starts - starts[0] - np.arange(COUNT) / RATE).max() < 0.011


@pytest.mark.parametrize(
    "suffix, codec, pixels, options",
    QUICK,
    ids=[f"{codec}.{suffix}" for suffix, codec, *_ in QUICK],
)
def test_frames_come_in_order_and_at_their_times(tmp_path, suffix, codec, pixels, options):
    """A reader that sought gave frame 0 for all frames of .avi and .mpg, and was off by up to 96
    frames in .ts.
    """
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


@pytest.mark.parametrize("width, height", [(16, 16), (24, 48), (48, 24), (72, 40), (136, 8)])
def test_small_and_odd_sizes_are_read(tmp_path, width, height):
    """Widths of 16, 24, 48 and 72 passed the check and failed in the middle of encoding."""
    kinds = (
        ("a.mp4", "libx264", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.mkv", "ffv1", "bgr0"),
    )
    for name, codec, pixels in kinds:
        path = write(tmp_path / name, codec, pixels, size=(height, width), count=9)
        pictures = [
            torch.from_numpy(frame.picture().copy()).permute(2, 0, 1) / 255
            for frame in clip_frames(path)
        ]
        assert [number_in(picture) for picture in pictures] == [*range(9)]


def test_a_variable_rate_is_followed(tmp_path):
    """Without decord such a clip was read at half its speed."""
    times = [0, 20, 40, 60, 500, 520, 540, 1000, 1040]
    path = write(tmp_path / "clip.mp4", "libx264", times=times, count=9)
    frames = read_clip(path, ClipFormat(fps=10.0, num_frames=11, height=HEIGHT, width=WIDTH))
    assert [number_in(frame) for frame in frames] == [0, 3, 3, 4, 4, 4, 6, 6, 7, 7, 7]
    assert clip_starts(path, 9) == pytest.approx(np.array(times) / 1000)


def test_of_a_long_clip_only_the_beginning_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "hour.mp4", "mpeg4", count=2000, rate=1, size=(16, 16))
    assert len(clip_starts(path, 3)) < 12
    seen = []
    monkeypatch.setattr(
        "streamvid.data.clips.clip_frames",
        lambda path: (seen.append(f) or f for f in clip_frames(path)),
    )
    assert read_clip(path, ClipFormat(fps=1.0, num_frames=4, height=16, width=16)).shape == (
        4,
        3,
        16,
        16,
    )
    assert len(seen) == 4


# ---- upright, square, in the right colours -------------------------------------------------------


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=True).stdout


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize(
    "mirror", [(), ("-display_hflip",), ("-display_vflip",)], ids=["", "mirrored", "flipped"]
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_clip_is_upright_as_ffmpeg_shows_it(tmp_path, turn, mirror, suffix):
    """Of a selfie camera's mirrored clips the frames stood on their heads."""
    grey = (
        np.random.default_rng(0)
        .integers(0, 255, (4, 6, 1), dtype=np.uint8)
        .repeat(8, 0)
        .repeat(8, 1)
    )
    image = np.repeat(grey, 3, axis=2)
    plain = write(
        tmp_path / "plain.mp4", "libx264", size=image.shape[:2], pictures=[image] * 2, count=2
    )
    turned = tmp_path / f"turned.{suffix}"
    ffmpeg("-display_rotation", turn, *mirror, "-i", plain, "-c", "copy", turned)
    height, width = (32, 48) if turn % 180 == 0 else (48, 32)
    shown = ffmpeg("-i", turned, "-frames:v", 1, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    reference = np.frombuffer(shown, np.uint8).reshape(height, width, 3).astype(int)
    picture = next(clip_frames(turned)).picture()
    assert picture.shape == reference.shape and np.abs(picture - reference).mean() < 1


def test_an_angle_that_is_no_quarter_is_refused(tmp_path):
    plain = write(tmp_path / "plain.mp4", "libx264", count=2)
    ffmpeg("-display_rotation", 30, "-i", plain, "-c", "copy", tmp_path / "turned.mp4")
    with pytest.raises(ValueError, match="turned.mp4 can't be read .*an angle that is no quarter"):
        list(clip_frames(tmp_path / "turned.mp4"))


@pytest.mark.parametrize("turn, shape", [(0, (16, 64)), (90, (64, 16))])
def test_pixels_become_square(tmp_path, turn, shape):
    """A circle of an anamorphic clip was read as an ellipse."""
    height, width = 32, 64  # stored; shown twice as wide
    y, x = np.mgrid[:height, :width] + 0.5
    disc = ((x - 32) * 2) ** 2 + ((y - 16) * 1.0) ** 2 < 14**2
    picture = np.repeat((disc * 255).astype(np.uint8)[..., None], 3, -1)
    plain = write(
        tmp_path / "plain.mp4", "libx264", size=(height, width), pictures=[picture] * 2, count=2
    )
    wide = "h264_metadata=sample_aspect_ratio=2/1"
    ffmpeg("-display_rotation", turn, "-i", plain, "-c", "copy", "-bsf:v", wide, tmp_path / "a.mp4")
    (frame,) = read_clip(
        tmp_path / "a.mp4", ClipFormat(num_frames=1, height=shape[0] * 2, width=shape[1] * 2)
    )
    inside = frame[0] > 0.5
    across, down = inside.any(0).sum(), inside.any(1).sum()
    assert abs(across - 28) <= 2 and abs(down - 28) <= 2


def rgb_of(y, u, v, red, blue, full):
    """The definition of YUV by the weights of red and blue (ITU-R BT.601, BT.709, BT.2020)."""
    luma, scale = (y / 255, 255) if full else ((y - 16) / 219, 224)
    u, v = (u - 128) / scale, (v - 128) / scale
    r, b = luma + 2 * (1 - red) * v, luma + 2 * (1 - blue) * u
    return np.array([r, (luma - red * r - blue * b) / (1 - red - blue), b]) * 255


WEIGHTS = {5: (0.299, 0.114), 1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}  # by H.273's numbers


@pytest.mark.parametrize(
    "matrix, size, expected",
    [
        (2, (64, 48), 5),
        (2, (1280, 720), 1),
        (2, (720, 1280), 1),
        (2, (1280, 534), 1),
        (2, (720, 576), 5),
        (1, (64, 48), 1),
        (5, (1280, 720), 5),
        (6, (64, 48), 5),
        (9, (64, 48), 9),
    ],
)
@pytest.mark.parametrize("full", [False, True])
# the range is in the pixel format, or in a tag
@pytest.mark.parametrize("codec", ["libx264", "ffv1"])
def test_colours_are_what_tags_say_and_else_what_the_size_says(
    tmp_path, matrix, size, expected, full, codec
):
    (width, height), yuv = size, (120, 90, 170)
    planes = np.repeat(yuv, [height * width, height * width // 4, height * width // 4])
    frame = av.VideoFrame.from_ndarray(
        planes.astype(np.uint8).reshape(height * 3 // 2, width), format="yuv420p"
    )
    frame.colorspace, frame.color_range = matrix, 2 if full else 1
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream(
            codec, rate=25, options={"qp": "0", "preset": "ultrafast"} if codec == "libx264" else {}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    picture = next(clip_frames(tmp_path / "a.mkv")).picture()
    np.testing.assert_allclose(
        picture.mean((0, 1)), rgb_of(*yuv, *WEIGHTS[expected], full), atol=1.5
    )


def test_a_gif_with_holes_and_an_animated_webp_are_read(tmp_path):
    images = [Image.fromarray(picture(number)) for number in range(6)]
    images[0].save(
        tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=125, lossless=True
    )
    images[0].save(
        tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=120, disposal=2
    )
    form = ClipFormat(fps=8.0, num_frames=6, height=HEIGHT, width=WIDTH)
    for name in ("a.webp", "a.gif"):
        check_clip(tmp_path / name, form)
        assert [number_in(frame) for frame in read_clip(tmp_path / name, form)] == [
            0,
            1,
            2,
            3,
            4,
            5,
        ]


# ---- what is refused -----------------------------------------------------------------------------


def damaged(path, content):
    path.write_bytes(content)
    return path


def test_what_is_no_clip_is_one_line(tmp_path, capfd):
    whole = write(tmp_path / "whole.mp4", "libx264").read_bytes()
    (tmp_path / "other.txt").write_text("secret")
    paths = {
        damaged(tmp_path / "empty.mp4", b""): "the file is empty",
        damaged(tmp_path / "text.mp4", b"a caption\n" * 50): "Invalid data",
        damaged(tmp_path / "short.mp4", whole[:500]): "read as a video",
        damaged(tmp_path / "zeros.mkv", bytes(5000)): "Invalid data",
        damaged(
            tmp_path / "list.mp4", b"ffconcat version 1.0\nfile whole.mp4\n"
        ): "none of those that are read",
        damaged(
            tmp_path / "list.ts", b"#EXTM3U\n#EXTINF:1,\nwhole.mp4\n#EXT-X-ENDLIST\n"
        ): "none of those|Invalid data",
        tmp_path / "missing.mp4": "no clip at",
        damaged(tmp_path / "no.webp", b"RIFF1234WEBP"): "read as a video",
    }
    for path, said in paths.items():
        for call in (check_clip, read_clip):
            with pytest.raises(ValueError, match=said) as caught:
                call(path, FORM)
            assert "\n" not in str(caught.value) and path.name in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_sound_without_pictures_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="it has no pictures"):
        check_clip(tmp_path / "a.mkv", FORM)


@pytest.mark.parametrize(
    "suffix, codec", [("mp4", "libx264"), ("mkv", "ffv1"), ("avi", "mpeg4"), ("ts", "mpeg2video")]
)
def test_damage_is_found_and_says_where(tmp_path, suffix, codec):
    pictures = list(
        np.random.default_rng(0).integers(0, 255, (COUNT, HEIGHT, WIDTH, 3), dtype=np.uint8)
    )
    path = write(tmp_path / f"clip.{suffix}", codec, pictures=pictures)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = np.random.default_rng(1).bytes(3000)
    with pytest.raises(
        ValueError, match=r"can't be read as a video \((frame \d+ is damaged|.*nvalid|.*time of)"
    ):
        read_clip(damaged(path, bytes(content)), FORM)


def test_a_clip_cut_short_is_read_as_far_as_it_goes(tmp_path):
    content = write(tmp_path / "clip.mkv", "mpeg4", count=400).read_bytes()
    path = damaged(tmp_path / "cut.mkv", content[: len(content) // 2])
    assert [number_in(frame) for frame in read_clip(path, FORM)][:3] == [0, 2, 4]
    for call in (check_clip, read_clip):
        with pytest.raises(ValueError, match="cut.mkv is too short|can't be read"):
            call(path, ClipFormat(fps=16.0, num_frames=200, height=HEIGHT, width=WIDTH))


def test_pictures_beyond_the_limit_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(frames_module, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    images = [Image.fromarray(picture(number)) for number in range(6)]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:])
    for path in (
        write(tmp_path / "a.mp4", "libx264"),
        write(tmp_path / "a.gif", "gif", "rgb8"),
        tmp_path / "a.webp",
    ):
        with pytest.raises(ValueError, match=f"frames are {WIDTH} x {HEIGHT}, expected at most"):
            check_clip(path, FORM)


def test_times_that_fall_are_refused(tmp_path, monkeypatch):
    frames = [frames_module.Frame(start, None) for start in (0.0, 0.5, 0.4)]
    monkeypatch.setattr(frames_module, "_av_frames", lambda path: iter(frames))
    with pytest.raises(
        ValueError, match="the time of frame 2 is before that of the frame that it follows"
    ):
        list(clip_frames(write(tmp_path / "a.mp4", "libx264")))


MEASURE = """
import json, resource, sys
from streamvid.data.clips import ClipFormat, check_clip, read_clip
form = ClipFormat(num_frames=17, height=64, width=64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
check_clip(sys.argv[1], form); read_clip(sys.argv[1], form)
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, codec, pixels, size",
    [
        ("a.mp4", "libx264", "yuv420p", (2160, 3840)),
        ("a.gif", "gif", "rgb8", (4000, 4000)),
    ],
)
def test_memory_does_not_grow_with_the_clip(tmp_path, name, codec, pixels, size):
    """33 frames of 4K took 4.6 GB, a GIF of 4000 x 4000 5.9 GB in the check alone."""
    pictures = [np.zeros((*size, 3), np.uint8)] * 40
    path = write(tmp_path / name, codec, pixels, size=size, pictures=pictures)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < 900


def test_who_reads_no_clips_needs_no_decoder():
    code = (
        "import sys, streamvid.video, streamvid.teachers.clip_folder; assert not {'av',"
        " 'imageio_ffmpeg'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
