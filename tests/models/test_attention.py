"""Properties of attention and of the patterns of who sees whom. Legend: B batch, L tokens, N heads,
D head size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamvid.models.attention import (
    Span,
    attend_spans,
    attention,
    block_causal_spans,
    full_spans,
    has_flash,
    teacher_forcing_spans,
)


def qkv(queries: int, keys: int) -> list[Tensor]:
    """Random q, k, v [2, L, 3, 8] that take a gradient."""
    torch.manual_seed(0)
    return [torch.randn(2, tokens, 3, 8, requires_grad=True) for tokens in (queries, keys, keys)]


def mask_of(spans: tuple[Span, ...], queries: int, keys: int) -> Tensor:
    """The boolean mask [Lq, Lk] that a pattern stands for."""
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for span in spans:
        for start, stop in span.keys:
            mask[slice(*span.queries), start:stop] = True
    return mask


@pytest.mark.parametrize(
    "spans, queries, keys",
    [
        (full_spans(5, context_tokens=3), 5, 8),
        (block_causal_spans(3, 2), 6, 6),
        (block_causal_spans(2, 128, context_tokens=7), 256, 263),
        (teacher_forcing_spans(1, 4), 4, 4),
        (teacher_forcing_spans(3, 2), 10, 10),
    ],
)
def test_spans_equal_masked_attention(spans, queries, keys):
    """A pattern without a mask computes what the mask would, forwards and backwards."""
    results = []
    for masked in (False, True):
        q, k, v = qkv(queries, keys)
        mask = mask_of(spans, queries, keys)
        out = attention(q, k, v, mask) if masked else attend_spans(q, k, v, spans)
        out.square().sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_block_causal_pattern():
    """Chunk c sees the context, the chunks before it and itself."""
    mask = mask_of(block_causal_spans(2, 2, context_tokens=1), 4, 5)
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert mask.int().tolist() == expected


def test_teacher_forcing_pattern():
    """Over [clean 0, clean 1 | noisy 0, noisy 1, noisy 2] a noisy chunk sees the clean past and
    itself.
    """
    mask = mask_of(teacher_forcing_spans(3, 1), 5, 5)
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 0, 1, 0], [1, 1, 0, 0, 1]]
    assert mask.int().tolist() == expected


@pytest.mark.gpu
def test_flash_attention_agrees_with_torch():
    """Where flash_attn is used, it agrees with torch's attention in half precision."""
    device = torch.device("cuda")
    if not has_flash(device):
        pytest.skip("flash_attn is not installed")
    q, k, v = (x.detach().to(device, torch.bfloat16) for x in qkv(20, 30))
    shown = torch.ones(20, 30, dtype=torch.bool, device=device)  # a mask chooses torch's own
    torch.testing.assert_close(attention(q, k, v), attention(q, k, v, shown), atol=2e-2, rtol=2e-2)
