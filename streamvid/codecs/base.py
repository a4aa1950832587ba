"""What the rest of the code asks of a latent video codec.

Shapes: frames ``[B, T, 3, H, W]`` in [0, 1]; latents ``[B, C, T', h, w]``, normalised to zero mean and
unit variance a channel. A clip of ``1 + r k`` frames has ``1 + k`` latent frames, r = ``temporal_ratio``.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class VideoCodec(Protocol):
    """A causal video autoencoder with a streaming decoder."""

    latent_channels: int
    temporal_ratio: int
    spatial_ratio: int

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Frames ``[B, 1 + r k, 3, H, W]`` in [0, 1] to normalised latents ``[B, C, 1 + k, h, w]``."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Normalised latents ``[B, C, 1 + k, h, w]`` to frames ``[B, 1 + r k, 3, H, W]`` in [0, 1]."""

    def new_decoder_state(self) -> Any:
        """The state of a stream of which nothing has been decoded yet."""

    def decode_chunk(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next latent frames of a stream to frames, and the new state; the old state is not changed.

        Concatenated over chunks, the frames equal ``decode_latents`` of the concatenated latents.
        """


def latent_frames_of(num_frames: int, temporal_ratio: int) -> int:
    """Latent frames of a clip of ``num_frames`` pixel frames.

    Raises:
        ValueError: unless ``num_frames`` is ``1 + temporal_ratio * k``.
    """
    if num_frames < 1 or (num_frames - 1) % temporal_ratio:
        lower = 1 + max(0, (num_frames - 1) // temporal_ratio) * temporal_ratio
        raise ValueError(
            f"num_frames={num_frames} is not 1 + {temporal_ratio} k; use {lower} or {lower + temporal_ratio}"
        )
    return 1 + (num_frames - 1) // temporal_ratio
