"""The student: a Wan transformer that is bidirectional, block-causal over a clip, or streams over a
cache.

Parameters and configuration are those of ``diffusers.WanTransformer3DModel`` (Wan, arXiv
2503.20314), so a Wan folder opens here and a student's folder opens in diffusers. What differs is
who attends to whom (``attention.Span``), where frames are (``rope``), and that the modulation is
computed a frame, not a token: hidden states keep a frame axis. Blocks are pure: what a cache holds
goes in as tensors and what a pass leaves comes out as detached tensors, so activation checkpointing
recomputes exactly what it computed and no gradient crosses from a chunk to the ones before it.

A student with a ``jump_embedding`` is a flow map: told a target time s, it gives the mean velocity
from t to s, and told nothing the velocity at t. diffusers opens its folder too, warns that it does
not know the embedding, and gives the velocity at t.

Legend: B batch, C latent channels, T latent frames, H W latent size, F frames in the sequence (T,
or clean and noisy ones together), S tokens per frame, L tokens, D model size, N heads, E head size.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.utils import BaseOutput
from einops import rearrange
from torch import Tensor, nn

from streamvid.models.attention import (
    Span,
    attend_spans,
    attention,
    block_causal_spans,
    full_spans,
    teacher_forcing_spans,
)
from streamvid.models.jump_embedding import JumpEmbedding
from streamvid.models.kv_cache import KeyValue, StreamKVCache
from streamvid.models.rope import rotary_table, rotate

EXPORT_CLASS_NAME = "WanTransformer3DModel"
QK_NORM = "rms_norm_across_heads"


@dataclass
class CausalWanOutput(BaseOutput):
    """``sample``: velocity [B, C, T, H, W]. ``kv``: if asked for, what ``StreamKVCache.append``
    takes.
    """

    sample: Tensor
    kv: tuple[KeyValue, ...] | None = None


class ConditionEmbedder(nn.Module):
    """Timesteps to modulation, text to the model's size."""

    def __init__(self, dim: int, freq_dim: int, text_dim: int, jump_embedding: bool) -> None:
        super().__init__()
        self.timesteps_proj = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(freq_dim, dim)
        self.act_fn = nn.SiLU()
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = PixArtAlphaTextProjection(text_dim, dim, act_fn="gelu_tanh")
        self.jump_embedder = JumpEmbedding(freq_dim, dim) if jump_embedding else None

    def forward(
        self, timestep: Tensor, span: Tensor | None, cond: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Timesteps [B, F], spans of jumps [B, F] and cond [B, L, text_dim] to [B, F, D], [B, F, 6,
        D] and [B, L, D]; a cond of None stays None.
        """
        waves = self.timesteps_proj(timestep.flatten()).unflatten(0, timestep.shape)
        temb = self.time_embedder(waves.to(self.time_embedder.linear_1.weight.dtype))
        if span is not None:
            temb = temb + self.jump_embedder(span)
        temb = temb.to(dtype)
        modulation = self.time_proj(self.act_fn(temb)).unflatten(-1, (6, -1))
        return temb, modulation, None if cond is None else self.text_embedder(cond.to(dtype))


class HeadAttention(nn.Module):
    """The projections around an attention, with RMS norm of queries and keys across heads."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, eps=eps)
        self.norm_k = nn.RMSNorm(dim, eps=eps)

    def query(self, x: Tensor) -> Tensor:
        """[..., D] to [..., N, E]."""
        q = self.to_q(x)
        return self.norm_q(q).to(q.dtype).unflatten(-1, (self.num_heads, -1))

    def key_value(self, x: Tensor) -> KeyValue:
        """[..., D] to a key and a value [..., N, E]."""
        k, v = self.to_k(x), self.to_v(x)
        k = self.norm_k(k).to(v.dtype)
        return k.unflatten(-1, (self.num_heads, -1)), v.unflatten(-1, (self.num_heads, -1))

    def output(self, x: Tensor) -> Tensor:
        """[..., N, E] to [..., D]."""
        return self.to_out[0](x.flatten(-2))


class CausalWanBlock(nn.Module):
    """Self-attention over the context and the frames given, cross-attention to text,
    feed-forward.
    """

    def __init__(
        self, dim: int, ffn_dim: int, num_heads: int, cross_attn_norm: bool, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = HeadAttention(dim, num_heads, eps)
        self.attn2 = HeadAttention(dim, num_heads, eps)
        self.norm2 = (
            FP32LayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()
        )
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.norm3 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        hidden: Tensor,
        cond: Tensor | KeyValue,
        modulation: Tensor,
        rotary: Tensor,
        spans: tuple[Span, ...],
        context: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue, KeyValue]:
        """One block; no side effects.

        Args:
            hidden: [B, F, S, D].
            cond: of the prompts [B, L, D], or the keys and values that an earlier call made of it.
            modulation: [B, F, 6, D] or [B, 1, 6, D].
            rotary: table [F, S, 1, E / 2] of the frames in ``hidden``.
            spans: who attends to whom; keys are ``[context | hidden]``.
            context: turned keys and values [B, L, N, E].

        Returns:
            Hidden states [B, F, S, D]; detached keys before the rotary embedding, and values,
            [B, F, S, N, E]; the text's detached keys and values [B, L, N, E].
        """
        table = (self.scale_shift_table + modulation.float()).unsqueeze(2)  # [B, F, 1, 6, D]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(-2)

        x = _modulate(self.norm1(hidden.float()), shift, scale).type_as(hidden)
        attended, kv = self._attend_frames(x, rotary, spans, context)
        hidden = (hidden.float() + attended * gate).type_as(hidden)

        x = self.norm2(hidden.float()).type_as(hidden)
        attended, text_kv = self._attend_cond(x, cond)
        hidden = hidden + attended

        x = _modulate(self.norm3(hidden.float()), ffn_shift, ffn_scale).type_as(hidden)
        hidden = (hidden.float() + self.ffn(x).float() * ffn_gate).type_as(hidden)
        return hidden, kv, text_kv

    def _attend_frames(
        self, x: Tensor, rotary: Tensor, spans: tuple[Span, ...], context: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        q = rotate(self.attn1.query(x), rotary).flatten(1, 2)
        k, v = self.attn1.key_value(x)  # [B, F, S, N, E]
        kv = (k.detach(), v.detach())  # sg: a committed chunk gets no gradient from later ones
        k, v = rotate(k, rotary).flatten(1, 2), v.flatten(1, 2)
        if context is not None:
            k, v = torch.cat([context[0], k], dim=1), torch.cat([context[1], v], dim=1)
        return self.attn1.output(attend_spans(q, k, v, spans)).view_as(x), kv

    def _attend_cond(self, x: Tensor, cond: Tensor | KeyValue) -> tuple[Tensor, KeyValue]:
        q = self.attn2.query(x).flatten(1, 2)
        k, v = self.attn2.key_value(cond) if isinstance(cond, Tensor) else cond
        return self.attn2.output(attention(q, k, v)).view_as(x), (k.detach(), v.detach())


class CausalWanTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Text-to-video Wan transformer with block-causal, teacher-forced and cached passes.

    Args: those of ``diffusers.WanTransformer3DModel``, with its defaults (Wan 14B).
        ``rope_max_seq_len`` is kept for diffusers; positions here come from no table.
        ``image_dim``, ``added_kv_proj_dim`` and ``pos_embed_seq_len`` must be None.
        jump_embedding: whether the model takes ``target_timestep``; see ``jump_embedding``. A
            loaded model gets it from ``add_jump_embedding``. Only a folder with it names the key.

    Raises:
        ValueError: for image conditioning, temporal patches, or an unknown ``qk_norm``.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["patch_embedding", "condition_embedder", "norm"]
    _no_split_modules = ["CausalWanBlock"]
    _repeated_blocks = ["CausalWanBlock"]
    _keep_in_fp32_modules = [
        "time_embedder",
        "jump_embedder",
        "scale_shift_table",
        "norm1",
        "norm2",
        "norm3",
    ]
    _keys_to_ignore_on_load_unexpected = ["norm_added_q"]
    _skip_keys = ["cache"]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = QK_NORM,
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        jump_embedding: bool = False,
    ) -> None:
        super().__init__()
        if not (image_dim is None and added_kv_proj_dim is None and pos_embed_seq_len is None):
            raise ValueError(
                "image conditioning is not supported: image_dim, added_kv_proj_dim and"
                " pos_embed_seq_len must be None; use a text-to-video Wan checkpoint"
            )
        if patch_size[0] != 1:
            raise ValueError(
                f"patch_size={tuple(patch_size)} joins frames; the first number must be 1"
            )
        if qk_norm != QK_NORM:
            raise ValueError(f"qk_norm={qk_norm!r} is not supported; Wan has {QK_NORM!r}")
        dim = num_attention_heads * attention_head_dim
        self.patch_embedding = nn.Conv3d(
            in_channels, dim, kernel_size=tuple(patch_size), stride=tuple(patch_size)
        )
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim, jump_embedding)
        self.blocks = nn.ModuleList(
            [
                CausalWanBlock(dim, ffn_dim, num_attention_heads, cross_attn_norm, eps)
                for _ in range(num_layers)
            ]
        )
        self.norm_out = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, (out_channels or in_channels) * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        cache: StreamKVCache | None = None,
        chunk_frames: int | None = None,
        clean_context: Tensor | None = None,
        context_timestep: Tensor | float = 0.0,
        target_timestep: Tensor | float | None = None,
        return_kv: bool = False,
        return_dict: bool = True,
    ) -> CausalWanOutput | tuple[Tensor, ...]:
        """The velocity of noisy latents. Inputs are cast to the weights' dtype, which is the
        output's.

        Args:
            hidden_states: noisy latents [B, C, T, H, W].
            timestep: [B], [B, T] (a frame each) or one number; 0 (data) to 1000 (noise).
            encoder_hidden_states: text embedding [B, L, text_dim].
            cache: committed context, which the frames follow; it is not changed. Without gradient,
                the text's keys and values are kept in it for the next call with the same tensor.
            chunk_frames: None lets the frames see each other; otherwise a chunk of so many frames
                sees itself and the chunks before it (and the context of ``cache``).
            clean_context: data [B, C, T, H, W]; teacher forcing: a noisy chunk sees the clean
                chunks before it instead of the noisy ones. Needs ``chunk_frames``, excludes
                ``cache`` and ``return_kv``.
            context_timestep: that of ``clean_context``, as ``timestep``.
            target_timestep: where a jump of the noisy frames is to land, as ``timestep`` and at
                most as large; the output is then the mean velocity of the way. None gives the
                velocity at ``timestep``, and so does a target equal to it. Needs a model with
                ``jump_embedding``.
            return_kv: also return the frames' detached keys and values, for ``cache.append``.
            return_dict: False returns ``(sample,)`` or ``(sample, kv)``.

        Raises:
            ValueError: if shapes or arguments do not fit together.
        """
        self._check_inputs(hidden_states, encoder_hidden_states, cache, chunk_frames)
        frames, height, width = hidden_states.shape[2:]
        timestep = _frame_timesteps(timestep, hidden_states)
        span = self._jump_span(timestep, target_timestep, hidden_states)
        positions, context = tuple(range(frames)), ()
        if cache is not None:
            positions, context = cache.frame_positions(frames)[1], cache.context(frames)
        if clean_context is not None:
            _check_teacher_forcing(hidden_states, clean_context, cache, chunk_frames, return_kv)
            past = clean_context[:, :, : frames - chunk_frames]
            past_timestep = _frame_timesteps(context_timestep, clean_context)
            timestep = _joined_timesteps(past_timestep, timestep, past.shape[2], frames)
            if span is not None:  # context does not jump
                span = _joined_timesteps(torch.zeros_like(span), span, past.shape[2], frames)
            hidden_states = torch.cat([past.to(hidden_states), hidden_states], dim=2)
            positions = positions[: past.shape[2]] + positions

        grid = (height // self.config.patch_size[1], width // self.config.patch_size[2])
        spans = _spans(frames, math.prod(grid), chunk_frames, context, clean_context is not None)
        rotary = rotary_table(positions, grid, self.config.attention_head_dim, hidden_states.device)
        hidden, temb, kv = self._run_blocks(
            hidden_states, timestep, span, encoder_hidden_states, rotary, spans, context, cache
        )
        sample = self._head(hidden[:, -frames:], temb[:, -frames:], grid)
        kv = kv if return_kv else None
        if not return_dict:
            return (sample,) if kv is None else (sample, kv)
        return CausalWanOutput(sample=sample, kv=kv)

    @property
    def takes_target(self) -> bool:
        """Whether the model can be told a ``target_timestep``."""
        return self.condition_embedder.jump_embedder is not None

    def new_cache(
        self,
        batch_size: int,
        height: int,
        width: int,
        window_frames: int | None = None,
        sink_frames: int = 0,
        positions: str = "absolute",
        max_trained_frames: int | None = None,
    ) -> StreamKVCache:
        """An empty cache for ``batch_size`` streams of ``height`` x ``width`` latents; see
        ``StreamKVCache``.
        """
        return StreamKVCache(
            num_layers=self.config.num_layers,
            batch_size=batch_size,
            height=height,
            width=width,
            patch_size=tuple(self.config.patch_size[1:]),
            window_frames=window_frames,
            sink_frames=sink_frames,
            positions=positions,
            max_trained_frames=max_trained_frames,
        )

    @torch.no_grad()
    def commit(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        cond: Tensor,
        cache: StreamKVCache,
    ) -> None:
        """Append finished frames [B, C, T, H, W] to the cache, by a pass at the context timestep.

        To keep the keys of a denoising pass instead, ask that pass for ``return_kv`` and
        ``cache.append`` them.
        """
        cache.append(self(latents, timestep, cond, cache=cache, return_kv=True).kv)

    def to_json_string(self) -> str:
        """The configuration, under the class name that diffusers knows."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = EXPORT_CLASS_NAME
        if not self.takes_target:
            del config["jump_embedding"]  # diffusers would warn of it
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _run_blocks(
        self,
        latents: Tensor,
        timestep: Tensor,
        span: Tensor | None,
        cond: Tensor,
        rotary: Tensor,
        spans: tuple[Span, ...],
        context: tuple[KeyValue, ...],
        cache: StreamKVCache | None,
    ) -> tuple[Tensor, Tensor, tuple[KeyValue, ...]]:
        """Latents [B, C, F, H, W] to hidden states [B, F, S, D], time embedding [B, F, D], keys and
        values.
        """
        dtype = self.patch_embedding.weight.dtype
        hidden = rearrange(
            self.patch_embedding(latents.to(dtype)), "b d f h w -> b f (h w) d"
        ).contiguous()
        keeps_text = cache is not None and not torch.is_grad_enabled()
        text_kv = cache.text_kv(cond) if keeps_text else ()
        temb, modulation, projected = self.condition_embedder(
            timestep, span, None if text_kv else cond, dtype
        )
        conds = text_kv or (projected,) * len(self.blocks)
        contexts = context or (None,) * len(self.blocks)
        kv, new_text_kv = [], []
        for block, block_cond, block_context in zip(self.blocks, conds, contexts, strict=True):
            args = (hidden, block_cond, modulation, rotary, spans, block_context)
            hidden, block_kv, block_text_kv = self._run_block(block, args)
            kv.append(block_kv)
            new_text_kv.append(block_text_kv)
        if keeps_text and not text_kv:
            cache.keep_text(cond, new_text_kv)
        return hidden, temb.expand(-1, hidden.shape[1], -1), tuple(kv)

    def _run_block(self, block: nn.Module, args: tuple) -> tuple[Tensor, KeyValue, KeyValue]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _head(self, hidden: Tensor, temb: Tensor, grid: tuple[int, int]) -> Tensor:
        """Hidden states [B, T, S, D] and time embedding [B, T, D] to velocity [B, C, T, H, W]."""
        # [B, T, 1, D] each
        shift, scale = (self.scale_shift_table + temb.unsqueeze(2)).unsqueeze(2).unbind(-2)
        hidden = self.proj_out(
            _modulate(self.norm_out(hidden.float()), shift, scale).type_as(hidden)
        )
        _, rows, columns = self.config.patch_size
        pattern = "b t (h w) (p q c) -> b c t (h p) (w q)"
        return rearrange(hidden, pattern, h=grid[0], w=grid[1], p=rows, q=columns)

    def _jump_span(
        self, timestep: Tensor, target: Tensor | float | None, latents: Tensor
    ) -> Tensor | None:
        """How far the frames jump, [B, 1] or [B, T]; None if they are not told."""
        if target is None:
            return None
        if not self.takes_target:
            raise ValueError(
                "target_timestep needs a student with a jump embedding; call"
                " models.jump_embedding.add_jump_embedding(student), or leave it at None"
            )
        return timestep - _frame_timesteps(target, latents)

    def _check_inputs(
        self, latents: Tensor, cond: Tensor, cache: StreamKVCache | None, chunk_frames: int | None
    ) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.config.in_channels:
            raise ValueError(
                f"expected latents [B, {self.config.in_channels}, T, H, W], got"
                f" {list(latents.shape)}"
            )
        batch_size, _, frames, height, width = latents.shape
        if cond.ndim != 3 or cond.shape[0] != batch_size:
            raise ValueError(
                f"expected a text embedding [{batch_size}, L, D], got {list(cond.shape)}"
            )
        if height % self.config.patch_size[1] or width % self.config.patch_size[2]:
            raise ValueError(
                f"latent size {height} x {width} is not a multiple of the patch"
                f" {tuple(self.config.patch_size[1:])}"
            )
        if chunk_frames is not None and (chunk_frames < 1 or frames % chunk_frames):
            raise ValueError(f"chunk_frames={chunk_frames} does not divide {frames} latent frames")
        if cache is not None:
            cache.check_pass(batch_size, frames, height, width)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def _frame_timesteps(timestep: Tensor | float, latents: Tensor) -> Tensor:
    """A number, [B] or [B, T] to [B, 1] or [B, T] on the latents' device."""
    batch_size, frames = latents.shape[0], latents.shape[2]
    if not isinstance(timestep, Tensor):
        return torch.full((batch_size, 1), float(timestep), device=latents.device)
    shape = tuple(timestep.shape)
    if shape not in ((), (batch_size,), (batch_size, frames)):
        raise ValueError(
            f"expected timesteps [{batch_size}] or [{batch_size}, {frames}], got {list(shape)}"
        )
    timestep = timestep.to(latents.device)
    return timestep if timestep.ndim == 2 else timestep.expand(batch_size).unsqueeze(1)


def _joined_timesteps(past: Tensor, timestep: Tensor, num_past: int, frames: int) -> Tensor:
    """Timesteps of the first ``num_past`` past frames and all noisy ones: [B, 1] or [B, T] each to
    [B, F].
    """
    past = past.expand(-1, frames)[:, :num_past]
    return torch.cat([past.to(timestep.dtype), timestep.expand(-1, frames)], dim=1)


def _check_teacher_forcing(
    latents: Tensor,
    clean_context: Tensor,
    cache: StreamKVCache | None,
    chunk_frames: int | None,
    return_kv: bool,
) -> None:
    if chunk_frames is None:
        raise ValueError("clean_context needs chunk_frames")
    if cache is not None or return_kv:
        raise ValueError(
            "clean_context takes the place of a cache; it goes with neither cache nor return_kv"
        )
    if clean_context.shape != latents.shape:
        raise ValueError(
            f"clean_context {list(clean_context.shape)} and hidden_states {list(latents.shape)}"
            " differ in shape"
        )


def _spans(
    frames: int,
    frame_tokens: int,
    chunk_frames: int | None,
    context: tuple[KeyValue, ...],
    teacher_forcing: bool,
) -> tuple[Span, ...]:
    context_tokens = context[0][0].shape[1] if context else 0
    if chunk_frames is None:
        return full_spans(frames * frame_tokens, context_tokens)
    num_chunks, chunk_tokens = frames // chunk_frames, chunk_frames * frame_tokens
    if teacher_forcing:
        return teacher_forcing_spans(num_chunks, chunk_tokens)
    return block_causal_spans(num_chunks, chunk_tokens, context_tokens)
