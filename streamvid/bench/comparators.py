"""Other ways to stream the same geometry, to be measured beside ours.

- ``SelfForcingStyle``: how Self-Forcing's released inference (arXiv 2506.08009) attends and caches,
  written anew from reading it, on the weights and layers of our network. Keys are cached after the
  rotary embedding, at their place in the stream. A buffer per layer is written in place by every
  pass and moved when it is full. Rotations are computed in float64 and built for each call. Data
  predictions are computed in float64. Every chunk is committed by a pass of its own.
- ``Recompute``: no cache. Each pass runs over the whole window, clean context and noisy chunk.
- ``DiffusersFAR``: diffusers' causal transformer, AnyFlow-FAR (arXiv 2503.19325, 2605.13724),
  called as its pipeline calls it. It keeps the last chunks whole and older ones at a quarter of the
  tokens, and a commit runs over all of the window again. It is given torch's fused attention, since
  its own needs compilation to be fast.

Each is an endless iterator of chunks ``[1, C, f, h, w]``. The weights of the first two are those of
the network given, and so is what they compute, but for a window that has moved on.

Legend: B batch, F frames, S tokens per frame, N heads, E head size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from streamvid.core.process import renoise_step, x0_from_v
from streamvid.core.times import step_times
from streamvid.gpu_check.measure import in_precision
from streamvid.models.attention import attention
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.rope import THETA, axis_sizes
from streamvid.rollout.noise import INITIAL_EVENT, KeyedNoise
from streamvid.rollout.schedule import StreamConfig

MOST_FRAMES = 1024  # of the released tables of angles
WHOLE_CHUNKS = 6  # of AnyFlow-FAR, at most


class Stream:
    """What the comparators share: noise, times, and steps that renoise the data prediction."""

    def __init__(
        self, cond: Tensor, config: StreamConfig, latent_shape: tuple[int, int, int]
    ) -> None:
        if config.window_frames is None:
            raise ValueError("a comparison needs a window; set window_frames")
        self.cond, self.config = cond, config
        channels, height, width = latent_shape
        self.shape = (channels, config.chunk_frames, height, width)
        self.times = step_times(config.num_steps, config.shift)
        self.noise = KeyedNoise([0])

    def draw(self, chunk: int, event: int) -> Tensor:
        return self.noise.draw(chunk, event, self.shape, self.cond.device, torch.float32)

    def denoise(self, chunk: int) -> Tensor:
        """A chunk from noise to data, by ``velocity``."""
        x = self.draw(chunk, INITIAL_EVENT)
        for step, t in enumerate(self.times, 1):
            x0 = x0_from_v(x.double(), self.velocity(x, t, chunk).double(), t)
            if step == len(self.times):
                return x0.float()
            x = renoise_step(x0, self.draw(chunk, step).double(), self.times[step]).float()
        raise AssertionError("there is at least one step")

    def velocity(self, x: Tensor, t: float, chunk: int) -> Tensor:
        raise NotImplementedError

    def commit(self, x0: Tensor, chunk: int) -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Tensor]:
        for chunk in itertools.count():
            with torch.no_grad():  # which ends before the yield, so that the consumer's mode stays
                x0 = self.denoise(chunk)
                self.commit(x0, chunk)
            yield x0


class Recompute(Stream):
    """Without a cache."""

    def __init__(self, network: CausalWanTransformer3DModel, *stream: Any) -> None:
        super().__init__(*stream)
        self.network = network
        self.context = torch.zeros(1, self.shape[0], 0, *self.shape[2:], device=self.cond.device)

    def velocity(self, x: Tensor, t: float, chunk: int) -> Tensor:
        frames = self.shape[1]
        level = torch.zeros(1, self.context.shape[2] + frames, device=x.device)
        level[:, -frames:] = 1000 * t
        both = torch.cat([self.context, x], dim=2)
        out = self.network(both, level, self.cond, chunk_frames=frames).sample
        return out[:, :, -frames:]

    def commit(self, x0: Tensor, chunk: int) -> None:
        kept = self.config.window_frames - self.shape[1]
        sink = self.config.sink_frames
        context = torch.cat([self.context, x0], dim=2)
        if context.shape[2] > kept:
            recent = context[:, :, context.shape[2] - (kept - sink) :]
            context = torch.cat([context[:, :, :sink], recent], dim=2)
        self.context = context


class SelfForcingStyle(Stream):
    """With rolling buffers of turned keys."""

    def __init__(self, network: CausalWanTransformer3DModel, *stream: Any) -> None:
        super().__init__(*stream)
        self.network = network
        config, weight = network.config, network.patch_embedding.weight
        _, rows, columns = config.patch_size
        self.grid = self.shape[2] // rows, self.shape[3] // columns
        heads = (config.num_attention_heads, config.attention_head_dim)
        self.capacity = self.config.window_frames * math.prod(self.grid)
        self.sink = self.config.sink_frames * math.prod(self.grid)
        zeros = lambda: torch.zeros(
            1, self.capacity, *heads, dtype=weight.dtype, device=weight.device
        )
        self.buffers = [(zeros(), zeros()) for _ in network.blocks]
        self.ends = [(0, 0) for _ in network.blocks]  # in the stream and in the buffer, in tokens
        self.text_kv: list[Any] = [None for _ in network.blocks]
        self.tables = [
            torch.polar(torch.ones_like(angles), angles).to(weight.device)
            for angles in (_angles(size) for size in axis_sizes(heads[1]))
        ]

    def velocity(self, x: Tensor, t: float, chunk: int) -> Tensor:
        return self.run(x, t, chunk * self.shape[1])

    def commit(self, x0: Tensor, chunk: int) -> None:
        self.run(x0, 0.0, chunk * self.shape[1])

    def run(self, latents: Tensor, t: float, start: int) -> Tensor:
        """A pass over frames that begin at frame ``start``; it leaves their keys in the buffers."""
        net, frames = self.network, latents.shape[2]
        dtype = net.patch_embedding.weight.dtype
        hidden = rearrange(net.patch_embedding(latents.to(dtype)), "b d f h w -> b f (h w) d")
        level = torch.full((1, frames), 1000 * t, device=latents.device)
        temb, modulation, text = net.condition_embedder(level, None, self.cond, dtype)
        for layer, block in enumerate(net.blocks):
            hidden = self.run_block(layer, block, hidden, modulation, text, start)
        return net._head(hidden, temb, self.grid)

    def run_block(
        self, layer: int, block: Any, hidden: Tensor, modulation: Tensor, text: Tensor, start: int
    ) -> Tensor:
        """Hidden states [B, F, S, D] through one block."""
        table = (block.scale_shift_table + modulation.float()).unsqueeze(2)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(-2)
        x = (block.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        q, (k, v) = block.attn1.query(x), block.attn1.key_value(x)
        q, k = self.turn(q, start).flatten(1, 2), self.turn(k, start).flatten(1, 2)
        k, v = self.write(layer, k, v.flatten(1, 2), start * x.shape[2])
        attended = block.attn1.output(attention(q, k, v)).view_as(x)
        hidden = (hidden.float() + attended * gate).type_as(hidden)
        x = block.norm2(hidden.float()).type_as(hidden)
        if self.text_kv[layer] is None:
            self.text_kv[layer] = block.attn2.key_value(text)
        q = block.attn2.query(x).flatten(1, 2)
        hidden = hidden + block.attn2.output(attention(q, *self.text_kv[layer])).view_as(x)
        x = (block.norm3(hidden.float()) * (1 + ffn_scale) + ffn_shift).type_as(hidden)
        return (hidden.float() + block.ffn(x).float() * ffn_gate).type_as(hidden)

    def turn(self, x: Tensor, start: int) -> Tensor:
        """``x`` [B, F, S, N, E] at its places, in float64."""
        frames, (rows, columns) = x.shape[1], self.grid
        time, height, width = self.tables
        parts = (
            time[start : start + frames, None, None].expand(-1, rows, columns, -1),
            height[None, :rows, None].expand(frames, -1, columns, -1),
            width[None, None, :columns].expand(frames, rows, -1, -1),
        )
        table = torch.cat(parts, dim=-1).flatten(1, 2).unsqueeze(2)  # [F, S, 1, E / 2]
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table).flatten(-2).type_as(x)

    def write(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Put keys and values of tokens from ``start`` of the stream in the buffer, over those of
        an earlier pass; returns what the pass sees, itself included.
        """
        keys, values = self.buffers[layer]
        in_stream, in_buffer = self.ends[layer]
        tokens, end = k.shape[1], start + k.shape[1]
        if end > in_stream and in_buffer + tokens > self.capacity:
            out = in_buffer + tokens - self.capacity
            for buffer in (keys, values):  # what is kept moves to the left, over what goes
                buffer[:, self.sink : in_buffer - out] = buffer[
                    :, self.sink + out : in_buffer
                ].clone()
            in_buffer -= out
        in_buffer += end - in_stream
        keys[:, in_buffer - tokens : in_buffer], values[:, in_buffer - tokens : in_buffer] = k, v
        self.ends[layer] = (end, in_buffer)
        return keys[:, :in_buffer], values[:, :in_buffer]


def _angles(size: int) -> Tensor:
    """Angles of an axis of ``size`` channels at all places of the released tables, float64."""
    frequencies = THETA ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return torch.outer(torch.arange(MOST_FRAMES, dtype=torch.float64), frequencies)


class DiffusersFAR(Stream):
    """diffusers' AnyFlow-FAR of the same sizes, with random weights, always at the last chunk of a
    clip as long as the window.
    """

    def __init__(self, network: CausalWanTransformer3DModel, *stream: Any) -> None:
        super().__init__(*stream)
        weight = network.patch_embedding.weight
        chunks = self.config.window_frames // self.config.chunk_frames
        whole = min(WHOLE_CHUNKS, chunks)
        self.partition = [self.config.chunk_frames] * chunks
        self.network = _far(network, whole, self.partition).to(weight.device)
        height, width = self.shape[2:]
        heads = network.config.num_attention_heads
        size = network.config.attention_head_dim
        cache = lambda frames, patch: torch.zeros(
            2, 1, heads, frames * (height // patch) * (width // patch), size
        ).to(weight)
        self.cache = {
            layer: {
                "full_cache": cache(whole * self.config.chunk_frames, 2),
                "compressed_cache": cache((chunks - whole + 1) * self.config.chunk_frames, 4),
            }
            for layer in range(network.config.num_layers)
        }
        clip = (1, sum(self.partition), self.shape[0], height, width)
        self.clip = torch.randn(clip, device=weight.device).to(weight.dtype)
        self.mask = self._mask(height, width)

    def velocity(self, x: Tensor, t: float, chunk: int) -> Tensor:
        frames = self.config.chunk_frames
        now, later = (torch.full((1, frames), 1000 * s, device=x.device) for s in (t, 0.0))
        out, _ = self.network(
            x.transpose(1, 2).to(self.clip),
            timestep=now,
            r_timestep=later,
            encoder_hidden_states=self.cond,
            chunk_partition=self.partition,
            kv_cache=self.cache,
            kv_cache_flag={"num_cached_chunks": len(self.partition) - 1, "is_cache_step": False},
            return_dict=False,
        )
        return out.transpose(1, 2)

    def commit(self, x0: Tensor, chunk: int) -> None:
        self.clip[:, -x0.shape[2] :] = x0.transpose(1, 2)
        zero = torch.zeros(1, self.clip.shape[1], device=x0.device)
        self.network(
            self.clip,
            timestep=zero,
            r_timestep=zero,
            encoder_hidden_states=self.cond,
            chunk_partition=self.partition,
            attention_mask=self.mask,
            kv_cache=self.cache,
            kv_cache_flag={"num_cached_chunks": len(self.partition) - 1, "is_cache_step": True},
            return_dict=False,
        )

    def _mask(self, height: int, width: int) -> Tensor:
        """The mask of a commit as torch's attention takes it, bool [1, 1, L, L]."""
        from torch.nn.attention.flex_attention import create_mask

        blocks = self.network.build_attention_mask(
            chunk_partition=self.partition,
            height=height,
            width=width,
            device=self.clip.device,
            mode="cache",
        )
        length = blocks.shape[-1]
        mask = create_mask(blocks.mask_mod, 1, 1, length, length, device=str(self.clip.device))
        # tokens that only fill up see themselves: a row that sees nothing would not be finite
        return mask | torch.eye(length, dtype=torch.bool, device=mask.device)


def _far(network: CausalWanTransformer3DModel, whole: int, partition: list[int]) -> Any:
    from diffusers.models.transformers.transformer_anyflow_far import (
        AnyFlowCausalAttnProcessor,
        AnyFlowFARTransformer3DModel,
    )

    class FusedAttention(AnyFlowCausalAttnProcessor):
        """Its processor, with the attention that everything else here has."""

        _attention_backend = "native"
        _SUPPORTED_BACKENDS = ("native",)

    config = network.config
    names = ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim")
    names += ("freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "eps")
    far = AnyFlowFARTransformer3DModel(
        **{name: config[name] for name in names},
        full_chunk_limit=whole,
        chunk_partition=tuple(partition),
    )
    for block in far.blocks:
        block.attn1.set_processor(FusedAttention())
    return in_precision(far, network.patch_embedding.weight.dtype).eval()


COMPARATORS: dict[str, type[Any]] = {
    "diffusers": DiffusersFAR,
    "self-forcing-style": SelfForcingStyle,
    "recompute": Recompute,
}
"""By the name in ``--against``."""
