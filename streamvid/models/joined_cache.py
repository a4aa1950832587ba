"""Caches of several streams, read by one pass over all of them.

Each stream keeps its own cache, so that it can leave the batch, be branched and be saved. A pass
over several streams sees their contexts side by side; the streams may be at different places. What
a pass commits goes into each stream's own cache, see ``students.batch``.

Legend: B batch, L tokens, N heads, D head size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from streamvid.models.kv_cache import StreamKVCache
from streamvid.models.kv_store import KeyValue, LayerContext, RingContext, index_on


class JoinedCache:
    """What ``CausalWanTransformer3DModel`` reads of a cache, for the streams of several.

    What it joins is kept until a cache changes: once per chunk, not once per denoising step. Until
    then the contexts are in memory twice.

    Args:
        caches: of streams whose visible contexts are equally long.
        conds: text embeddings ``[B, L, D]`` of each, the tensors that the streams' own passes
            have.
    """

    static = False
    """Passes write to the joined copies alone."""

    def __init__(self, caches: Sequence[StreamKVCache], conds: Sequence[Tensor]) -> None:
        self.caches = tuple(caches)
        self.conds = tuple(conds)
        self.cond = torch.cat(self.conds)
        self._context: tuple[Hashable, tuple[LayerContext, ...]] | None = None
        self._text: _Joined | None = None

    def check_pass(self, batch_size: int, num_frames: int, height: int, width: int) -> None:
        """A ValueError unless the pass can follow each context."""
        expected = sum(cache.batch_size for cache in self.caches)
        if batch_size != expected:
            raise ValueError(f"the caches hold {expected} streams, the input {batch_size}")
        for cache in self.caches:
            cache.check_pass(cache.batch_size, num_frames, height, width)

    def visible_frames(self, num_frames: int) -> tuple[int, ...]:
        """Indices of the context that a pass sees, those of the first stream; the others see as
        many.
        """
        return self.caches[0].visible_frames(num_frames)

    def turns(self, num_frames: int) -> tuple[tuple[int, ...], ...]:
        """Positions that the next frames of each sample are turned to."""
        return tuple(
            cache.turns(num_frames) for cache in self.caches for _ in range(cache.batch_size)
        )

    def context(self, num_frames: int, chunkwise: bool = False) -> tuple[LayerContext, ...]:
        """What a pass over the next frames of all streams sees, per layer, its own frames last."""
        place = tuple((c.num_committed_frames, c.visible_frames(num_frames)) for c in self.caches)
        if self._context is None or self._context[0] != (num_frames, place):
            parts = [cache.visible_layers(num_frames) for cache in self.caches]
            layers = tuple(_with_room(rows, num_frames) for rows in zip(*parts, strict=True))
            self._context = ((num_frames, place), layers)
        return self._context[1]

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


def _with_room(rows: Sequence[KeyValue], num_frames: int) -> LayerContext:
    """A layer's keys and values of several streams side by side, and behind them room for the
    frames of a pass.
    """
    key, value = (
        torch.cat([F.pad(x, (0,) * 6 + (0, num_frames)) for x in parts]) for parts in zip(*rows)
    )
    seen = key.shape[1] - num_frames
    return RingContext((key, value), index_on(key.device, range(seen, seen + num_frames)))


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
