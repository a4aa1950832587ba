"""The command line: who may be let in, and how a server ends."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress

import httpx
import pytest
import torch

from streamvid.data.world import read_caption
from streamvid.serving import command, models
from streamvid.shipped import TINY_STUDENT, TINY_TEACHER
from streamvid.students import folder


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_a_public_address_demands_a_token(host, capsys, monkeypatch):
    monkeypatch.delenv(command.TOKEN_VARIABLE, raising=False)
    assert command.main(["--host", host]) == 2
    error = capsys.readouterr().err
    assert "token" in error and error.count("\n") == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_demands_none(host):
    command.check_address(host, None)


@pytest.mark.parametrize("token", ["short", "", "has spaces in it 0123456789", "ü" * 20])
def test_a_token_that_is_no_secret_is_refused(tmp_path, token):
    (tmp_path / "token").write_text(token)
    with pytest.raises(ValueError, match="expected at least 16"):
        command.read_token(str(tmp_path / "token"))


@pytest.fixture
def configured(monkeypatch):
    """``configured(options)``: uvicorn's configuration of a server that is not started."""

    def configure(*options):
        seen = []
        monkeypatch.setattr(command, "announce", lambda uvicorn, config, *rest: seen.append(config))
        assert command.main(list(options)) == 0
        return seen[0]

    return configure


def test_only_a_proxy_may_say_for_whom_it_asks(configured):
    """Anyone on the machine could once pass as many addresses, each with its own limits."""
    assert not configured("--port", "0").proxy_headers
    assert configured("--port", "0", "--allow-host", "live.example.org").proxy_headers


def test_limits_are_set_by_name(configured, capsys):
    limits = configured("--limit", "sessions=3", "--limit", "max_fps=240").app.state.worker.limits
    assert (limits.sessions, limits.max_fps, limits.waiting) == (3, 240.0, 16)
    assert command.main(["--limit", "session=3"]) == 2
    assert "sessions" in capsys.readouterr().err


def test_the_examples_are_sentences_of_the_world():
    examples = command.world_examples()
    assert len(set(examples)) == len(examples) > 20
    assert all(read_caption(example).bodies for example in examples)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_cleanly(number, tmp_path):
    """The stream gets its end, and the recording is complete."""
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    from streamvid.serving.protocol import parse_server_message

    server = subprocess.Popen(
        [sys.executable, "-m", "streamvid.serving.command", "--port", "0", "--folder", tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        address = re.search(r"localhost:\d+", server.stdout.readline())[0]
        while httpx.get(f"http://{address}/readyz").status_code != 200:
            pass
        with connect(f"ws://{address}/v1/realtime/video") as socket:
            socket.send('{"type": "session.start", "prompt": "a small red circle moves up"}')
            socket.send('{"type": "record.start"}')
            while not isinstance(socket.recv(), bytes):
                pass
            server.send_signal(number)
            said = []
            with suppress(ConnectionClosed):  # with 1012, the server restarts
                while True:
                    if isinstance(message := socket.recv(), str):
                        said.append(parse_server_message(message))
        assert [m.reason for m in said if m.type == "session.done"] == ["server_stopping"]
        recorded = next(m for m in said if m.type == "record.done")
        assert (tmp_path / f"{recorded.id}.mp4").stat().st_size > 0
        assert server.wait(30) == 0
    finally:
        server.kill()


def test_students_and_a_teacher_have_names_of_their_own(monkeypatch):
    """The folder above `student`, with a number where it is taken."""
    monkeypatch.setattr(folder, "load_student", lambda path, *_: f"opened {path}")
    device = torch.device("cpu")
    args = command.parse_args(["--student", "runs/dmd/student", "--student", "old/dmd"], "serve")
    assert command.open_students(args, device, public=False) == [
        ("dmd", "opened runs/dmd/student", ["--student", "runs/dmd/student"]),
        ("dmd-2", "opened old/dmd", ["--student", "old/dmd"]),
    ]
    assert command.open_teachers(args, device, ["dmd", "dmd-2"]) == []
    args = command.parse_args(["--teacher"], "serve")
    assert command.open_students(args, device, public=False) == [
        ("streamvid-tiny", f"opened {TINY_STUDENT}", [])
    ]
    monkeypatch.setattr(models, "serve_teacher", lambda *given: given)
    (shipped,) = command.open_teachers(args, device, ["streamvid-tiny"])
    assert shipped[:3] == ("streamvid-tiny-teacher", str(TINY_TEACHER), 33)
    args = command.parse_args(["--teacher", "runs/dmd/teacher", "--teacher-frames", "81"], "serve")
    (other,) = command.open_teachers(args, device, ["dmd"])
    assert other[:3] == ("dmd-2", "runs/dmd/teacher", 81)


def test_a_batch_has_at_least_one_stream(capsys):
    assert command.main(["--batch", "0"]) == 2
    assert "expected at least 1" in capsys.readouterr().err
