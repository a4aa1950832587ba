"""Chunks of frames as the binary messages of a viewer: pictures, or fragments of a stream."""

from __future__ import annotations

import time
from typing import Literal, Protocol

import numpy as np

from streamvid.serving import protocol
from streamvid.serving.stream import Frames


class FrameEncoder(Protocol):
    """Encodes the frames of one stream, in order."""

    encoding: protocol.Encoding
    initialisation: bytes
    """What a decoder reads before the first frame; empty of pictures."""
    codec: str | None
    """As ``MediaSource`` names it; None of pictures."""

    def encode(
        self, image: np.ndarray, sequence: int, chunk: int, lasts: int, fps: float
    ) -> tuple[bytes, int]:
        """What is sent of a frame ``[H, W, 3]``, and flags of its header.

        Args:
            sequence, chunk: its numbers.
            lasts: frames until the next one, 1 if none is left out.
            fps: frames per second of playback.
        """


class PictureEncoder:
    """Each frame is a picture of its own."""

    initialisation = b""
    codec = None

    def __init__(self, encoding: Literal["jpeg", "webp"], quality: int):
        self.encoding = encoding
        self._quality = quality

    def encode(
        self, image: np.ndarray, sequence: int, chunk: int, lasts: int, fps: float
    ) -> tuple[bytes, int]:
        """The picture; see ``FrameEncoder``."""
        return protocol.encode_picture(image, self.encoding, self._quality), 0


def open_encoder(start: protocol.SessionStart, height: int, width: int, fps: float) -> FrameEncoder:
    """The encoder that a viewer has asked for."""
    if start.format != "h264":
        return PictureEncoder(start.format, start.quality)
    from streamvid.serving.fmp4 import FragmentEncoder

    return FragmentEncoder(height, width, fps, start.quality)


def encode_frames(frames: Frames, picks: range, encoder: FrameEncoder, fps: float) -> list[bytes]:
    """The binary messages of some frames of a chunk."""
    started = time.perf_counter()
    encoded = []
    for index in picks:
        lasts = min(picks.step, len(frames.images) - index)
        image, sequence = frames.images[index], frames.sequence + index
        encoded.append(encoder.encode(image, sequence, frames.chunk, lasts, fps))
    server_us = frames.server_us + int(1e6 * (time.perf_counter() - started))
    messages = []
    for number, (index, (body, flags)) in enumerate(zip(picks, encoded)):
        if number == 0:
            flags |= protocol.FIRST_OF_CHUNK
            flags |= protocol.FIRST_OF_PROMPT if frames.first_of_prompt else 0
        header = protocol.FrameHeader(
            frames.sequence + index,
            frames.chunk,
            frames.prompt_id,
            server_us,
            frames.captured_us,
            encoder.encoding,
            flags,
        )
        messages.append(protocol.pack_frame(header, body))
    return messages


def pack_initialisation(encoder: FrameEncoder, chunk: int) -> bytes:
    """The binary message that precedes the first frame of a stream that begins with ``chunk``."""
    header = protocol.FrameHeader(
        sequence=0,
        chunk=chunk,
        prompt_id=0,
        server_us=0,
        captured_us=time.time_ns() // 1000,
        encoding=encoder.encoding,
        flags=protocol.INITIALISATION,
    )
    return protocol.pack_frame(header, encoder.initialisation)
