"""Three-axis rotary position embedding, as Wan has it, at any positions.

A head's D channels are D / 2 interleaved pairs; time takes D - 4 (D // 6) channels, height and
width 2 (D // 6) each, in this order. A pair of frequency f at position p is turned by the angle p
f. Tables are computed from the positions in float64, so that there is no table that a long stream
can run out of, and are kept as complex64: a complex tensor is left alone by the float casts of
mixed-precision wrappers.

Legend: B batch, F frames, S tokens per frame (height x width of the token grid), N heads, D head
size.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0


def axis_sizes(head_size: int) -> tuple[int, int, int]:
    """Channels of a head that time, height and width turn."""
    spatial = 2 * (head_size // 6)
    return head_size - 2 * spatial, spatial, spatial


@lru_cache(maxsize=8)
def rotary_table(
    frame_positions: tuple[float, ...] | tuple[tuple[float, ...], ...],
    grid: tuple[int, int],
    head_size: int,
    device: torch.device,
) -> Tensor:
    """The rotations of all tokens of frames at these positions (integer or real, in latent frames).

    Args:
        frame_positions: one number per frame, or such a tuple per sample of the batch.
        grid: rows and columns of tokens in a frame.
        head_size: D, even.
        device: where the table shall live.

    Returns:
        complex64 [F, S, 1, D / 2], or [B, F, S, 1, D / 2] if samples are at different places. It is
        shared between calls: don't write to it.
    """
    # A table first made inside inference_mode could not enter autograd later.
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(frame_positions[0], tuple):
            rows = [rotary_table(row, grid, head_size, device) for row in frame_positions]
            return rows[0] if len(set(frame_positions)) == 1 else torch.stack(rows)
        time = torch.tensor(frame_positions, dtype=torch.float64)
        time = _rotations(time, axis_sizes(head_size)[0])
        if device.type == "cuda":  # from pinned memory the host needn't wait for the device
            time = time.pin_memory()
        space = _space_table(grid, head_size, device)
        shape = (len(frame_positions), len(space), -1)
        time = time.to(device, non_blocking=True)[:, None].expand(shape)
        return torch.cat([time, space.expand(shape)], dim=-1).unsqueeze(2)


@lru_cache(maxsize=8)
def _space_table(grid: tuple[int, int], head_size: int, device: torch.device) -> Tensor:
    """The rotations by row and column of all tokens of a frame, complex64 [S, pairs]; a stream's
    frames share them.
    """
    _, height, width = axis_sizes(head_size)
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid)
    rows = _rotations(rows, height)[:, None].expand(*grid, -1)
    columns = _rotations(columns, width)[None].expand(*grid, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).to(device)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """``x`` [B, F, S, N, D] turned by ``table`` [F, S, 1, D / 2] or [B, F, S, 1, D / 2]; computed
    in float32, returned as ``x``.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


def _rotations(positions: Tensor, size: int) -> Tensor:
    """Of an axis of ``size`` channels at float64 positions [P], complex64 [P, size / 2]."""
    angle = torch.outer(positions, _frequencies(size))
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def _frequencies(size: int) -> Tensor:
    """Frequencies of an axis of ``size`` channels, float64 [size / 2], in radians a position."""
    return THETA ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
