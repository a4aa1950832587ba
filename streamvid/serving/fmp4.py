"""Frames as one H.264 stream in fragmented MP4: an initialisation segment, then a fragment per
frame.

libx264 encodes, libav's muxer writes the boxes, both by PyAV. A fragment comes out as soon as its
frame goes in: there are no B frames and no look-ahead, and each fragment is written by a muxer of
its own, told by ``fragment_index`` and ``frag_discont`` which one of the stream it is, because a
muxer that lives on holds a frame back until the next one tells how long it lasts.

Frames that a viewer misses are left out before they are encoded. Every frame that is encoded is
sent, so each one finds the frame that it refers to.
"""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
from av.video.frame import PictureType

from streamvid.frames import EXACT
from streamvid.serving.protocol import KEY_FRAME

TICKS_PER_SECOND = 90_000
KEY_EVERY_S = 4.0
BT709, LIMITED = 1, 1  # of ITU-T H.273, and libav's number of the range 16 to 235
NEVER = 2**30  # frames between the key frames that x264 chooses by itself
MOVFLAGS = "empty_moov+default_base_moof+frag_discont+skip_trailer"


def has_h264() -> bool:
    """Whether H.264 can be encoded here."""
    return "libx264" in av.codecs_available


def check_h264(height: int, width: int) -> None:
    """Refuse frames that can't be encoded."""
    if not has_h264():
        raise ValueError("format: this server has no libx264; ask for jpeg")
    if height % 2 or width % 2:
        raise ValueError(f"format: h264 needs an even size, got {width} x {height}; ask for jpeg")


class FragmentEncoder:
    """Encodes the frames of one stream.

    Args:
        height, width: of the frames, in pixels, even.
        fps: frames per second, about; each frame says how long it lasts.
        quality: 1 to 100, as of pictures.
    """

    encoding = "h264"

    def __init__(self, height: int, width: int, fps: float, quality: int):
        self._output = av.open(io.BytesIO(), "w", format="mp4")  # of parameters, not of packets
        rate = Fraction(fps).limit_denominator(1000)
        self._stream = self._output.add_stream("libx264", rate=rate)
        context = self._stream.codec_context
        context.height, context.width = height, width
        context.pix_fmt = "yuv420p"
        context.time_base = Fraction(1, TICKS_PER_SECOND)
        context.gop_size = NEVER
        context.max_b_frames = 0
        context.thread_count = 1
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = LIMITED
        context.options = {
            "preset": "veryfast",
            "tune": "zerolatency",
            "forced-idr": "1",
            "sc_threshold": "0",
            "crf": f"{51 - 0.36 * quality:g}",
        }
        self._output.start_encoding()
        self._context = context
        self._ticks = 0
        self._key_ticks = -TICKS_PER_SECOND * KEY_EVERY_S
        self._num_fragments = 0
        self._next: tuple[int, int] | None = None
        self.initialisation = b"".join(self._boxes(None, (b"ftyp", b"moov")))

    @property
    def codec(self) -> str:
        """The stream's codec as ``MediaSource`` names it (RFC 6381): profile and level."""
        record = self.initialisation.index(b"avcC") + 4
        return f"avc1.{self.initialisation[record + 1 : record + 4].hex()}"

    def encode(
        self, image: np.ndarray, sequence: int, chunk: int, lasts: int, fps: float
    ) -> tuple[bytes, int]:
        """The fragment of the next frame, and its flags.

        Args:
            image: RGB bytes ``[H, W, 3]``.
            sequence, chunk: its numbers; a frame that does not follow the last one is a key frame.
            lasts: frames until the next one, 1 if none is left out.
            fps: frames per second of playback.
        """
        follows = self._next is not None and self._next[0] == sequence
        follows = follows and chunk - self._next[1] in (0, 1)
        is_key = not follows or self._ticks - self._key_ticks >= KEY_EVERY_S * TICKS_PER_SECOND
        frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
            format="yuv420p", interpolation=EXACT, dst_colorspace=BT709, dst_color_range=LIMITED
        )
        frame.pts, frame.time_base = self._ticks, self._context.time_base
        frame.pict_type = PictureType.I if is_key else PictureType.NONE
        (packet,) = self._stream.encode(frame)
        packet.duration = max(1, round(TICKS_PER_SECOND * lasts / fps))
        if is_key:
            self._key_ticks = self._ticks
        self._ticks += packet.duration
        self._next = sequence + lasts, chunk
        self._num_fragments += 1
        fragment = b"".join(self._boxes(packet, (b"moof", b"mdat")))
        return fragment, KEY_FRAME if is_key else 0

    def _boxes(self, packet: av.Packet | None, kinds: tuple[bytes, ...]) -> list[bytes]:
        """What a muxer makes of a packet, its boxes of some kinds."""
        buffer = io.BytesIO()
        options = {
            "movflags": MOVFLAGS,
            "fragment_index": str(max(1, self._num_fragments)),
            "avoid_negative_ts": "make_non_negative",  # the default moves every first packet to 0
        }
        with av.open(buffer, "w", format="mp4", options=options) as muxer:
            stream = muxer.add_stream_from_template(self._stream)
            muxer.start_encoding()
            if packet is not None:
                packet.stream = stream
                muxer.mux(packet)
        return [box for kind, box in split_boxes(buffer.getvalue()) if kind in kinds]


def split_boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """The boxes of an MP4 file (ISO/IEC 14496-12, 4.2), each with its kind."""
    boxes, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        boxes.append((data[at + 4 : at + 8], data[at : at + size]))
        at += size
    return boxes
