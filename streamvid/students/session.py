"""A live stream: one student, one viewer, steered between chunks.

    session = Session(student, "a small red circle moves up", seed=7, height=64, width=64)
    for _ in range(4):
        show(session.next_chunk().images)
    session.switch_prompt("a large blue square moves left")
    show(session.next_chunk().images)
    session.script.save("stream.yaml")

A session that nobody steers gives the stream of ``rollout.sampler.stream`` bit for bit: both run
``rollout.loop``, the session a chunk at a time. All that is steered takes effect at the next chunk
boundary and is recorded as a ``Script``, from which ``play_script`` makes the same stream again.

A prompt is switched in one of four ways. A chunk is committed as context under the prompt that made
it, whenever that happens.

- ``cut``: later passes read the new prompt. The context keeps what the old one left in it.
- ``blend``: the same, but the embedding moves to the new one over some chunks.
- ``recache``: before that the last window of clean latents is committed again under the new prompt,
  at its old positions (arXiv 2509.22622, LongLive), so that the context agrees with the new prompt.
- ``hard``: a new scene. No context, positions from 0, the decoder begins anew; the noise goes on.

One thread at a time may use a session. ``close`` alone may be called from another one.

A chunk is a generator of the passes that it takes: ``next_chunk`` runs each at once, and
``students.batch`` those of several sessions as one.

Shapes: B = 1, C channels, f latent frames per chunk, h w latent size, T pixel frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from streamvid.config import build_config
from streamvid.printing import one_line
from streamvid.rollout.loop import Steps, rollout_passes
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.passes import Pass, next_result
from streamvid.rollout.sampler import check_finite, latent_shape_of, new_cache, now_s
from streamvid.rollout.schedule import Denoise, StreamConfig
from streamvid.students.batch import Decode, run_alone
from streamvid.students.contexts import commit_start, digest_frames, recommit_window
from streamvid.students.folder import Student, deployed
from streamvid.students.rate import RateHolder
from streamvid.students.script import (
    BLEND_CHUNKS,
    DEFAULT_MODE,
    MODES,
    Change,
    Interpolation,
    Mode,
    Script,
    check_prompt,
)
from streamvid.students.snapshot import (
    check_maker,
    fingerprint,
    named,
    pack_state,
    read_snapshot,
    unpack_state,
    write_snapshot,
)
from streamvid.students.stream_state import (
    Blend,
    Context,
    StreamState,
    advance_blend,
    check_student,
    context_of,
    keep_contexts,
    next_events,
    steer_state,
)
from streamvid.video import to_uint8


class SessionClosed(RuntimeError):
    """The session was closed, perhaps while a chunk was under way."""


@dataclass(frozen=True)
class SessionChunk:
    """What a viewer gets at a time, as ``rollout.sampler.StreamChunk`` and with what made it."""

    frames: Tensor  # [1, T, 3, H, W] in [0, 1]
    latents: Tensor  # [1, C, f, h, w]
    index: int  # in the stream, from 0; scenes go on counting
    prompt: str
    seed: int
    steps: int
    denoise_s: float  # with the commit of the chunk before, and a recache
    decode_s: float

    @property
    def images(self) -> np.ndarray:
        """The frames as bytes ``[T, H, W, 3]``."""
        return to_uint8(self.frames[0])


class Session:
    """A stream that can be steered, saved, and continued.

    Args:
        student: from ``students.folder.load_student``. Its stream order has to be autoregressive,
            with a context.
        prompt: what to show first.
        seed: of the noise.
        height, width: of the frames, in pixels.
        steps: per chunk; None is the student's own schedule.
        start: frames ``[T, 3, H, W]`` in [0, 1] that the stream goes on from. The last ones that
            make whole chunks are encoded and committed; ``next_chunk`` gives what follows them.

    Raises:
        ValueError: one line, if one of these can't be.
    """

    def __init__(
        self,
        student: Student,
        prompt: str,
        *,
        seed: int = 0,
        height: int,
        width: int,
        steps: int | None = None,
        start: Tensor | None = None,
    ) -> None:
        check_student(student)
        digest = None if start is None else digest_frames(start)
        self._begin(student, Script(prompt, height, width, seed, steps, digest))
        config = deployed(student.stream, steps=steps)
        self._cache = self._new_cache(config)
        self._state = StreamState(
            index=0,
            scene=0,
            seed=seed,
            prompt=prompt,
            cond=self._encode(prompt),
            blend=None,
            config=config,
            contexts=(),
            decoder=student.codec.new_decoder_state(),
        )
        if start is not None:
            self._state = commit_start(student, self._state, self._cache, start, height, width)
            self._script = replace(self._script, num_chunks=self._state.index)

    def _begin(self, student: Student, script: Script) -> None:
        """What every session has, a new one, a restored one and a branch."""
        self.student = student
        self._transformer = student.transformer
        self._device = next(self._transformer.parameters()).device
        self._script = script
        self._latent_shape = latent_shape_of(
            student.codec, self._transformer, script.height, script.width
        )
        self._queued: Change | None = None
        self._rate: RateHolder | None = None
        self._uncommitted: Steps | None = None  # its next step is the commit
        self._closed = False

    # ---- the stream ------------------------------------------------------------------------------

    @property
    def index(self) -> int:
        """The index of the next chunk."""
        return self._open_state().index

    @property
    def prompt(self) -> str:
        """The prompt that the last change has asked for, in effect or about to be."""
        queued = self._queued.prompt if self._queued else None
        return queued or self._open_state().prompt

    @property
    def seed(self) -> int:
        """The seed that the last change has asked for, in effect or about to be."""
        queued = self._queued.seed if self._queued else None
        return self._open_state().seed if queued is None else queued

    @property
    def asked_steps(self) -> int | None:
        """The steps per chunk that the last change has asked for, in effect or about to be; None is
        the student's own schedule.
        """
        queued = self._queued.steps if self._queued else None
        return self.script.last_steps if queued is None else queued

    @property
    def steps(self) -> int:
        """Steps of the next chunk, as far as is known."""
        return len(next_events(steer_state(self.student, self._open_state(), self._queued)))

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def shape(self) -> Hashable:
        """What the next chunk's passes are like: of sessions with equal shapes they run as one."""
        state, config = self._open_state(), self.student.stream
        frames = self._cache.num_frames
        if self._uncommitted is not None:
            frames += config.chunk_frames
        if config.window_frames is not None:
            frames = min(frames, config.window_frames - config.chunk_frames)
        if self._queued is not None and self._queued.mode == "hard":
            frames = 0
        text = tuple(state.cond.shape)
        return id(self._transformer), id(self.student.codec), self._latent_shape, text, frames

    @property
    def memory_bytes(self) -> int:
        """Bytes of the cache, of which a branch may share some; 0 when the session is closed."""
        cache = self._cache
        return 0 if cache is None else cache.memory_bytes()

    def next_chunk(self) -> SessionChunk:
        """Make the next chunk.

        If this raises, the session stays as it was, with what is queued, and may be asked again;
        unless the context could not be written, which closes it.

        Raises:
            SessionClosed: if the session is closed, also while the chunk is made.
            ValueError: at the first chunk, if weights or prompt give numbers that are not finite.
        """
        return run_alone(self.chunk_passes())

    def chunk_passes(self) -> Generator[Pass | Decode, Any, SessionChunk]:
        """The next chunk, as ``next_chunk`` makes it: yields what is to be run, without gradient,
        and is sent what that gives.
        """
        started_s = now_s(self._device)
        num_commits = self._num_commits() if self._uncommitted else 0
        yield from self._commit_passes()
        self._choose_steps()
        change = None if self._queued is None else self._queued.with_defaults()
        state, cache = yield from self._changed(self._open_state(), change)
        cond = state.blend.at(state.cond) if state.blend else state.cond
        events = next_events(state)
        last_input: list[Context] = []
        rollout = self._rollout(state, cache, events, cond, last_input)
        result = yield from next_result(rollout)
        denoised_s = now_s(self._device)
        frames, decoder = yield Decode(self.student.codec, result.latents, state.decoder)
        if state.index == 0:
            check_finite(cond, result.latents, frames)
        decoded_s = now_s(self._device)
        context = context_of(state, result, last_input[0])
        self._queued, self._cache, self._uncommitted = None, cache, rollout
        self._state = replace(
            state,
            index=state.index + 1,
            blend=advance_blend(state.blend),
            contexts=keep_contexts((*state.contexts, context), state.config),
            decoder=decoder,
        )
        self._script = replace(
            self._script,
            num_chunks=state.index + 1,
            changes=self._script.changes + (() if change is None else (change,)),
        )
        if self._closed:
            self.close()
            raise SessionClosed("the session was closed while a chunk was made")
        denoise_s, decode_s = denoised_s - started_s, decoded_s - denoised_s
        if self._rate and (change is None or change.prompt is None):  # a switch is no rule
            self._rate.observe(len(events) + num_commits, denoise_s, decode_s)
        return SessionChunk(
            frames=frames,
            latents=result.latents,
            index=state.index,
            prompt=state.prompt,
            seed=state.seed,
            steps=len(events),
            denoise_s=denoise_s,
            decode_s=decode_s,
        )

    def close(self) -> None:
        """Free everything. A chunk that another thread is making ends before its next step."""
        self._closed = True
        self._cache = self._state = self._uncommitted = self._queued = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- steering --------------------------------------------------------------------------------

    def switch_prompt(
        self,
        prompt: str,
        mode: Mode = DEFAULT_MODE,
        blend_chunks: int = BLEND_CHUNKS,
        keep_sink: bool = True,
        interpolation: Interpolation = "linear",
    ) -> None:
        """Show another prompt from the next chunk on; a switch that is still queued is replaced.

        Args:
            prompt: what to show.
            mode: see the module's docstring.
            blend_chunks: of mode "blend": chunk k of n is made with the share k / n of the new
                embedding; 1 is a cut.
            keep_sink: of mode "recache": whether the sink's keys stay those of the old prompt. The
                sink is kept in whole chunks while these are in the window.
            interpolation: of mode "blend": straight, or along the arc between the two, per token.

        Raises:
            ValueError: one line, if one of these can't be.
        """
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}, expected one of {', '.join(MODES)}")
        options: dict[str, Any] = {}
        if mode == "blend":
            options = {"blend_chunks": blend_chunks, "interpolation": interpolation}
        if mode == "recache":
            options = {"keep_sink": bool(keep_sink)}
        check_prompt(prompt)
        self.steer(Change(self.index, prompt, mode, **options))

    def set_steps(self, steps: int) -> None:
        """Steps of every later chunk, at the student's own shift; ends ``hold_rate``."""
        self.steer(Change(self.index, steps=steps))
        self._rate = None

    def set_schedule(self, times: Sequence[float] | None) -> None:
        """The falling noise levels, in (0, 1], of every later chunk's steps; None is the student's
        own schedule. Ends ``hold_rate``.
        """
        self.steer(Change(self.index, times=tuple(float(t) for t in times or ())))
        self._rate = None

    def set_seed(self, seed: int) -> None:
        """The seed of every later chunk's noise."""
        self.steer(Change(self.index, seed=seed))

    def hold_rate(self, fps: float | None, choices: Sequence[int] = (1, 2, 3, 4)) -> None:
        """Choose the steps of every later chunk so that ``fps`` frames per second are made, with as
        many steps as that allows; None stops. The script records what was chosen.

        Raises:
            ValueError: if the rate is not positive, or a choice is no number of steps.
        """
        measured = (self._rate.pass_s, self._rate.decode_s) if self._rate else ()
        self._rate = None if fps is None else RateHolder(fps, choices, *measured)

    def steer(self, change: Change) -> None:
        """Queue a change for the next chunk, whatever its ``at`` says; a later one wins over what
        is queued.

        Raises:
            ValueError: if the student can't be streamed so.
        """
        state = self._open_state()
        change = replace(change, at=state.index)
        steer_state(self.student, state, change)
        self._queued = change if self._queued is None else self._queued | change

    @property
    def script(self) -> Script:
        """What has happened so far. It lives on after ``close``."""
        return self._script

    # ---- keeping ---------------------------------------------------------------------------------

    def branch(self) -> Session:
        """Another session that goes on from here by itself, over a context of its own."""
        self._commit_pending()
        state = self._open_state()
        twin = object.__new__(Session)
        twin._begin(self.student, self._script)
        twin._state, twin._cache, twin._queued = state, self._cache.clone(), self._queued
        twin._rate = None if self._rate is None else replace(self._rate)
        return twin

    def snapshot(self, path: str | Path) -> None:
        """Write all that the stream needs to go on bit for bit to one safetensors file, at once."""
        self._commit_pending()
        tensors, facts = pack_state(self._open_state())
        tensors |= {f"cache.{name}": tensor for name, tensor in self._cache.state().items()}
        facts |= {
            "student": self._fingerprint(),
            "own_stream": self.student.stream.to_json(),
            "script": self._script.to_plain(),
            "queued": None if self._queued is None else asdict(self._queued),
            "committed_frames": self._cache.num_committed_frames,
            "rate": None if self._rate is None else asdict(self._rate),
        }
        write_snapshot(path, tensors, facts)

    @classmethod
    def restore(cls, path: str | Path, student: Student) -> Session:
        """The session of a snapshot; it goes on bit for bit.

        Raises:
            ValueError: one line, if the file is missing, damaged, or of another student.
        """
        check_student(student)
        tensors, facts = read_snapshot(path)
        session = object.__new__(cls)
        try:
            session._begin(student, Script.from_plain(facts["script"]))
            check_maker(facts, session._fingerprint(), student.stream)
            session._load(tensors, facts)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"snapshot {path}: {one_line(error)}") from error
        return session

    def _load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        tensors = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        self._state = unpack_state(tensors, facts)
        self._cache = self._new_cache(self._state.config)
        self._cache.load_state(named(tensors, "cache."), facts["committed_frames"])
        self._queued = facts["queued"] and build_config(Change, facts["queued"])
        self._rate = facts["rate"] and RateHolder(**facts["rate"])

    # ---- parts -----------------------------------------------------------------------------------

    def _open_state(self) -> StreamState:
        state = self._state
        if state is None:
            raise SessionClosed("the session is closed; begin another one")
        return state

    def _fingerprint(self) -> str:
        return fingerprint(self._transformer, self.student.codec)

    def _encode(self, prompt: str) -> Tensor:
        """``[1, L, D]``, where the transformer computes."""
        return self.student.prompts.encode([prompt]).to(self._device)

    def _new_cache(self, config: StreamConfig) -> Any:
        return new_cache(self._transformer, config, 1, self._latent_shape, static=True)

    def _num_commits(self) -> int:
        """Passes per chunk that write context."""
        return int(self.student.stream.commit == "clean")

    def _rollout(
        self,
        state: StreamState,
        cache: Any,
        events: Sequence[Denoise],
        cond: Tensor,
        last_input: list[Context],
    ) -> Steps:
        """The rollout of one chunk; its next step after the chunk is the commit.

        Args:
            last_input: is filled with what the chunk's last pass ran over.
        """

        def before_step(chunk: int, t: float, x_t: Tensor) -> Tensor:
            if self._closed:
                raise SessionClosed("the session was closed while a chunk was made")
            last_input[:] = [Context(x_t, t)]
            return x_t

        return rollout_passes(
            self.student.transformer,
            cond,
            events,
            KeyedNoise([state.seed]),
            latent_shape=self._latent_shape,
            chunk_frames=state.config.chunk_frames,
            cache=cache,
            commit=state.config.commit,
            context_t=state.config.context_t,
            stepper=state.config.stepper,
            commit_last=True,
            before_step=before_step,
        )

    def _commit_pending(self) -> None:
        run_alone(self._commit_passes())

    def _commit_passes(self) -> Generator[Pass, Any, None]:
        """Commit the last chunk, under the prompt that made it.

        A viewer never waits for it: it runs before the next chunk.
        """
        self._open_state()
        if self._uncommitted is None:
            return
        try:
            yield from next_result(self._uncommitted)
        except BaseException:
            self.close()  # a stream with a hole in its context is another one
            raise
        self._uncommitted = None

    def _choose_steps(self) -> None:
        """What ``hold_rate`` makes of the last chunks, as a change like any other."""
        if self._rate is None:
            return
        state, codec = self._open_state(), self.student.codec
        begins = state.scene_index == 0 or (
            self._queued is not None and self._queued.mode == "hard"
        )
        num_frames = codec.temporal_ratio * state.config.chunk_frames
        num_frames -= codec.temporal_ratio - 1 if begins else 0
        current = len(next_events(state))
        steps = self._rate.choose(num_frames, current, self._num_commits())
        if steps != current:
            self.steer(Change(state.index, steps=steps))

    def _changed(
        self, state: StreamState, change: Change | None
    ) -> Generator[Pass, Any, tuple[StreamState, Any]]:
        """The state and the cache with a change; those of the session stay as they are."""
        if change is None:
            return state, self._cache
        state = replace(
            state,
            config=steer_state(self.student, state, change).config,
            seed=state.seed if change.seed is None else change.seed,
        )
        if change.prompt is None:
            return state, self._cache
        cond, blend, cache = self._encode(change.prompt), None, self._cache
        if change.mode == "blend":
            origin = state.blend.at(state.cond) if state.blend else state.cond
            blend = Blend(origin, change.blend_chunks, 0, change.interpolation)
        if change.mode == "recache":
            cache = yield from recommit_window(
                self._transformer, state, cache, cond, change.keep_sink
            )
        state = replace(state, prompt=change.prompt, cond=cond, blend=blend)
        if change.mode == "hard":
            decoder = self.student.codec.new_decoder_state()
            state = replace(state, scene=state.index, contexts=(), decoder=decoder)
            cache = self._new_cache(state.config)
        return state, cache
