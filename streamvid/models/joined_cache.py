"""Caches of several streams, read by one pass over all of them.

Each stream keeps its own cache, so that it can leave the batch, be branched and be saved. A pass
over several streams sees their contexts side by side; the streams may be at different places. It
writes to none of the caches: what it commits goes into each stream's own, see ``students.batch``.

Legend: B batch, F frames, S tokens per frame, L tokens, N heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamvid.models.kv_cache import StreamKVCache
from streamvid.models.kv_store import KeyValue, LayerContext, Room


class JoinedCache:
    """What ``CausalWanTransformer3DModel`` reads of a cache, for the streams of several.

    What it joins is kept until a cache changes: once per chunk, not once per denoising step. Until
    then the contexts are in memory twice.

    Args:
        caches: of streams whose visible contexts are equally long.
        conds: text embeddings ``[B, L, D]`` of each, the tensors that the streams' own passes
            have.
    """

    static = False  # a pass over it gives its keys and values

    def __init__(self, caches: Sequence[StreamKVCache], conds: Sequence[Tensor]) -> None:
        self.caches = tuple(caches)
        self.conds = tuple(conds)
        self.cond = torch.cat(self.conds)
        # what they are made of, and what is joined
        self._context: tuple[Sequence[Any], tuple[LayerContext, ...]] | None = None
        self._text: tuple[Sequence[Any], tuple[KeyValue, ...]] | None = None

    def check_pass(self, batch_size: int, num_frames: int, height: int, width: int) -> None:
        """A ValueError unless the pass can follow each context."""
        expected = sum(cache.batch_size for cache in self.caches)
        if batch_size != expected:
            raise ValueError(f"the caches hold {expected} streams, the input {batch_size}")
        for cache in self.caches:
            cache.check_pass(cache.batch_size, num_frames, height, width)

    def visible_frames(self, num_frames: int) -> tuple[int, ...]:
        """Those of the first stream; all streams see as many."""
        return self.caches[0].visible_frames(num_frames)

    def turns(self, num_frames: int) -> tuple[tuple[int, ...], ...]:
        """Positions that the next ``num_frames`` frames of each stream are turned to."""
        return tuple(
            cache.turns(num_frames) for cache in self.caches for _ in range(cache.batch_size)
        )

    def context(self, num_frames: int, chunkwise: bool = False) -> tuple[LayerContext, ...]:
        """What a pass over the next ``num_frames`` frames sees, per layer; empty if it sees only
        itself. See ``StreamKVCache.context``.
        """
        parts = [cache.context(num_frames, chunkwise) for cache in self.caches]
        if not self.visible_frames(num_frames):
            return ()
        if self._context is None or not _same(parts, self._context[0]):
            self._context = (
                parts,
                tuple(
                    _join_rooms([layer.room() for layer in layers], num_frames)
                    for layers in zip(*parts, strict=True)
                ),
            )
        return self._context[1]

    def text_kv(self, cond: Tensor) -> tuple[KeyValue, ...]:
        """The keys and values that the caches keep for their prompts; empty if one lacks them."""
        if cond is not self.cond:
            return ()
        parts = [cache.text_kv(own) for cache, own in zip(self.caches, self.conds)]
        if not all(parts):
            return ()
        if self._text is None or not _same(parts, self._text[0]):
            self._text = (
                parts,
                tuple(
                    (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer]))
                    for layer in zip(*parts, strict=True)
                ),
            )
        return self._text[1]

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


@dataclass(frozen=True)
class _JoinedRoom:
    buffers: KeyValue
    places: Tensor

    def room(self) -> Room:
        return *self.buffers, self.places


def _join_rooms(rooms: Sequence[Room], num_frames: int) -> _JoinedRoom:
    """Rooms of several streams as one: a pass's own frames, which stand at other places in each,
    stand last.
    """
    first = rooms[0][0]
    used = first.shape[1]
    seen = used - num_frames
    orders = [first.new_zeros(used).index_fill_(0, places, 1) for *_, places in rooms]
    orders = [own.argsort(stable=True)[:seen] for own in orders]  # no host waits for it
    joined = []
    for layer in range(2):
        context = [room[layer].index_select(1, order) for room, order in zip(rooms, orders)]
        size = (sum(len(x) for x in context), used, *first.shape[2:])
        whole = first.new_empty(size)
        whole[:, :seen] = torch.cat(context)
        joined.append(whole)
    key, value = joined
    return _JoinedRoom((key, value), torch.arange(seen, used, device=first.device))


def _same(parts: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether these are the very same parts."""
    return all(new is old for new, old in zip(parts, others, strict=True))
