"""A tiny causal video autoencoder with a streaming decoder.

The kind is TAEHV's (github.com/madebyollin/taehv): two-dimensional convolutions only; what passes
from frame to frame is one memory slot a block, the block's input at the frame before. Time is
reduced 4 times and space 8 times. A clip has 1 + 4k frames: the first frame is held for the three
frames before it, so that every latent frame stands for four frames, and of the first four decoded
frames the last is kept.

Shapes: B batch, T frames, C channels, H W height and width, h w the same in latent space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from streamvid.codecs.base import check_frames, check_latents

DecoderState = tuple[Tensor | None, ...]
"""One entry a memory block (None before the first frame), then a marker of whether the stream has
begun."""


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer of images to every frame of ``[B, T, C, H, W]``."""
    batch = x.shape[0]
    return rearrange(
        layer(rearrange(x, "b t c h w -> (b t) c h w")), "(b t) c h w -> b t c h w", b=batch
    )


def conv(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2)


class MemoryBlock(nn.Module):
    """A residual block that also sees its own input at the frame before."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, 2 * channels),
            conv(2 * channels, channels),
            nn.SiLU(),
            conv(channels, channels),
            nn.SiLU(),
            conv(channels, channels),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x [B, T, C, H, W]`` and the frame before it ``[B, 1, C, H, W]`` to the output and the
        new past.
        """
        first = torch.zeros_like(x[:, :1]) if past is None else past
        before = torch.cat([first, x[:, :-1]], dim=1)
        return x + per_frame(self.layers, torch.cat([x, before], dim=2)), x[:, -1:]


class TimePool(nn.Module):
    """Two frames to one: their channels side by side, then a 1 x 1 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix = conv(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(self.mix, rearrange(x, "b (t s) c h w -> b t (s c) h w", s=2))


class TimeGrow(nn.Module):
    """One frame to two, by a 1 x 1 convolution to twice the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.split = conv(channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(per_frame(self.split, x), "b t (s c) h w -> b (t s) c h w", s=2)


class CausalStack(nn.ModuleList):
    """Layers in order; memory blocks get and give back their slot of the state."""

    def slots(self) -> int:
        return sum(isinstance(layer, MemoryBlock) for layer in self)

    def run(self, x: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """``x [B, T, C, H, W]`` through all layers; a new state is returned, the given one is not
        changed.
        """
        old, new = iter(state), []
        for layer in self:
            if isinstance(layer, MemoryBlock):
                x, past = layer(x, next(old))
                new.append(past)
            elif isinstance(layer, (TimePool, TimeGrow)):
                x = layer(x)
            else:
                x = per_frame(layer, x)
        return x, tuple(new)


class AutoencoderTinyVideo(ModelMixin, ConfigMixin):
    """The tiny codec; a ``streamvid.codecs.base.VideoCodec``.

    Beside the convolutions runs a linear path, patches of 4 x 8 x 8 pixels to a latent pixel and
    back (the residual autoencoding of DC-AE, arXiv 2410.10733, reduced to one step): colours pass
    through it at once.

    Args:
        latent_channels: channels of a latent frame.
        widths: channels at 1/8, 1/4 and 1/2 of the size.
        latents_mean, latents_std: of the raw latents, a channel; None until measured.
    """

    temporal_ratio = 4
    spatial_ratio = 8
    latents_per_call = 1
    """Latent frames that ``decode_chunk`` decodes together; with more the bits depend on the
    chunking."""

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        widths: tuple[int, int, int] = (96, 64, 32),
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ):
        super().__init__()
        deep, middle, shallow = widths
        self.encoder = CausalStack(
            [
                nn.PixelUnshuffle(2),
                conv(12, shallow),
                nn.SiLU(),
                conv(shallow, middle, 3, 2),
                MemoryBlock(middle),
                TimePool(middle),
                conv(middle, deep, 3, 2),
                MemoryBlock(deep),
                TimePool(deep),
                MemoryBlock(deep),
                nn.SiLU(),
                conv(deep, latent_channels),
            ]
        )
        self.decoder = CausalStack(
            [
                conv(latent_channels, deep),
                MemoryBlock(deep),
                MemoryBlock(deep),
                TimeGrow(deep),
                MemoryBlock(deep),
                nn.Upsample(scale_factor=2),
                conv(deep, middle),
                MemoryBlock(middle),
                TimeGrow(middle),
                MemoryBlock(middle),
                nn.Upsample(scale_factor=2),
                conv(middle, shallow),
                nn.SiLU(),
                conv(shallow, shallow),
                nn.SiLU(),
                conv(shallow, 12),
                nn.PixelShuffle(2),
            ]
        )
        self.linear_encoder = conv(4 * 3 * 64, latent_channels, 1)
        self.linear_decoder = conv(latent_channels, 4 * 3 * 64, 1)

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    def _statistic(self, values: list[float] | None, default: float, like: Tensor) -> Tensor:
        values = [default] * self.latent_channels if values is None else list(values)
        return torch.tensor(values, dtype=like.dtype, device=like.device)[None, :, None, None, None]

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the mean and standard deviation ``[C]`` of raw latents in the configuration."""
        self.register_to_config(
            latents_mean=[float(m) for m in mean], latents_std=[float(s) for s in std]
        )

    def raw_encode(self, frames: Tensor) -> Tensor:
        """Frames ``[B, 1 + 4k, 3, H, W]`` to latents ``[B, C, 1 + k, h, w]`` that are not
        normalised.
        """
        check_frames(frames, self.temporal_ratio, self.spatial_ratio)
        held = torch.cat([frames[:, :1].expand(-1, 3, -1, -1, -1), frames], dim=1)
        latents, _ = self.encoder.run(held * 2 - 1, (None,) * self.encoder.slots())
        patches = rearrange(
            held * 2 - 1, "b (t s) c (h p) (w q) -> b t (s c p q) h w", s=4, p=8, q=8
        )
        return rearrange(
            latents + per_frame(self.linear_encoder, patches), "b t c h w -> b c t h w"
        )

    def _decode(self, latents: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Raw latents ``[B, T, C, h, w]`` to frames ``[B, 4T, 3, H, W]`` in [-1, 1], not
        clamped.
        """
        frames, state = self.decoder.run(latents, state)
        patches = per_frame(self.linear_decoder, latents)
        return (
            frames
            + rearrange(patches, "b t (s c p q) h w -> b (t s) c (h p) (w q)", s=4, p=8, q=8),
            state,
        )

    def raw_decode(self, latents: Tensor) -> Tensor:
        """The whole clip at once, not clamped (for training): raw latents to frames ``[B, 1 + 4k,
        3, H, W]``.
        """
        frames, _ = self._decode(
            rearrange(latents, "b c t h w -> b t c h w"), self.new_decoder_state()
        )
        return (frames[:, 3:] + 1) / 2

    def encode_frames(self, frames: Tensor) -> Tensor:
        """See ``VideoCodec.encode_frames``. In the weights' precision, to latents of the
        frames'.
        """
        latents = self.raw_encode(frames.to(self.dtype)).to(frames.dtype)
        mean = self._statistic(self.config.latents_mean, 0.0, latents)
        return (latents - mean) / self._statistic(self.config.latents_std, 1.0, latents)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See ``VideoCodec.decode_latents``; a stream of one chunk, so that the two agree to the
        bit.
        """
        return self.decode_chunk(latents, self.new_decoder_state())[0]

    def new_decoder_state(self) -> DecoderState:
        """See ``VideoCodec.new_decoder_state``."""
        return (None,) * self.decoder.slots()

    def decode_chunk(self, latents: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """See ``VideoCodec.decode_chunk``. One latent frame at a time, unless ``latents_per_call``
        says otherwise: the bits don't depend on the chunking.

        In the weights' precision, to frames of the latents'.
        """
        check_latents(latents, self.latent_channels)
        raw = latents * self._statistic(self.config.latents_std, 1.0, latents)
        raw = raw + self._statistic(self.config.latents_mean, 0.0, latents)
        clips = []
        raw = rearrange(raw, "b c t h w -> b t c h w").to(self.dtype)
        for some in raw.split(self.latents_per_call, dim=1):
            begun = state[0] is not None
            frames, state = self._decode(some.contiguous(), state)
            clips.append(frames if begun else frames[:, 3:])
        return ((torch.cat(clips, dim=1).to(latents.dtype) + 1) / 2).clamp(0, 1), state


def reconstruction_loss(
    codec: AutoencoderTinyVideo, frames: Tensor, noise: Tensor, prior_weight: float
) -> tuple[Tensor, Tensor]:
    """Squared error of decoded noisy latents, and the pull of the latents towards a unit Gaussian.

    ``noise`` (of the latents' shape, small) keeps the latent space smooth, ``prior_weight *
    mean(z^2)`` keeps its scale: a variational bound with a fixed posterior width.

    Returns:
        the loss to minimise and the plain mean squared error in [0, 1] pixel units.
    """
    latents = codec.raw_encode(frames)
    error = F.mse_loss(codec.raw_decode(latents + noise), frames)
    return error + prior_weight * latents.square().mean(), error.detach()
