"""Wan's video autoencoder (arXiv 2503.20314) as a streaming codec.

The network is diffusers' `AutoencoderKLWan`: Wan 2.1's (8 x 8 x 4, 16 channels; Wan 2.2 A14B has
the same) and the one of Wan 2.2 TI2V 5B (16 x 16 x 4, 48 channels, patches of 2 x 2 pixels) are two
configurations of it. Its causal convolutions look at most two frames back, and its decoder takes
these frames, the *features*, as a list with a slot a convolution. diffusers keeps the list on the
module and drops it after every call, so that `decode` can neither continue a stream nor hold two.
Here the list is the stream's state.

Shapes: B batch, C latent channels, T latent frames, H W height and width in pixels, h w in latent
pixels.
"""

from __future__ import annotations

import json

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from einops import rearrange
from torch import Tensor

from streamvid.codecs.base import check_frames, check_latents, check_same_stream

Features = tuple[Tensor | str | None, ...]
"""A slot a causal convolution: its last two input frames, None before the first frame, and for the
convolutions that double the rate the text "Rep" after the first frame, which they don't double."""

DecoderState = tuple[Features, ...]
"""The features of each spatial tile, row by row (one tile without tiling); empty before the first
frame."""

Window = tuple[slice, slice]
"""Rows and columns of a tile, in latent pixels."""


class StreamingAutoencoderKLWan(AutoencoderKLWan):
    """diffusers' Wan autoencoder; also a ``streamvid.codecs.base.VideoCodec``. Saved, it is
    diffusers' class again.

    Args: those of ``diffusers.AutoencoderKLWan``, with its defaults (Wan 2.1).

    Large frames: after ``enable_tiling()`` overlapping tiles are coded apart and blended, as
    diffusers does it, which needs the memory of one tile's activations and shows where tiles
    disagree. A stream then carries the features of every tile (1.8 times those of the frame, at the
    default overlap) and still equals diffusers' tiled decode. Switch tiling between streams, not
    within one. ``enable_slicing()`` concerns encoding only.

    The state is large: at 480 x 832 the features of Wan 2.1 are 944 million numbers, 1.9 GB in half
    precision.
    """

    @property
    def latent_channels(self) -> int:
        """Channels of a latent frame."""
        return self.config.z_dim

    @property
    def temporal_ratio(self) -> int:
        """Frames a latent frame; 4, which diffusers' loop over the clip assumes."""
        return _agreed(
            2 ** sum(self.config.temperal_downsample),
            self.config.scale_factor_temporal,
            "scale_factor_temporal",
        )

    @property
    def spatial_ratio(self) -> int:
        """Pixels a latent pixel, along one side; the patches of Wan 2.2 included."""
        ratio = 2 ** (len(self.config.dim_mult) - 1) * self._patch
        return _agreed(ratio, self.config.scale_factor_spatial, "scale_factor_spatial")

    @property
    def _patch(self) -> int:
        return self.config.patch_size or 1

    def encode_frames(self, frames: Tensor) -> Tensor:
        """See ``VideoCodec.encode_frames``; the posterior's mean. In the weights' precision, one
        call at a time.
        """
        check_frames(frames, self.temporal_ratio, self.spatial_ratio)
        clip = rearrange(frames * 2 - 1, "b t c h w -> b c t h w").to(self.dtype)
        raw = self.encode(clip).latent_dist.mode().float()
        return (
            (raw - self._statistic("latents_mean", raw)) / self._statistic("latents_std", raw)
        ).to(frames.dtype)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See ``VideoCodec.decode_latents``; a stream of one chunk, so that the two agree to the
        bit.
        """
        return self.decode_chunk(latents, self.new_decoder_state())[0]

    def new_decoder_state(self) -> DecoderState:
        """See ``VideoCodec.new_decoder_state``."""
        return ()

    def decode_chunk(self, latents: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """See ``VideoCodec.decode_chunk``. One latent frame at a time: the bits don't depend on the
        chunking.

        Raises:
            ValueError: for other channels, or a batch, a size or tiles other than those of the
                stream.
        """
        check_latents(latents, self.latent_channels)
        rows = self._windows(
            latents.shape[3] * self.spatial_ratio, latents.shape[4] * self.spatial_ratio
        )
        windows = [window for row in rows for window in row]
        raw = latents.float() * self._statistic("latents_std", latents) + self._statistic(
            "latents_mean", latents
        )
        parts = [raw[..., up, across].to(self.dtype) for up, across in windows]
        state = state or ((None,) * self._cached_conv_counts["decoder"],) * len(parts)
        _check_state(parts, state)
        decoded = [self._decode_tile(part, features) for part, features in zip(parts, state)]
        tiles = iter(clip for clip, _ in decoded)
        clip = self._join([[next(tiles) for _ in row] for row in rows])
        if self._patch > 1:
            clip = unpatchify(clip, self._patch)
        frames = (rearrange(clip, "b c t h w -> b t c h w").to(latents.dtype).clamp(-1, 1) + 1) / 2
        return frames, tuple(features for _, features in decoded)

    def to_json_string(self) -> str:
        """The configuration, under the class name that diffusers knows."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = AutoencoderKLWan.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _decode_tile(self, raw: Tensor, features: Features) -> tuple[Tensor, Features]:
        """Raw latents ``[B, C, T, h, w]`` to a clip in [-1, 1], not clamped and in patches; and the
        new features.
        """
        # the decoder puts new tensors into the list and leaves the old ones alone
        slots, clips = list(features), []
        for latent in raw.split(1, dim=2):
            first = slots[0] is None
            clips.append(
                self.decoder(
                    self.post_quant_conv(latent), feat_cache=slots, feat_idx=[0], first_chunk=first
                )
            )
        return torch.cat(clips, dim=2), tuple(slots)

    def _windows(self, height: int, width: int) -> list[list[Window]]:
        """The tiles of a frame of that many pixels, row by row; the whole frame without tiling or
        if it is one tile.
        """
        if not self.use_tiling or (
            height <= self.tile_sample_min_height and width <= self.tile_sample_min_width
        ):
            return [[(slice(None), slice(None))]]
        rows = _slices(
            height, self.tile_sample_min_height, self.tile_sample_stride_height, self.spatial_ratio
        )
        columns = _slices(
            width, self.tile_sample_min_width, self.tile_sample_stride_width, self.spatial_ratio
        )
        return [[(row, column) for column in columns] for row in rows]

    def _join(self, rows: list[list[Tensor]]) -> Tensor:
        """Tiles to a clip: each is blended into the one above and the one to the left, as diffusers
        does it.
        """
        if len(rows) == len(rows[0]) == 1:
            return rows[0][0]
        stride = (
            self.tile_sample_stride_height // self._patch,
            self.tile_sample_stride_width // self._patch,
        )
        overlap = (
            self.tile_sample_min_height // self._patch - stride[0],
            self.tile_sample_min_width // self._patch - stride[1],
        )
        for row, above in zip(rows, [None, *rows]):
            for column, tile in enumerate(row):  # blend_v and blend_h change the tile in place
                if above is not None:
                    self.blend_v(above[column], tile, overlap[0])
                if column:
                    self.blend_h(row[column - 1], tile, overlap[1])
        kept = [
            torch.cat([tile[..., : stride[0], : stride[1]] for tile in row], dim=-1) for row in rows
        ]
        return torch.cat(kept, dim=-2)

    def _statistic(self, name: str, like: Tensor) -> Tensor:
        values = self.config[name]
        if len(values) != self.latent_channels:
            raise ValueError(
                f"config.{name} has {len(values)} numbers, expected z_dim={self.latent_channels};"
                " see vae/config.json"
            )
        return torch.tensor(values, dtype=torch.float32, device=like.device)[
            None, :, None, None, None
        ]


def _check_state(parts: list[Tensor], state: DecoderState) -> None:
    """A ValueError unless the chunk's tiles are as many and as large as those of the stream."""
    if len(state) != len(parts):
        raise ValueError(
            f"the stream has {len(state)} tiles, this frame {len(parts)}; "
            "begin a stream of other tiles with new_decoder_state()"
        )
    for part, features in zip(parts, state):
        if features[0] is not None:
            check_same_stream(part, features[0])


def _slices(size: int, tile: int, stride: int, ratio: int) -> list[slice]:
    """Windows of ``tile`` pixels every ``stride`` pixels, in latent pixels."""
    return [
        slice(start, start + tile // ratio) for start in range(0, size // ratio, stride // ratio)
    ]


def _agreed(ratio: int, written: int, name: str) -> int:
    """What the layers do, if the configuration says the same; diffusers' pipelines and tiling go by
    the latter.
    """
    if ratio != written:
        raise ValueError(
            f"the layers of this autoencoder make {name} {ratio}, its config.json says {written};"
            " correct it"
        )
    return ratio
