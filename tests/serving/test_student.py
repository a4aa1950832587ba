"""The shipped student behind the server: what a viewer receives is what the library makes."""

import shlex

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from streamvid.cli import sample
from streamvid.evaluation.world_score import score
from streamvid.serving import protocol
from streamvid.serving.server import create_app
from streamvid.students.folder import TINY_STUDENT, load_student
from streamvid.students.play import play_script
from streamvid.students.script import Script
from streamvid.video import read_video

OLD = "a large red circle moves to the right slowly"
NEW = "a large blue square moves down slowly"


@pytest.fixture(scope="module")
def student():
    return load_student(TINY_STUDENT)


@pytest.fixture
def client(student, tmp_path):
    app = create_app(student, folder=tmp_path / "clips", warm_up=False)
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def watch(viewer, num_frames):
    """So many more frames, each confirmed."""
    for _ in range(num_frames):
        header, _ = viewer.next_frame()
        viewer.send("ack", sequence=header.sequence)


def pictures(frames):
    """What a viewer has received as frames [T, 3, H, W] in [0, 1]."""
    images = np.stack([protocol.decode_picture(picture) for _, picture in frames])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def test_the_script_of_a_stream_makes_the_very_same_frames_again(client, live, student, tmp_path):
    with live(client) as viewer:
        viewer.send("session.start", prompt=OLD, seed=5, steps=1, fps=60, acks=True)
        watch(viewer, 9)
        viewer.send("session.prompt_update", prompt=NEW, mode="recache")
        viewer.send("session.update", steps=2, seed=6)
        viewer.until("prompt.applied")
        watch(viewer, 12)
        viewer.send("session.pause")
        viewer.until("session.paused")
        viewer.send("script.get")
        text = viewer.until("script").script
    (tmp_path / "stream.yaml").write_text(text)
    script = Script.load(tmp_path / "stream.yaml")
    again = np.concatenate([chunk.images for chunk in play_script(student, script)])
    assert len(again) >= len(viewer.frames) >= 21
    for header, picture in viewer.frames:
        assert picture == protocol.encode_picture(again[header.sequence], "jpeg")


def test_the_command_of_a_recording_makes_the_very_same_clip(client, live, tmp_path, monkeypatch):
    """Also of one that began in the middle of the stream, at another rate than the default."""
    with live(client) as viewer:
        viewer.send("session.start", prompt=OLD, seed=5, steps=1, fps=60, acks=True)
        watch(viewer, 9)
        viewer.send("record.start")
        watch(viewer, 9)
        viewer.send("session.prompt_update", prompt=NEW, mode="recache")
        viewer.send("session.update", steps=2, seed=6)
        viewer.until("prompt.applied")
        watch(viewer, 12)
        viewer.send("record.stop")
        done = viewer.until("record.done")
    assert done.first_chunk > 0
    (tmp_path / "recorded.mp4").write_bytes(client.get(done.url).content)
    (tmp_path / "stream.yaml").write_text(done.script)
    monkeypatch.chdir(tmp_path)
    threads, program, command, *options = shlex.split(done.command)
    assert (threads, program, command) == (
        f"OMP_NUM_THREADS={torch.get_num_threads()}",
        "streamvid",
        "sample",
    )
    assert sample.main(options) == 0
    recorded, rate = read_video("recorded.mp4")
    again, again_rate = read_video("clip.mp4")
    assert len(recorded) == done.frames and torch.equal(recorded, again)
    assert rate == pytest.approx(again_rate) == pytest.approx(60, rel=0.01)


def test_the_world_scorer_sees_the_new_prompt_in_what_was_received(client, live):
    with live(client) as viewer:
        viewer.send("session.start", prompt=OLD, seed=1, fps=60, acks=True)
        watch(viewer, 33)
        viewer.send("session.prompt_update", prompt=NEW, mode="hard")
        viewer.until("prompt.applied")
        watch(viewer, 33)
    before = [frame for frame in viewer.frames if frame[0].prompt_id == 0][:33]
    after = [frame for frame in viewer.frames if frame[0].prompt_id == 1][:33]
    for frames, right, wrong in ((before, OLD, NEW), (after, NEW, OLD)):
        clip = pictures(frames)
        assert score(clip, right).colour > 0.8 > 0.3 > score(clip, wrong).colour
        assert score(clip, right).overall > score(clip, wrong).overall + 0.2


def test_a_size_that_the_codec_does_not_divide_ends_the_stream_with_the_reason(client, live):
    with live(client) as viewer:
        viewer.send("session.start", prompt=OLD, height=63, width=64)
        error = viewer.until("error")
        assert error.code == "bad_request" and "multiples of" in error.message
        assert viewer.until("session.done").reason == "error"
