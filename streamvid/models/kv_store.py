"""Where a stream's keys and values are kept: ``Pieces`` as they were committed, or a ``Ring`` of
fixed size that passes write to.

Both keep keys turned by the rotary embedding at their frames' indices in the stream. Attention sees
differences of positions alone, so a key is turned once, and again only if its distance to the
others is to change, as a sink's does. Angles are computed in float64: a key at index 10^6 is turned
as accurately as one at 0.

Both show a pass its keys in the order of their places, and the frames of the pass stand at theirs:
the rounding of a softmax's sum depends on the order, and so a stream over a ring is bit-equal to a
rollout over pieces. The places are the cache's to say.

Legend: B batch, F frames, S tokens per frame, L = F S tokens, N heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamvid.models.rope import rotary_table, rotate

KeyValue = tuple[Tensor, Tensor]
Layers = tuple[KeyValue, ...]
Room = tuple[Tensor, Tensor, Tensor]
"""Turned keys and values [B, F, S, N, D], and where in them a pass's own frames [F] go."""


@dataclass(frozen=True)
class Run:
    """Consecutive frames in consecutive places."""

    place: int
    start: int
    """Index in the stream of the first frame."""
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class LayerContext(Protocol):
    """What a pass sees of a layer besides its own frames."""

    def room(self) -> Room:
        """The keys and values that the pass sees, with room for its own."""


# ---- pieces --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Frames that were committed together: per layer, turned keys and values [B, F, S, N, D]."""

    start: int
    layers: Layers

    @property
    def stop(self) -> int:
        return self.start + self.layers[0][0].shape[1]

    def cut(self, start: int, stop: int) -> Piece | None:
        """The frames from ``start`` to ``stop`` that are in here; None if there are none."""
        start, stop = max(start, self.start), min(stop, self.stop)
        if start >= stop:
            return None
        if (start, stop) == (self.start, self.stop):
            return self
        frames = slice(start - self.start, stop - self.start)
        return Piece(start, tuple((k[:, frames], v[:, frames]) for k, v in self.layers))


@dataclass(frozen=True)
class _PieceContext:
    keys: tuple[Tensor, ...]
    """In the order of their places; zeros without memory of their own are room for the pass's."""
    values: tuple[Tensor, ...]
    places: Tensor

    def room(self) -> Room:
        return torch.cat(self.keys, dim=1), torch.cat(self.values, dim=1), self.places


class Pieces:
    """Keys and values as they were committed; nothing is ever written to.

    A pass, a backward pass or a copy that holds tensors is not disturbed. They are joined inside
    the block that needs them, so what checkpointing holds of a context is these pieces, whatever
    the number of passes that saw them.
    """

    def __init__(self, pieces: tuple[Piece, ...] = ()) -> None:
        self._pieces = pieces

    def copy(self) -> Pieces:
        """Another store, of the same tensors."""
        return Pieces(self._pieces)

    def append(self, start: int, kv: Sequence[KeyValue]) -> None:
        """Add the frames from index ``start`` on: turned keys and values."""
        self._pieces += (Piece(start, tuple(kv)),)

    def keep(self, runs: Sequence[Run]) -> None:
        """Forget all but these frames."""
        self._pieces = tuple(_freed(piece) for piece in self._cut(runs))

    def layers(self, runs: Sequence[Run]) -> Layers:
        """Keys turned at their own indices and values [B, F, S, N, D], per layer."""
        pieces = self._cut(runs)
        return tuple(
            tuple(torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
            for pairs in zip(*(piece.layers for piece in pieces), strict=True)
        )

    def context(
        self, seen: Sequence[Run], own: Sequence[Run], num_sink: int, shift: int
    ) -> tuple[LayerContext, ...]:
        """What a pass sees, per layer; empty if it sees only itself.

        Args:
            seen, own: of the context and of the pass, in the order in which they are to be shown.
            num_sink, shift: of so many first frames, the keys are turned on by ``shift``.
        """
        placed: list[tuple[int, Piece]] = []
        for run in seen:
            for piece in self._cut([run]):
                if shift and piece.stop <= num_sink:
                    piece = Piece(piece.start, turned_on(piece.layers, shift))
                placed.append((run.place + piece.start - run.start, piece))
        if not placed:
            return ()
        layers = placed[0][1].layers
        placed += [(run.place, _empty(run, layers)) for run in own]
        placed.sort(key=lambda pair: pair[0])
        places = index_on(layers[0][0].device, _places(placed, own))
        return tuple(
            _PieceContext(*zip(*(piece.layers[i] for _, piece in placed)), places)
            for i in range(len(layers))
        )

    def tensors(self) -> list[Tensor]:
        return [x for piece in self._pieces for pair in piece.layers for x in pair]

    def _cut(self, runs: Sequence[Run]) -> list[Piece]:
        cuts = (piece.cut(run.start, run.stop) for run in runs for piece in self._pieces)
        return [piece for piece in cuts if piece is not None]


def _freed(piece: Piece) -> Piece:
    """A copy where the frames are views that keep at least twice their bytes alive."""
    key = piece.layers[0][0]
    if 2 * key.nbytes > key.untyped_storage().nbytes():
        return piece
    return Piece(piece.start, tuple((k.clone(), v.clone()) for k, v in piece.layers))


# ---- the ring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RingContext:
    buffers: KeyValue
    places: Tensor

    def room(self) -> Room:
        return *self.buffers, self.places


class Ring:
    """Buffers of a fixed number of places per layer, that passes write their frames to.

    They are allocated with the first frames; later only a copy of the sink's keys is, once, if they
    have to be turned on. Nothing of the context is copied: what attention sees are views.
    """

    def __init__(self, num_layers: int, num_places: int) -> None:
        self.num_places = num_places
        self._buffers: list[KeyValue | None] = [None] * num_layers
        self._sink: tuple[Tensor, ...] = ()  # its keys as they were before they were turned on
        self._shift = 0  # by which those in the buffers are

    def copy(self) -> Ring:
        """A ring of its own."""
        own = Ring(len(self._buffers), self.num_places)
        own._buffers = [pair and (pair[0].clone(), pair[1].clone()) for pair in self._buffers]
        own._sink = self._sink  # never written to
        own._shift = self._shift
        return own

    def write(self, start: int, runs: Sequence[Run], kv: Sequence[KeyValue]) -> None:
        """Write the frames in ``runs`` of those from index ``start`` on: turned keys and values."""
        if self._buffers[0] is None:
            self._allocate(kv)
        for buffers, pair in zip(self._buffers, kv, strict=True):
            for buffer, x in zip(buffers, pair, strict=True):
                for run in runs:
                    places = slice(run.place, run.place + len(run))
                    buffer[:, places] = x[:, run.start - start : run.stop - start]

    def context(
        self, seen: Sequence[Run], own: Sequence[Run], num_sink: int, shift: int
    ) -> tuple[LayerContext, ...]:
        """What a pass sees, per layer, see ``Pieces.context``; empty while nothing was written.

        Together the runs fill the places from the first one on.
        """
        if num_sink and seen:
            self.turn_sink(num_sink, shift)
        if self._buffers[0] is None:
            return ()
        used = sum(len(run) for run in (*seen, *own))
        numbers = [place for run in own for place in range(run.place, run.place + len(run))]
        places = index_on(self._buffers[0][0].device, numbers)
        return tuple(_RingContext((k[:, :used], v[:, :used]), places) for k, v in self._buffers)

    def turn_sink(self, num_sink: int, shift: int) -> None:
        """Turn the sink's keys on by ``shift`` from where they were at first."""
        if shift == self._shift:
            return
        if not self._sink:
            self._sink = tuple(pair[0][:, :num_sink].clone() for pair in self._buffers)
        for pair, key in zip(self._buffers, self._sink, strict=True):
            pair[0][:, :num_sink] = turned_by(key, shift)
        self._shift = shift

    def forget_sink(self, num_sink: int) -> None:
        """Its keys stand as they were at first, and may be written again."""
        self.turn_sink(num_sink, 0)
        self._sink = ()

    def layers(self, runs: Sequence[Run]) -> Layers:
        """Keys turned at their own indices and values [B, F, S, N, D], per layer; copies."""
        places = [slice(run.place, run.place + len(run)) for run in runs]
        found = []
        for layer, (key, value) in enumerate(self._buffers):
            keys, values = (torch.cat([x[:, p] for p in places], dim=1) for x in (key, value))
            if self._sink:
                keys[:, : self._sink[layer].shape[1]] = self._sink[layer]
            found.append((keys, values))
        return tuple(found)

    def tensors(self) -> list[Tensor]:
        return [*self._sink, *(x for pair in self._buffers if pair is not None for x in pair)]

    def _allocate(self, kv: Sequence[KeyValue]) -> None:
        # what inference_mode makes can't be written to outside of it
        with torch.inference_mode(False):
            for layer, pair in enumerate(kv):
                self._buffers[layer] = tuple(
                    torch.empty(
                        (x.shape[0], self.num_places, *x.shape[2:]), dtype=x.dtype, device=x.device
                    )
                    for x in pair
                )


# ---- shared -------------------------------------------------------------------------------------


def turned_by(key: Tensor, shift: int) -> Tensor:
    """Keys [B, F, S, N, D] at positions later by ``shift`` frames; rows and columns stay."""
    return rotate(key, rotary_table((shift,), (1, 1), key.shape[-1], key.device))


def turned_on(layers: Layers, shift: int) -> Layers:
    """Layers with their keys turned on by ``shift`` frames, without gradient."""
    with torch.inference_mode(False), torch.no_grad():
        return tuple((turned_by(k, shift), v) for k, v in layers)


def index_on(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """Whole numbers as a tensor on a device, for which the host doesn't wait."""
    with torch.inference_mode(False):
        index = torch.tensor(numbers)
        if device.type == "cuda":
            return index.pin_memory().to(device, non_blocking=True)
        return index.to(device)


def _empty(run: Run, like: Layers) -> Piece:
    """Room for frames of the shape and precision of others."""
    key = like[0][0]
    zeros = key.new_zeros(()).expand(key.shape[0], len(run), *key.shape[2:])
    return Piece(run.start, ((zeros, zeros),) * len(like))


def _places(placed: Sequence[tuple[int, Piece]], own: Sequence[Run]) -> list[int]:
    """Where a pass's frames are, in their order, in what is ``placed`` one after the other."""
    starts, done = {}, 0
    for place, piece in placed:
        starts[place] = done
        done += piece.stop - piece.start
    return [starts[run.place] + i for run in own for i in range(len(run))]
