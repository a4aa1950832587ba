"""What goes wrong beside the viewers' own mistakes: broken connections, disks, memory, signals."""

import asyncio
import errno
import json
import logging
import threading
import time

import pytest
from websockets.sync.client import connect

from streamvid.serving import protocol, realtime, recording, server
from streamvid.serving.stream import CHUNKS_WAITING, Frames, Stream
from streamvid.serving.worker import Busy

LIVE = "/v1/realtime/video"


def eventually(condition):
    """Wait until something holds that another thread brings about."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came about")


def live_url(address):
    return f"ws{address.removeprefix('http')}{LIVE}"


# ---------------------------------------------------------------- connections


def test_a_connection_that_breaks_in_the_middle_of_a_chunk_frees_all(make_app, running, world):
    """Over a real socket, and without a word of goodbye."""
    app = make_app()
    worker = app.state.worker
    with running(app) as address:
        socket = connect(live_url(address))
        socket.send(json.dumps({"type": "session.start", "prompt": "one", "steps": 8}))
        while not isinstance(socket.recv(), bytes):
            pass
        world.transformer.entered.clear()
        world.transformer.go_on.clear()
        assert world.transformer.entered.wait(60)
        forwards, stream = world.transformer.forwards, worker._live.active[0]
        socket.socket.close()
        eventually(lambda: stream.gone)
        world.transformer.go_on.set()
        eventually(lambda: stream.ended.is_set() and not app.state.streams)
        assert world.transformer.forwards - forwards <= 1  # of the eight steps of the chunk
        assert all(session.closed for session in world.sessions)
        assert app.state.metrics.registry.get_sample_value("streamvid_cache_bytes") == 0


class Wire:
    """A connection without a socket, whose viewer takes messages only while ``taking`` is set."""

    def __init__(self, app):
        self.app, self.sent, self.taking = app, [], asyncio.Event()
        self.incoming = asyncio.Queue()
        self.incoming.put_nowait({"type": "websocket.connect"})

    def say(self, message_type, **fields):
        text = json.dumps({"type": message_type, **fields})
        self.incoming.put_nowait({"type": "websocket.receive", "text": text})

    async def _send(self, event):
        if event["type"] == "websocket.send":
            await self.taking.wait()
        self.sent.append(event)

    async def run(self):
        scope = {
            "type": "websocket",
            "path": LIVE,
            "headers": [(b"host", b"localhost")],
            "query_string": b"",
            "client": ("127.0.0.1", 1),
            "subprotocols": [],
            "app": self.app,
        }
        await self.app(scope, self.incoming.get, self._send)

    @property
    def headers(self):
        """Of the frames that were taken."""
        pictures = [event["bytes"] for event in self.sent if event.get("bytes")]
        return [protocol.unpack_frame(picture)[0] for picture in pictures]


def on_wire(app, steps):
    """Run ``steps(wire)``, a coroutine, beside a connection of a running application."""

    async def run():
        wire = Wire(app)
        serving = asyncio.create_task(wire.run())
        try:
            await steps(wire)
        finally:
            wire.taking.set()
            wire.incoming.put_nowait({"type": "websocket.disconnect", "code": 1006})
            await asyncio.wait_for(serving, 60)

    asyncio.run(run())


async def soon(condition):
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came about")


def test_for_a_viewer_that_takes_nothing_no_more_than_two_chunks_wait(make_client):
    """It does not confirm either; when it goes on it gets the newest, with a gap."""
    app = make_client().app
    worker = app.state.worker

    async def steps(wire):
        wire.say("session.start", prompt="one")
        await soon(lambda: worker._live.active and worker._live.active[0].dropped > 0)
        stream = worker._live.active[0]
        await soon(lambda: stream.chunks >= 12)
        assert sum(isinstance(item, Frames) for item in stream.outbox._items) <= CHUNKS_WAITING
        wire.taking.set()
        await soon(lambda: len(wire.headers) > 16)
        sequences = [header.sequence for header in wire.headers]
        assert sequences == sorted(set(sequences))
        assert sequences[-1] + 1 - len(sequences) >= 4  # the gap

    on_wire(app, steps)


def test_a_viewer_that_takes_nothing_for_long_counts_as_gone(make_client, live, monkeypatch):
    monkeypatch.setattr(realtime, "SEND_TIMEOUT_S", 0.2)
    client = make_client()
    app = client.app

    async def steps(wire):
        wire.say("session.start", prompt="one")
        await soon(lambda: wire.sent and wire.sent[-1]["type"] == "websocket.close")
        assert wire.sent[-1]["code"] == 1011
        await soon(lambda: not app.state.worker._live.active)

    on_wire(app, steps)
    with live(client) as viewer:  # the server lives on
        viewer.send("session.start", prompt="two")
        viewer.next_frame()


def test_a_slow_viewer_still_learns_that_the_server_stops(make_client):
    """The server once closed connections while the end of a stream was still on its way."""
    app = make_client().app
    stopping = threading.Thread(target=server.drain, args=(app, 30))

    async def steps(wire):
        wire.say("session.start", prompt="one")
        await soon(lambda: app.state.worker._live.active)
        stopping.start()
        await soon(lambda: not app.state.worker._live.active)
        assert stopping.is_alive()  # it waits for the viewer
        wire.taking.set()
        await soon(lambda: not stopping.is_alive())
        said = [json.loads(event["text"]) for event in wire.sent if event.get("text")]
        assert said[-1]["type"] == "session.done" and said[-1]["reason"] == "server_stopping"

    on_wire(app, steps)


def test_a_server_does_not_wait_for_ever_for_a_viewer(make_client, monkeypatch):
    monkeypatch.setattr(server, "GOODBYE_S", 0.1)
    app = make_client().app

    async def steps(wire):
        wire.say("session.start", prompt="one")
        await soon(lambda: app.state.worker._live.active)
        await asyncio.to_thread(server.drain, app, 30)
        assert app.state.streams

    on_wire(app, steps)


def test_connections_of_one_address_are_limited_and_counted_down(make_client, live):
    client = make_client(limits={"connections_per_address": 2})
    with live(client), live(client):
        with pytest.raises(Exception) as closed, live(client):
            pass
        assert closed.value.code == 1013
    with live(client), live(client) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.next_frame()


def test_refusals_without_end_close_the_connection(make_client, live):
    """One good message among the bad ones once kept it open for ever."""
    with live(make_client(limits={"messages_per_minute": 20})) as viewer:
        with pytest.raises(live.Closed, match="1008"):
            for _ in range(20):
                for text in ("{", "{", '{"type": "ack", "sequence": 0}'):
                    viewer.socket.send_text(text)
            viewer.send("session.pause")
            viewer.until("error", code="no_session")
    assert len(viewer.of_type("error")) == 20


def test_a_crowd_that_comes_within_one_chunk_does_not_overflow_the_queue(make_client, live, world):
    """Nobody is admitted during a chunk, so places looked free for all who came."""
    client = make_client(limits={"sessions": 2, "waiting": 1, "sessions_per_address": 99})
    worker = client.app.state.worker
    with live(client) as first:
        first.send("session.start", prompt="one")
        first.next_frame()
        world.transformer.entered.clear()
        world.transformer.go_on.clear()
        assert world.transformer.entered.wait(60)
        start = protocol.SessionStart(prompt="two")
        model = worker.models.default
        crowd = [Stream(start, 16, 16, 100.0, lambda: None, model) for _ in range(3)]
        try:
            for stream in crowd[:2]:  # one place, and one in the queue
                worker.add_stream(stream)
            with pytest.raises(Busy):
                worker.add_stream(crowd[2])
        finally:
            world.transformer.go_on.set()


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize(
    "failure, code", [(RuntimeError("inside"), "internal"), (MemoryError(), "out_of_memory")]
)
@pytest.mark.parametrize("request_type", ["session.reset", "session.bookmark"])
def test_a_failure_in_a_change_ends_one_stream(
    make_client, live, world, monkeypatch, failure, code, request_type
):
    def fail(session):
        raise failure

    client = make_client()
    with live(client) as other, live(client) as viewer:
        other.send("session.start", prompt="other")
        other.next_frame()
        viewer.send("session.start", prompt="one")
        viewer.next_frame()
        viewer.send("record.start")
        viewer.until("record.started")
        viewer.until("video.chunk")
        viewer.until("video.chunk")
        monkeypatch.setattr(type(world.sessions[1]), "branch", fail)
        world.failures["open this"] = failure
        fields = {"prompt": "open this"} if request_type == "session.reset" else {}
        viewer.send(request_type, **fields)
        error = viewer.until("error")
        assert error.code == code and error.retryable and "inside" not in error.message
        assert viewer.until("session.done").reason == "error"
        recorded = viewer.of_type("record.done")[0]  # what was recorded is not lost
        assert client.get(recorded.url).status_code == 200
        other.until("video.chunk")
    assert client.get("/healthz").status_code == 200


def test_pictures_that_cannot_be_encoded_end_one_stream(make_client, live, monkeypatch):
    encode = protocol.encode_picture

    def broken(image, encoding, quality):
        if encoding == "webp":
            raise OSError("encoder error -2")
        return encode(image, encoding, quality)

    monkeypatch.setattr(protocol, "encode_picture", broken)
    client = make_client()
    with live(client) as good, live(client) as bad:
        good.send("session.start", prompt="one")
        bad.send("session.start", prompt="two", format="webp")
        with pytest.raises(live.Closed, match="1011"):
            while True:
                bad.receive()
        good.next_frame()
        worker = good.worker
        eventually(lambda: len(worker._live.active) == 1)


def test_a_worker_that_ends_by_itself_says_so(make_client, live, monkeypatch):
    client = make_client()
    worker = client.app.state.worker
    with live(client) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.next_frame()

        def broken(now):
            raise RuntimeError("secret of the code")

        monkeypatch.setattr(worker, "_departed", broken)
        assert viewer.until("session.done").reason == "server_stopping"
        eventually(lambda: not worker.alive)
        assert client.get("/healthz").status_code == 500
        assert client.get("/readyz").status_code == 503
        viewer.send("session.start", prompt="two")
        assert viewer.until("error").code == "busy"


# ---------------------------------------------------------------- disks


class FillingDisk(recording.VideoWriter):
    """Has room for two chunks, and is full in the third."""

    def append_images(self, images):
        if self.num_frames >= 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().append_images(images)


@pytest.mark.parametrize("container", ["mp4", "gif"])
def test_a_disk_that_fills_up_in_the_middle_leaves_no_half_file(
    make_client, live, monkeypatch, tmp_path, container
):
    monkeypatch.setattr(recording, "VideoWriter", FillingDisk)
    client = make_client()
    with live(client) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.send("record.start", format=container)
        started = viewer.until("record.started")
        error = viewer.until("error")
        assert (error.code, error.message) == ("record_failed", "the recording was lost: disk full")
        assert not list((tmp_path / "clips").iterdir())
        clip = client.get(f"/v1/videos/{started.id}").json()
        assert (clip["status"], clip["error"]["message"]) == ("failed", "disk full")
        assert client.get(f"/v1/videos/{started.id}/content").status_code == 409
        viewer.until("video.chunk")  # the stream goes on
        monkeypatch.undo()
        viewer.send("record.start")  # and can be recorded when there is room again
        viewer.until("record.started")
        viewer.until("video.chunk")
        viewer.until("video.chunk")
        viewer.send("record.stop")
        assert client.get(viewer.until("record.done").url).status_code == 200


def test_a_recording_that_is_deleted_while_it_runs_leaves_no_file(make_client, live, tmp_path):
    """Its file once came afterwards, and nobody knew of it."""
    client = make_client()
    with live(client) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.send("record.start")
        started = viewer.until("record.started")
        viewer.until("video.chunk")
        viewer.until("video.chunk")
        assert client.delete(f"/v1/videos/{started.id}").json()["deleted"]
        viewer.send("record.stop")
        viewer.send("session.stop")
        viewer.until("session.done")
    (error,) = viewer.of_type("error")
    assert (error.code, "deleted" in error.message) == ("record_failed", True)
    assert not list((tmp_path / "clips").iterdir())


def test_the_recording_of_a_viewer_that_vanishes_is_complete(make_client, live, tmp_path):
    client = make_client()
    with live(client) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.send("record.start")
        started = viewer.until("record.started")
        viewer.until("video.chunk")
        viewer.until("video.chunk")
    eventually(lambda: client.get(f"/v1/videos/{started.id}").json()["status"] == "completed")
    assert client.get(f"/v1/videos/{started.id}/content").status_code == 200


# ---------------------------------------------------------------- what is written down


def test_no_log_has_a_prompt(make_client, live, world, caplog):
    """Neither of a stream that fails, nor of a message or a request that is refused."""
    secret = "my secret bad chunk"
    world.failures[secret] = RuntimeError("broken")
    client = make_client()
    with caplog.at_level(logging.DEBUG, logger="streamvid"), live(client) as viewer:
        viewer.send("session.start", prompt=secret)
        viewer.until("session.done")
        viewer.send("session.start", prompt=f"{secret}\n")
        viewer.send("session.start", prompt=secret, **{secret: 1})
        viewer.until("error", code="bad_message")
        clip = client.post("/v1/videos", json={"prompt": secret, "num_frames": 4}).json()
        eventually(lambda: client.get(f"/v1/videos/{clip['id']}").json()["status"] == "failed")
    assert caplog.records and secret not in caplog.text
