"""The memory of a stream: keys and values of the frames that were committed.

The tensors in a cache are never written to. ``append`` installs new ones, so a denoising pass, a
backward pass or a clone that holds the old ones is not disturbed, and everything in a cache is
detached. Keys are kept as they are before the rotary embedding, so that a frame's position may
change while it stays.

The window counts the frames being denoised: over a window of 6 a chunk of 3 sees 3 frames of
context, of which the first ``sink_frames`` are the stream's first ones and the rest the most recent
ones. The store holds up to a whole window, because how many frames come next is known only when
they come.

Legend: B batch, F frames, S tokens per frame, L = F S tokens, N heads, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from streamvid.models.rope import rotary_table, rotate

POSITION_POLICIES = ("absolute", "window")

KeyValue = tuple[Tensor, Tensor]


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
    ) -> None:
        if height % patch_size[0] or width % patch_size[1]:
            raise ValueError(
                f"latent size {height} x {width} is not a multiple of the patch {patch_size}"
            )
        if positions == "window" and max_trained_frames is None:
            max_trained_frames = window_frames
        _check_policy(window_frames, sink_frames, positions, max_trained_frames)
        self.num_layers = num_layers
        self.batch_size = batch_size
        self.height = height
        self.width = width
        self.grid = (height // patch_size[0], width // patch_size[1])
        self.window_frames = window_frames
        self.sink_frames = sink_frames
        self.positions = positions
        self.max_trained_frames = max_trained_frames
        self.reset()

    def reset(self) -> None:
        """Forget the stream and its prompt."""
        self.num_committed_frames = 0  # in the stream's whole life
        self._layers: tuple[KeyValue, ...] = ()  # a layer's k and v, [B, F, S, N, D] each
        self._context: tuple[int, tuple[KeyValue, ...]] | None = None
        self._text: tuple[Tensor, int | None, tuple[KeyValue, ...]] | None = None

    def clone(self) -> StreamKVCache:
        """A cache that goes on from here by itself. The two share tensors, which neither ever
        changes.
        """
        return copy.copy(self)

    @property
    def num_frames(self) -> int:
        """Frames that are stored."""
        return self._layers[0][0].shape[1] if self._layers else 0

    def memory_bytes(self) -> int:
        """Bytes of all tensors that the cache holds, shared ones included."""
        groups = [self._layers]
        groups += [self._context[1]] if self._context else []
        groups += [self._text[2]] if self._text else []
        tensors = {x.data_ptr(): x.nbytes for group in groups for pair in group for x in pair}
        return sum(tensors.values())

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
        """Temporal positions of the visible context and of the next ``num_frames`` frames."""
        end = self.num_committed_frames + num_frames
        shift = max(0, end - self.max_trained_frames) if self.positions == "window" else 0
        context = (
            i if i < self.sink_frames else i - shift for i in self.visible_frames(num_frames)
        )
        return tuple(context), tuple(range(end - num_frames - shift, end - shift))

    def context(self, num_frames: int) -> tuple[KeyValue, ...]:
        """What a pass over the next ``num_frames`` frames sees: per layer, turned keys and values
        [B, L, N, D].

        Empty before the first commit. Computed once between commits, not once a denoising step.
        """
        if not self._layers:
            return ()
        if self._context is None or self._context[0] != num_frames:
            self._context = (num_frames, self._turned_context(num_frames))
        return self._context[1]

    def append(self, kv: Sequence[KeyValue]) -> None:
        """Commit frames: per layer, their keys before the rotary embedding and their values [B, F,
        S, N, D].

        Raises:
            ValueError: if layers, batch or frame size are not this cache's.
        """
        self._check_kv(kv)
        new = tuple((k.detach(), v.detach()) for k, v in kv)
        if self._layers:
            pairs = zip(self._layers, new, strict=True)
            new = tuple(
                (torch.cat([k0, k1], 1), torch.cat([v0, v1], 1)) for (k0, v0), (k1, v1) in pairs
            )
        self._layers = tuple((self._evicted(k), self._evicted(v)) for k, v in new)
        self.num_committed_frames += kv[0][0].shape[1]
        self._context = None

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
        if resume_at > keep_frames and keep_frames != self.sink_frames:
            raise ValueError(
                f"a gap from frame {keep_frames} to {resume_at}, expected behind the sink of"
                f" {self.sink_frames} frames only"
            )
        kept = tuple((k[:, :keep_frames], v[:, :keep_frames]) for k, v in self._layers)
        self._layers = kept if keep_frames else ()
        self.num_committed_frames = resume_at
        self._context = None

    def state(self) -> dict[str, Tensor]:
        """What is stored, by name: ``0.key``, ``0.value`` and so on, ``[B, F, S, N, D]`` each.

        With ``num_committed_frames`` it is all that ``load_state`` needs.
        """
        return {
            f"{layer}.{name}": x
            for layer, pair in enumerate(self._layers)
            for name, x in zip(("key", "value"), pair)
        }

    def load_state(self, tensors: Mapping[str, Tensor], num_committed_frames: int) -> None:
        """Go on from what ``state`` gave, bit for bit; what the cache held is forgotten.

        Raises:
            ValueError: if layers, batch or frame size are not this cache's, or more or fewer
                frames are stored than a stream of this length has.
        """
        layers = ()
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
        self._layers = layers
        self.num_committed_frames = num_committed_frames

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

    def _evicted(self, x: Tensor) -> Tensor:
        """``x`` [B, F, ...] without the frames that no later pass can see."""
        if self.window_frames is None or x.shape[1] <= self.window_frames:
            return x
        return _ends(x, self.sink_frames, self.window_frames - self.sink_frames)

    def _turned_context(self, num_frames: int) -> tuple[KeyValue, ...]:
        num_visible = len(self.visible_frames(num_frames))
        if not num_visible:
            return ()
        first = self._layers[0][0]
        positions, _ = self.frame_positions(num_frames)
        table = rotary_table(positions, self.grid, first.shape[-1], first.device)
        num_recent = num_visible - self.sink_frames
        # What a pass under inference_mode leaves here may be read by a pass with gradient.
        with torch.inference_mode(False), torch.no_grad():
            return tuple(
                (
                    rotate(_ends(k, self.sink_frames, num_recent), table).flatten(1, 2),
                    _ends(v, self.sink_frames, num_recent).flatten(1, 2),
                )
                for k, v in self._layers
            )

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


def _ends(x: Tensor, num_first: int, num_last: int) -> Tensor:
    """The first and the last frames of ``x`` [B, F, ...]; ``x`` itself where that is all of
    them.
    """
    frames = x.shape[1]
    if num_first + num_last == frames:
        return x
    return torch.cat([x[:, :num_first], x[:, frames - num_last :]], dim=1)


def _version(tensor: Tensor) -> int | None:
    """The count of in-place writes to a tensor; inference tensors keep none."""
    return None if tensor.is_inference() else tensor._version


def _check_policy(
    window_frames: int | None, sink_frames: int, positions: str, max_trained_frames: int | None
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
