"""Distribution matching on self-forced rollouts: what DMD, adversarial self-distillation and
DiagDistill share.

The student rolls out a clip x over its own committed chunks, as it will be streamed (Self-Forcing,
arXiv 2506.08009), and

    student:     x <- x - g,  g = (x0_fake(x_t) - x0_real(x_t)) / mean |x - x0_real|,  x_t = (1 - t) x + t eps
    fake_score:  minimise mean |v_fake(x_t, t) - (eps - x)|^2 over rollouts of its own, detached

at one t per clip. x0_real is the guided teacher, x0_fake has no guidance. A turn draws one exit, a
random step of the student's list, the same for all processes: the clip x is made of the exits'
predictions, only they carry gradient, and no gradient passes from chunk to chunk. Where chunks have
lists of different lengths, each exits at the same fraction of its own. A chunk takes all its steps
before it becomes context (``context: streamed``), so that the keys and values over which later
chunks are denoised are written from the states and at the times at which a stream writes them.
Self-Forcing's code commits the exit's prediction (``context: exit``), which costs fewer forwards,
but is a context that no stream has: with reused keys the past is then keys of nearly pure noise in
a quarter of the updates.

Every step updates the fake score; every ``fake_updates_per_student``-th step then updates the
student too, which so meets a score that has just followed it. With 5, a run of 1000 steps has 1000
updates of the fake score and 200 of the student, as Self-Forcing counts.

The fake score sees clips that ended at different steps, as one mixture; a mixture may be right
while each step's clips are wrong. ``fake_knows_steps`` tells it which step of how many ended the
rollout.

Long rollouts (``rollout_chunks``; after Self-Forcing++, arXiv 2510.02283): the student goes on past
the teacher's clip length, over the window and sink that it streams with, and a part as long as the
teacher's clips is judged. A video codec's first latent frame is an image, so that the teacher knows
no clip that begins with another: as in Self-Forcing's code the part's first frame is decoded and
encoded as an image, and its first chunk carries no gradient. That makes the part a clip of the
codec, not one of the prompt, which tells how a clip begins: where the teacher still is outside its
law, at high noise, ``window_high`` leaves the comparison out.

A method adds to ``student_terms`` and ``turns``; ``decide`` and ``stream_of`` say how a rollout is
made.

Shapes: B batch, C channels, T latent frames of a clip, h w latent size, L D of a prompt embedding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from streamvid.core.fitting import flow_matching_loss
from streamvid.core.inject import dmd_gradient, surrogate
from streamvid.core.process import add_noise, x0_from_v
from streamvid.core.times import TimeLaw, sample_times
from streamvid.models.step_labels import add_step_labels, labelled
from streamvid.rollout.loop import rollout
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.sampler import new_cache
from streamvid.rollout.schedule import Denoise, StreamConfig, build_schedule, move_tap, truncate
from streamvid.seeding import key_to_seed, keyed_generator, keyed_normal
from streamvid.teachers.base import Teacher, check_needs, predict_guided, score_velocity
from streamvid.training.method import as_floats

LAST = math.nextafter(1.0, 0.0)  # the exit's place that is always a chunk's last step
MOST_CHUNKS = 10_000  # of a rollout, which is kept in memory


@dataclass
class MatchingConfig:
    """Settings of distribution matching."""

    num_chunks: int = 7
    """Chunks of the clips that the scores judge; times the stream's chunk_frames, the teacher's
    clip length."""
    guidance_scale: float = 4.0
    """Of the teacher, ``uncond + s (cond - uncond)``; 1 is none, 3 to 6 are usual."""
    time_law: TimeLaw = "uniform"
    """Law of the nominal time at which the scores are compared, and at which the fake score is
    fitted."""
    shift: float = 5.0
    """Shift of that law."""
    low: float = 0.02
    """Least time, after the shift; in [0, 1)."""
    high: float = 0.98
    """Greatest time, after the shift; in (0, 1]."""
    normalizer: Literal["sample", "none"] = "sample"
    """"sample" divides a sample's gradient by its mean |x - x0_real|, "none" leaves it."""
    fake_updates_per_student: int = 5
    """Updates of the fake score for each of the student; 1 to 10."""
    student_start_step: int = 0
    """Steps that warm up the fake score alone."""
    fake_knows_steps: bool = False
    """Whether the fake score is told which step of how many ended a rollout, by a vector on its
    time embedding."""
    exit: Literal["random", "last"] = "random"
    """Which step of a chunk carries gradient: any, or always the last."""
    rollout_chunks: int | None = None
    """Chunks of the longest rollout; None is ``num_chunks``. Gradient and loss are on
    ``num_chunks`` of them."""
    window: Literal["random", "last"] = "random"
    """Where in a longer rollout those are: anywhere, the rollout then ending with them, or at its
    end."""
    window_high: float | None = None
    """Greatest time at which a part from the middle of a rollout is judged; None is ``high``."""
    context: Literal["streamed", "exit"] = "streamed"
    """What chunks become context from: all their steps, as in a stream, or the exit's prediction,
    as in Self-Forcing's code."""

    def __post_init__(self) -> None:
        for name in ("num_chunks", "fake_updates_per_student"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        for name in ("num_chunks", "rollout_chunks"):
            if (getattr(self, name) or 0) > MOST_CHUNKS:
                raise ValueError(f"{name}={getattr(self, name)} must be at most {MOST_CHUNKS:,}")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low={self.low}, high={self.high}, expected 0 <= low < high <= 1")
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift}, expected a positive number; 1 is no shift")
        if self.rollout_chunks is not None and self.rollout_chunks < self.num_chunks:
            raise ValueError(
                f"rollout_chunks={self.rollout_chunks} is shorter than the"
                f" num_chunks={self.num_chunks} that are judged"
            )
        if self.rollout_chunks is not None and self.rollout_chunks > self.num_chunks == 1:
            raise ValueError(
                "num_chunks=1: the first chunk of a part from the middle carries no gradient; judge"
                " at least 2"
            )
        if self.window_high is not None and not self.low < self.window_high <= self.high:
            raise ValueError(
                f"window_high={self.window_high}, expected above low={self.low} and at most"
                f" high={self.high}"
            )
        choices_of = {
            "exit": ("random", "last"),
            "window": ("random", "last"),
            "context": ("streamed", "exit"),
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected one of {choices}")


@dataclass(frozen=True)
class Decision:
    """What all samples and all processes share in a turn."""

    exit_index: int  # steps before the one that carries gradient, of the chunk with most
    exit_place: float  # in [0, 1): of m steps, the one numbered int(m * place) carries gradient
    first_chunk: int  # of the part that is judged
    num_steps: int | None = None  # per chunk, where a method draws it; None is the stream's
    # the exit's place in the first chunk's list; None is exit_place
    first_place: float | None = None

    def exit_step(self, chunk: int, num_steps: int) -> int:
        """Steps that a chunk of ``num_steps`` takes before its exit."""
        place = self.first_place if chunk == 0 and self.first_place is not None else self.exit_place
        return int(place * num_steps)


@dataclass(frozen=True)
class Judged:
    """A rollout and what the scores say of it; all but ``x`` are detached."""

    x: Tensor  # [B, C, T, h, w], with the student's gradient
    x_t: Tensor
    t: Tensor  # [B]
    x0_fake: Tensor
    x0_real: Tensor
    gradient: Tensor


class DistributionMatching:
    """The frame of a method.

    Args:
        config: see ``Config``.
        student: a causal Wan transformer.
        teacher: gives the score of the data.
        stream: how the student is streamed; its rollouts in training are the same.
        latent_shape: (C, h, w).
        fake_score: a bidirectional network that ``teachers.base.score_velocity`` takes; None is the
            teacher's ``trainable_copy``.
        seed: of all random draws.
        as_image: from the latents ``[B, C, t, h, w]`` of a stream so far to that of its last frame
            as an image, ``[B, C, 1, h, w]``, see ``codecs.base.last_frame_as_image``; for rollouts
            longer than the clips that are judged.

    Raises:
        ValueError: if these do not fit together.
    """

    needs: frozenset[str] = frozenset({"score"})

    def __init__(
        self,
        config: MatchingConfig,
        student: nn.Module,
        teacher: Teacher,
        stream: StreamConfig,
        latent_shape: tuple[int, int, int],
        fake_score: nn.Module | None = None,
        seed: int = 0,
        as_image: Callable[[Tensor], Tensor] | None = None,
    ):
        check_needs(self, teacher)
        if config.guidance_scale != 1 and teacher.uncond is None:
            raise ValueError(
                f"guidance_scale={config.guidance_scale} needs the teacher's uncond; 1 is no"
                " guidance"
            )
        if stream.order == "rolling" and config.exit == "random":
            raise ValueError(
                "order='rolling' denoises chunks of all levels jointly and has no exit; set"
                " exit='last'"
            )
        if (config.rollout_chunks or 0) > config.num_chunks and as_image is None:
            raise ValueError(
                "rollout_chunks above num_chunks needs as_image, by which a part's first frame"
                " becomes an image"
            )
        self.as_image = as_image
        self.config = config
        self.student = student
        self.teacher = teacher
        self.stream = stream
        self.latent_shape = tuple(latent_shape)
        self.fake_score = _trainable_copy(teacher) if fake_score is None else fake_score
        self.seed = seed
        self.num_steps = max(
            steps_per_chunk(stream, config.rollout_chunks or config.num_chunks).values()
        )
        if config.fake_knows_steps:
            add_step_labels(self.fake_score, self.num_steps * (self.num_steps + 1) // 2)

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student, "fake_score": self.fake_score}

    def turns(self, step: int) -> tuple[str, ...]:
        """The fake score in every step, and after it the student in the last of each cycle."""
        is_last = (step + 1) % self.config.fake_updates_per_student == 0
        return (
            ("fake_score", "student")
            if is_last and step >= self.config.student_start_step
            else ("fake_score",)
        )

    def loss(self, turn: str, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, float]]:
        """Batches hold ``cond [B, L, D]`` and ``keys``."""
        decision = self.decide(turn, step, batch.get("micro", 0))
        if turn == "student":
            return self._student_loss(batch, decision)
        if turn == "fake_score":
            return self._fake_loss(batch, decision)
        raise ValueError(f"turn={turn!r}, expected 'student' or 'fake_score'")

    def decide(self, turn: str, step: int, micro: int = 0) -> Decision:
        """The shared choices of a turn, from (seed, step, turn) alone."""
        generator = keyed_generator(self.seed, "decision", step, turn, micro)
        any_step, any_place = (torch.rand(2, generator=generator, dtype=torch.float64)).tolist()
        places = (self.config.rollout_chunks or self.config.num_chunks) - self.config.num_chunks + 1
        exit_place = any_step if self.config.exit == "random" else LAST
        return Decision(
            exit_index=int(exit_place * self.num_steps),
            exit_place=exit_place,
            first_chunk=int(any_place * places) if self.config.window == "random" else places - 1,
        )

    def choices(self, turn: str, step: int) -> tuple[int | None, ...]:
        """What the cost of a turn depends on."""
        decision = self.decide(turn, step)
        # chunks then end at other places of their own lists
        uneven = self.stream.step_table or self.stream.first_steps
        place = int(12 * decision.exit_place) if uneven else None  # of lists of 1, 2, 3 and 4 steps
        return decision.exit_index, place, decision.first_chunk, decision.num_steps

    def stream_of(self, decision: Decision) -> StreamConfig:
        """How the rollout of a turn is streamed."""
        return self.stream

    def student_terms(
        self, judged: Judged, batch: dict[str, Any], decision: Decision
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the student minimises, and numbers worth logging. Here: distribution matching
        alone.
        """
        return (
            surrogate(judged.x, judged.gradient, mask=self.counted_frames(judged.x, decision)),
            {},
        )

    def counted_frames(self, x: Tensor, decision: Decision) -> Tensor | None:
        """Which frames of the judged part carry gradient, ``[B, T]`` of 0 and 1; None: all of
        them.
        """
        if decision.first_chunk == 0:
            return None
        counts = torch.ones(len(x), x.shape[2], device=x.device)
        counts[:, : self.stream.chunk_frames] = 0
        return counts

    def _student_loss(
        self, batch: dict[str, Any], decision: Decision
    ) -> tuple[Tensor, dict[str, float]]:
        judged = self._judge(
            self._roll_out(batch, self.stream_of(decision), decision), batch, decision
        )
        loss, numbers = self.student_terms(judged, batch, decision)
        x = judged.x.detach()
        numbers = {"loss": loss.detach(), **numbers}
        numbers["gradient_rms"] = judged.gradient.square().mean().sqrt()
        numbers["fake_real_gap"] = (judged.x0_fake - judged.x0_real).abs().mean()
        numbers["student_real_gap"] = (x - judged.x0_real).abs().mean()  # the normaliser
        numbers.update(latent_statistics(x))
        return loss, {**as_floats(numbers), "exit_index": float(decision.exit_index)}

    @torch.no_grad()
    def _judge(self, x: Tensor, batch: dict[str, Any], decision: Decision) -> Judged:
        """Both scores at one noising of ``x``, and the direction between them."""
        x_t, _, t = self._noised(x, batch["keys"], decision)
        cond = batch["cond"].to(x.dtype)
        x0_fake = x0_from_v(x_t, self._fake_velocity(x_t, t, cond, self._label(decision)), t)
        v_real = predict_guided(self.teacher, x_t, t, cond, self.config.guidance_scale)
        x0_real = x0_from_v(x_t, v_real.to(x_t.device), t)
        return Judged(
            x, x_t, t, x0_fake, x0_real, dmd_gradient(x, x0_fake, x0_real, self.config.normalizer)
        )

    def _fake_loss(
        self, batch: dict[str, Any], decision: Decision
    ) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            x = self._roll_out(batch, self.stream_of(decision), decision)
            x_t, eps, t = self._noised(x, batch["keys"], decision)
        velocity = self._fake_velocity(x_t, t, batch["cond"].to(x.dtype), self._label(decision))
        loss = flow_matching_loss(velocity, x, eps)
        return loss, as_floats({"loss": loss})

    def _roll_out(
        self, batch: dict[str, Any], stream: StreamConfig, decision: Decision, role: str = "student"
    ) -> Tensor:
        """The judged part ``[B, C, T, h, w]`` of a rollout, with the caller's grad mode; each
        ``role`` has its own noise.
        """
        first, end = decision.first_chunk, decision.first_chunk + self.config.num_chunks
        results = rollout(
            self.student,
            batch["cond"],
            _tapped_from(first, self._schedule(stream, decision, end)),
            KeyedNoise([key_to_seed(self.seed, role, key) for key in batch["keys"]]),
            latent_shape=self.latent_shape,
            chunk_frames=stream.chunk_frames,
            cache=new_cache(self.student, stream, len(batch["keys"]), self.latent_shape),
            commit=stream.commit,
            context_t=stream.context_t,
            stepper=stream.stepper,
        )
        results = list(results)
        x = torch.cat([result.prediction for result in results[first:]], dim=2)
        if first == 0:
            return x
        so_far = torch.cat(
            [*(result.latents for result in results[:first]), results[first].latents[:, :, :1]],
            dim=2,
        )
        return torch.cat([self.as_image(so_far), x[:, :, 1:]], dim=2)

    def _schedule(
        self, stream: StreamConfig, decision: Decision, num_chunks: int
    ) -> Iterator[Denoise]:
        """The schedule of a rollout, tapped at its exits."""
        steps = steps_per_chunk(stream, num_chunks)
        schedule = build_schedule(stream, num_chunks)
        if self.ends_at_exit(decision):
            return truncate(schedule, lambda chunk: decision.exit_step(chunk, steps[chunk]))
        schedule = move_tap(schedule, lambda chunk: decision.exit_step(chunk, steps[chunk]))
        last = num_chunks - 1  # is nobody's context, so that its exit ends it
        return truncate(
            schedule,
            lambda chunk: (
                decision.exit_step(chunk, steps[chunk]) if chunk == last else steps[chunk]
            ),
        )

    def ends_at_exit(self, decision: Decision) -> bool:
        """Whether a chunk's exit is its last step and so its context."""
        return self.config.context == "exit"

    def _noised(
        self, x: Tensor, keys: list[int], decision: Decision
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``x_t``, its noise ``eps`` and its time ``[B]``, keyed by sample; detached."""
        c = self.config
        high = c.high if decision.first_chunk == 0 or c.window_high is None else c.window_high
        eps = torch.stack(
            [keyed_normal(tuple(x.shape[1:]), self.seed, "score_eps", key) for key in keys]
        )
        generators = [keyed_generator(self.seed, "score_t", key) for key in keys]
        t = torch.cat(
            [
                sample_times(1, c.time_law, c.shift, generator, c.low, high)
                for generator in generators
            ]
        )
        eps, t = eps.to(x), t.to(x)
        return add_noise(x.detach(), eps, t), eps, t  # sg

    def _fake_velocity(
        self, x_t: Tensor, t: Tensor, cond: Tensor, label: int | None = None
    ) -> Tensor:
        with labelled(self.fake_score, label):
            return score_velocity(self.fake_score, x_t, t, cond)

    def _label(self, decision: Decision) -> int | None:
        """A number for each step of each number of steps; None where the fake score is not told."""
        if not self.config.fake_knows_steps:
            return None
        n = decision.num_steps or self.num_steps
        return n * (n - 1) // 2 + decision.exit_index


def steps_per_chunk(stream: StreamConfig, num_chunks: int) -> Counter[int]:
    """How many steps each of the first chunks of a stream takes."""
    return Counter(chunk for event in build_schedule(stream, num_chunks) for chunk in event.chunks)


def latent_statistics(x: Tensor) -> dict[str, Tensor]:
    """What tells the usual failures of a student from its latents ``[B, C, T, h, w]``, which have
    unit variance.

    ``latent_rms`` and ``latent_max`` grow with over-saturation, ``drift`` (rms of the last frame
    over that of the first) with errors that add up, and ``motion`` (mean absolute difference of
    neighbouring frames) falls when a student freezes.
    """
    rms = x.square().mean(dim=(0, 1, 3, 4)).sqrt()  # [T]
    moves = (x[:, :, 1:] - x[:, :, :-1]).abs()
    return {
        "latent_rms": x.square().mean().sqrt(),
        "latent_max": x.abs().max(),
        "drift": rms[-1] / rms[0].clamp_min(1e-8),
        "motion": moves.mean() if moves.numel() else x.new_zeros(()),
    }


def _tapped_from(first_chunk: int, schedule: Iterator[Denoise]) -> Iterator[Denoise]:
    """The same schedule, without gradient before ``first_chunk``."""
    for event in schedule:
        yield replace(
            event, tap=tuple(t and i >= first_chunk for i, t in zip(event.chunks, event.tap))
        )


def _trainable_copy(teacher: Teacher) -> nn.Module:
    if not hasattr(teacher, "trainable_copy"):
        raise ValueError(
            f"{type(teacher).__name__} has no network to start the fake score from; pass fake_score"
        )
    return teacher.trainable_copy()
