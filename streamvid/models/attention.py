"""The one attention of streamvid, and the patterns of who sees whom.

A pattern is data: a tuple of ``Span``, each a range of queries and the ranges of keys that it sees.
A span needs no mask, so block-causal and teacher-forced passes cost a call a chunk and never touch
what they may not see.

``attention`` is the only place that chooses a kernel, by the name of a *backend*. diffusers'
dispatch has "native", "flash", "_flash_3", "sage", "_native_cudnn", "xformers" and others; two are
ours. "products" is two matrix products with a softmax between them; "auto" is the fastest backend
for the tensors at hand, by the rule of ``fastest_backend``. Without a name it is what diffusers'
``attention_backend`` or its environment variable says, else flash_attn where it is installed and
the tensors are half precision on a CUDA device, else torch's own.

Legend: B batch, L tokens, N heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.utils import is_flash_attn_3_available, is_flash_attn_available
from torch import Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLASH_MAX_HEAD_SIZE = 256
NATIVE = AttentionBackendName.NATIVE.value
OWN_BACKENDS = ("auto", "products")
BACKENDS = (*OWN_BACKENDS, *(name.value for name in AttentionBackendName))

MOST_SCORES = 2**20
"""Of "products": so many scores are held at a time, 2 MiB in bfloat16, about a core's cache."""
MIN_ROWS = 512
"""Of "products": but at least those of so many queries, as each block reads all keys anew."""
PRODUCTS_MIN_QUERIES = 128
PRODUCTS_MIN_HEAD_SIZE = 48
"""Below either, "products" is slower than torch's kernel."""

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


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Softmax attention, scaled by 1 / sqrt(D).

    Args:
        q: [B, Lq, N, D].
        k, v: [B, Lk, N, D], of the dtype of ``q``.
        mask: bool, broadcastable to [B, N, Lq, Lk], True where a query sees a key; None shows all.
            Not every backend takes one; without a name of a backend it is torch's own.
        backend: one of ``BACKENDS``, or None.

    Returns:
        [B, Lq, N, D].
    """
    backend = resolve_backend(q, k, mask, backend)
    if backend == "products":
        return _products(q, k, v, mask)
    if backend == NATIVE:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, L, D]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=AttentionBackendName(backend))


def resolve_backend(q: Tensor, k: Tensor, mask: Tensor | None, backend: str | None) -> str:
    """The backend that ``attention`` takes for these tensors, by its name; never "auto"."""
    if backend == "auto":
        return fastest_backend(q, k, mask)
    if backend is not None:
        return backend
    if mask is not None:
        return NATIVE
    active, _ = _AttentionBackendRegistry.get_active_backend()
    if active == AttentionBackendName.NATIVE and _is_half(q) and has_flash(q.device):
        return AttentionBackendName.FLASH.value
    return active.value


def fastest_backend(q: Tensor, k: Tensor, mask: Tensor | None = None) -> str:
    """The backend that "auto" stands for.

    On a CPU that has bfloat16 instructions but no matrix unit (AMX), "products" for large
    attention in bfloat16, where torch's kernel reaches a half of it. On a Hopper GPU or a later
    one, in half precision, flash-attn 3 where it is installed, else cuDNN's kernel: flash-attn 2
    reaches about 35 % of such a device. Otherwise what no name stands for. With a mask it is
    torch's own.
    """
    if mask is not None:
        return NATIVE
    if q.is_cpu and _prefers_products(q, k):
        return "products"
    if q.is_cuda and _is_half(q) and torch.cuda.get_device_capability(q.device) >= (9, 0):
        installed = is_flash_attn_3_available()
        name = AttentionBackendName._FLASH_3 if installed else AttentionBackendName._NATIVE_CUDNN
        return name.value
    return resolve_backend(q, k, mask, None)


@cache
def has_flash(device: torch.device) -> bool:
    """Whether flash_attn is installed and runs on this device, a CUDA one of compute capability 8.0
    or later.
    """
    if device.type != "cuda" or not is_flash_attn_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def has_fast_products() -> bool:
    """Whether this CPU is of the kind that the rule of "products" was measured on."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def _is_half(q: Tensor) -> bool:
    """Whether flash attention takes such tensors."""
    return q.dtype in HALF_DTYPES and q.shape[-1] <= FLASH_MAX_HEAD_SIZE


def _prefers_products(q: Tensor, k: Tensor) -> bool:
    """Whether "products" is faster; with a gradient it would keep all scores for the way back."""
    large = q.shape[1] >= PRODUCTS_MIN_QUERIES and q.shape[-1] >= PRODUCTS_MIN_HEAD_SIZE
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return large and q.dtype == torch.bfloat16 and not learns and has_fast_products()


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as two products and a softmax, over some heads and some queries at a time.

    The scores are rounded to the tensors' dtype, so that in bfloat16 the error is twice that of
    torch's kernel. Arguments and result are those of ``attention``.
    """
    batch, queries, num_heads, head_size = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B N, L, D], contiguous
    q, k = q * head_size**-0.5, k.transpose(1, 2)
    if mask is not None:
        shape = (batch, num_heads, queries, k.shape[2])
        mask = mask.expand(shape).flatten(0, 1)
    scores_per_head = queries * k.shape[2]
    group = max(1, MOST_SCORES // scores_per_head)
    rows = min(queries, max(MIN_ROWS, MOST_SCORES // k.shape[2]))
    outputs = []
    for first in range(0, len(q), group):
        heads = slice(first, first + group)
        parts = []
        for start in range(0, queries, rows):
            some = slice(start, start + rows)
            scores = q[heads, some] @ k[heads]
            if mask is not None:
                scores = scores.masked_fill(~mask[heads, some], float("-inf"))
            parts.append(scores.softmax(-1) @ v[heads])
        outputs.append(_joined(parts, dim=1))
    return _joined(outputs, dim=0).unflatten(0, (batch, num_heads)).transpose(1, 2)


def attend_spans(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], backend: str | None = None
) -> Tensor:
    """Attention of each span's queries over its keys; the spans' queries tile ``q`` in order.

    Args:
        q: [B, Lq, N, D].
        k, v: [B, Lk, N, D].
        backend: as in ``attention``.

    Returns:
        [B, Lq, N, D].
    """
    outputs = [
        attention(
            q[:, slice(*span.queries)],
            _ranges(k, span.keys),
            _ranges(v, span.keys),
            backend=backend,
        )
        for span in spans
    ]
    return _joined(outputs, dim=1)


def _ranges(x: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """The tokens of ``x`` [B, L, N, D] in the ranges, one after the other; a view where there is
    one range.
    """
    return _joined([x[:, start:stop] for start, stop in ranges], dim=1)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """``torch.cat``, without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
