"""Several live sessions whose next chunks are made together.

    batch = Batch([session, other])
    while batch:
        for session, outcome in batch.step():
            ...  # outcome is the session's chunk, or what it has raised

A session's chunk is a generator of the calls that it takes: passes of the student, and at the end a
decoding. A step takes every session one call further. Calls of equal shape run as one; the others
run by themselves, so that sessions of any age, steps and size may be in one batch. What a session
is depends on the batch only by the rounding of matrix products.

A session that raises ends alone. Where a joint call fails, for example for lack of memory, each of
its calls is made by itself.

Shapes: B batch, C channels, f latent frames per chunk, T pixel frames, H W pixels, h w latent size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from streamvid.codecs.base import VideoCodec, flatten_state, rebuild_state
from streamvid.models.joined_cache import JoinedCache
from streamvid.models.kv_cache import StreamKVCache
from streamvid.rollout.passes import CommitPass, Pass

Made = TypeVar("Made")


@dataclass(frozen=True)
class Decode:
    """The decoding of a chunk; it gives frames ``[B, T, 3, H, W]`` and the decoder's new state."""

    codec: VideoCodec
    latents: Tensor  # [B, C, f, h, w]
    state: Any

    def run(self) -> tuple[Tensor, Any]:
        """Call the codec."""
        return self.codec.decode_chunk(self.latents, self.state)


@torch.no_grad()
def run_alone(calls: Generator[Any, Any, Made]) -> Made:
    """What a generator of calls returns; each call is made as soon as it is asked for."""
    given = None
    while True:
        try:
            call = calls.send(given)
        except StopIteration as end:
            return end.value
        try:
            given = call.run()
        except BaseException as error:
            calls.throw(error)
            raise


class Batch:
    """Sessions of which each makes its next chunk.

    Args:
        sessions: with ``chunk_passes``, each once.
        before_call: called with a session before each of its calls; what it raises ends that
            session's chunk.
    """

    def __init__(
        self, sessions: Sequence[Any], before_call: Callable[[Any], None] | None = None
    ) -> None:
        self._before_call = before_call or _nothing
        self._rows = [_Row(session, session.chunk_passes()) for session in sessions]
        self._joined: dict[Hashable, JoinedCache] = {}  # those of the last step
        self._may_join = True
        self._begun = False

    def __len__(self) -> int:
        """Sessions under way."""
        return len(self._rows)

    @torch.no_grad()
    def step(self) -> list[tuple[Any, Any]]:
        """Take every session one call further.

        Returns:
            The sessions that are done with that, each with its chunk, or with the exception that
            ended it.
        """
        if not self._begun:  # what comes before a chunk's first call is its session's too
            self._begun = True
            self._advance(self._rows, [None] * len(self._rows))
        for row in self._rows:
            row.check(self._before_call)
        groups: dict[Hashable, list[_Row]] = {}
        for row in self._rows:
            if row.call is not None:
                groups.setdefault(shape_of(row.call), []).append(row)
        last, self._joined = self._joined, {}
        for rows in groups.values():
            self._advance(rows, self._run([row.call for row in rows], last))
        done = [row for row in self._rows if row.call is None]
        self._rows = [row for row in self._rows if row.call is not None]
        return [(row.session, row.outcome) for row in done]

    def close(self) -> None:
        """Give the chunks up."""
        for row in self._rows:
            row.calls.close()
        self._rows = []

    @staticmethod
    def _advance(rows: Sequence[_Row], given: Sequence[Any]) -> None:
        for row, result in zip(rows, given, strict=True):
            row.advance(result)

    def _run(self, calls: list[Any], last: dict[Hashable, JoinedCache]) -> list[Any]:
        """What calls of equal shape give; an exception in place of what could not be made."""
        if len(calls) > 1 and self._may_join:
            try:
                return self._run_joined(calls, last)
            except Exception:
                # whose fault it is shows when each is made by itself
                self._may_join = False
                last.clear()
                self._joined.clear()
        return [_attempt(call.run) for call in calls]

    def _run_joined(self, calls: list[Any], last: dict[Hashable, JoinedCache]) -> list[Any]:
        if isinstance(calls[0], Decode):
            return decode_joined(calls)
        parts = tuple((id(call.cache), id(call.cond)) for call in calls)
        cache = last.get(parts)
        if cache is None:
            cache = JoinedCache([call.cache for call in calls], [call.cond for call in calls])
        self._joined[parts] = cache
        return run_joined(calls, cache)


class _Row:
    """A session's chunk under way: the call that it waits for, and at its end what came of it."""

    def __init__(self, session: Any, calls: Generator[Any, Any, Any]) -> None:
        self.session = session
        self.calls = calls
        self.call: Any = None
        self.outcome: Any = None

    def advance(self, given: Any) -> None:
        """Go on with what the call has given, or raised."""
        try:
            if isinstance(given, Exception):
                self.call = self.calls.throw(given)
            else:
                self.call = self.calls.send(given)
        except StopIteration as end:
            self.call, self.outcome = None, end.value
        except Exception as error:
            self.call, self.outcome = None, error

    def check(self, before_call: Callable[[Any], None]) -> None:
        """End the chunk with what ``before_call`` raises."""
        if self.call is None:
            return
        error = _attempt(lambda: before_call(self.session))
        if isinstance(error, Exception):
            self.advance(error)


def shape_of(call: Any) -> Hashable:
    """What has to agree for calls to run as one."""
    latents = getattr(call, "latents", None)
    match call:
        case Decode():
            layout, tensors = flatten_state(call.state)
            shapes = tuple(x.shape for x in tensors)
            return Decode, id(call.codec), latents.shape, latents.dtype, json.dumps(layout), shapes
        case Pass(cache=StreamKVCache()):
            return (
                type(call),
                id(call.student),
                latents.shape,
                latents.dtype,
                call.timestep.shape,
                call.cond.shape,
                call.target is None,
                call.keeps_kv,
                len(call.cache.visible_frames(latents.shape[2])),
            )
    return id(call)  # only its own


def run_joined(passes: Sequence[Pass], cache: JoinedCache) -> list[Any]:
    """What passes of equal shape give, by one pass over all of them.

    Args:
        cache: their caches, joined in this order.
    """
    first = passes[0]
    commits = isinstance(first, CommitPass)
    whole = Pass(
        first.student,
        torch.cat([one.latents for one in passes]),
        torch.cat([one.timestep for one in passes]),
        cache.cond,
        cache,
        target=None if first.target is None else torch.cat([one.target for one in passes]),
        keeps_kv=commits or first.keeps_kv,
    )
    velocity, kv = whole.run()
    parts = [None] * len(passes) if kv is None else cache.split_kv(kv)
    if commits:
        return [
            _attempt(lambda one=one, kv=kv: one.cache.append(kv)) for one, kv in zip(passes, parts)
        ]
    return list(zip(velocity.split([len(one.latents) for one in passes]), parts, strict=True))


def decode_joined(decodes: Sequence[Decode]) -> list[tuple[Tensor, Any]]:
    """The frames and new states of chunks of equal shape, decoded as one."""
    sizes = [len(one.latents) for one in decodes]
    flat = [flatten_state(one.state) for one in decodes]
    layout = flat[0][0]
    state = rebuild_state(layout, [torch.cat(x) for x in zip(*(tensors for _, tensors in flat))])
    latents = torch.cat([one.latents for one in decodes])
    frames, state = decodes[0].codec.decode_chunk(latents, state)
    layout, tensors = flatten_state(state)
    # copies: a part would keep the memory of the whole batch as long as its stream lives
    states = zip(*([part.clone() for part in x.split(sizes)] for x in tensors))
    return [
        (clip, rebuild_state(layout, own))
        for clip, own in zip(frames.split(sizes), states, strict=True)
    ]


def _attempt(call: Callable[[], Any]) -> Any:
    """What a call returns, or the exception that it raises."""
    try:
        return call()
    except Exception as error:
        return error


def _nothing(session: Any) -> None:
    pass
