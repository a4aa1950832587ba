"""Properties of the rotary embedding. Legend: F frames, S tokens a frame, N heads, D head size."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from streamvid.models.rope import axis_sizes, rotary_table, rotate

CPU = torch.device("cpu")


@pytest.mark.parametrize("head_size", [12, 24, 128])
def test_table_equals_diffusers(head_size):
    """Frames 0, 1, 2 are turned as diffusers' Wan turns them, for head sizes that 6 divides and
    not.
    """
    frames, height, width = 3, 2, 5
    cos, sin = WanRotaryPosEmbed(head_size, (1, 2, 2), 64)(
        torch.empty(1, 1, frames, 2 * height, 2 * width)
    )
    table = rotary_table((0, 1, 2), (height, width), head_size, CPU).reshape(
        1, -1, 1, head_size // 2
    )
    torch.testing.assert_close(table.real, cos[..., ::2].float(), atol=1e-7, rtol=0)
    torch.testing.assert_close(table.imag, sin[..., ::2].float(), atol=1e-7, rtol=0)


def test_axes_fill_the_head():
    """Wan 2.1: 44 channels of 128 for time, 42 for height and width each."""
    assert axis_sizes(128) == (44, 42, 42)


@pytest.mark.parametrize("shift", [1, 2.5, 5000])
def test_attention_depends_on_distances_only(shift):
    """A shift of all temporal positions, far past any table and not only by integers, changes no
    product.
    """
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 4, 6, 1, 24).unbind(0)
    products = []
    for offset in (0, shift):
        table = rotary_table(tuple(offset + i for i in range(4)), (2, 3), 24, CPU)
        products.append(rotate(q, table).flatten(1, 3)[0] @ rotate(k, table).flatten(1, 3)[0].T)
    torch.testing.assert_close(products[0], products[1], atol=1e-5, rtol=0)


def test_table_made_in_inference_mode_serves_training():
    """A table cached by a stream under inference_mode was an inference tensor, which autograd
    refuses to save.
    """
    with torch.inference_mode():
        table = rotary_table((0.125,), (1, 1), 24, CPU)
    x = torch.randn(1, 1, 1, 1, 24, requires_grad=True)
    rotate(x, table).sum().backward()
    assert x.grad is not None


def test_half_precision_input_is_turned_in_float32():
    """The result for bfloat16 is the float32 result, rounded once."""
    x = torch.randn(1, 2, 1, 3, 24, dtype=torch.bfloat16)
    table = rotary_table((700, 701), (1, 1), 24, CPU)
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())
