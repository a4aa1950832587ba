"""TAEHV, a tiny autoencoder for the latents of large video models (github.com/madebyollin/taehv,
MIT licence).

It decodes Wan's latents at 1/25 of the work of Wan's own decoder, at some cost in detail: for live
views. The published files are `taew2_1` (Wan 2.1, and Wan 2.2 A14B, which has the same latents: 16
channels, 8 x 8 x 4) and `taew2_2` (Wan 2.2 TI2V 5B: 48 channels, 16 x 16 x 4, in patches of 2 x 2
pixels), as `.safetensors` or `.pth`.

It takes and gives latents as the diffusion model has them, that is normalised: nothing is left to
scale. A file says nothing about whose latents it is for, only the shapes tell: `taehv`
(HunyuanVideo) and `taecvx` (CogVideoX) have those of `taew2_1`, and would decode Wan's latents to
nonsense.

The network is a row of layers whose place in the row is their published name. What passes from
frame to frame is `tiny_vae.MemoryBlock`'s: its input at the frame before.

Shapes: B batch, C channels, T latent frames, H W height and width in pixels, h w in latent pixels.
"""

from __future__ import annotations

from math import isqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from streamvid.codecs.base import check_frames, check_latents, check_same_stream
from streamvid.codecs.tiny_vae import (
    CausalStack,
    DecoderState,
    MemoryBlock,
    TimeGrow,
    TimePool,
    per_frame,
)
from streamvid.weights import read_tensors

WIDTHS = (256, 128, 64, 64)
"""Channels of the decoder at 1/8, 1/4, 1/2 and all of the size (of patches); the encoder has 64
throughout."""


def conv(channels_in: int, channels_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=bias)


class SoftClamp(nn.Module):
    """Latents far outside of (-3, 3) are drawn to its ends."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class MemBlock(MemoryBlock):
    """TAEHV's memory block: no normalisation, and a ReLU after the sum."""

    def __init__(self, channels: int):
        nn.Module.__init__(self)  # other layers than MemoryBlock's
        self.conv = nn.Sequential(
            conv(2 * channels, channels),
            nn.ReLU(),
            conv(channels, channels),
            nn.ReLU(),
            conv(channels, channels),
        )

    @property
    def layers(self) -> nn.Module:
        return self.conv

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """As ``MemoryBlock.forward``."""
        total, past = super().forward(x, past)
        return F.relu(total), past


class TPool(TimePool):
    """``stride`` frames to one: their channels side by side, the earlier first, then a 1 x 1
    convolution.
    """

    def __init__(self, channels: int, stride: int):
        nn.Module.__init__(self)
        self.stride = stride
        self.conv = nn.Conv2d(stride * channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(self.conv, rearrange(x, "b (t s) c h w -> b t (s c) h w", s=self.stride))


class TGrow(TimeGrow):
    """One frame to ``stride``, by a 1 x 1 convolution to that many times the channels, the earlier
    frame's first.
    """

    def __init__(self, channels: int, stride: int):
        nn.Module.__init__(self)
        self.stride = stride
        self.conv = nn.Conv2d(channels, stride * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(per_frame(self.conv, x), "b t (s c) h w -> b (t s) c h w", s=self.stride)


def build_encoder(image_channels: int, latent_channels: int) -> CausalStack:
    """To 1/8 of the size, 1/4 of the frames."""
    layers: list[nn.Module] = [conv(image_channels, 64), nn.ReLU()]
    for time_stride in (2, 2, 1):
        layers += [
            TPool(64, time_stride),
            conv(64, 64, stride=2, bias=False),
            *(MemBlock(64) for _ in range(3)),
        ]
    return CausalStack([*layers, conv(64, latent_channels)])


def build_decoder(latent_channels: int, image_channels: int) -> CausalStack:
    """To 8 times the size, 4 times the frames."""
    layers: list[nn.Module] = [SoftClamp(), conv(latent_channels, WIDTHS[0]), nn.ReLU()]
    for channels, narrower, time_stride in zip(WIDTHS, WIDTHS[1:], (1, 2, 2)):
        layers += [MemBlock(channels) for _ in range(3)]
        layers += [
            nn.Upsample(scale_factor=2),
            TGrow(channels, time_stride),
            conv(channels, narrower, bias=False),
        ]
    return CausalStack([*layers, nn.ReLU(), conv(WIDTHS[-1], image_channels)])


class AutoencoderTAEHV(ModelMixin, ConfigMixin):
    """TAEHV with the published names; a ``streamvid.codecs.base.VideoCodec``.

    Args:
        latent_channels: 16 for Wan 2.1, 48 for Wan 2.2 TI2V 5B.
        patch_size: side of the pixel patches that the network sees as one pixel; 1 and 2.
        has_encoder: False for a file that holds the decoder only.
    """

    temporal_ratio = 4
    latents_per_call = 1
    """Latent frames that ``decode_chunk`` decodes together; with more the bits depend on the
    chunking."""

    @register_to_config
    def __init__(self, latent_channels: int = 16, patch_size: int = 1, has_encoder: bool = True):
        super().__init__()
        image_channels = 3 * patch_size**2
        self.encoder = build_encoder(image_channels, latent_channels) if has_encoder else None
        self.decoder = build_decoder(latent_channels, image_channels)

    @classmethod
    def from_file(cls, file: str | Path) -> AutoencoderTAEHV:
        """Open a published file, in float32; its shapes tell which of them it is.

        Raises:
            ValueError: if it is missing, damaged, or of other names or shapes.
        """
        tensors = read_tensors(Path(file))
        try:
            latent_channels = tensors["decoder.1.weight"].shape[1]
            patch_size = isqrt(len(tensors["decoder.22.weight"]) // 3)
        except KeyError as error:
            raise ValueError(
                f"{file} has no {error}; expected TAEHV's names, as in taew2_1.safetensors"
            ) from error
        codec = cls(
            latent_channels, patch_size, any(name.startswith("encoder.") for name in tensors)
        )
        _check_names_and_shapes(str(file), tensors, codec.state_dict())
        codec.load_state_dict(tensors)
        return codec

    @property
    def latent_channels(self) -> int:
        """Channels of a latent frame."""
        return self.config.latent_channels

    @property
    def spatial_ratio(self) -> int:
        """Pixels a latent pixel, along one side."""
        return 8 * self.config.patch_size

    def encode_frames(self, frames: Tensor) -> Tensor:
        """See ``VideoCodec.encode_frames``. In the weights' precision.

        The last frame is held to fill the last group of four, as published: a latent frame sees up
        to three frames ahead, unlike Wan's encoder's.

        Raises:
            ValueError: for wrong sizes, or if the file held no encoder.
        """
        if self.encoder is None:
            raise ValueError(
                "this TAEHV holds only the decoder; encode with the Wan autoencoder of the same"
                " latents"
            )
        check_frames(frames, self.temporal_ratio, self.spatial_ratio)
        held = torch.cat([frames, frames[:, -1:].expand(-1, 3, -1, -1, -1)], dim=1).to(self.dtype)
        patches = F.pixel_unshuffle(held, self.config.patch_size)
        latents, _ = self.encoder.run(patches, (None,) * self.encoder.slots())
        return rearrange(latents, "b t c h w -> b c t h w").to(frames.dtype)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See ``VideoCodec.decode_latents``; a stream of one chunk, so that the two agree to the
        bit.
        """
        return self.decode_chunk(latents, self.new_decoder_state())[0]

    def new_decoder_state(self) -> DecoderState:
        """See ``VideoCodec.new_decoder_state``; one frame a memory block, 67 MB in half precision
        at 480 x 832.
        """
        return (None,) * self.decoder.slots()

    def decode_chunk(self, latents: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """See ``VideoCodec.decode_chunk``. One latent frame at a time, unless ``latents_per_call``
        says otherwise: the bits don't depend on the chunking.

        A latent frame makes four frames; of the first four of a stream the last is kept.

        Raises:
            ValueError: for other channels, or a batch or size other than that of the stream.
        """
        check_latents(latents, self.latent_channels)
        if state[0] is not None:
            check_same_stream(latents, state[0])
        clips = []
        ordered = rearrange(latents, "b c t h w -> b t c h w").to(self.dtype)
        for some in ordered.split(self.latents_per_call, dim=1):
            begun = state[0] is not None
            patches, state = self.decoder.run(some.contiguous(), state)
            clips.append(patches if begun else patches[:, 3:])
        frames = F.pixel_shuffle(torch.cat(clips, dim=1), self.config.patch_size)
        return frames.clamp(0, 1).to(latents.dtype), state


def _check_names_and_shapes(
    file: str, tensors: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """A ValueError of one line unless the two have the same names, with the same shapes."""
    for kind, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has the unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"{file} {kind} {min(names)} and {len(names) - 1} more; expected a TAEHV file such"
                " as taew2_1"
            )
    wrong = [name for name in expected if tensors[name].shape != expected[name].shape]
    if wrong:
        came, due = (tuple(table[wrong[0]].shape) for table in (tensors, expected))
        raise ValueError(
            f"{file}: {wrong[0]} is {came}, expected {due}, and {len(wrong) - 1} more; only TAEHV's"
            " standard widths open"
        )
