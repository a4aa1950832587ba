"""Caches of several streams, read by one pass over all of them.

Each stream keeps its own cache, so that it can leave the batch, be branched and be saved. A pass
over several streams sees their contexts side by side; the streams may be at different places. What
a pass commits goes into each stream's own cache, see ``students.batch``.

Legend: B batch, L tokens, N heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamvid.models.kv_cache import KeyValue, StreamKVCache


class JoinedCache:
    """What ``CausalWanTransformer3DModel`` reads of a cache, for the streams of several.

    What it joins is kept until a cache changes: once per chunk, not once per denoising step. Until
    then the contexts are in memory twice.

    Args:
        caches: of streams whose visible contexts are equally long.
        conds: text embeddings ``[B, L, D]`` of each, the tensors that the streams' own passes
            have.
    """

    def __init__(self, caches: Sequence[StreamKVCache], conds: Sequence[Tensor]) -> None:
        self.caches = tuple(caches)
        self.conds = tuple(conds)
        self.cond = torch.cat(self.conds)
        self._context: _Joined | None = None
        self._text: _Joined | None = None

    def check_pass(self, batch_size: int, num_frames: int, height: int, width: int) -> None:
        """A ValueError unless the pass can follow each context."""
        expected = sum(cache.batch_size for cache in self.caches)
        if batch_size != expected:
            raise ValueError(f"the caches hold {expected} streams, the input {batch_size}")
        for cache in self.caches:
            cache.check_pass(cache.batch_size, num_frames, height, width)

    def frame_positions(
        self, num_frames: int
    ) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
        """Temporal positions of the visible context and of the next ``num_frames`` frames, of each
        stream.
        """
        rows = [cache.frame_positions(num_frames) for cache in self.caches]
        sizes = [cache.batch_size for cache in self.caches]
        context, frames = zip(*(row for row, size in zip(rows, sizes) for _ in range(size)))
        return context, frames

    def context(self, num_frames: int) -> tuple[KeyValue, ...]:
        """The turned keys and values that the streams see, per layer ``[B, L, N, D]`` each."""
        parts = [cache.context(num_frames) for cache in self.caches]
        self._context = _join(parts, self._context)
        return self._context.whole

    def text_kv(self, cond: Tensor) -> tuple[KeyValue, ...]:
        """The keys and values that the caches keep for their prompts; empty if one lacks them."""
        if cond is not self.cond:
            return ()
        parts = [cache.text_kv(own) for cache, own in zip(self.caches, self.conds)]
        if not all(parts):
            return ()
        self._text = _join(parts, self._text)
        return self._text.whole

    def keep_text(self, cond: Tensor, kv: Sequence[KeyValue]) -> None:
        """Keep the prompts' keys and values in the streams' own caches, if ``cond`` is theirs."""
        if cond is not self.cond:
            return
        for cache, own, rows in zip(self.caches, self.conds, self.split_kv(kv)):
            cache.keep_text(own, rows)

    def split_kv(self, kv: Sequence[KeyValue]) -> list[tuple[KeyValue, ...]]:
        """Keys and values of all streams, per layer ``[B, ...]``, as those of each cache."""
        sizes = [cache.batch_size for cache in self.caches]
        layers = [tuple(zip(k.split(sizes), v.split(sizes))) for k, v in kv]
        # copies: a part would keep the memory of the whole batch as long as its stream lives
        return [
            tuple((k.clone(), v.clone()) for k, v in rows) for rows in zip(*layers, strict=True)
        ]


class _Joined:
    """Keys and values side by side, and the parts that they are made of."""

    def __init__(self, parts: Sequence[tuple[KeyValue, ...]]) -> None:
        self.parts = tuple(parts)
        self.whole = tuple(
            (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer]))
            for layer in zip(*parts, strict=True)
        )


def _join(parts: Sequence[tuple[KeyValue, ...]], last: _Joined | None) -> _Joined:
    """The parts side by side; ``last`` if it is made of these very parts."""
    if last is not None and all(new is old for new, old in zip(parts, last.parts, strict=True)):
        return last
    return _Joined(parts)
