"""Clips, checks and refusals over HTTP, and recordings of live streams."""

import errno
import json
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamvid.frames import clip_frames
from streamvid.serving import recording
from streamvid.serving.guard import Guard
from streamvid.students.script import Script


def wait_for(client, clip_id, status="completed", headers=None):
    for _ in range(6000):
        clip = client.get(f"/v1/videos/{clip_id}", headers=headers).json()
        if clip["status"] in (status, "failed"):
            return clip
        time.sleep(0.01)
    raise AssertionError("the clip never came")


def decode(body, tmp_path, suffix=".mp4"):
    path = tmp_path / f"fetched{suffix}"
    path.write_bytes(body)
    return np.stack([frame.picture() for frame in clip_frames(path)])


def test_a_clip_is_made_fetched_listed_and_deleted(make_client, live, tmp_path):
    client = make_client()
    asked = {"prompt": "one", "seed": 9, "num_frames": 10, "fps": 20, "size": "32x16"}
    clip = client.post("/v1/videos", json=asked).json()
    assert (clip["object"], clip["size"], clip["seconds"]) == ("video", "32x16", "0.5")
    clip = wait_for(client, clip["id"])
    assert (clip["status"], clip["progress"], clip["error"]) == ("completed", 100, None)
    reply = client.get(f"/v1/videos/{clip['id']}/content")
    assert reply.headers["content-type"] == "video/mp4"
    frames = decode(reply.content, tmp_path)
    assert frames.shape == (10, 16, 32, 3)
    assert np.abs(frames[0, 8, 8].astype(int) - (live.red_of("one"), 0, 9)).max() < 8
    assert [c["id"] for c in client.get("/v1/videos").json()["data"]] == [clip["id"]]
    assert client.delete(f"/v1/videos/{clip['id']}").json()["deleted"]
    assert client.get(f"/v1/videos/{clip['id']}").status_code == 404
    assert not list((tmp_path / "clips").iterdir())


def test_a_recording_can_be_fetched_with_what_makes_it_again(make_client, live, tmp_path):
    client = make_client()
    with live(client) as viewer:
        viewer.send("session.start", prompt="one", seed=9)
        viewer.send("record.start")
        viewer.until("video.chunk", chunk=2)
        viewer.send("session.prompt_update", prompt="two", mode="hard")
        viewer.until("prompt.applied")
        viewer.send("record.stop")
        done = viewer.until("record.done")
    body = client.get(done.url).content
    frames = decode(body, tmp_path)
    assert len(frames) == done.frames
    assert abs(int(frames[0, 8, 8, 1]) - 8 * done.first_chunk) < 8  # green tells the chunk
    assert abs(int(frames[0, 8, 8, 0]) - live.red_of("one")) < 8
    assert abs(int(frames[-1, 8, 8, 0]) - live.red_of("two")) < 8
    notes = recording.read_notes(tmp_path / "fetched.mp4")
    assert notes["title"] == "one" and notes["comment"] == done.script
    (tmp_path / "stream.yaml").write_text(done.script)
    script = Script.load(tmp_path / "stream.yaml")
    assert (script.prompt, script.seed, script.changes[0].prompt) == ("one", 9, "two")
    assert "streamvid sample --script stream.yaml" in done.command


def test_a_reset_or_a_branch_ends_the_recording(make_client, live):
    """Its script is that of one session, so no frame of the next one is in it."""
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.send("session.bookmark")
        for prompt, restart in (
            ("one", {"message_type": "session.reset", "prompt": "two"}),
            ("two", {"message_type": "session.branch", "bookmark": 0}),
        ):
            viewer.send("record.start")
            viewer.until("record.started")
            viewer.until("video.chunk")
            viewer.send(**restart)
            assert f"prompt: {prompt}\n" in viewer.until("record.done").script


@pytest.mark.parametrize("suffix", ["webm", "gif"])
def test_other_formats_of_recordings(make_client, live, tmp_path, suffix):
    client = make_client()
    with live(client) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.send("record.start", format=suffix)
        viewer.until("record.started")
        viewer.until("video.chunk")
        viewer.until("video.chunk")  # frames of a chunk are alike, which a .gif keeps as one
        viewer.send("session.stop")  # finishes the recording
        viewer.until("session.done")
        done = viewer.of_type("record.done")[0]
    frames = decode(client.get(done.url).content, tmp_path, f".{suffix}")
    assert frames.shape[1:] == (16, 16, 3) and len(frames) > 1


def test_a_recording_without_a_frame_is_lost_and_nothing_waits_for_it(make_client, live):
    """Its thread once waited for ever, and ``session.done`` with it."""
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.send("session.pause")
        viewer.until("session.paused")
        viewer.send("record.start")
        viewer.send("record.stop")
        assert "no frames came" in viewer.until("error", code="record_failed").message
        viewer.send("session.stop")
        assert viewer.until("session.done").reason == "stopped"


def test_a_full_disk_ends_the_recording_but_not_the_stream(make_client, live, monkeypatch):
    class FullDisk:
        def __init__(self, *args):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recording, "VideoWriter", FullDisk)
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.send("record.start")
        error = viewer.until("error")
        assert (error.code, error.message) == ("record_failed", "the recording was lost: disk full")
        last = viewer.next_frame()[0].chunk
        viewer.until("video.chunk", chunk=last + 3)
        viewer.send("session.stop")
        assert viewer.until("session.done").reason == "stopped"


def test_a_disk_that_hangs_ends_the_recording_but_not_the_stream(make_client, live, monkeypatch):
    class HangingDisk(recording.VideoWriter):
        def append_images(self, images):
            assert go_on.wait(60)

    go_on = threading.Event()
    monkeypatch.setattr(recording, "VideoWriter", HangingDisk)
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.send("record.start")
        viewer.until("video.chunk", chunk=recording.BACKLOG + 6)  # it has not waited
        go_on.set()
        assert "too slow" in viewer.until("error", code="record_failed").message


def test_a_long_recording_stops_by_itself(make_client, live):
    with live(make_client(limits={"record_seconds": 0.05})) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.send("record.start")
        assert viewer.until("record.done").frames == 8  # the chunk that reaches 5 frames at 100/s


def test_only_the_newest_clips_are_kept(make_client, tmp_path):
    client = make_client(limits={"clips_kept": 2})
    ids = []
    for prompt in "abcd":
        ids.append(client.post("/v1/videos", json={"prompt": prompt, "num_frames": 4}).json()["id"])
        wait_for(client, ids[-1])
    assert [client.get(f"/v1/videos/{i}").status_code for i in ids] == [404, 200, 200, 200]
    assert len(list((tmp_path / "clips").iterdir())) == 3


def test_a_clip_that_fails_says_why(make_client, world):
    world.failures["bad"] = RuntimeError("secret of the code")
    client = make_client()
    clip_id = client.post("/v1/videos", json={"prompt": "bad", "num_frames": 4}).json()["id"]
    clip = wait_for(client, clip_id)
    assert clip["status"] == "failed" and "secret" not in json.dumps(clip)
    assert client.get(f"/v1/videos/{clip_id}/content").status_code == 409


def test_a_deleted_clip_is_given_up_in_the_middle_of_a_chunk(make_client, world, tmp_path):
    client = make_client()
    world.transformer.go_on.clear()
    clip_id = client.post("/v1/videos", json={"prompt": "one", "num_frames": 40}).json()["id"]
    assert world.transformer.entered.wait(60)
    forwards = world.transformer.forwards
    client.delete(f"/v1/videos/{clip_id}")
    world.transformer.go_on.set()
    other = client.post("/v1/videos", json={"prompt": "two", "num_frames": 4, "steps": 1}).json()
    wait_for(client, other["id"])
    assert world.transformer.forwards <= forwards + 2
    assert world.sessions[0].closed


def test_clips_and_a_live_stream_share_the_worker(make_client, live):
    client = make_client()
    with live(client) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.next_frame()
        clip_id = client.post("/v1/videos", json={"prompt": "two", "num_frames": 40}).json()["id"]
        assert wait_for(client, clip_id)["status"] == "completed"
        viewer.next_frame()


def test_warming_up_is_not_ready(make_client, world):
    world.transformer.go_on.clear()
    client = make_client(warm_up=True)
    reply = client.get("/readyz")
    assert (reply.status_code, reply.json()) == (503, {"status": "warming up"})
    world.transformer.go_on.set()
    for _ in range(6000):
        if client.get("/readyz").status_code == 200:
            break
        time.sleep(0.01)
    assert client.get("/readyz").json() == {"status": "ready"}
    assert world.sessions[0].index == 4  # a window of 2 latent frames, 1 per chunk, and 2 more
    assert client.get("/healthz").json() == {"status": "ok"}


def test_figures_count(make_client, live):
    client = make_client()
    with live(client) as viewer:
        viewer.send("session.start", prompt="one", num_frames=12)
        viewer.until("session.done")
    lines = client.get("/metrics").text.splitlines()
    assert 'streamvid_chunks_total{kind="live"} 3.0' in lines
    assert "streamvid_frames_sent_total 12.0" in lines
    assert "streamvid_first_chunk_seconds_count 1.0" in lines
    assert "streamvid_sessions 0.0" in lines


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": ""},
        {"prompt": "a", "seconds": 1e9},
        {"prompt": "a", "seconds": "x"},
        {"prompt": "a", "size": "64"},
        {"prompt": "a", "size": "9999x9999"},
        {"prompt": "a", "model": "sora-2"},
        {"prompt": "a", "fps": -1},
        {"prompt": "a", "unknown": 1},
        {"prompt": "a" * 501},
        {"prompt": "a", "input_reference": {"image_url": "file:///etc/passwd"}},
        [],
        7,
        None,
        {"prompt": "\ud800"},
    ],
)
def test_a_wrong_request_is_told_in_openais_shape(make_client, fields):
    reply = make_client().post(
        "/v1/videos", content=json.dumps(fields), headers={"content-type": "application/json"}
    )
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and "Traceback" not in reply.text


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:9999"}, 403),
        ({"host": "localhost:8000", "origin": "https://evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "null"}, 403),
        ({"host": "localhost:8000", "origin": ""}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000.evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "http://evil.example@localhost:8000"}, 403),
        ({"host": "localhost:8000@evil.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": ""}, 403),
        ({"host": "localhost", "content-length": "70000"}, 413),
    ],
)
def test_host_origin_and_size(make_client, live, headers, status):
    client = make_client()
    assert client.get("/v1/info", headers=headers).status_code == status
    if status == 403:
        with pytest.raises(Exception) as closed, live(client, headers=headers):
            pass
        assert closed.value.code == 1008


def test_a_body_without_a_length_is_counted(make_client):
    reply = make_client().post("/v1/videos", content=iter([b" " * 40_000] * 3))
    assert reply.status_code == 413


TOKEN = "secret0123456789abcdef"


def test_a_token_is_demanded_of_all_but_the_page_and_the_checks(make_client, live):
    client = make_client(token=TOKEN, hosts=None)
    bearer = {"authorization": f"Bearer {TOKEN}"}
    for path in ("/v1/info", "/v1/videos", "/metrics", "/openapi.json", "/docs"):
        assert client.get(path).status_code == 401, path
        assert client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.get(path, headers={"authorization": TOKEN}).status_code == 401
        assert client.get(path, headers=bearer).status_code == 200
    for path in ("/", "/page/app.js", "/healthz", "/readyz"):
        assert client.get(path).status_code == 200
    with pytest.raises(Exception) as closed, live(client):
        pass
    assert closed.value.code == 1008
    with live(client, subprotocols=["streamvid", f"bearer.{TOKEN}"]) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.next_frame()
        assert viewer.socket.accepted_subprotocol == "streamvid"


def test_a_token_does_not_open_the_server_to_pages_of_other_sites(make_client):
    """A program sends no Origin; a browser that has the token in a page of its own does."""
    client = make_client(token=TOKEN, hosts=None)
    bearer = {"authorization": f"Bearer {TOKEN}", "host": "live.example.org"}
    for origin, status in (
        ({}, 200),
        ({"origin": "https://live.example.org"}, 200),
        ({"origin": "https://evil.example"}, 403),
    ):
        assert client.get("/v1/info", headers={**bearer, **origin}).status_code == status


@pytest.mark.parametrize("given", ["", " ", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "\xe9" * 20])
def test_what_is_not_the_token_is_refused(make_client, live, given):
    client = make_client(token=TOKEN, hosts=None)
    bearer = {"authorization": f"Bearer {given}".encode("latin-1")}
    assert client.get("/v1/info", headers=bearer).status_code == 401
    if given.isascii():  # the client sends no other
        offered = ["streamvid", f"bearer.{given}"]
        with pytest.raises(Exception) as closed, live(client, subprotocols=offered):
            pass
        assert closed.value.code == 1008


def test_any_host_needs_a_token():
    with pytest.raises(ValueError, match="token"):
        Guard(None, token=None, hosts=None, body_bytes=1)


@pytest.mark.parametrize(
    "path",
    [
        "/page/../server.py",
        "/page/%2e%2e/server.py",
        "/page//etc/passwd",
        "/v1/videos/..%2f..%2fserver.py/content",
    ],
)
def test_no_path_of_a_client_is_opened(make_client, path):
    reply = make_client().get(path)
    assert reply.status_code == 404 and "import" not in reply.text


def test_the_page_is_bound_to_its_own_server(make_client):
    headers = make_client().get("/").headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]


def test_an_error_of_ours_is_one_line(make_app, monkeypatch, make_client):
    client = make_client()
    monkeypatch.setattr(client.app.state.worker, "add_clip", lambda clip: 1 / 0)
    reply = client.post("/v1/videos", json={"prompt": "one"})
    assert reply.status_code == 500 and "division" not in reply.text


paths = st.sampled_from(
    ["/v1/videos", "/v1/videos/x", "/v1/videos/x/content", "/readyz", "/v1/info", "/nope"]
)
bodies = st.binary(max_size=60) | st.dictionaries(
    st.sampled_from(
        ["prompt", "seconds", "size", "seed", "steps", "fps", "num_frames", "format", "x"]
    ),
    st.none()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.integers(), max_size=2),
).map(lambda fields: json.dumps(fields).encode())
kinds = st.sampled_from(
    [
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "text/plain",
        "",
    ]
)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["GET", "POST", "DELETE", "PUT"]), paths, bodies, kinds)
def test_no_request_is_answered_500(fuzzed, method, path, body, kind):
    reply = fuzzed.request(method, path, content=body, headers={"content-type": kind})
    assert reply.status_code < 500 or path == "/readyz"


@pytest.fixture
def fuzzed(make_client):
    return make_client(limits={"clips_waiting": 1000, "clip_seconds": 0.5})


# ---------------------------------------------------------------- a client that nobody here wrote


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openais_client_makes_and_fetches_a_clip(make_app, running, tmp_path):
    openai = pytest.importorskip("openai")
    with running(make_app(token=TOKEN, hosts=None, fps=10.0)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN, max_retries=0)
        video = client.videos.create_and_poll(
            prompt="one", seconds="1", size="32x16", poll_interval_ms=20, extra_body={"seed": 9}
        )
        assert (video.status, video.progress, video.seconds) == ("completed", 100, "1")
        body = client.videos.download_content(video.id).read()
        assert decode(body, tmp_path).shape == (10, 16, 32, 3)
        assert [v.id for v in client.videos.list()] == [video.id]
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)
        with pytest.raises(openai.BadRequestError, match="one line"):
            client.videos.create(prompt="a\nb")
        stranger = openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.videos.list()
