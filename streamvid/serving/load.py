"""Viewers of a server, as many as one likes, and how well they are served.

A viewer is a client over a real WebSocket that confirms frames as they come and asks for another
prompt from time to time. Pictures are not decoded. What a person would have seen follows from when
frames came: ``play`` simulates a player that begins ``buffer_s`` after the first frame, shows a
frame every ``1 / fps`` seconds, and stands still while the next frame is not there.

Times are seconds of ``time.perf_counter``.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import WebSocketException

from streamvid.printing import printable
from streamvid.serving import protocol

LIVE_PATH = "/v1/realtime/video"
START_TIMEOUT_S = 180.0
"""A server that is not ready after so long is given up."""
GOODBYE_TIMEOUT_S = 30.0
"""A server that does not end a stream in so long is given up."""
FIGURES = {
    "sessions": "streamvid_sessions",
    "waiting": "streamvid_sessions_waiting",
    "threads": "streamvid_threads",
    "cache_bytes": "streamvid_cache_bytes",
    "memory_bytes": "process_resident_memory_bytes",
    "open_files": "process_open_fds",
}
"""What is read of a server's ``/metrics``, and its names there."""


# ---------------------------------------------------------------- what one viewer sees


@dataclass
class Switch:
    """A new prompt, from asking for it to its first frame."""

    asked_s: float
    old_prompt: int
    chunks: int = 0
    """Chunks of the old prompt that came meanwhile."""
    seen_s: float | None = None
    """None: its first frame has not come."""


@dataclass
class Visit:
    """What one viewer asked for and saw."""

    fps: float
    asked_s: float = 0.0
    ended_s: float = 0.0
    sequences: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    """Of each frame, beside ``sequences``."""
    chunk_starts: list[int] = field(default_factory=list)
    """Places in ``sequences`` where a chunk begins."""
    ages_s: list[float] = field(default_factory=list)
    """Per chunk: from when it was finished to when its first frame came, if both machines have
    one clock."""
    work_ms: list[float] = field(default_factory=list)
    """Per chunk: time that the model took."""
    switches: list[Switch] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    prompt_id: int = 0
    waited: bool = False
    """Whether all places were taken at first."""

    def note_frame(self, header: protocol.FrameHeader, now_s: float) -> None:
        """A frame has come."""
        if not self.chunk_starts or header.flags & protocol.FIRST_OF_CHUNK:
            self.chunk_starts.append(len(self.sequences))
            self.ages_s.append(time.time() - header.captured_us / 1e6)
            self._note_chunk_of(header.prompt_id, now_s)
        self.sequences.append(header.sequence)
        self.arrivals_s.append(now_s)

    def _note_chunk_of(self, prompt_id: int, now_s: float) -> None:
        self.prompt_id = prompt_id
        for switch in self.switches:
            if switch.seen_s is None and prompt_id > switch.old_prompt:
                switch.seen_s = now_s
            elif switch.seen_s is None:
                switch.chunks += 1

    def note_message(self, message: protocol.Message) -> None:
        """A message has come."""
        match message:
            case protocol.SessionQueued():
                self.waited = True
            case protocol.VideoChunk():
                self.work_ms.append(message.compute_ms)
            case protocol.Error():
                self.errors[message.code] += 1

    @property
    def first_frame_s(self) -> float | None:
        """From asking to the first frame; None if none came."""
        return self.arrivals_s[0] - self.asked_s if self.arrivals_s else None

    @property
    def first_chunk_s(self) -> float | None:
        """From asking to the last frame of the first chunk that came; None if none came."""
        if not self.arrivals_s:
            return None
        end = self.chunk_starts[1] if len(self.chunk_starts) > 1 else len(self.arrivals_s)
        return self.arrivals_s[end - 1] - self.asked_s

    @property
    def dropped(self) -> int:
        """Frames that were left out: the gaps in what came."""
        return self.sequences[-1] + 1 - len(self.sequences) if self.sequences else 0

    @property
    def intervals_s(self) -> list[float]:
        """Between the first frames of chunks."""
        starts = [self.arrivals_s[place] for place in self.chunk_starts]
        return list(np.diff(starts))


@dataclass(frozen=True)
class Playback:
    """What a player makes of the frames that came."""

    due: int
    """Frames that should have been shown until the end."""
    in_time: int
    """Those that came before they should be shown."""
    stalls: int
    stall_s: float
    watched_s: float
    """From when the first frame should have been shown to the end."""


def play(visit: Visit, buffer_s: float) -> Playback:
    """Simulate the player of a visit.

    Frame k of a stream is due ``buffer_s + k / fps`` after the first one came. If a chunk is not
    there in time, those of its frames that are overdue are late; then the player has stood still,
    and all that follows is due later by as much. A frame that was left out is late. Where nothing
    came, the player stands still until the end.
    """
    if not visit.arrivals_s:
        return Playback(1, 0, 1, visit.ended_s - visit.asked_s, visit.ended_s - visit.asked_s)
    sequences, arrivals_s = np.array(visit.sequences), np.array(visit.arrivals_s)
    origin_s = arrivals_s[0] + buffer_s  # when frame 0 is due, later by each stall
    begun_s, stalls, stall_s, in_time = origin_s, 0, 0.0, 0
    for begin, end in zip(visit.chunk_starts, [*visit.chunk_starts[1:], len(sequences)]):
        due_s = origin_s + (sequences[begin:end] - sequences[0]) / visit.fps
        late_s = arrivals_s[begin:end] - due_s
        in_time += int(((late_s <= 0) & (due_s <= visit.ended_s)).sum())
        if late_s.max() > 0:
            stalls += 1
            stall_s += float(late_s.max())
            origin_s += late_s.max()
    next_s = origin_s + (sequences[-1] + 1 - sequences[0]) / visit.fps
    due = int(sequences[-1] + 1 - sequences[0])
    if next_s < visit.ended_s:
        stalls += 1
        stall_s += visit.ended_s - next_s
        due += int((visit.ended_s - next_s) * visit.fps)
    else:  # frames that came early, for after the end
        due = min(due, int((visit.ended_s - origin_s) * visit.fps) + 1)
    return Playback(max(due, in_time), in_time, stalls, stall_s, visit.ended_s - begun_s)


# ---------------------------------------------------------------- a viewer


@dataclass(frozen=True)
class Server:
    """Where a server is, and what lets one in."""

    url: str
    token: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def connect(self) -> connect_websocket:
        """A WebSocket for a stream, as a context."""
        address = f"ws{self.url.removeprefix('http')}{LIVE_PATH}"
        return connect_websocket(
            address, additional_headers=self.headers, max_size=None, compression=None
        )

    def fetch(self, path: str) -> str:
        """The text of a page.

        Raises:
            ValueError: in one line, if there is no server or it refuses.
        """
        request = Request(f"{self.url}{path}", headers=self.headers)
        try:
            with urlopen(request, timeout=30) as reply:
                return reply.read().decode()
        except HTTPError as error:
            hint = "; give --token-file" if error.code == 401 else ""
            raise ValueError(f"{self.url}{path} answers {error.code}{hint}") from None
        except (URLError, OSError) as error:
            reason = printable(getattr(error, "reason", error))
            raise ValueError(
                f"no server answers at {self.url} ({reason}); start one with: streamvid serve"
            ) from None

    def figures(self) -> dict[str, float]:
        """What the server says of itself, by the names of ``FIGURES``; NaN where it says
        nothing.
        """
        said = {}
        for line in self.fetch("/metrics").splitlines():
            name, _, value = line.rpartition(" ")
            said[name] = value
        return {name: float(said.get(key, "nan")) for name, key in FIGURES.items()}


@dataclass(frozen=True)
class Wishes:
    """What a viewer asks for.

    Args:
        prompts: the first one, and those that it switches to in turn.
        switch_every_s: seconds between two prompts; None never switches.
        settings: of ``session.start`` besides prompt and seed.
    """

    prompts: Sequence[str]
    seed: int = 0
    switch_every_s: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


async def watch(server: Server, visit: Visit, wishes: Wishes, seconds: float) -> None:
    """Watch for so many seconds, then end the stream; what goes wrong is counted in the visit."""
    try:
        async with server.connect() as socket:
            await begin(socket, visit, wishes)
            steering = asyncio.create_task(_switch_prompts(socket, visit, wishes))
            try:
                await asyncio.wait_for(receive(socket, visit), seconds)
            except asyncio.TimeoutError:
                pass  # the time is up
            finally:
                visit.ended_s = time.perf_counter()
                steering.cancel()
            await socket.send(json.dumps({"type": "session.stop"}))
            await asyncio.wait_for(_drain(socket), GOODBYE_TIMEOUT_S)
    except (WebSocketException, OSError, asyncio.TimeoutError) as error:
        visit.errors[type(error).__name__] += 1
    finally:
        visit.ended_s = visit.ended_s or time.perf_counter()


async def begin(socket: ClientConnection, visit: Visit, wishes: Wishes) -> None:
    """Ask for a stream."""
    visit.asked_s = time.perf_counter()
    start = {
        "type": "session.start",
        "prompt": wishes.prompts[0],
        "seed": wishes.seed,
        "fps": visit.fps,
        "acks": True,
        **wishes.settings,
    }
    await socket.send(json.dumps(start))


async def receive(socket: ClientConnection, visit: Visit) -> None:
    """Note and confirm what comes, until the stream ends, which is an error here."""
    async for message in socket:
        if isinstance(message, bytes):
            header, _ = protocol.unpack_frame(message)
            visit.note_frame(header, time.perf_counter())
            await socket.send(f'{{"type": "ack", "sequence": {header.sequence}}}')
            continue
        said = protocol.parse_server_message(message)
        visit.note_message(said)
        if isinstance(said, protocol.SessionDone):
            visit.errors[f"ended: {said.reason}"] += 1
            return
    visit.errors["connection closed"] += 1


async def _switch_prompts(socket: ClientConnection, visit: Visit, wishes: Wishes) -> None:
    if wishes.switch_every_s is None:
        return
    for prompt in islice(cycle(wishes.prompts), 1, None):
        await asyncio.sleep(wishes.switch_every_s)
        visit.switches.append(Switch(time.perf_counter(), visit.prompt_id))
        update = {"type": "session.prompt_update", "prompt": prompt}
        with suppress(WebSocketException):  # the receiver tells it
            await socket.send(json.dumps(update))


async def _drain(socket: ClientConnection) -> None:
    async for message in socket:
        if isinstance(message, str) and '"session.done"' in message:
            return


# ---------------------------------------------------------------- a server of one's own


@contextmanager
def run_server(options: Sequence[str]) -> Iterator[tuple[Server, subprocess.Popen[str]]]:
    """A server in a process of its own, ready, and its process; it ends with the context.

    Args:
        options: of ``streamvid serve``.

    Raises:
        ValueError: if it can't be started, with its own words.
    """
    command = [sys.executable, "-m", "streamvid.serving.command", *options]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            server = Server(_address_of(process, errors))
            _wait_until_ready(server, process, errors)
            yield server, process
        finally:
            _end(process)


def _address_of(process: subprocess.Popen[str], errors: IO[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:  # ends when the server does
        found = re.search(r"http://\S+?:\d+", line)
        if found:
            return found[0].replace("localhost", "127.0.0.1")
    process.wait()
    raise ValueError(_last_words(process, errors))


def _wait_until_ready(server: Server, process: subprocess.Popen[str], errors: IO[str]) -> None:
    patience_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < patience_s:
        if process.poll() is not None:
            raise ValueError(_last_words(process, errors))
        with suppress(ValueError):
            server.fetch("/readyz")
            return
        time.sleep(0.1)
    raise ValueError(f"the server was not ready after {START_TIMEOUT_S:g} s")


def _last_words(process: subprocess.Popen[str], errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line for line in errors.read().splitlines() if line.strip()]
    reason = printable(lines[-1]).removeprefix("error: ") if lines else "without a word"
    return f"the server ended with exit code {process.returncode}: {reason}"


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def check_url(url: str) -> str:
    """The address of a server, without a slash at its end.

    Raises:
        ValueError: if it is none.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/"):
        raise ValueError(f"--url {printable(url)}, expected an address such as http://host:8000")
    return f"{parts.scheme}://{parts.netloc}"
