"""Streams that are kept on the server's disk, and go on from there."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from streamvid.serving import command, protocol
from streamvid.serving.limits import Limits
from streamvid.serving.server import create_app
from streamvid.serving.snapshots import Snapshots
from streamvid.serving.starts import StartFile, StartStore
from streamvid.students.folder import TINY_STUDENT, load_student
from streamvid.students.session import Session

OLD = "a large red circle moves to the right slowly"
NEW = "a large blue square moves down slowly"


@pytest.fixture(scope="module")
def student():
    return load_student(TINY_STUDENT)


@pytest.fixture
def open_server(student, tmp_path):
    """``open_server(**options)``: a client of a server whose snapshots are in ``state``."""

    def make(limits=None, **options):
        given = {"folder": tmp_path / "clips", "state": tmp_path / "state", "warm_up": False}
        app = create_app(student, limits=Limits(**limits or {}), **{**given, **options})
        return TestClient(app, base_url="http://localhost")

    return make


def watch(viewer, num_frames):
    """So many more frames, each confirmed."""
    for _ in range(num_frames):
        header, _ = viewer.next_frame()
        viewer.send("ack", sequence=header.sequence)


def goes_on_from(viewer, earlier, made):
    """Whether what a viewer sees is what the earlier one has seen after its snapshot."""
    before = {header.sequence - made.sequence: picture for header, picture in earlier.frames}
    shared = [header.sequence for header, _ in viewer.frames if header.sequence in before]
    same = all(
        before[h.sequence] == picture for h, picture in viewer.frames if h.sequence in shared
    )
    return same and len(shared) >= 12


def steer(viewer, **options):
    """A stream with a past: a blend under way, other steps and another seed."""
    viewer.send("session.start", prompt=OLD, seed=5, steps=1, fps=60, acks=True, **options)
    watch(viewer, 9)
    viewer.send("session.prompt_update", prompt=NEW, mode="blend", blend_chunks=4)
    viewer.send("session.update", steps=2, seed=6)
    viewer.until("prompt.applied")


def test_a_stream_goes_on_bit_for_bit_in_another_server(open_server, live, tmp_path):
    with open_server() as client, live(client) as first:
        assert client.get("/v1/info").json()["snapshots"]
        steer(first)
        first.send("session.snapshot")
        made = first.until("snapshot.made")
        watch(first, 24)
    assert re.fullmatch(r"snapshot_[0-9a-f]{32}", made.id) and not made.autosave
    assert [path.name for path in (tmp_path / "state").iterdir()] == [f"{made.id}.safetensors"]
    with open_server() as client, live(client) as second:
        second.send("session.start", snapshot=made.id, fps=60, acks=True)
        start = second.until("video.start")
        assert (start.prompt, start.seed, start.steps) == (NEW, 6, 2)
        assert (start.height, start.width, start.chunk) == (64, 64, made.chunk)
        watch(second, 16)
        second.send("script.get")
        assert "mode: blend" in second.until("script").script
        second.send("session.reset")
        again = second.until("session.restarted")
        assert (again.prompt, again.seed, again.steps, again.chunk) == (NEW, 6, 2, 0)
    assert second.frames[0][0].chunk == made.chunk > 0
    assert goes_on_from(second, first, made)


def test_what_was_asked_before_the_snapshot_is_in_it(open_server, live):
    with open_server() as client:
        with live(client) as first:
            first.send("session.start", prompt=OLD, seed=5, steps=1, fps=60, acks=True)
            watch(first, 5)
            first.send("session.pause")
            first.until("session.paused")
            first.send("session.prompt_update", prompt=NEW)
            first.send("session.update", seed=8)
            first.send("session.snapshot")
            made = first.until("snapshot.made")
            first.send("session.resume")
            first.until("prompt.applied")
            watch(first, 16)
        with live(client) as second:
            second.send("session.start", snapshot=made.id, fps=60, acks=True)
            start = second.until("video.start")
            assert (start.prompt, start.seed) == (NEW, 8)
            watch(second, 16)
    assert goes_on_from(second, first, made)


def test_a_stream_is_kept_by_itself_under_one_name(open_server, live, tmp_path):
    with open_server(autosave=2) as client:
        with live(client) as first:
            first.send("session.start", prompt=OLD, seed=5, steps=1, fps=60, acks=True)
            watch(first, 36)
            first.send("session.pause")
            first.until("session.paused")
        saved = first.of_type("snapshot.made")
        assert len({one.id for one in saved}) == 1 and all(one.autosave for one in saved)
        assert [one.chunk for one in saved] == list(range(2, 2 * len(saved) + 1, 2))
        assert len(list((tmp_path / "state").iterdir())) == 1
        with live(client) as second:
            second.send("session.start", snapshot=saved[0].id, num_frames=4)
            assert second.until("video.start").chunk == saved[-1].chunk
            second.until("session.done")


def test_the_frames_that_a_stream_began_from_are_kept_with_it(open_server, live, tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 20, 20)).save(picture, "PNG")
    with open_server() as client, live(client) as first:
        upload = client.post("/v1/starts", files={"file": ("a.png", picture.getvalue())}).json()
        first.send("session.start", prompt=OLD, seed=5, steps=1, fps=60, start=upload["id"])
        first.until("video.chunk")
        first.send("session.snapshot")
        made = first.until("snapshot.made")
    names = {f"{made.id}.png", f"{made.id}.safetensors"}
    assert {path.name for path in (tmp_path / "state").iterdir()} == names
    with open_server() as client, live(client) as second:
        second.send("session.start", snapshot=made.id, fps=60)
        second.send("record.start")
        second.until("record.started")
        second.until("video.chunk")
        second.send("session.reset")
        second.until("session.restarted")
        assert second.of_type("session.restarted")[0].chunk >= 1  # from its frames, not from noise
        done = second.until("record.done")
        assert "--start start.png" in done.command
        with Image.open(io.BytesIO(client.get(done.start_url).content)) as image:
            assert image.getpixel((5, 5)) == (90, 20, 20)


def break_file(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def cut_file(path):
    path.write_bytes(path.read_bytes()[:-1000])


def other_student(path):
    other = load_student(TINY_STUDENT)
    next(other.transformer.parameters()).data += 1
    Session(other, OLD, height=64, width=64).snapshot(path)


@pytest.mark.parametrize(
    "harm, word",
    [(break_file, "damaged"), (cut_file, "damaged"), (other_student, "another student")],
)
def test_a_file_that_does_not_fit_ends_the_stream_with_one_line(
    open_server, live, student, tmp_path, harm, word
):
    path = tmp_path / "state" / f"snapshot_{32 * 'a'}.safetensors"
    path.parent.mkdir()
    Session(student, OLD, height=64, width=64).snapshot(path)
    harm(path)
    with open_server() as client, live(client) as viewer:
        viewer.send("session.start", snapshot=path.stem)
        error = viewer.until("error")
        assert error.code == "bad_request" and word in error.message
        assert "\n" not in error.message and str(tmp_path) not in error.message
        assert viewer.until("session.done").reason == "error"
        viewer.send("session.start", prompt=OLD, num_frames=1)  # the server lives on
        assert viewer.until("session.done").reason == "finished"


def test_an_id_that_is_none_is_refused(make_client, live, tmp_path):
    with live(make_client(state=tmp_path / "state")) as viewer:
        viewer.send("session.start", snapshot=f"snapshot_{32 * '0'}")
        assert "no such snapshot" in viewer.until("error").message
        viewer.until("session.done")
        for wrong in ("../../etc/passwd", "snapshot_", f"snapshot_{32 * '0'}/../x"):
            viewer.send("session.start", snapshot=wrong)
            error = viewer.until("error")
            assert error.code == "bad_message" and "snapshot" in error.message


def test_a_server_without_a_folder_keeps_nothing(make_client, live):
    client = make_client()
    assert not client.get("/v1/info").json()["snapshots"]
    with live(client) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.send("session.snapshot")
        assert "--state" in viewer.until("error").message
        viewer.until("video.chunk")  # the stream goes on
        viewer.send("session.stop")
        viewer.until("session.done")
        viewer.send("session.start", snapshot=f"snapshot_{32 * '0'}")
        assert "--state" in viewer.until("error").message


@pytest.mark.parametrize("field", ["prompt", "seed", "steps", "height", "width", "start"])
def test_what_the_snapshot_says_is_not_said_again(field):
    value = {"prompt": "one", "start": f"start_{32 * '0'}"}.get(field, 7)
    fields = {"type": "session.start", "snapshot": f"snapshot_{32 * '0'}", "fps": 20}
    assert protocol.parse_viewer_message(json.dumps(fields)).prompt is None
    with pytest.raises(ValueError, match=f"{field}: the snapshot says it"):
        protocol.parse_viewer_message(json.dumps({**fields, field: value}))


def test_a_stream_from_nothing_needs_a_prompt():
    with pytest.raises(ValueError, match="prompt: a stream needs one"):
        protocol.parse_viewer_message('{"type": "session.start"}')


def test_a_full_disk_does_not_end_the_stream(open_server, live, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(Session, "snapshot", full)
    with open_server(autosave=2) as client, live(client) as viewer:
        viewer.send("session.start", prompt=OLD, steps=1, fps=60, num_frames=30)
        viewer.send("session.snapshot")
        error = viewer.until("error")
        assert (error.code, "disk full" in error.message) == ("snapshot_failed", True)
        assert viewer.until("session.done").reason == "finished"
    assert len([one for one in viewer.messages if one.type == "error"]) >= 2


class Kept:
    """A session that is one file."""

    def snapshot(self, path):
        path.write_text("kept")


@pytest.fixture
def store(tmp_path):
    starts = StartStore(tmp_path / "starts", 4, 60.0)
    return Snapshots(tmp_path / "state", 2, starts)


def test_the_oldest_snapshots_make_room_with_their_frames(store, tmp_path):
    frames = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(frames)
    start, ids = StartFile(frames), [store.new_id() for _ in range(3)]
    for number, snapshot_id in enumerate(ids):
        store.save(snapshot_id, Kept(), start)
        os.utime(store.folder / f"{snapshot_id}.safetensors", (number, number))
    store.save(ids[1], Kept(), start)  # again: now it is the newest
    expected = {f"{name}{suffix}" for name in ids[1:] for suffix in (".safetensors", ".png")}
    assert {path.name for path in store.folder.iterdir()} == expected
    with pytest.raises(ValueError, match="no such snapshot"):
        store.open(ids[0], Path.read_text)
    session, own = store.open(ids[1], Path.read_text)
    assert session == "kept" and own.images().shape == (1, 4, 4, 3)
    assert own.path.parent == tmp_path / "starts"
    del own
    assert (store.folder / f"{ids[1]}.png").is_file()


@pytest.mark.parametrize("arguments", [["--autosave", "3"], ["--state", "x", "--autosave", "0"]])
def test_keeping_nothing_is_refused(arguments, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert "--autosave" in error and error.count("\n") == 1


# ---------------------------------------------------------------- a server that is killed


class Server:
    """A real server in a process of its own."""

    def __init__(self, state):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "streamvid.serving.command", "--port", "0", "--state", state],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self.address = re.search(r"localhost:\d+", self.process.stdout.readline())[0]
        while httpx.get(f"http://{self.address}/readyz").status_code != 200:
            time.sleep(0.2)

    def kill(self):
        """End it at once, as a power cut would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)


def watch_server(server, num_frames, **start):
    """(frames, messages): the snapshot is asked for with the ninth frame."""
    from websockets.sync.client import connect

    frames, said = [], []
    with connect(f"ws://{server.address}/v1/realtime/video") as socket:
        socket.send(json.dumps({"type": "session.start", "acks": True, **start}))
        while len(frames) < num_frames:
            message = socket.recv()
            if isinstance(message, str):
                said.append(protocol.parse_server_message(message))
                continue
            frames.append(protocol.unpack_frame(message))
            socket.send(json.dumps({"type": "ack", "sequence": frames[-1][0].sequence}))
            if len(frames) == 9 and "prompt" in start:
                socket.send('{"type": "session.snapshot"}')
    return frames, said


@pytest.mark.slow
def test_a_stream_survives_the_death_of_its_server(tmp_path):
    """kill -9, another server: the frames are those of the stream that was never interrupted."""
    server = Server(tmp_path)
    try:
        frames, said = watch_server(server, 60, prompt=OLD, seed=5, fps=30)
    finally:
        server.kill()
    made = next(message for message in said if message.type == "snapshot.made")
    server = Server(tmp_path)
    try:
        later, _ = watch_server(server, 24, snapshot=made.id, fps=30)
    finally:
        server.kill()
    before = {header.sequence - made.sequence: picture for header, picture in frames}
    shared = [header.sequence for header, _ in later if header.sequence in before]
    assert later[0][0].chunk == made.chunk and len(shared) >= 16
    assert all(before[h.sequence] == picture for h, picture in later if h.sequence in shared)
    assert len({picture for _, picture in later}) > 8  # the frames move
    assert np.mean([before[n] == frames[0][1] for n in shared]) < 0.5
