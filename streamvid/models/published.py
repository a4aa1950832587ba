"""Sizes of published Wan transformers, for what has to be known before anything is fetched.

As in ``transformer/config.json`` of the repositories on the Hugging Face hub; all have patches of 1
x 2 x 2, text embeddings of 4096 numbers and heads of 128.
"""

from __future__ import annotations

from typing import Any

_COMMON = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
_WAN_1_3B = {**_COMMON, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_14B = {**_COMMON, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_WAN_5B = {
    **_COMMON,
    "num_attention_heads": 24,
    "ffn_dim": 14336,
    "num_layers": 30,
    "in_channels": 48,
    "out_channels": 48,
}
# of Wan 2.1, which sees the first frame through CLIP too
_CLIP = {"image_dim": 1280, "added_kv_proj_dim": 5120}

PUBLISHED: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _WAN_1_3B,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _WAN_14B,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": {**_WAN_14B, **_CLIP, "in_channels": 36},
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": {**_WAN_14B, **_CLIP, "in_channels": 36},
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _WAN_5B,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _WAN_14B,
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": {**_WAN_14B, "in_channels": 36},
}
"""Keywords of ``diffusers.WanTransformer3DModel`` by the name on the hub."""

EXPERTS = frozenset(name for name in PUBLISHED if "A14B" in name)
"""Those with a second transformer of the same sizes, for the low noise levels."""
