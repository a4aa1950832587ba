"""The memory of a stream: keys and values of the frames that were committed.

The window counts the frames being denoised: over a window of 6 a chunk of 3 sees 3 frames of
context, of which the first ``sink_frames`` are the stream's first ones and the rest the most recent
ones. The store holds up to a whole window, because how many frames come next is known only when
they come.

A cache keeps what was committed as it came (``kv_store.Pieces``): nothing is ever written to, so a
backward pass or a clone that holds tensors is not disturbed, and everything in it is detached. For
a stream there is a static one, of passes over always as many frames and without gradient: its
buffers have a fixed size, a pass writes its frames over those that it no longer sees
(``kv_store.Ring``), and nothing is copied. Both show attention the same numbers in the same order.

Legend: B batch, F frames, S tokens per frame, L = F S tokens, N heads, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from streamvid.models.kv_store import KeyValue, LayerContext, Layers, Pieces, Ring, Run
from streamvid.models.rope import rotary_table, rotate

POSITION_POLICIES = ("absolute", "window")


class StreamKVCache:
    """The committed context of B streams that advance together. Made by ``model.new_cache``.

    Args:
        num_layers: transformer blocks.
        batch_size: B.
        height, width: size of a latent frame.
        patch_size: latent rows and columns in a token.
        window_frames: frames that attention spans, with those being denoised; None keeps all.
        sink_frames: frames from the stream's start that stay in the window for ever.
        positions: "absolute" gives each frame its index in the stream. "window" does so until the
            stream is ``max_trained_frames`` long; from then on the newest frame stays at the last
            trained position, distances between recent frames stay true, and the sink stays at the
            first positions, that is, as far away as the model has ever seen anything.
        max_trained_frames: length in latent frames of the clips that the model was trained on. None
            means ``window_frames`` under "window", and unlimited under "absolute".
        pass_frames: frames of every pass and commit of a static cache, which takes no gradient;
            None is a cache for any.

    Raises:
        ValueError: if these do not fit together.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        height: int,
        width: int,
        patch_size: tuple[int, int],
        window_frames: int | None = None,
        sink_frames: int = 0,
        positions: str = "absolute",
        max_trained_frames: int | None = None,
        pass_frames: int | None = None,
    ) -> None:
        if height % patch_size[0] or width % patch_size[1]:
            raise ValueError(
                f"latent size {height} x {width} is not a multiple of the patch {patch_size}"
            )
        if positions == "window" and max_trained_frames is None:
            max_trained_frames = window_frames
        _check_policy(window_frames, sink_frames, positions, max_trained_frames, pass_frames)
        self.num_layers = num_layers
        self.batch_size = batch_size
        self.height = height
        self.width = width
        self.grid = (height // patch_size[0], width // patch_size[1])
        self.window_frames = window_frames
        self.sink_frames = sink_frames
        self.positions = positions
        self.max_trained_frames = max_trained_frames
        self.pass_frames = pass_frames
        self.reset()

    def reset(self) -> None:
        """Forget the stream and its prompt."""
        self.num_committed_frames = 0  # in the stream's whole life
        self.num_frames = 0  # that are stored
        self._first_recent = self.sink_frames  # index of the frame in the first place of the ring
        self._store: Pieces | Ring = Pieces()
        if self.pass_frames is not None:
            self._store = Ring(self.num_layers, self.window_frames)
        self._passed = 0  # frames that a static cache's last pass has written
        self._context: tuple[tuple[int, bool], tuple[LayerContext, ...]] | None = None
        self._text: tuple[Tensor, int | None, Layers] | None = None

    def clone(self) -> StreamKVCache:
        """A cache that goes on from here by itself. Two caches share tensors, which neither ever
        changes; two static ones have buffers of their own.
        """
        twin = copy.copy(self)
        twin._store, twin._context = self._store.copy(), None
        return twin

    @property
    def static(self) -> bool:
        """Whether passes write their keys and values into the cache; see ``pass_frames``."""
        return self.pass_frames is not None

    def memory_bytes(self) -> int:
        """Bytes of all memory that the cache keeps, shared memory included."""
        tensors = self._store.tensors()
        tensors += [x for pair in self._text[2] for x in pair] if self._text else []
        memory = (x.untyped_storage() for x in tensors)
        return sum({x._cdata: x.nbytes() for x in memory}.values())

    def stored_frames(self) -> tuple[int, ...]:
        """Indices in the stream of the frames that are stored, in their order."""
        committed, stored = self.num_committed_frames, self.num_frames
        if stored == committed:
            return tuple(range(committed))
        return (*range(self.sink_frames), *range(committed - stored + self.sink_frames, committed))

    def visible_frames(self, num_frames: int) -> tuple[int, ...]:
        """Indices in the stream of the context that a pass over the next ``num_frames`` frames
        sees.
        """
        stored = self.stored_frames()
        if self.window_frames is None or len(stored) + num_frames <= self.window_frames:
            return stored
        num_recent = self.window_frames - self.sink_frames - num_frames
        committed = self.num_committed_frames
        return (*range(self.sink_frames), *range(committed - num_recent, committed))

    def frame_positions(self, num_frames: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Temporal positions of the visible context and of the next ``num_frames`` frames.

        Attention sees their differences, and turns keys and queries accordingly; see ``turns``.
        """
        shift = self._shift(num_frames)
        context = (
            i if i < self.sink_frames else i - shift for i in self.visible_frames(num_frames)
        )
        return tuple(context), tuple(i - shift for i in self.turns(num_frames))

    def turns(self, num_frames: int) -> tuple[int, ...]:
        """Positions that the next ``num_frames`` frames are turned to: their indices in the stream.

        The context that a pass is shown is turned to match: recent frames to their indices, the
        sink to where its distance is that of ``frame_positions``.
        """
        start = self.num_committed_frames
        return tuple(range(start, start + num_frames))

    def context(self, num_frames: int, chunkwise: bool = False) -> tuple[LayerContext, ...]:
        """What a pass over the next ``num_frames`` frames sees, per layer; empty if it sees only
        itself.

        Of a static cache the pass takes the places of the frames that it does not see: these are
        forgotten here.

        Args:
            chunkwise: show the pass's own frames last, as a block-causal pass needs them.

        Raises:
            ValueError: if a static cache is to be passed with gradient, or chunkwise.
        """
        if self.static:
            self._begin_static_pass(chunkwise)
        if self._context is None or self._context[0] != (num_frames, chunkwise):
            self._context = ((num_frames, chunkwise), self._shown(num_frames, chunkwise))
        return self._context[1]

    def end_static_pass(self, kv: Sequence[KeyValue]) -> None:
        """Say that a pass over a static cache's ``context`` has gone through all layers.

        Args:
            kv: as for ``append``, of a pass to which the cache gave no context; else empty.
        """
        if kv:
            start = self.num_committed_frames
            turned = self._turned(kv, start)
            self._store.write(start, self._runs(self.turns(self.pass_frames)), turned)
            self._context = None
        self._passed = self.pass_frames

    def append(self, kv: Sequence[KeyValue]) -> None:
        """Commit frames.

        Args:
            kv: per layer, their keys before the rotary embedding and their values [B, F, S, N, D].
                Empty for what the last pass over a static cache has written.

        Raises:
            ValueError: if layers, batch or frame size are not this cache's, or no pass has written.
        """
        start = self.num_committed_frames
        if not kv and self.static:
            if not self._passed:
                raise ValueError(
                    "no frames to commit: no pass over this static cache has ended since the last"
                    " commit; run the student over the frames first"
                )
            self._grow(self._passed)
            return
        self._check_kv(kv)
        num_frames = kv[0][0].shape[1]
        turned = self._turned(kv, start)
        self._grow(num_frames)
        if isinstance(self._store, Ring):
            kept = [index for index in self.stored_frames() if index >= start]
            self._store.write(start, self._runs(kept), turned)
        else:
            self._store.append(start, turned)
            self._store.keep(self._runs(self.stored_frames()))

    def rewind(self, resume_at: int, keep_frames: int = 0) -> None:
        """Forget all but the first ``keep_frames`` stored frames; the next commit is frame
        ``resume_at`` of the stream.

        So frames that were committed can be committed again, at their places, under another
        prompt. Between kept frames and ``resume_at`` may be a gap, which no later pass sees.

        Raises:
            ValueError: if so many frames are not stored, or a gap follows others than the sink.
        """
        if not 0 <= keep_frames <= min(self.num_frames, resume_at):
            raise ValueError(
                f"keep_frames={keep_frames}, expected at most the {self.num_frames} stored ones"
                f" and resume_at={resume_at}"
            )
        gap = resume_at > keep_frames or self.stored_frames()[:keep_frames] != (
            *range(keep_frames),
        )
        if gap and keep_frames != self.sink_frames:
            raise ValueError(
                f"a gap from frame {keep_frames} to {resume_at}, expected behind the sink of"
                f" {self.sink_frames} frames only"
            )
        if isinstance(self._store, Ring):
            self._store.forget_sink(self.sink_frames)
        else:
            self._store.keep(self._runs(range(keep_frames)))
        self.num_frames = keep_frames
        self.num_committed_frames = resume_at
        self._first_recent = resume_at if gap else self.sink_frames
        self._context, self._passed = None, 0

    def state(self) -> dict[str, Tensor]:
        """What is stored, by name: ``0.key``, ``0.value`` and so on, ``[B, F, S, N, D]`` each, keys
        turned to their frames' indices in the stream; and ``first_recent``, which says the places.

        With ``num_committed_frames`` it is all that ``load_state`` needs.
        """
        layers = self._store.layers(self._runs(self.stored_frames())) if self.num_frames else ()
        return {
            f"{layer}.{name}": x
            for layer, pair in enumerate(layers)
            for name, x in zip(("key", "value"), pair)
        } | {"first_recent": torch.tensor(self._first_recent)}

    def load_state(self, tensors: Mapping[str, Tensor], num_committed_frames: int) -> None:
        """Go on from what ``state`` gave, bit for bit; what the cache held is forgotten.

        Raises:
            ValueError: if layers, batch or frame size are not this cache's, or more or fewer
                frames are stored than a stream of this length has.
        """
        layers: Layers = ()
        first_recent = int(tensors["first_recent"])
        tensors = {name: x for name, x in tensors.items() if name != "first_recent"}
        if tensors:
            names = [(f"{i}.key", f"{i}.value") for i in range(self.num_layers)]
            if tensors.keys() != {name for pair in names for name in pair}:
                raise ValueError(
                    f"the cache has {self.num_layers} layers, the state {len(tensors)} tensors;"
                    " expected a key and a value per layer"
                )
            layers = tuple((tensors[key], tensors[value]) for key, value in names)
            self._check_kv(layers)
        stored = layers[0][0].shape[1] if layers else 0
        least = min(self.sink_frames, num_committed_frames)
        most = min(num_committed_frames, self.window_frames or num_committed_frames)
        if not least <= stored <= most:
            raise ValueError(
                f"the state stores {stored} frames of {num_committed_frames} committed, expected"
                f" {least} to {most}"
            )
        self.reset()
        self.num_committed_frames, self.num_frames = num_committed_frames, stored
        self._first_recent = first_recent
        done = 0
        for run in self._runs(self.stored_frames()):
            count = run.stop - run.start
            part = tuple((k[:, done : done + count], v[:, done : done + count]) for k, v in layers)
            if isinstance(self._store, Ring):
                self._store.write(run.start, [run], part)
            else:
                self._store.append(run.start, part)
            done += count

    def check_pass(self, batch_size: int, num_frames: int, height: int, width: int) -> None:
        """Raise ValueError unless a pass over ``num_frames`` frames of this size can follow the
        context.
        """
        if batch_size != self.batch_size:
            raise ValueError(f"the cache holds {self.batch_size} streams, the input {batch_size}")
        if (height, width) != (self.height, self.width):
            raise ValueError(
                f"the cache is for latents of {self.height} x {self.width}, the input is {height} x"
                f" {width}"
            )
        if self.window_frames is not None and num_frames + self.sink_frames > self.window_frames:
            raise ValueError(
                f"window_frames={self.window_frames} has no room for {num_frames} frames and "
                f"sink_frames={self.sink_frames}; use at least {num_frames + self.sink_frames}"
            )
        if self.pass_frames not in (None, num_frames):
            raise ValueError(
                f"the cache is static, for passes over {self.pass_frames} frames; this one is over"
                f" {num_frames}"
            )
        end = self.num_committed_frames + num_frames
        if (
            self.positions == "absolute"
            and self.max_trained_frames is not None
            and end > self.max_trained_frames
        ):
            raise ValueError(
                f"the stream would be {end} frames long and the model was trained on"
                f" {self.max_trained_frames}; use positions='window'"
            )

    def text_kv(self, prompt: Tensor) -> tuple[KeyValue, ...]:
        """The keys and values that ``keep_text`` kept for this very tensor, unchanged since; else
        empty.
        """
        if self._text is None or self._text[0] is not prompt or self._text[1] != _version(prompt):
            return ()
        return self._text[2]

    def keep_text(self, prompt: Tensor, kv: Sequence[KeyValue]) -> None:
        """Keep a prompt's keys and values per layer [B, L, N, D], in place of the last prompt's.

        Only for passes without gradient: kept text has no graph, and the weights must not change
        meanwhile.
        """
        self._text = (prompt, _version(prompt), tuple((k.detach(), v.detach()) for k, v in kv))

    def _begin_static_pass(self, chunkwise: bool) -> None:
        if torch.is_grad_enabled():
            raise ValueError(
                "a static cache is written to by passes, which a gradient can't stand; use"
                " torch.no_grad(), or a cache with pass_frames=None"
            )
        if chunkwise:
            raise ValueError(
                "a static cache has no block-causal passes; pass the chunks one after the other,"
                " or use a cache with pass_frames=None"
            )
        self.num_frames = len(self.visible_frames(self.pass_frames))
        self._passed = 0

    def _shown(self, num_frames: int, chunkwise: bool) -> tuple[LayerContext, ...]:
        seen = self._runs(self.visible_frames(num_frames))
        own = self._runs(self.turns(num_frames))
        if chunkwise:
            last = self.window_frames or self.num_committed_frames
            own = (Run(last, self.num_committed_frames, self.num_committed_frames + num_frames),)
        return self._store.context(seen, own, self.sink_frames, self._shift(num_frames))

    def _grow(self, num_frames: int) -> None:
        """Count frames as committed, and those that no later pass can see as forgotten."""
        self.num_committed_frames += num_frames
        self.num_frames += num_frames
        if self.window_frames is not None:
            self.num_frames = min(self.num_frames, self.window_frames)
        self._context, self._passed = None, 0

    def _shift(self, num_frames: int) -> int:
        """How much nearer the sink is than its index says, to a pass over the next frames."""
        if self.positions != "window":
            return 0
        end = self.num_committed_frames + num_frames
        return max(0, end - self.max_trained_frames)

    def _runs(self, frames: Sequence[int]) -> tuple[Run, ...]:
        """Frames of rising indices as runs, by their places: the sink has the first ones, the rest
        of the window goes around in those behind it.
        """
        runs: list[Run] = []
        for index in frames:
            place, last = self._place(index), runs[-1] if runs else None
            if last and (last.stop, last.place + last.stop - last.start) == (index, place):
                runs[-1] = Run(last.place, last.start, index + 1)
            else:
                runs.append(Run(place, index, index + 1))
        return tuple(runs)

    def _place(self, index: int) -> int:
        if self.window_frames is None or index < self.sink_frames:
            return index
        around = self.window_frames - self.sink_frames
        return self.sink_frames + (index - self._first_recent) % around

    def _turned(self, kv: Sequence[KeyValue], start: int) -> Layers:
        """Keys and values of frames from index ``start`` on, the keys turned, apart from any graph
        and inference mode.
        """
        first = kv[0][0]
        turns = tuple(range(start, start + first.shape[1]))
        table = rotary_table(turns, self.grid, first.shape[-1], first.device)
        with torch.inference_mode(False), torch.no_grad():
            return tuple((rotate(k, table), _own(v)) for k, v in kv)

    def _check_kv(self, kv: Sequence[KeyValue]) -> None:
        if len(kv) != self.num_layers:
            raise ValueError(
                f"the cache has {self.num_layers} layers, the keys and values {len(kv)}"
            )
        frame = (self.batch_size, self.grid[0] * self.grid[1])
        for x in (x for pair in kv for x in pair):
            if x.ndim != 5 or (x.shape[0], x.shape[2]) != frame:
                raise ValueError(
                    f"expected keys and values [{frame[0]}, frames, {frame[1]}, heads, head size], "
                    f"got {list(x.shape)}"
                )


def _own(x: Tensor) -> Tensor:
    """``x`` without a graph; a copy if it is a view of more, or only good for inference."""
    if x.is_inference() or x.untyped_storage().nbytes() > x.nbytes:
        return x.clone()
    return x.detach()


def _version(tensor: Tensor) -> int | None:
    """The count of in-place writes to a tensor; inference tensors keep none."""
    return None if tensor.is_inference() else tensor._version


def _check_policy(
    window_frames: int | None,
    sink_frames: int,
    positions: str,
    max_trained_frames: int | None,
    pass_frames: int | None,
) -> None:
    if positions not in POSITION_POLICIES:
        raise ValueError(f"positions={positions!r} is not one of {POSITION_POLICIES}")
    if sink_frames < 0:
        raise ValueError(f"sink_frames={sink_frames} is negative")
    if window_frames is None and sink_frames:
        raise ValueError(f"sink_frames={sink_frames} needs a window: without one every frame stays")
    if window_frames is None and positions == "window":
        raise ValueError("positions='window' needs window_frames")
    if window_frames is not None and window_frames <= sink_frames:
        raise ValueError(
            f"window_frames={window_frames} has no room beside sink_frames={sink_frames}"
        )
    if positions == "window" and max_trained_frames < window_frames:
        raise ValueError(
            f"window_frames={window_frames} is more than the model was trained on"
            f" ({max_trained_frames} frames)"
        )
    if pass_frames is not None and window_frames is None:
        raise ValueError(
            f"pass_frames={pass_frames} needs window_frames: a static cache has a fixed size"
        )
    if pass_frames is not None and not 1 <= pass_frames <= window_frames - sink_frames:
        raise ValueError(
            f"pass_frames={pass_frames}, expected 1 to {window_frames - sink_frames}, what the"
            " window has beside the sink"
        )
