"""A student that needs no model: its frames say which prompt, chunk and seed made them."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from streamvid.students.script import Change, Script

HAS_LIVE = all(importlib.util.find_spec(name) for name in ("fastapi", "httpx", "hypothesis"))
collect_ignore_glob = [] if HAS_LIVE else ["test_*.py"]  # the extra `live` is not installed
if HAS_LIVE:
    import uvicorn
    from fastapi.testclient import TestClient

    from streamvid.serving import protocol
    from streamvid.serving.limits import Limits
    from streamvid.serving.server import create_app

FRAMES = 4  # per chunk
LIMITS = {"max_fps": 1000.0, "max_pixels": 64 * 64}


class Transformer(torch.nn.Module):
    """Counts its forwards; waits in one where a test says so."""

    def __init__(self):
        super().__init__()
        self.forwards = 0
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def forward(self):
        self.forwards += 1
        self.entered.set()
        assert self.go_on.wait(60), "the test has forgotten to let the model go on"


@dataclass
class FakeChunk:
    images: np.ndarray
    index: int
    steps: int


@dataclass
class World:
    """What all sessions of a test share."""

    transformer: Transformer = field(default_factory=Transformer)
    sessions: list = field(default_factory=list)
    failures: dict = field(default_factory=dict)  # prompt -> exception


@dataclass
class FakePass:
    run: Transformer


class FakeSession:
    """As ``students.session.Session``; the red of a frame is its prompt's letters, green its chunk,
    blue its seed.
    """

    def __init__(self, world, prompt, *, seed=0, height, width, steps=None):
        if prompt in world.failures and "open" in prompt:
            raise world.failures[prompt]
        self.world, self.prompt, self.seed, self.steps = world, prompt, seed, steps or 4
        self.index, self.closed, self.held = 0, False, None
        self.script = Script(prompt, height, width, seed, steps)
        world.sessions.append(self)

    @property
    def shape(self):
        return self.script.height, self.script.width

    def chunk_passes(self):
        assert not self.closed, "a closed session was asked for a chunk"
        for _ in range(self.steps):
            yield FakePass(self.world.transformer)
        if self.prompt in self.world.failures:
            raise self.world.failures[self.prompt]
        colour = (red_of(self.prompt), 8 * self.index % 256, self.seed % 256)
        images = np.empty((FRAMES, self.script.height, self.script.width, 3), np.uint8)
        images[:] = colour
        self.index += 1
        return FakeChunk(images, self.index - 1, self.steps)

    def switch_prompt(self, prompt, mode, blend_chunks, keep_sink):
        if prompt == "refused":
            raise ValueError("this prompt can't be")
        self.prompt = prompt
        self._note(prompt=prompt, mode=mode)

    def set_steps(self, steps):
        self.steps = steps

    def set_seed(self, seed):
        self.seed = seed

    def hold_rate(self, fps):
        self.held = fps

    def branch(self):
        size = {"height": self.script.height, "width": self.script.width}
        twin = FakeSession(self.world, self.prompt, seed=self.seed, steps=self.steps, **size)
        twin.index, twin.script = self.index, self.script
        return twin

    def close(self):
        self.closed = True

    @property
    def memory_bytes(self):
        return 0 if self.closed else 1000

    def _note(self, **change):
        changes = tuple(c for c in self.script.changes if c.at != self.index)
        self.script = Script(
            self.script.prompt,
            self.script.height,
            self.script.width,
            self.script.seed,
            self.script.steps,
            changes=(*changes, Change(self.index, **change)),
        )


def red_of(prompt: str) -> int:
    return 40 + sum(map(ord, prompt)) % 200


@pytest.fixture
def world():
    return World()


@pytest.fixture
def make_session(world):
    """``make_session(prompt, **options)``, as ``students.session.Session`` of a student."""
    return lambda *args, **kwargs: FakeSession(world, *args, **kwargs)


@pytest.fixture
def make_app(world, make_session, tmp_path):
    """``make_app(**options)``, as ``create_app`` with the fake student; limits are a dictionary."""

    def make(**options):
        student = SimpleNamespace(
            transformer=world.transformer,
            stream=SimpleNamespace(num_steps=4, chunk_frames=1, window_frames=2),
            codec=SimpleNamespace(temporal_ratio=FRAMES),
        )
        given = {"height": 16, "width": 16, "fps": 100.0, "warm_up": False}
        given["limits"] = Limits(**LIMITS | options.pop("limits", {}))
        return create_app(
            student,
            folder=tmp_path / "clips",
            open_session=make_session,
            **{**given, **options},
        )

    return make


@pytest.fixture
def make_client(make_app):
    """``make_client(**options)``: a client of a running application; stopped after the test."""
    clients = []

    def make(**options):
        client = TestClient(
            make_app(**options), base_url="http://localhost", raise_server_exceptions=False
        )
        client.__enter__()
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def running():
    """``running(app)``: a context, the address of the application on a real socket."""

    @contextmanager
    def run(app):
        config = uvicorn.Config(
            app, port=0, log_level="critical", lifespan="on", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(30)

    return run


class Live:
    """A viewer in a test: sends messages, collects what comes."""

    def __init__(self, socket, worker):
        self.socket, self.worker = socket, worker
        self.messages, self.frames = [], []

    def send(self, message_type, **fields):
        self.socket.send_text(json.dumps({"type": message_type, **fields}))

    def receive(self):
        """The next message, or (header, picture) of a frame."""
        event = self.socket.receive()
        if event["type"] == "websocket.close":
            raise Closed(event.get("code"))
        if event.get("bytes") is not None:
            frame = protocol.unpack_frame(event["bytes"])
            self.frames.append(frame)
            return frame
        message = protocol.parse_server_message(event["text"])
        self.messages.append(message)
        return message

    def until(self, message_type, **fields):
        """The next message of a type, and with these fields."""
        while True:
            message = self.receive()
            if isinstance(message, tuple) or message.type != message_type:
                continue
            if all(getattr(message, name) == value for name, value in fields.items()):
                return message

    def next_frame(self):
        """The next frame."""
        while not isinstance(item := self.receive(), tuple):
            pass
        return item

    def of_type(self, message_type):
        return [message for message in self.messages if message.type == message_type]


class Closed(Exception):
    """The server has closed the connection, with this code."""


@pytest.fixture
def live():
    """``live(client)``: a context of a connected viewer."""

    @contextmanager
    def connect(client, headers=None, **options):
        headers = {"host": "localhost", **(headers or {})}
        with client.websocket_connect("/v1/realtime/video", headers=headers, **options) as socket:
            yield Live(socket, client.app.state.worker)

    connect.Closed, connect.red_of = Closed, red_of
    return connect
