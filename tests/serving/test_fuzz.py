"""Anything at all sent to the server: it lives on, and answers as its own schemas say."""

import importlib.util
import io
import json
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from streamvid.serving import protocol, recording

ODD = 4_000_000_007  # a bookmark that no stream has, which its answer repeats
HAS_SCHEMATHESIS = importlib.util.find_spec("schemathesis") is not None


def bounded(max_examples):
    """Settings with which a run is the same each time."""
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )


class NoDisk:
    """A writer of clips without an encoder: a file of so many bytes as frames."""

    def __init__(self, path, fps):
        self.path, self.num_frames = path, 0

    def __enter__(self):
        return self

    def append_images(self, images):
        self.num_frames += len(np.asarray(images))

    def __exit__(self, kind, error, trace):
        if error is None:
            self.path.write_bytes(bytes(self.num_frames))


@pytest.fixture
def server(make_client, monkeypatch):
    """A client of a server whose limits leave much to try, and whose disk costs nothing."""
    monkeypatch.setattr(recording, "VideoWriter", NoDisk)
    monkeypatch.setattr(recording, "write_notes", lambda path, notes: None)
    wide = {"clips_waiting": 10_000, "clip_seconds": 6.0, "messages_per_minute": 100_000}
    return make_client(limits=wide)


# ---------------------------------------------------------------- messages

prompts = st.sampled_from(["one", "two", "refused", "ein Höhenzug \U0001f304", "a" * 500])
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["a\nb", "\u202e", "\x00", "x" * 501, 2**53, -1, 0, 1e308]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)
FIELDS = {
    "prompt": prompts,
    "seed": st.integers(0, 2**53 - 1),
    "steps": st.integers(1, 8),
    "fps": st.floats(0.01, 1000),
    "mode": st.sampled_from(["cut", "blend", "recache", "hard"]),
    "blend_chunks": st.integers(1, 64),
    "keep_sink": st.booleans(),
    "hold_rate": st.booleans(),
    "acks": st.booleans(),
    "num_frames": st.integers(1, 40),
    "height": st.sampled_from([1, 16, 31]),
    "width": st.sampled_from([2, 16, 64]),
    "quality": st.integers(1, 100),
    "bookmark": st.integers(0, 3),
    "sequence": st.integers(0, 60),
}
GIVEN = {  # fields of each message; those of `session.start` may also be left out
    "session.start": ["seed", "steps", "fps", "num_frames", "height", "width", "quality", "acks"],
    "session.prompt_update": ["mode", "blend_chunks", "keep_sink"],
    "session.update": ["steps", "seed", "fps", "hold_rate"],
    "session.reset": ["prompt", "seed", "steps"],
    "session.branch": [],
    "ack": [],
    **{f"session.{word}": [] for word in ("pause", "resume", "bookmark", "stop")},
    **{word: [] for word in ("record.start", "record.stop", "script.get")},
}
NEEDED = {
    "session.start": ["prompt"],
    "session.prompt_update": ["prompt"],
    "session.branch": ["bookmark"],
    "ack": ["sequence"],
}


@st.composite
def valid_messages(draw):
    """A message that can be read; what it asks for may still be refused."""
    kind = draw(st.sampled_from(list(GIVEN)))
    fields = {name: draw(FIELDS[name]) for name in NEEDED.get(kind, ())}
    if GIVEN[kind]:
        more = draw(st.sets(st.sampled_from(GIVEN[kind]), max_size=3))
        fields.update({name: draw(FIELDS[name]) for name in sorted(more)})
    return json.dumps({"type": kind, **fields})


@st.composite
def spoilt_messages(draw):
    """A message with one field that is anything."""
    message = json.loads(draw(valid_messages()))
    name = draw(st.sampled_from([*message, "prompt", "type", "unknown", "\n", "\u202e"]))
    message[name] = draw(junk)
    return json.dumps(message, ensure_ascii=draw(st.booleans()))


no_messages = st.one_of(
    st.text(max_size=40),
    st.binary(max_size=40),
    junk.map(json.dumps),
    st.sampled_from(
        [
            "[" * 5000,
            '{"type":' * 2000,
            '{"type": "session.start", "prompt": ' + "9" * 5000 + "}",
            '{"type": "ack", "sequence": 1e400}',
            '{"type": "session.start", "prompt": "\\ud800"}',
            '{"type": "session.stop", "type": "session.start"}',
            "x" * 16_384,
            "x" * 16_385,
            '{"type": "session.start", "prompt": "' + "\U0001f304" * 5000 + '"}',
            b"SVF1" + bytes(28),
            "",
        ]
    ),
)
conversations = st.lists(
    st.one_of(valid_messages(), valid_messages(), valid_messages(), spoilt_messages(), no_messages),
    min_size=1,
    max_size=14,
)


def converse(viewer, conversation):
    """Say all, then read until the answer to a last question; each answer fits its schema."""
    for message in conversation:
        if isinstance(message, bytes):
            viewer.socket.send_bytes(message)
        else:
            viewer.socket.send_text(message)
    viewer.send("session.branch", bookmark=ODD)
    while True:
        answer = viewer.receive()
        if isinstance(answer, protocol.Error):
            assert "\n" not in answer.message and len(answer.message) < 400
            assert "Traceback" not in answer.message
            assert answer.code != "internal", answer.message
            if answer.code in ("no_session", "too_many") or str(ODD) in answer.message:
                return


def check_conversation(server, live, conversation):
    """The server outlives a conversation, and keeps nothing of it."""
    worker = server.app.state.worker
    with live(server) as viewer:
        try:
            converse(viewer, conversation)
        except live.Closed as closed:
            assert closed.args[0] in (1003, 1008, 1013)
    assert worker.failure is None and worker.alive
    assert server.get("/healthz").status_code == 200


@bounded(60)
@given(conversation=conversations)
def test_any_conversation_leaves_the_server_alive(server, live, conversation):
    check_conversation(server, live, conversation)


@pytest.mark.slow
@bounded(1500)
@given(conversation=conversations)
def test_many_conversations_leave_the_server_alive(server, live, conversation):
    check_conversation(server, live, conversation)


def test_after_all_conversations_nothing_is_held(server, live, world):
    """The same as the short fuzz, looked at from its end."""
    worker = server.app.state.worker

    @bounded(15)
    @given(conversation=conversations)
    def some(conversation):
        check_conversation(server, live, conversation)

    some()
    with live(server) as viewer:  # the worker has seen that the others are gone
        viewer.send("session.start", prompt="last", num_frames=4)
        viewer.until("session.done")
    assert not worker._waiting and all(stream.gone for stream in worker._live.active)
    open_sessions = [session for session in world.sessions if not session.closed]
    assert len(open_sessions) <= len(worker._live.active)


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 60_000,
        b'{"prompt":' * 6_000,
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "fps": NaN}',
        b'{"prompt": "a", "a\\nb\\u001b[2J": 1}',
        b"\xff\xfe{\x00}\x00",
        b"\x00" * 100,
        b"",
    ],
)
def test_a_hostile_body_is_a_400_in_one_line(server, body):
    """Deep nesting and half a character were once answered 500."""
    reply = server.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert message.isprintable() and len(message) < 200


@pytest.mark.parametrize("length", ["9" * 5000, "9" * 25, "65537"])
def test_a_length_beyond_all_bounds_is_too_large(server, length):
    reply = server.post("/v1/videos", content=b"", headers={"content-length": length})
    assert reply.status_code == 413


@pytest.mark.parametrize("path", ["/", "/healthz", "/page/app.js", "/page/x", "/v1/videos", "/x"])
def test_a_websocket_at_another_path_is_refused(server, path):
    """At the page's files it was once an error of the server's own."""
    with pytest.raises(Exception) as closed, server.websocket_connect(path):
        pass
    assert getattr(closed.value, "code", None) in (1000, 1008)


def make_clip(server):
    """The id of a clip that is complete."""
    asked = {"prompt": "one", "num_frames": 4, "steps": 1}
    clip_id = server.post("/v1/videos", json=asked).json()["id"]
    while server.get(f"/v1/videos/{clip_id}").json()["status"] in ("queued", "in_progress"):
        time.sleep(0.01)
    return clip_id


def make_start(server):
    """The id of a picture to begin from."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    files = {"file": ("a.png", file.getvalue(), "image/png")}
    return server.post("/v1/starts", files=files).json()["id"]


KNOWN = {"clip_id": make_clip, "start_id": make_start, "model_id": lambda server: "student"}


def send(server, case):
    """The answer to a case, as it would go over the wire."""
    import requests

    asked = requests.Request(**case.as_transport_kwargs(base_url="http://localhost")).prepare()
    return server.request(asked.method, asked.url, content=asked.body, headers=asked.headers)


def check_operations(server, max_examples):
    """Requests of each operation of the server's own OpenAPI, good and bad ones."""
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
    ]
    schema = schemathesis.openapi.from_dict(server.get("/openapi.json").json())
    answered, known = {}, {}
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:

            @bounded(max_examples)
            @given(case=operation.as_strategy(generation_mode=mode))
            def conforms(case):
                for name in case.path_parameters.keys() & KNOWN.keys():
                    if known.setdefault(case.path, 0) % 2:
                        case.path_parameters[name] = KNOWN[name](server)
                    known[case.path] += 1
                reply = send(server, case)
                answered.setdefault(case.path, set()).add(reply.status_code)
                case.validate_response(reply, checks=checks)

            try:
                conforms()
            except BaseException as error:
                if type(error).__name__ != "Unsatisfiable":  # nothing can be wrong with it
                    raise
    assert answered.keys() == set(schema)
    refused = {path for path, statuses in answered.items() if 200 not in statuses}
    # a file that can be decoded is hardly found by chance; no clip here began from one
    assert refused <= {"/v1/starts", "/v1/videos/{clip_id}/start"}
    assert all(404 in answered[path] for path in answered if "{" in path)
    assert server.get("/healthz").status_code == 200


needs_schemathesis = pytest.mark.skipif(
    not HAS_SCHEMATHESIS, reason="schemathesis is not installed; pip install 'streamvid[test]'"
)


@needs_schemathesis
def test_answers_are_those_of_the_openapi(server):
    check_operations(server, max_examples=3)


@needs_schemathesis
@pytest.mark.slow
def test_many_answers_are_those_of_the_openapi(server):
    check_operations(server, max_examples=60)
