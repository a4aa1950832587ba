"""One viewer's connection: reads what it asks for, sends what the worker has for it.

The connection runs in the event loop and never touches the model. Frames are encoded in threads,
just before they are sent, so that frames which a slow viewer misses cost nothing, and an encoder of
video never refers to one of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

from fastapi import WebSocket, WebSocketDisconnect

from streamvid.serving import protocol
from streamvid.serving.encoding import (
    FrameEncoder,
    encode_frames,
    open_encoder,
    pack_initialisation,
)
from streamvid.serving.errors import Busy
from streamvid.serving.limits import Limits, TokenBucket
from streamvid.serving.metrics import Metrics
from streamvid.serving.starts import Start, StartStore
from streamvid.serving.stream import Frames, Stream
from streamvid.serving.worker import Worker

log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 10.0
"""A viewer that takes nothing for so long has gone."""
MOST_MISTAKES = 5
"""Messages in a row that can't be read, after which the connection is closed."""
MALFORMED, TOO_MUCH, TRY_LATER = 1003, 1008, 1013  # close codes


@dataclass(frozen=True)
class Defaults:
    """What a stream is where its viewer says nothing."""

    height: int
    width: int
    fps: float


class Viewer:
    """A connection, with at most one stream at a time."""

    def __init__(
        self,
        socket: WebSocket,
        worker: Worker,
        limits: Limits,
        metrics: Metrics,
        defaults: Defaults,
        addresses: Counter[str],
        starts: StartStore,
    ):
        self._socket = socket
        self._worker = worker
        self._limits = limits
        self._metrics = metrics
        self._defaults = defaults
        self._addresses = addresses
        self._starts = starts
        self._address = socket.client.host if socket.client else "unknown"
        self._control = TokenBucket(limits.messages_per_minute)
        self._acks = TokenBucket(120 * limits.max_fps)
        self._errors = TokenBucket(limits.messages_per_minute)
        self._sending = asyncio.Lock()
        self._stream: Stream | None = None
        self._sender: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until one side leaves."""
        mistakes = 0
        try:
            while True:
                text = await self._receive()
                try:
                    await self._handle(text)
                    mistakes = 0
                except ValueError as error:
                    mistakes += 1
                    await self._tell("bad_message", str(error))
                    if mistakes >= MOST_MISTAKES:
                        await self._close(MALFORMED, "too many messages that can't be read")
                        return
        except (WebSocketDisconnect, _Closed, RuntimeError):  # a send after the end is the latter
            return
        except asyncio.TimeoutError:
            log.debug("a viewer takes no answers")
        finally:
            self._leave()

    async def _receive(self) -> str:
        event = await self._socket.receive()
        if event["type"] == "websocket.disconnect":
            raise _Closed
        text = event.get("text")
        if text is None:
            return ""  # what is no text is no message either
        if len(text.encode("utf-8", "replace")) > self._limits.message_bytes:
            await self._tell("too_large", f"expected at most {self._limits.message_bytes} bytes")
            await self._close(TOO_MUCH, "message too large")
            raise _Closed
        return text

    async def _handle(self, text: str) -> None:
        message = protocol.parse_viewer_message(text)
        bucket = self._acks if isinstance(message, protocol.Ack) else self._control
        if not bucket.take():
            rate = self._limits.messages_per_minute
            await self._tell("too_many", f"more than {rate} messages per minute; slow down", True)
            return
        self._check(message)
        stream = self._live_stream()
        if isinstance(message, protocol.SessionStart):
            await self._start(message, stream)
        elif stream is None:
            if not isinstance(message, (protocol.Ack, protocol.SessionStop)):
                await self._tell("no_session", "there is no stream; send session.start first")
        elif isinstance(message, protocol.Ack):
            self._worker.acknowledge(stream, message.sequence)
        elif not self._worker.tell(stream, message):
            await self._tell("too_many", "too many changes within one chunk; slow down", True)

    def _check(self, message: protocol.Message) -> None:
        """The server's own limits, which are tighter than the types'."""
        limits, given = self._limits, message.model_dump()
        if given.get("prompt") is not None:
            limits.check_prompt(given["prompt"])
        limits.check_steps(given.get("steps"))
        limits.check_fps(given.get("fps"))

    def _live_stream(self) -> Stream | None:
        return None if self._stream is None or self._stream.ended.is_set() else self._stream

    async def _start(self, start: protocol.SessionStart, stream: Stream | None) -> None:
        if stream is not None:
            await self._tell("bad_state", "a stream is running; send session.stop first")
            return
        if self._sender is not None:
            await self._sender  # the end of the stream before
        defaults = self._defaults
        model = self._worker.models.find_live(start.model)
        begins_from = self._find_start(start)
        of_start = defaults if begins_from is None else begins_from
        height, width = start.height or of_start.height, start.width or of_start.width
        self._limits.check_size(height, width)
        if self._addresses[self._address] >= self._limits.sessions_per_address:
            most = self._limits.sessions_per_address
            await self._tell("busy", f"more than {most} streams of one address; close one", True)
            return
        awake, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(awake.set)

        new = Stream(start, height, width, start.fps or defaults.fps, wake, model)
        new.start_file = None if begins_from is None else begins_from.file
        try:
            self._worker.add_stream(new)
        except Busy as error:
            await self._tell("busy", str(error), True)
            await self._close(TRY_LATER, "busy")
            raise _Closed from None
        self._addresses[self._address] += 1
        self._stream = new
        self._sender = asyncio.create_task(self._send_stream(new, awake))

    def _find_start(self, start: protocol.SessionStart) -> Start | None:
        """The frames that a stream is to begin from."""
        if start.start is None:
            return None
        found = self._starts.get(start.start)
        if found is None:
            raise ValueError("start: there is no such start, or its time is over; upload it again")
        asked = start.height or found.height, start.width or found.width
        if asked != (found.height, found.width):
            raise ValueError(
                f"start: it is {found.width} x {found.height}, the stream {asked[1]} x {asked[0]};"
                " leave the size out, or upload it for this size"
            )
        return found

    async def _send_stream(self, stream: Stream, awake: asyncio.Event) -> None:
        """All of a stream, until it is over or the viewer takes no more."""
        encoder: FrameEncoder | None = None
        try:
            while True:
                awake.clear()
                while (item := stream.outbox.take()) is not None:
                    if isinstance(item, Frames):
                        await self._send_frames(stream, item, encoder)
                        continue
                    if isinstance(item, protocol.VideoStart):
                        encoder = await self._send_start(stream, item)
                        continue
                    await self._send(item)
                    if isinstance(item, protocol.SessionDone):
                        return
                await awake.wait()
        except Exception as error:  # each server has its own kind for a connection that is gone
            log.debug("a viewer takes no more: %s", type(error).__name__)
            self._worker.leave(stream)
            with suppress(Exception):
                await self._socket.close(1011)
        finally:
            self._addresses[self._address] -= 1
            if not self._addresses[self._address]:
                del self._addresses[self._address]

    async def _send_start(self, stream: Stream, start: protocol.VideoStart) -> FrameEncoder:
        """The beginning of a stream, and what a decoder needs; returns the encoder."""
        encoder = await asyncio.to_thread(
            open_encoder, stream.start, start.height, start.width, start.fps
        )
        await self._send(start.model_copy(update={"codec": encoder.codec}))
        if encoder.initialisation:
            await self._send(pack_initialisation(encoder, start.chunk))
        return encoder

    async def _send_frames(self, stream: Stream, frames: Frames, encoder: FrameEncoder) -> None:
        num_frames = len(frames.images)
        stride = stream.flow.stride(num_frames)
        picks = range(0, num_frames, stride)
        messages = await asyncio.to_thread(encode_frames, frames, picks, encoder, stream.fps)
        for index, message in zip(picks, messages):
            await self._send(message)
            stream.flow.sent = frames.sequence + index
        stream.dropped += num_frames - len(picks)
        self._metrics.frames_sent.inc(len(picks))
        self._metrics.frames_dropped.inc(num_frames - len(picks))

    async def _send(self, item: protocol.Message | bytes) -> None:
        async with self._sending:
            if isinstance(item, bytes):
                sending = self._socket.send_bytes(item)
            else:
                sending = self._socket.send_text(item.model_dump_json())
            await asyncio.wait_for(sending, SEND_TIMEOUT_S)

    async def _tell(self, code: str, message: str, retryable: bool = False) -> None:
        self._metrics.errors.labels(code).inc()
        if not self._errors.take():
            await self._close(TOO_MUCH, "too many messages that were refused")
            raise _Closed
        await self._send(protocol.Error(code=code, message=message, retryable=retryable))

    async def _close(self, code: int, reason: str) -> None:
        async with self._sending:
            await self._socket.close(code, reason)

    def _leave(self) -> None:
        if self._stream is not None:
            self._worker.leave(self._stream)


class _Closed(Exception):
    """The connection is over."""
