"""The one attention of streamvid, and the patterns of who sees whom.

A pattern is data: a tuple of ``Span``, each a range of queries and the ranges of keys that it sees.
A span needs no mask, so block-causal and teacher-forced passes cost a call a chunk and never touch
what they may not see. ``attention`` is the only place that chooses a kernel: torch's own, or
flash_attn where it is installed and the tensors are half precision on a CUDA device that has it.

Legend: B batch, L tokens, N heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_MAX_HEAD_SIZE = 256

Range = tuple[int, int]


@dataclass(frozen=True)
class Span:
    """Tokens ``queries`` (start, stop) see the tokens of every range in ``keys`` and nothing
    else.
    """

    queries: Range
    keys: tuple[Range, ...]


def full_spans(tokens: int, context_tokens: int = 0) -> tuple[Span, ...]:
    """All ``tokens`` queries see the context and each other; keys are ``[context | tokens]``."""
    return (Span((0, tokens), ((0, context_tokens + tokens),)),)


def block_causal_spans(
    num_chunks: int, chunk_tokens: int, context_tokens: int = 0
) -> tuple[Span, ...]:
    """Chunk c sees the context, the chunks before it and itself; keys are ``[context |
    chunks]``.
    """
    return tuple(
        Span(
            (c * chunk_tokens, (c + 1) * chunk_tokens),
            ((0, context_tokens + (c + 1) * chunk_tokens),),
        )
        for c in range(num_chunks)
    )


def teacher_forcing_spans(num_chunks: int, chunk_tokens: int) -> tuple[Span, ...]:
    """Over ``[clean | noisy]``: noisy chunk c sees the clean chunks before c, and itself.

    The clean half is block-causal and has ``num_chunks - 1`` chunks, because nobody sees the last
    one.
    """
    num_clean = (num_chunks - 1) * chunk_tokens
    noisy = [Span((num_clean, num_clean + chunk_tokens), ((num_clean, num_clean + chunk_tokens),))]
    for start in range(chunk_tokens, num_chunks * chunk_tokens, chunk_tokens):
        own = (num_clean + start, num_clean + start + chunk_tokens)
        noisy.append(Span(own, ((0, start), own)))
    return block_causal_spans(num_chunks - 1, chunk_tokens) + tuple(noisy)


@cache
def has_flash(device: torch.device) -> bool:
    """Whether flash_attn is installed and runs on this CUDA device (compute capability 8.0 or
    later).
    """
    return flash_attn_func is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, scaled by 1 / sqrt(D).

    Args:
        q: [B, Lq, N, D].
        k, v: [B, Lk, N, D], of the dtype of ``q``.
        mask: bool, broadcastable to [B, N, Lq, Lk], True where a query sees a key; None shows all.

    Returns:
        [B, Lq, N, D].
    """
    half = q.dtype in FLASH_DTYPES and q.shape[-1] <= FLASH_MAX_HEAD_SIZE
    if mask is None and q.is_cuda and half and has_flash(q.device):
        return flash_attn_func(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, L, D]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def attend_spans(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span]) -> Tensor:
    """Attention of each span's queries over its keys; the spans' queries tile ``q`` in order.

    Args:
        q: [B, Lq, N, D].
        k, v: [B, Lk, N, D].

    Returns:
        [B, Lq, N, D].
    """
    outputs = [
        attention(q[:, slice(*span.queries)], _ranges(k, span.keys), _ranges(v, span.keys))
        for span in spans
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _ranges(x: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """The tokens of ``x`` [B, L, N, D] in the ranges, one after the other; a view where there is
    one range.
    """
    parts = [x[:, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
