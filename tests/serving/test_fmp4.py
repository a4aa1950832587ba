"""H.264 in fragmented MP4: what a client decodes is what the server's model has made."""

import io
import itertools

import av
import numpy as np
import pytest

from streamvid.frames import clip_frames
from streamvid.serving import protocol
from streamvid.serving.encoding import PictureEncoder, encode_frames
from streamvid.serving.fmp4 import KEY_EVERY_S, FragmentEncoder, split_boxes
from streamvid.serving.stream import Frames

HEIGHT, WIDTH = 48, 64
FPS = 16.0


def picture(number):
    """A gradient with a bright block that moves; each number gives another picture."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[..., 0] = np.linspace(30, 200, WIDTH)
    image[..., 1] = np.linspace(200, 30, HEIGHT)[:, None]
    left = 3 * number % (WIDTH - 16)
    image[16:32, left : left + 16] = (250, 240, 40)
    return image


def chunk_of(number, num_frames=4):
    images = np.stack([picture(number * num_frames + i) for i in range(num_frames)])
    return Frames(images, number * num_frames, number, 0, 0, 0, False)


def encode(encoder, numbers, stride=1):
    """The messages of some chunks, every ``stride``-th frame of them."""
    chunks = [chunk_of(number) for number in numbers]
    made = [encode_frames(chunk, range(0, 4, stride), encoder, FPS) for chunk in chunks]
    return [protocol.unpack_frame(message) for message in itertools.chain(*made)]


def decode(initialisation, fragments, tmp_path):
    """(pictures, times in seconds) as a player sees them."""
    path = tmp_path / "received.mp4"
    path.write_bytes(initialisation + b"".join(fragments))
    frames = list(clip_frames(path))
    return np.stack([frame.picture() for frame in frames]), [frame.start for frame in frames]


def psnr(a, b):
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-9))


@pytest.fixture
def encoder():
    return FragmentEncoder(HEIGHT, WIDTH, FPS, protocol.QUALITY)


def test_each_fragment_shows_its_frame_at_once(encoder, tmp_path):
    """No frame is held back: after k fragments k pictures can be seen, in the right colours."""
    frames = encode(encoder, range(3))
    for count in range(1, len(frames) + 1):
        bodies = [body for _, body in frames[:count]]
        pictures, times = decode(encoder.initialisation, bodies, tmp_path)
        assert len(pictures) == count
        assert times == pytest.approx([i / FPS for i in range(count)], abs=1e-4)
    for (header, _), seen in zip(frames, pictures):
        assert psnr(seen, picture(header.sequence)) > 34
        assert psnr(seen, picture(header.sequence + 1)) < 30  # so the right one is told apart


def test_a_fragment_is_one_frame_and_the_first_one_is_a_key_frame(encoder):
    frames = encode(encoder, range(2))
    assert [kind for kind, _ in split_boxes(encoder.initialisation)] == [b"ftyp", b"moov"]
    for _, body in frames:
        assert [kind for kind, _ in split_boxes(body)] == [b"moof", b"mdat"]
    assert [header.flags & protocol.KEY_FRAME for header, _ in frames] == [8] + 7 * [0]
    assert [header.flags & protocol.FIRST_OF_CHUNK for header, _ in frames] == [1, 0, 0, 0] * 2
    numbers = [int.from_bytes(body[20:24], "big") for _, body in frames]  # of moof.mfhd
    assert numbers == list(range(1, 9))


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_after_dropped_chunks_every_picture_is_right_and_time_has_no_gap(encoder, tmp_path, stride):
    frames = encode(encoder, [0, 1, 4, 5, 9], stride)
    bodies = [body for _, body in frames]
    pictures, times = decode(encoder.initialisation, bodies, tmp_path)
    assert len(pictures) == len(frames)
    assert times == pytest.approx([stride * i / FPS for i in range(len(frames))], abs=1e-4)
    for (header, _), seen in zip(frames, pictures):
        assert psnr(seen, picture(header.sequence)) > 34
    keys = [header.sequence for header, _ in frames if header.flags & protocol.KEY_FRAME]
    assert keys == [0, 16, 36]


def test_a_client_may_begin_again_at_any_key_frame(encoder, tmp_path):
    frames = encode(encoder, [0, 1, 4, 5])
    begin = next(i for i, (header, _) in enumerate(frames) if header.sequence == 16)
    assert frames[begin][0].flags & protocol.KEY_FRAME
    pictures, _ = decode(encoder.initialisation, [body for _, body in frames[begin:]], tmp_path)
    assert len(pictures) == 8
    for number, seen in enumerate(pictures):
        assert psnr(seen, picture(16 + number)) > 34


def test_a_key_frame_comes_at_least_every_few_seconds(encoder):
    frames = encode(encoder, range(40))
    keys = [header.sequence for header, _ in frames if header.flags & protocol.KEY_FRAME]
    assert keys == list(range(0, 160, int(KEY_EVERY_S * FPS)))


def test_another_rate_of_playback_shows_frames_for_longer(encoder, tmp_path):
    bodies = [encoder.encode(picture(i), i, 0, 1, 16.0 if i < 4 else 8.0)[0] for i in range(7)]
    _, times = decode(encoder.initialisation, bodies, tmp_path)
    assert times == pytest.approx([0, 1 / 16, 2 / 16, 3 / 16, 4 / 16, 6 / 16, 8 / 16], abs=1e-4)


def test_a_lower_quality_takes_fewer_bytes():
    sizes = []
    for quality in (100, 20):
        frames = encode(FragmentEncoder(HEIGHT, WIDTH, FPS, quality), range(3))
        sizes.append(sum(len(body) for _, body in frames))
    assert sizes[1] < 0.7 * sizes[0]


def test_it_takes_fewer_bytes_than_pictures(encoder):
    pictures = encode(PictureEncoder("jpeg", protocol.QUALITY), range(5))
    fragments = encode(encoder, range(5))
    sizes = [sum(len(body) for _, body in frames) for frames in (pictures, fragments)]
    assert sizes[1] < sizes[0] / 2


# ---------------------------------------------------------------- live streams


def fragments_of(viewer):
    """What a viewer has received: the initialisation, and the frames after it."""
    (first, initialisation), *frames = viewer.frames
    assert first.flags == protocol.INITIALISATION
    assert not any(header.flags & protocol.INITIALISATION for header, _ in frames)
    assert all(header.encoding == "h264" for header, _ in viewer.frames)
    return initialisation, frames


def jpegs(make_client, live, num_frames):
    """The same stream as pictures, by sequence."""
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one", seed=9, num_frames=num_frames)
        viewer.until("session.done")
    return {header.sequence: protocol.decode_picture(body) for header, body in viewer.frames}


def test_a_viewer_sees_what_the_viewer_of_pictures_sees(make_client, live, tmp_path):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one", seed=9, num_frames=40, format="h264")
        start = viewer.until("video.start")
        viewer.until("session.done")
    initialisation, frames = fragments_of(viewer)
    record = initialisation.index(b"avcC") + 4
    assert start.format == "h264"
    assert start.codec == f"avc1.{initialisation[record + 1 : record + 4].hex()}"
    seen, _ = decode(initialisation, [body for _, body in frames], tmp_path)
    same = jpegs(make_client, live, 40)
    sequences = [header.sequence for header, _ in frames]
    shared = [i for i, sequence in enumerate(sequences) if sequence in same]
    assert len(seen) == len(frames) and len(shared) >= 12
    assert min(psnr(seen[i], same[sequences[i]]) for i in shared) > 34


def test_a_viewer_that_confirms_nothing_gets_a_stream_that_can_be_decoded(
    make_client, live, tmp_path
):
    """What it missed leaves no trace in what it got."""
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one", seed=9, acks=True, format="h264")
        while len(viewer.frames) < 105:  # every frame, and then every second
            viewer.receive()
        dropped = viewer.of_type("video.chunk")[-1].dropped
    initialisation, frames = fragments_of(viewer)
    gaps = np.diff([header.sequence for header, _ in frames])
    assert {1, 2} <= set(gaps) and dropped > 0
    seen, _ = decode(initialisation, [body for _, body in frames], tmp_path)
    assert len(seen) == len(frames)
    for (header, _), image in zip(frames, seen):
        expected = np.array([live.red_of("one"), 8 * header.chunk % 256, 9])
        assert np.abs(image.reshape(-1, 3).mean(axis=0) - expected).max() < 4


def test_a_stream_that_begins_again_begins_with_a_key_frame(make_client, live):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one", format="h264")
        viewer.until("video.chunk", chunk=3)
        viewer.send("session.reset")
        viewer.until("session.restarted")
        sequence = viewer.until("video.chunk").sequence
        header, _ = viewer.next_frame()
    assert header.sequence == sequence and header.flags & protocol.KEY_FRAME


@pytest.mark.parametrize("size", [{"height": 15}, {"width": 17}])
def test_an_odd_size_is_refused_in_one_line(make_client, live, size):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one", format="h264", **size)
        error = viewer.until("error")
        assert error.code == "bad_request" and "even size" in error.message
        assert viewer.until("session.done").reason == "error"


def test_a_server_without_libx264_says_so(make_client, live, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mjpeg"})
    client = make_client()
    assert client.get("/v1/info").json()["formats"] == ["jpeg", "webp"]
    with live(client) as viewer:
        viewer.send("session.start", prompt="one", format="h264")
        assert "libx264" in viewer.until("error").message


def test_boxes_are_split_where_they_end():
    data = b"\x00\x00\x00\x0cabcd1234" + b"\x00\x00\x00\x08efgh"
    assert split_boxes(data) == [(b"abcd", data[:12]), (b"efgh", data[12:])]
    with av.open(io.BytesIO(FragmentEncoder(16, 16, 25.0, 50).initialisation)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
