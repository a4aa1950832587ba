"""Images and clips that streams begin from: how they are decoded, by whom, and what is refused."""

import io
import json
import os
import re
import shlex
import struct
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from streamvid.cli import sample
from streamvid.frames import Frame
from streamvid.serving import decoding, protocol, starts, uploads
from streamvid.serving.decoding import Decoded, Job, decode
from streamvid.serving.limits import Limits
from streamvid.serving.server import create_app
from streamvid.serving.starts import StartFile, StartStore, child_environment
from streamvid.students.contexts import fill_first_chunk
from streamvid.students.folder import TINY_STUDENT, load_student
from streamvid.students.session import Session
from streamvid.video import from_uint8, read_video, write_video

PROMPT = "a large red circle moves to the right slowly"
RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def save(image, path, **options):
    image.save(path, **options)
    return path


def decoded(tmp_path, source, height=16, width=16, **changes):
    """The frames of a file, decoded here and read back as the server reads them."""
    job = Job(
        source=str(source),
        target=str(tmp_path / "decoded"),
        height=height,
        width=width,
        fps=changes.pop("fps", 16.0),
        only_first=False,
        max_frames=81,
        max_seconds=60.0,
        max_pixels=2**25,
        memory_bytes=2**31,
        cpu_seconds=20.0,
    )
    made = decode(replace(job, **changes))
    path = tmp_path / f"decoded{made.suffix}"
    images = StartFile(path).images()
    assert len(images) == made.num_frames and images.dtype == np.uint8
    return images


def stripes(width, height, colours, across=True):
    """A picture of stripes of equal size."""
    image = np.zeros((height, width, 3), np.uint8)
    for part, colour in zip(np.array_split(np.arange(width if across else height), 3), colours):
        image[(slice(None), part) if across else part] = colour
    return Image.fromarray(image)


def write_gif(path, levels, duration=100):
    pictures = [Image.new("RGB", (16, 16), (level,) * 3) for level in levels]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return path


# ---------------------------------------------------------------- what is made of a file


@pytest.mark.parametrize("size", [(16, 16), (9, 31)])
def test_a_picture_of_the_streams_size_stays_as_it_is(tmp_path, size):
    height, width = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    source = save(Image.fromarray(pixels), tmp_path / "a.png")
    assert np.array_equal(decoded(tmp_path, source, height, width), pixels[None])


@pytest.mark.parametrize("across", [True, False])
def test_a_picture_covers_the_stream_and_its_middle_stays(tmp_path, across):
    size = (96, 32) if across else (32, 96)
    source = save(stripes(*size, (RED, GREEN, BLUE), across), tmp_path / "a.png")
    images = decoded(tmp_path, source)
    assert np.abs(images[0, 2:-2, 2:-2].astype(int) - GREEN).max() <= 2


def test_what_is_cut_off_is_cut_off_evenly(tmp_path):
    source = save(stripes(48, 16, (RED, GREEN, BLUE)), tmp_path / "a.png")
    image = decoded(tmp_path, source, 16, 32)[0].astype(int)
    assert image[:, :6].mean(axis=(0, 1)) == pytest.approx(RED, abs=8)
    assert image[:, -6:].mean(axis=(0, 1)) == pytest.approx(BLUE, abs=8)
    assert image[:, 12:20].mean(axis=(0, 1)) == pytest.approx(GREEN, abs=8)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_what_is_transparent_lies_over_black(tmp_path, suffix):
    pixels = np.full((16, 16, 4), 200, np.uint8)
    pixels[:, :8, 3], pixels[:, 8:, 3] = 0, 128
    options = {"lossless": True} if suffix == "webp" else {}
    source = save(Image.fromarray(pixels), tmp_path / f"a.{suffix}", **options)
    image = decoded(tmp_path, source)[0]
    assert image[:, :8].max() == 0 and np.abs(image[:, 8:].astype(int) - 100).max() <= 1


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    picture = stripes(16, 16, (RED, RED, BLUE), across=False)
    source = save(picture, tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    image = decoded(tmp_path, source)[0].astype(int)
    assert image[:, :3].mean(axis=(0, 1)) == pytest.approx(BLUE, abs=12)  # the bottom goes left
    assert image[:, -6:].mean(axis=(0, 1)) == pytest.approx(RED, abs=12)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.full((5, 7), 100 * 257, np.uint16)),
        Image.new("L", (5, 7), 100),
        Image.new("LA", (5, 7), (100, 255)),
        Image.new("L", (5, 7), 100).quantize(4),
        Image.new("1", (5, 7), 1),
    ],
    ids=lambda image: image.mode,
)
def test_pictures_of_any_mode(tmp_path, image):
    frames = decoded(tmp_path, save(image, tmp_path / "a.png"))
    level = 255 if image.mode == "1" else 100
    assert frames.shape == (1, 16, 16, 3) and np.abs(frames.astype(int) - level).max() <= 1


def test_a_gif_is_a_picture_or_a_clip(tmp_path):
    assert len(decoded(tmp_path, write_gif(tmp_path / "one.gif", [80]))) == 1
    moving = write_gif(tmp_path / "moving.gif", [40, 120, 200], duration=125)
    assert decoded(tmp_path, moving)[:, 5, 5, 0].tolist() == [40, 40, 120, 120, 200]
    assert decoded(tmp_path, moving, only_first=True)[:, 5, 5, 0].tolist() == [40]


@pytest.mark.parametrize("rate, expected", [(16, list(range(12))), (8, None), (32, None)])
def test_a_clip_is_brought_to_the_streams_rate(tmp_path, rate, expected):
    levels = torch.arange(12).float() * 20 / 255
    write_video(levels.view(-1, 1, 1, 1).expand(-1, 3, 16, 16), tmp_path / "a.mp4", rate)
    seen = np.rint(decoded(tmp_path, tmp_path / "a.mp4")[:, 8, 8, 1] / 20).astype(int).tolist()
    if rate == 16:
        assert seen == expected
    if rate == 8:
        assert seen == [number // 2 for number in range(23)]
    if rate == 32:
        assert len(seen) == 7 and all(abs(place - 2 * i) <= 1 for i, place in enumerate(seen))


def test_of_a_long_clip_the_last_frames_are_kept(tmp_path):
    levels = torch.arange(12).float() * 20 / 255
    write_video(levels.view(-1, 1, 1, 1).expand(-1, 3, 16, 16), tmp_path / "a.mp4", 16)
    seen = decoded(tmp_path, tmp_path / "a.mp4", max_frames=5)[:, 8, 8, 1] / 20
    assert np.rint(seen).tolist() == [7, 8, 9, 10, 11]
    still = write_gif(tmp_path / "still.gif", [40, 200], duration=2000)
    assert decoded(tmp_path, still, max_frames=5)[:, 0, 0, 0].tolist() == [40, 40, 40, 40, 200]


times = st.lists(st.floats(0, 2), min_size=1, max_size=20).map(sorted)


@settings(max_examples=200, deadline=None)
@given(times, st.sampled_from([8.0, 16.0, 24.0]))
def test_at_each_place_the_last_frame_that_has_begun_is_shown(starts_s, fps):
    frames = [Frame(start, lambda: None) for start in starts_s]
    shown = []
    for frame, place, count in decoding.resample(iter(frames), fps):
        assert place == len(shown) and count >= 1
        shown += [frame] * count
    places = [round((start - starts_s[0]) * fps) for start in starts_s]
    expected = [
        frames[max(i for i, place in enumerate(places) if place <= k)]
        for k in range(places[-1] + 1)
    ]
    assert shown == expected


@pytest.mark.parametrize("size", [(16, 16), (17, 31)])
def test_frames_are_kept_without_loss(tmp_path, size):
    images = np.random.default_rng(0).integers(0, 256, (5, *size, 3), np.uint8)
    decoding.write_lossless(images, str(tmp_path / "a.mkv"), 16.0)
    assert torch.equal(read_video(tmp_path / "a.mkv")[0], from_uint8(images))
    assert np.array_equal(StartFile(tmp_path / "a.mkv").images(), images)


@pytest.mark.parametrize("count, expected", [(1, [0] * 9), (4, [0] * 6 + [1, 2, 3]), (12, None)])
def test_what_is_shorter_than_the_first_chunk_is_lengthened_in_front(count, expected):
    student = SimpleNamespace(
        stream=SimpleNamespace(chunk_frames=3), codec=SimpleNamespace(temporal_ratio=4)
    )
    frames = torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    filled = fill_first_chunk(frames, student)[:, 0, 0, 0].tolist()
    assert filled == (expected or list(range(12)))


# ---------------------------------------------------------------- uploads


def png(width, height, body=b""):
    """A PNG that claims a size."""

    def part(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = part(b"IDAT", body or zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + data + part(b"IEND", b"")


def bytes_of(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    """A clip of 20 frames, whose index is at its end."""
    path = tmp_path_factory.mktemp("clips") / "a.mp4"
    levels = torch.linspace(0, 1, 20).view(-1, 1, 1, 1)
    write_video(levels.expand(-1, 3, 32, 32) * torch.ones(3, 32, 32), path, 16)
    return path.read_bytes()


def post(client, data, name="upload.png", **fields):
    return client.post("/v1/starts", files={"file": (name, data)}, data=fields)


def test_an_upload_is_told_as_what_a_stream_begins_from(make_client, mp4):
    client = make_client()
    said = post(client, bytes_of(Image.new("RGB", (50, 20), RED)), "fox.txt").json()
    assert re.fullmatch(r"start_[0-9a-f]{32}", said["id"])
    assert (said["kind"], said["num_frames"]) == ("image", 1)
    assert (said["width"], said["height"]) == (16, 16)
    clip = post(client, mp4, width="32", height="24").json()
    assert (clip["kind"], clip["width"], clip["height"]) == ("clip", 32, 24)
    assert clip["num_frames"] > 81 - 60  # 20 frames of 1.2 seconds at 100 per second, the last 81
    assert client.get(f"/v1/starts/{clip['id']}").json() == clip
    assert post(client, mp4, kind="image").json()["kind"] == "image"
    assert client.get(f"/v1/starts/{said['id']}/content").headers["content-type"] == "image/png"
    assert client.delete(f"/v1/starts/{said['id']}").json()["deleted"]
    assert client.get(f"/v1/starts/{said['id']}").status_code == 404


HOSTILE = {
    "empty": (b"", 400, "empty"),
    "text": (b"no picture at all, but a text", 415, "image/png"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "image/png"),
    "playlist": (b"#EXTM3U\nfile:///etc/passwd\n", 415, "image/png"),
    "cut off": (bytes_of(Image.effect_noise((99, 99), 50))[:900], 400, "cut off"),
    "only a head": (b"\x89PNG\r\n\x1a\n", 400, "can't be used"),
    "jpeg head": (b"\xff\xd8\xff\xe0" + bytes(400), 400, "can't be used"),
    "gif head": (b"GIF89a" + bytes(400), 400, "can't be used"),
    "mp4 head": (b"\x00\x00\x00\x18ftypmp42" + bytes(500), 400, "can't be used"),
    "webm head": (b"\x1a\x45\xdf\xa3" + bytes(500), 400, "can't be used"),
    "claims 10^9 pixels": (png(40_000, 40_000), 400, "pixels"),
    "bomb": (png(6000, 6000, zlib.compress(bytes(6000 * 18001), 9)), 400, "pixels"),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A server that outlives many uploads."""
    student = SimpleNamespace(
        transformer=torch.nn.Linear(1, 1),
        stream=SimpleNamespace(num_steps=4, chunk_frames=1, window_frames=2),
        codec=SimpleNamespace(temporal_ratio=4),
    )
    app = create_app(
        student, height=16, width=16, folder=tmp_path_factory.mktemp("clips"), warm_up=False
    )
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_picture_is_answered_in_one_line(shared, name):
    data, status, word = HOSTILE[name]
    reply = post(shared, data)
    message = reply.json()["error"]["message"]
    assert reply.status_code == status and word in message
    assert "\n" not in message and "/tmp" not in message and "upload" not in message
    assert shared.get("/healthz").status_code == 200


def test_a_clip_that_is_cut_off_is_answered_in_one_line(shared, mp4):
    for share in (0.3, 0.9):
        reply = post(shared, mp4[: int(share * len(mp4))])
        assert reply.status_code == 400 and "/" not in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "files, fields",
    [
        ({}, {}),
        ({}, {"file": "text"}),
        ({"picture": b"x"}, {}),
        ({"file": b"x", "other": b"y"}, {}),
        ({"file": b"\x89PNG\r\n\x1a\n"}, {"width": "0"}),
        ({"file": b"\x89PNG\r\n\x1a\n"}, {"width": "1e3"}),
        ({"file": b"\x89PNG\r\n\x1a\n"}, {"width": "9999", "height": "9999"}),
        ({"file": b"\x89PNG\r\n\x1a\n"}, {"kind": "sound"}),
        ({"file": b"\x89PNG\r\n\x1a\n"}, {"path": "/etc/passwd"}),
    ],
)
def test_a_wrong_form_is_answered_400(shared, files, fields):
    reply = shared.post("/v1/starts", files=files, data=fields)
    assert reply.status_code == 400 and "\n" not in reply.json()["error"]["message"]


def test_a_body_that_is_no_form_is_answered_400(shared):
    for kind in ("application/json", "multipart/form-data", "text/plain"):
        reply = shared.post("/v1/starts", content=b"{}", headers={"content-type": kind})
        assert reply.status_code == 400


def test_too_many_bytes_are_answered_413(make_client):
    client = make_client(limits={"start_bytes": 2000})
    assert post(client, bytes_of(Image.new("RGB", (9, 9)))).status_code == 200
    assert post(client, bytes(2001 * b"a")).status_code in (413, 415)
    long = bytes_of(Image.effect_noise((99, 99), 50))
    assert len(long) > 2000 and post(client, long).status_code == 413
    assert post(client, bytes(200_000)).status_code == 413
    chunks = (bytes(10_000) for _ in range(100))  # without a length
    head = {"content-type": "multipart/form-data; boundary=b"}
    assert client.post("/v1/starts", content=chunks, headers=head).status_code == 413


def test_a_clip_that_is_too_long_is_refused(make_client, mp4, tmp_path):
    client = make_client(limits={"start_seconds": 1.0})
    gif = write_gif(tmp_path / "long.gif", [0, 50, 100], duration=700).read_bytes()
    for data in (mp4, gif):
        reply = post(client, data)
        assert (
            reply.status_code == 400 and "longer than 1 seconds" in reply.json()["error"]["message"]
        )


def test_who_decodes_for_too_long_is_given_up(make_client):
    client = make_client(limits={"start_decode_seconds": 0.01})
    reply = post(client, bytes_of(Image.new("RGB", (9, 9))))
    assert reply.status_code == 400 and "took longer" in reply.json()["error"]["message"]


def test_who_needs_too_much_memory_is_refused(make_client):
    """The picture is within the limit of pixels, its process is not within that of memory."""
    client = make_client(limits={"start_decode_bytes": 250 * 2**20})
    reply = post(client, bytes_of(Image.new("RGBA", (3000, 3000))))
    assert reply.status_code == 400 and "memory" in reply.json()["error"]["message"]
    assert post(client, bytes_of(Image.new("RGB", (9, 9)))).status_code == 200


@pytest.mark.parametrize(
    "limits, status",
    [({"start_upload_seconds": 0.0}, 408), ({"starts_decoded": 1, "starts_waiting": -1}, 429)],
)
@pytest.mark.filterwarnings("ignore:coroutine")  # the form of which nothing was read
def test_who_has_to_wait_for_too_long_is_told(make_client, limits, status):
    client = make_client(limits=limits)
    for _ in range(2):
        assert post(client, bytes_of(Image.new("RGB", (9, 9)))).status_code == status


def test_a_process_that_dies_harms_nobody(shared, monkeypatch):
    monkeypatch.setattr(starts.sys, "executable", "/bin/false")
    reply = post(shared, bytes_of(Image.new("RGB", (9, 9))))
    assert reply.status_code == 400 and "can't be decoded" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"suffix": ".png"}',
        b'{"suffix": "/../../x", "num_frames": 1}',
        b'{"suffix": ".mkv", "num_frames": 10}',
        b'{"suffix": ".mkv", "num_frames": 0}',
        b'{"suffix": ".mkv", "num_frames": null}',
        b'{"error": "two\\nlines"}',
    ],
)
def test_a_process_that_was_taken_over_can_say_nothing_but_no(said):
    with pytest.raises(ValueError, match="the file can't be") as error:
        starts.read_answer(said, 9)
    assert "\n" not in str(error.value)
    assert starts.read_answer(b'{"suffix": ".mkv", "num_frames": 9}', 9) == Decoded(".mkv", 9)


def test_a_disk_without_room_is_told(shared, monkeypatch):
    def full(*_):
        raise OSError(28, "no room")

    monkeypatch.setattr(uploads.shutil, "copyfileobj", full)
    reply = post(shared, bytes_of(Image.new("RGB", (9, 9))))
    assert reply.status_code == 507 and "no room" in reply.json()["error"]["message"]


def test_the_process_knows_no_secrets():
    kept = child_environment({"STREAMVID_TOKEN": "x", "PATH": "/bin", "PYTHONPATH": "/a"})
    assert kept["PATH"] == "/bin" and kept["PYTHONPATH"].endswith(f"{os.pathsep}/a")
    assert "x" not in kept.values()


def test_a_token_and_the_own_origin_are_demanded(make_client):
    token = "0123456789abcdef"
    client = make_client(token=token)
    data = bytes_of(Image.new("RGB", (9, 9)))
    assert post(client, data).status_code == 401
    client.headers["authorization"] = f"Bearer {token}"
    assert post(client, data).status_code == 200
    client.headers["origin"] = "http://elsewhere.example"
    assert post(client, data).status_code == 403


def store_of(tmp_path, **options):
    store = StartStore(tmp_path / "starts", **{"most": 2, "life_s": 3600.0, **options})

    def add():
        start_id = store.new_id()
        (store.folder / f"{start_id}.png").write_bytes(bytes_of(Image.new("RGB", (4, 4))))
        return store.add(start_id, Decoded(".png", 1), 4, 4)

    return store, add


def test_the_oldest_starts_make_room_and_their_files_go_with_the_last_who_holds_them(tmp_path):
    store, add = store_of(tmp_path)
    ids = [add().id for _ in range(3)]
    held = store.get(ids[1]).file
    ids.append(add().id)
    assert [store.get(one) is None for one in ids] == [True, True, False, False]
    assert len(list(store.folder.iterdir())) == 3
    assert held.images().shape == (1, 4, 4, 3)
    del held
    assert len(list(store.folder.iterdir())) == 2
    assert len(set(ids)) == 4


def test_an_old_start_is_forgotten(tmp_path):
    store, add = store_of(tmp_path, life_s=0.0)
    start_id = add().id
    assert store.get(start_id) is None
    assert not list(store.folder.iterdir())


# ---------------------------------------------------------------- streams


@pytest.fixture(scope="module")
def student():
    return load_student(TINY_STUDENT)


@pytest.fixture
def client(student, tmp_path):
    limits = Limits(start_frames=20)
    app = create_app(student, folder=tmp_path / "clips", warm_up=False, limits=limits)
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def start_of(student, prompt=PROMPT, num_chunks=4):
    """Frames that the student has made, bytes ``[T, H, W, 3]``."""
    session = Session(student, prompt, seed=3, height=64, width=64)
    return np.concatenate([session.next_chunk().images for _ in range(num_chunks)])


def upload_frames(client, images, tmp_path):
    """The id of an upload without loss, of one image or of a clip."""
    if len(images) == 1:
        return post(client, bytes_of(Image.fromarray(images[0]))).json()["id"]
    decoding.write_lossless(images, str(tmp_path / "upload.mkv"), 16.0)
    return post(client, (tmp_path / "upload.mkv").read_bytes()).json()["id"]


@pytest.mark.parametrize("count", [1, 14])
def test_a_stream_goes_on_from_what_was_uploaded(client, live, student, tmp_path, count):
    images = start_of(student)[-count:]
    start_id = upload_frames(client, images, tmp_path)
    with live(client) as viewer:
        viewer.send("session.start", prompt=PROMPT, seed=5, start=start_id, num_frames=8)
        first = viewer.until("video.start").chunk
        viewer.until("session.done")
    frames = fill_first_chunk(from_uint8(images), student)
    session = Session(student, PROMPT, seed=5, height=64, width=64, start=frames)
    assert first == session.index > 0
    expected = np.concatenate([session.next_chunk().images for _ in range(4)])
    for header, picture in viewer.frames:
        assert picture == protocol.encode_picture(expected[header.sequence], "jpeg")
    from_noise = Session(student, PROMPT, seed=5, height=64, width=64).next_chunk().images
    assert np.abs(from_noise[-1].astype(int) - expected[0]).mean() > 2


def test_starting_over_begins_from_the_same_frames(client, live, student, tmp_path):
    start_id = upload_frames(client, start_of(student)[-1:], tmp_path)
    with live(client) as viewer:
        viewer.send("session.start", prompt=PROMPT, seed=5, start=start_id, fps=60)
        first = viewer.until("video.start").chunk
        before = viewer.next_frame()[1]
        client.delete(f"/v1/starts/{start_id}")  # the stream has it still
        viewer.send("session.reset")
        assert viewer.until("session.restarted").chunk == first
        viewer.until("video.chunk")
        assert viewer.next_frame()[1] == before


@pytest.mark.parametrize("count", [1, 14])
def test_the_command_of_a_recording_makes_the_very_same_clip(
    client, live, student, tmp_path, monkeypatch, count
):
    start_id = upload_frames(client, start_of(student)[-count:], tmp_path)
    with live(client) as viewer:
        viewer.send("session.start", prompt=PROMPT, seed=5, steps=1, fps=60, start=start_id)
        viewer.until("video.chunk")
        viewer.send("record.start")
        started = viewer.until("record.started")
        viewer.until("video.chunk")
        viewer.until("video.chunk")
        viewer.send("record.stop")
        done = viewer.until("record.done")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(done.command)
    name = words[words.index("--start") + 1]
    assert name == ("start.png" if count == 1 else "start.mkv")
    reply = client.get(done.start_url)
    assert f'filename="{name}"' in reply.headers["content-disposition"]
    (tmp_path / name).write_bytes(reply.content)
    (tmp_path / "recorded.mp4").write_bytes(client.get(done.url).content)
    (tmp_path / "stream.yaml").write_text(done.script)
    assert sample.main(words[3:]) == 0
    assert torch.equal(read_video("recorded.mp4")[0], read_video("clip.mp4")[0])
    assert client.delete(f"/v1/videos/{started.id}").json()["deleted"]
    assert not list((tmp_path / "clips").iterdir())
    assert client.get(done.start_url).status_code == 404


def test_a_recording_from_noise_has_no_start(make_client, live):
    client = make_client()
    with live(client) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.send("record.start")
        viewer.until("record.started")
        viewer.until("video.chunk")
        viewer.send("record.stop")
        done = viewer.until("record.done")
    assert done.start_url is None and "--start" not in done.command
    assert client.get(f"/v1/videos/{done.id}/start").status_code == 404


def test_a_start_that_does_not_fit_is_told_before_the_stream_begins(make_client, live):
    client = make_client()
    start_id = post(client, bytes_of(Image.new("RGB", (9, 9)))).json()["id"]
    wrong = [
        ({"start": "start_" + 32 * "0"}, "no such start"),
        ({"start": "../../etc/passwd"}, "start"),
        ({"start": start_id, "width": 32}, "16 x 16"),
    ]
    with live(client) as viewer:
        for fields, word in wrong:
            viewer.send("session.start", prompt="one", **fields)
            error = viewer.until("error")
            assert error.code == "bad_message" and word in error.message
    assert not viewer.of_type("video.start")


def test_the_job_is_all_that_the_process_is_told(tmp_path):
    job = starts.plan_job(tmp_path / "a.png", tmp_path / "b", 16, 16, 16.0, "image", Limits())
    assert job.only_first and Job(**json.loads(json.dumps(vars(job)))) == job
