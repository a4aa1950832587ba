"""What the rest of the code asks of a latent video codec.

Shapes: frames ``[B, T, 3, H, W]`` in [0, 1]; latents ``[B, C, T', h, w]``, normalised to zero mean
and unit variance a channel. A clip of ``1 + r k`` frames has ``1 + k`` latent frames, r =
``temporal_ratio``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class VideoCodec(Protocol):
    """A causal video autoencoder with a streaming decoder.

    The state of a stream is a value: it lives outside the codec, is never changed in place, and may
    be kept, copied and continued twice. It consists of tuples within tuples of tensors, texts,
    numbers and None, so that ``flatten_state`` can take it apart for a file. Dropping it and taking
    ``new_decoder_state`` begins a new stream.
    """

    latent_channels: int
    temporal_ratio: int
    spatial_ratio: int

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Frames ``[B, 1 + r k, 3, H, W]`` in [0, 1] to normalised latents ``[B, C, 1 + k, h,
        w]``.
        """

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Normalised latents ``[B, C, 1 + k, h, w]`` to frames ``[B, 1 + r k, 3, H, W]`` in [0,
        1].
        """

    def new_decoder_state(self) -> Any:
        """The state of a stream of which nothing has been decoded yet."""

    def decode_chunk(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next latent frames of a stream to frames, and the new state; the old state is not
        changed.

        Concatenated over chunks, the frames equal ``decode_latents`` of the concatenated latents.
        """


def flatten_state(state: Any) -> tuple[Any, list[Tensor]]:
    """A decoder's state as a layout that JSON can hold and the tensors that it refers to.

    Raises:
        ValueError: if the state holds anything but tuples, tensors, texts, numbers and None.
    """
    tensors: list[Tensor] = []

    def layout_of(part: Any) -> Any:
        if isinstance(part, Tensor):
            tensors.append(part)
            return {"tensor": len(tensors) - 1}
        if isinstance(part, tuple):
            return [layout_of(inner) for inner in part]
        if part is None or isinstance(part, (bool, int, float, str)):
            return part
        raise ValueError(
            f"a decoder's state holds a {type(part).__name__}, expected tuples, tensors, texts,"
            " numbers and None"
        )

    return layout_of(state), tensors


def rebuild_state(layout: Any, tensors: Sequence[Tensor]) -> Any:
    """The state that ``flatten_state`` took apart.

    Raises:
        ValueError: if the layout refers to a tensor that is not there.
    """
    if isinstance(layout, list):
        return tuple(rebuild_state(part, tensors) for part in layout)
    if not isinstance(layout, dict):
        return layout
    number = layout.get("tensor")
    if type(number) is not int or not 0 <= number < len(tensors):
        raise ValueError(f"a decoder's state refers to {layout}, of {len(tensors)} tensors")
    return tensors[number]


@torch.no_grad()
def last_frame_as_image(codec: VideoCodec, latents: Tensor) -> Tensor:
    """The last pixel frame of ``latents [B, C, t, h, w]``, encoded as an image: ``[B, C, 1, h,
    w]``.

    With it in place of their first latent, the latents that follow are those of a clip that begins
    there.
    """
    image = codec.decode_latents(latents)[:, -1:]
    return codec.encode_frames(image).to(latents)


def latent_frames_of(num_frames: int, temporal_ratio: int) -> int:
    """Latent frames of a clip of ``num_frames`` pixel frames.

    Raises:
        ValueError: unless ``num_frames`` is ``1 + temporal_ratio * k``.
    """
    if num_frames < 1 or (num_frames - 1) % temporal_ratio:
        lower = 1 + max(0, (num_frames - 1) // temporal_ratio) * temporal_ratio
        raise ValueError(
            f"num_frames={num_frames} is not 1 + {temporal_ratio} k; use {lower} or"
            f" {lower + temporal_ratio}"
        )
    return 1 + (num_frames - 1) // temporal_ratio


def check_frames(frames: Tensor, temporal_ratio: int, spatial_ratio: int) -> None:
    """A ValueError unless the frames are ``[B, 1 + r k, 3, H, W]`` of a size that the codec
    divides.
    """
    shape = tuple(frames.shape)
    if len(shape) != 5 or shape[2] != 3:
        raise ValueError(f"expected frames [B, T, 3, H, W], got {shape}")
    latent_frames_of(shape[1], temporal_ratio)
    if shape[3] % spatial_ratio or shape[4] % spatial_ratio:
        raise ValueError(
            f"frames of {shape[3]} x {shape[4]} pixels, expected multiples of {spatial_ratio}; crop"
            " or resize"
        )


def check_latents(latents: Tensor, channels: int) -> None:
    """A ValueError unless the latents are ``[B, channels, T, h, w]`` with T at least 1."""
    shape = tuple(latents.shape)
    if len(shape) != 5 or shape[1] != channels or not shape[2]:
        raise ValueError(f"expected latents [B, {channels}, T, h, w], got {shape}")


def check_same_stream(latents: Tensor, before: Tensor) -> None:
    """A ValueError if a chunk's batch or size is not that of ``before [B, ..., h, w]``, taken from
    the state.
    """
    expected, came = [(len(x), *x.shape[-2:]) for x in (before, latents)]
    if expected != came:
        raise ValueError(
            f"the stream has (batch, height, width) = {expected} in latent pixels, the chunk"
            f" {came}; begin a stream of another size with new_decoder_state()"
        )
