"""Properties of attention and of the patterns of who sees whom. Legend: B batch, L tokens, N heads,
D head size.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor

from streamvid.models import attention as attention_module
from streamvid.models.attention import (
    BACKENDS,
    Span,
    attend_spans,
    attention,
    block_causal_spans,
    fastest_backend,
    full_spans,
    has_flash,
    resolve_backend,
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


@pytest.mark.parametrize("most_scores", [2**22, 60, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_products_are_attention(monkeypatch, most_scores, masked):
    """In blocks of any size, forwards and backwards."""
    monkeypatch.setattr(attention_module, "MOST_SCORES", most_scores)
    monkeypatch.setattr(attention_module, "MIN_ROWS", 1)
    mask = mask_of(block_causal_spans(4, 5), 20, 20) if masked else None
    results = []
    for backend in ("products", "native"):
        q, k, v = qkv(20, 20)
        out = attention(q, k, v, mask, backend)
        out.square().sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


def test_products_hold_few_scores(monkeypatch):
    """No block of scores is larger than the limit."""
    sizes = []
    softmax = Tensor.softmax
    monkeypatch.setattr(attention_module, "MOST_SCORES", 64)
    monkeypatch.setattr(attention_module, "MIN_ROWS", 1)
    monkeypatch.setattr(
        Tensor, "softmax", lambda x, dim: sizes.append(x.numel()) or softmax(x, dim)
    )
    attention(*qkv(20, 30), backend="products")
    assert max(sizes) <= 64
    assert sum(sizes) == 2 * 3 * 20 * 30


def test_products_in_half_precision_are_near():
    """The scores are rounded too: the error is a few of bfloat16's steps, 2 ** -8."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 2, 64) for tokens in (130, 400, 400))
    exact = attention(q, k, v)
    rough = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend="products").float()
    assert (rough - exact).norm() / exact.norm() < 2**-7


def test_auto_takes_products_only_where_they_pay(monkeypatch):
    """Large, in bfloat16, without a mask and without a gradient, on a CPU of that kind."""
    monkeypatch.setattr(attention_module, "has_fast_products", lambda: True)
    large = torch.zeros(1, 128, 2, 64, dtype=torch.bfloat16)
    learns = large.clone().requires_grad_()
    assert fastest_backend(large, large) == "products"
    for q, k in [
        (large[:, :127], large),
        (large[..., :47], large[..., :47]),
        (large.float(), large.float()),
        (learns, large),
        (large, learns),
    ]:
        assert fastest_backend(q, k) == "native"
    mask = torch.ones(128, 128, dtype=torch.bool)
    assert resolve_backend(large, large, mask, "auto") == "native"
    with torch.no_grad():
        assert fastest_backend(learns, learns) == "products"
    monkeypatch.setattr(attention_module, "has_fast_products", lambda: False)
    assert fastest_backend(large, large) == "native"


def test_without_a_name_the_choice_is_diffusers():
    """Its context manager reaches our attention; a name of ours wins over it."""
    q, k, v = qkv(4, 6)
    with attention_backend("_native_math"):
        assert resolve_backend(q, k, None, None) == "_native_math"
        assert resolve_backend(q, k, None, "products") == "products"
        out = attention(q, k, v)
    assert resolve_backend(q, k, None, None) == "native"
    torch.testing.assert_close(out, attention(q, k, v), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", ["_native_math", "auto"])
def test_a_backend_by_name_is_attention(backend):
    assert backend in BACKENDS
    q, k, v = (x.detach() for x in qkv(16, 24))
    expected = attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v, backend=backend), expected, atol=1e-6, rtol=1e-5)
