"""Objectives over images and clips: the student's samples are rollouts, streamed as it will be.

``VideoSetting`` is a ``training.method.Method``: it gives an objective's losses the networks of a
run and, in each turn, a ``VideoStep``. The student rolls out a clip x over its own committed chunks
(Self-Forcing, arXiv 2506.08009). A turn draws one exit, a random step of the student's list, the
same for all processes: x is made of the exits' predictions, only they carry gradient, and no
gradient passes from chunk to chunk. Where chunks have lists of different lengths, each exits at the
same fraction of its own. A chunk takes all its steps before it becomes context (``context:
streamed``), so that the keys and values over which later chunks are denoised are written from the
states and at the times at which a stream writes them. Self-Forcing's code commits the exit's
prediction (``context: exit``), which costs fewer forwards, but is a context that no stream has.

Long rollouts (``rollout_chunks``; after Self-Forcing++, arXiv 2510.02283): the student goes on past
the teacher's clip length, over the window and sink that it streams with, and a part as long as the
teacher's clips is judged. A video codec's first latent frame is an image, so that the teacher knows
no clip that begins with another: as in Self-Forcing's code the part's first frame is decoded and
encoded as an image, and its first chunk carries no gradient. That makes the part a clip of the
codec, not one of the prompt, which tells how a clip begins: where the teacher still is outside its
law, at high noise, ``window_high`` leaves the comparison out.

A flow map ``u(x_t, t, s)`` of a whole clip is one block-causal pass in which each noisy chunk sees
the clean chunks before it: those of the clip that the step drew last, as a stream sees its own.

Images are clips of one latent frame.

Shapes: B batch, C channels, T latent frames of a clip, h w latent size, L D of a prompt embedding,
K logits.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from einops import repeat
from torch import Tensor, nn

from streamvid.core.adversary import QueryHead, capture
from streamvid.core.process import add_noise, v_from_x0, velocity
from streamvid.core.times import TimeLaw, choose_times, sample_times
from streamvid.data.trajectories import time_indices
from streamvid.models.discriminators import TrunkHeads
from streamvid.models.step_labels import add_step_labels, labelled
from streamvid.models.video_discriminator import VideoDiscriminator
from streamvid.objectives.base import LAST, Exit, NoisedChunks, Objective, Sample, Step
from streamvid.rollout.loop import ChunkResult, rollout
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.sampler import new_cache
from streamvid.rollout.schedule import (
    Denoise,
    StreamConfig,
    build_schedule,
    move_tap,
    table,
    truncate,
)
from streamvid.seeding import key_to_seed, keyed_generator, keyed_normal
from streamvid.teachers.base import TIMESTEPS, Teacher, score_velocity
from streamvid.training.method import as_floats

MOST_CHUNKS = 10_000  # of a rollout, which is kept in memory
LATER_CHUNK = 7  # one that has the last list of any step table
LEAST_TIME = 0.02  # of a time law for finished clips; a student's own steps are as they are
COPIES = ("average", "lagged", "start")  # of the student, where an objective needs them
OF_TEACHER = frozenset({"score", "features"})


@dataclass
class RolloutConfig:
    """How the student's samples are made in training; how it is streamed is the stream's say."""

    num_chunks: int = 7
    """Chunks of the clips that are judged; times the stream's chunk_frames, the teacher's clip
    length."""
    exit: Literal["random", "last"] = "random"
    """Which step of a chunk carries gradient: any, or always the last."""
    context: Literal["streamed", "exit"] = "streamed"
    """What chunks become context from: all their steps, as in a stream, or the exit's prediction,
    as in Self-Forcing's code."""
    rollout_chunks: int | None = None
    """Chunks of the longest rollout; null is ``num_chunks``. Gradient and loss are on
    ``num_chunks`` of them."""
    window: Literal["random", "last"] = "random"
    """Where in a longer rollout those are: anywhere, the rollout then ending with them, or at its
    end."""
    window_high: float | None = None
    """Greatest time at which a part from the middle of a rollout is judged; null is the
    objective's ``high``."""
    fake_knows_steps: bool = False
    """Whether the fake score is told which step of how many ended a rollout, by a vector on its
    time embedding. It sees clips that ended at different steps, as one mixture, and a mixture may
    be right while each step's clips are wrong."""
    group_size: int = 1
    """Samples per prompt, of objectives that compare these; 1 to 24."""

    def __post_init__(self) -> None:
        for name in ("num_chunks", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        for name in ("num_chunks", "rollout_chunks"):
            if (getattr(self, name) or 0) > MOST_CHUNKS:
                raise ValueError(f"{name}={getattr(self, name)} must be at most {MOST_CHUNKS:,}")
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
        if self.window_high is not None and not 0 < self.window_high <= 1:
            raise ValueError(f"window_high={self.window_high}, expected a time in (0, 1]")
        choices_of = {
            "exit": ("random", "last"),
            "window": ("random", "last"),
            "context": ("streamed", "exit"),
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected one of {choices}")

    @property
    def judges_cuts(self) -> bool:
        """Whether clips from the middle of a longer rollout are judged."""
        return (self.rollout_chunks or 0) > self.num_chunks


@dataclass(frozen=True)
class Decision:
    """What all samples and all processes share in a turn's rollout."""

    exit_index: int  # steps before the one that carries gradient, of the chunk with most
    exit_place: float  # in [0, 1): of m steps, the one numbered int(m * place) carries gradient
    first_chunk: int  # of the part that is judged
    num_steps: int | None = None  # per chunk, where an objective says it; None is the stream's
    first_place: float | None = None  # the exit's place in chunk 0's list; None is exit_place
    ends_at_exit: bool = False  # whether a chunk's exit is its last step and so its context

    def exit_step(self, chunk: int, num_steps: int) -> int:
        """Steps that a chunk of ``num_steps`` takes before its exit."""
        own = chunk == 0 and self.first_place is not None
        return int((self.first_place if own else self.exit_place) * num_steps)


@dataclass(frozen=True)
class Noising:
    """How finished clips are noised: a time per chunk, a seed and a prompt per clip."""

    times: list[float]
    seeds: list[int]
    cond: Tensor  # [B, L, D]


class VideoSetting:
    """An objective with the networks of a run.

    Args:
        objective: any.
        student: a causal Wan transformer; bidirectional for objectives that roll nothing out.
        stream: how the student is streamed; its rollouts in training are the same.
        latent_shape: (C, h, w).
        teacher: of objectives that need its score; frozen.
        rollout: how samples are made.
        fake_score: a bidirectional network that ``teachers.base.score_velocity`` takes; None is the
            teacher's ``trainable_copy``.
        discriminator: None makes the objective's own, or ``TrunkHeads`` on the teacher.
        uncond: embedding of the empty prompt ``[L, D]``, where there is no teacher that has it.
        seed: of all random draws.
        as_image: from the latents ``[B, C, t, h, w]`` of a stream so far to that of its last frame
            as an image, ``[B, C, 1, h, w]``, see ``codecs.base.last_frame_as_image``; for rollouts
            longer than the clips that are judged.

    Raises:
        ValueError: if these do not fit together.
    """

    def __init__(
        self,
        objective: Objective,
        student: nn.Module,
        stream: StreamConfig,
        latent_shape: tuple[int, int, int],
        teacher: Teacher | None = None,
        rollout: RolloutConfig | None = None,
        fake_score: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        uncond: Tensor | None = None,
        seed: int = 0,
        as_image: Callable[[Tensor], Tensor] | None = None,
    ):
        self.objective = objective
        self.student = student
        self.stream = stream
        self.latent_shape = tuple(latent_shape)
        self.teacher = teacher
        self.rollout = RolloutConfig() if rollout is None else rollout
        self.uncond = teacher.uncond if uncond is None and teacher is not None else uncond
        self.seed = seed
        self.as_image = as_image
        self._check()
        self.num_steps = max(self.steps_per_chunk().values())
        self.trained: dict[str, nn.Module] = {"student": student}
        names = objective.networks()
        if "fake_score" in names:
            self.trained["fake_score"] = (
                self._new_fake_score() if fake_score is None else fake_score
            )
        if self.rollout.fake_knows_steps and "fake_score" in self.trained:
            labels = self.num_steps * (self.num_steps + 1) // 2
            add_step_labels(self.trained["fake_score"], labels)
        if discriminator is not None:
            self.trained["discriminator"] = discriminator
        self.trained |= objective.new_networks(self.trained, self.latent_shape, stream, seed)
        if "discriminator" in names and "discriminator" not in self.trained:
            self.trained["discriminator"] = self._new_heads()
        self.copies = {
            name: copy.deepcopy(student).requires_grad_(False).eval()
            for name in COPIES
            if name in objective.needs
        }
        self.progress = 0.0

    # ---- training.method.Method

    @property
    def needs(self) -> frozenset[str]:
        """What the objective asks of its teacher."""
        return self.objective.needs & OF_TEACHER

    def networks(self) -> dict[str, nn.Module]:
        return self.trained

    def frozen(self) -> dict[str, nn.Module]:
        """The networks that are held and not trained."""
        held = {
            name: getattr(self.teacher, name, None) for name in ("transformer", "transformer_2")
        }
        return {**{n: part for n, part in held.items() if part is not None}, **self.copies}

    def turns(self, step: int) -> tuple[str, ...]:
        return self.objective.turns(step)

    def set_progress(self, progress: float) -> None:
        """How far the run is, in [0, 1]."""
        self.progress = progress

    def choices(self, turn: str, step: int) -> Hashable:
        return self.objective.choices(self.step_of(turn, None, step))

    def loss(self, turn: str, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, float]]:
        """Batches hold ``cond [B, L, D]`` and ``keys``, and ``latents [B, C, T, h, w]`` or
        ``states [B, n, C, T, h, w]`` with ``times [B, n]`` where the objective needs clips or
        pairs.
        """
        parts, numbers = zip(*self.losses(turn, batch, step))
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0], numbers[-1]

    def losses(
        self, turn: str, batch: dict[str, Any], step: int
    ) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """The loss in parts, the numbers with the last."""
        if turn not in self.trained:
            raise ValueError(f"turn={turn!r}, expected one of {', '.join(self.trained)}")
        context = self.step_of(turn, batch, step)
        loss = getattr(self.objective, turn)(context)
        if isinstance(loss, Tensor):
            yield loss, context.finish(loss)
            return
        part = next(loss)
        total = part.detach()
        for following in loss:
            yield part, {}
            part = following
            total = total + part.detach()
        yield part, context.finish(total)

    @torch.no_grad()
    def after_step(self, turn: str, step: int) -> None:
        """The student's copies follow it."""
        if turn != "student":
            return
        decays = {"average": self.objective.average_decay, "lagged": self.objective.lagged_decay}
        for name, decay in decays.items():
            if name in self.copies and self.objective.follows(name, step):
                old = list(self.placed(name).parameters())
                new = [p.detach() for p in self.student.parameters()]
                torch._foreach_lerp_(old, new, 1 - decay)
        self.objective.after_student(self.step_of(turn, None, step))

    def extra_state(self) -> dict[str, Tensor]:
        """The weights of copies that change."""
        return {
            f"{name}.{key}": value
            for name in self.copies
            if name != "start"
            for key, value in self.placed(name).state_dict().items()
        }

    # ---- parts of a step

    def step_of(self, turn: str, batch: dict[str, Any] | None, step: int) -> VideoStep:
        """The step that a loss gets; without a batch it knows its shared draws alone."""
        return VideoStep(self, turn, batch, step)

    def steps_per_chunk(self, stream: StreamConfig | None = None) -> Counter[int]:
        """How many steps each chunk of the longest rollout takes."""
        return steps_per_chunk(
            self.stream if stream is None else stream,
            self.rollout.rollout_chunks or self.rollout.num_chunks,
        )

    def placed(self, name: str) -> nn.Module:
        """A copy, which the trainer does not know, on the student's device."""
        return self.copies[name].to(next(self.student.parameters()).device)

    @property
    def trunk(self) -> nn.Module:
        """Whose features the discriminator reads."""
        if self.objective.trunk == "fake_score":
            return self.trained["fake_score"]
        return self.teacher.transformer

    # ---- construction

    def _check(self) -> None:
        objective, teacher = self.objective, self.teacher
        name = objective.name
        if self.needs and teacher is None:
            raise ValueError(
                f"objective={name} needs a teacher's {' and '.join(sorted(self.needs))}"
            )
        if "score" in self.needs and "score" not in teacher.provides:
            raise ValueError(
                f"objective={name} needs a teacher's score, but {type(teacher).__name__} provides"
                f" only {', '.join(sorted(teacher.provides)) or 'nothing'}; choose another teacher"
                " or another objective"
            )
        if "features" in self.needs and not hasattr(
            getattr(teacher, "transformer", None), "blocks"
        ):
            raise ValueError(
                f"objective={name} reads the blocks of a Wan transformer, which"
                f" {type(teacher).__name__} does not have; take a Wan teacher"
            )
        if "reward" in objective.needs:
            raise ValueError(f"objective={name} needs a reward, which clips do not have yet")
        if "group" in objective.needs and self.rollout.group_size < 2:
            raise ValueError(
                f"objective={name} compares samples of one prompt; set rollout.group_size to 2 or"
                " more"
            )
        if teacher is not None and teacher.uncond is None and not _is_unguided(objective):
            raise ValueError(
                f"guidance_scale={objective.guidance_scale} needs the teacher's uncond; 1 is no"
                " guidance"
            )
        if self.stream.order == "rolling" and self.rollout.exit == "random" and self.needs:
            raise ValueError(
                "order='rolling' denoises chunks of all levels jointly and has no exit; set"
                " rollout.exit='last'"
            )
        if "jumps" in objective.needs and not getattr(self.student, "takes_target", False):
            raise ValueError(
                f"objective={name} trains jumps to more than one time, which this student is not"
                " told; set student.jump_embedding=true"
            )
        if objective.sampler == "jump" and self.stream.stepper != "jump":
            raise ValueError(
                f"objective={name} trains jumps from step to step; set stream.stepper=jump"
            )
        if self.rollout.judges_cuts and self.as_image is None:
            raise ValueError(
                "rollout_chunks above num_chunks needs as_image, by which a part's first frame"
                " becomes an image"
            )
        objective.check_stream(self.stream, self.rollout.num_chunks)

    def _new_fake_score(self) -> nn.Module:
        if not hasattr(self.teacher, "trainable_copy"):
            raise ValueError(
                f"{type(self.teacher).__name__} has no network to start the fake score from; pass"
                " fake_score"
            )
        return self.teacher.trainable_copy()

    def _new_heads(self) -> nn.Module:
        trunk = self.trunk
        if not hasattr(trunk, "blocks"):
            raise ValueError(
                f"objective={self.objective.name} reads the blocks of a Wan transformer, but the"
                f" {self.objective.trunk.replace('_', ' ')} is a {type(trunk).__name__}; take a Wan"
                " teacher, or objective=dmd"
            )
        depth = len(trunk.blocks)
        layers = self.objective.feature_layers
        if layers is None:
            layers = sorted({depth // 3, depth // 2, depth - 1})
        num_logits = self.objective.num_logits_for(self.stream.num_steps)
        return TrunkHeads(trunk, layers, num_logits, seed=self.seed)


class VideoStep(Step):
    """One turn over clips.

    Draws are keyed by (seed, name, sample's key), so that they depend on neither batch nor
    processes; what all samples share is keyed by (seed, name, step, turn).
    """

    tangent = "fd"  # attention's fast kernels have no forward mode

    def __init__(self, method: VideoSetting, turn: str, batch: dict[str, Any] | None, step: int):
        super().__init__()
        self.method = method
        self.objective = method.objective
        self.turn = turn
        self.step = step
        self.progress = method.progress
        self.stream = method.stream
        self.num_steps = method.num_steps
        self.seed = method.seed
        self.uncond = method.uncond
        self.micro = 0 if batch is None else batch.get("micro", 0)
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.shared: dict[str, torch.Generator] = {}
        self.rolled: list[tuple[Decision, Tensor]] = []  # what was sampled, in order
        self.clean: Tensor | None = None
        self.batch = {} if batch is None else _grouped(batch, method.rollout.group_size)
        if batch is not None:
            self.cond: Tensor = self.batch["cond"]
            self.keys: list[int] = self.batch["keys"]
            self.group = torch.arange(self.batch_size, device=self.cond.device)
            self.group = self.group // method.rollout.group_size

    # ---- draws

    @property
    def batch_size(self) -> int:
        return len(self.keys)

    @property
    def dtype(self) -> torch.dtype:
        """Of states: float32, or float64 if the prompts are."""
        return torch.promote_types(self.cond.dtype, torch.float32)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, T, h, w) of the clips: the data's, or the rollouts'."""
        for name in ("latents", "states"):
            if name in self.batch:
                return tuple(self.batch[name].shape[-4:])
        channels, height, width = self.method.latent_shape
        frames = self.method.rollout.num_chunks * self.stream.chunk_frames
        return channels, frames, height, width

    def noise(self, *name: str) -> Tensor:
        return self.noise_like(self.shape, *name)

    def noise_like(self, shape: tuple[int, ...], *name: str) -> Tensor:
        """``[B, *shape]``, normal."""
        label = self._label("score_eps", name)
        draws = [keyed_normal(shape, self.method.seed, *label, key) for key in self.keys]
        return torch.stack(draws).to(self.cond.device, self.dtype)

    def uniform(self, *name: str) -> Tensor:
        label = self._label("uniform", name)
        generators = [keyed_generator(self.method.seed, *label, key) for key in self.keys]
        draws = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        return draws.to(self.cond.device, self.dtype)

    def times(
        self,
        law: TimeLaw | None = None,
        low: float | None = None,
        high: float | None = None,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> Tensor:
        o = self.objective
        law = o.time_law if law is None else law
        low = o.low if low is None else low
        high = o.high if high is None else high
        window_high = self.method.rollout.window_high
        if window_high is not None and self._decision.first_chunk > 0:
            high = min(high, window_high)
        return self._keyed_times((), law, o.shift, low, high, mean, std)

    def times_of(
        self, law: TimeLaw, shift: float, low: float, high: float, name: tuple[str, ...] = ()
    ) -> Tensor:
        return self._keyed_times(name, law, shift, low, high)

    def _keyed_times(self, name: tuple[str, ...], law: TimeLaw, *of_law: float) -> Tensor:
        label = self._label("score_t", name)
        generators = [keyed_generator(self.method.seed, *label, key) for key in self.keys]
        shift, *rest = of_law
        draws = [sample_times(1, law, shift, generator, *rest) for generator in generators]
        return torch.cat(draws).to(self.cond.device, self.dtype)

    def choose(self, count: int, name: str = "choice") -> int:
        return int(torch.randint(count, (), generator=self.generator(name)))

    def chance(self, name: str = "chance") -> float:
        return float(torch.rand((), generator=self.generator(name), dtype=torch.float64))

    def generator(self, name: str) -> torch.Generator:
        """What all samples and processes share in this turn, by name; it goes on where it was."""
        if name not in self.shared:
            key = (self.method.seed, name, self.step, self.turn, self.micro)
            self.shared[name] = keyed_generator(*key)
        return self.shared[name]

    def full(self, value: float) -> Tensor:
        return torch.full((self.batch_size,), value, device=self.cond.device, dtype=self.dtype)

    def _label(self, kind: str, name: tuple[str, ...]) -> tuple[str | int, ...]:
        """The name of a draw; without one, which of its kind it is in this turn."""
        if name:
            return name
        self.counts[(kind,)] += 1
        number = self.counts[(kind,)] - 1
        return (kind,) if number == 0 else (kind, number)

    # ---- what is shared by all processes

    def decide(self, number: int = 0) -> Decision:
        """The shared choices of the turn's rollout of that number, from (seed, step, turn)."""
        rollout_config, method = self.method.rollout, self.method
        key = (method.seed, "decision", self.step, self.turn, self.micro)
        generator = keyed_generator(*key, *([number] if number else []))
        any_step, any_place = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        chunks = rollout_config.rollout_chunks or rollout_config.num_chunks
        places = chunks - rollout_config.num_chunks + 1
        exit_place = any_step if rollout_config.exit == "random" else LAST
        at_random = rollout_config.window == "random"
        return Decision(
            exit_index=int(exit_place * method.num_steps),
            exit_place=exit_place,
            first_chunk=int(any_place * places) if at_random else places - 1,
            ends_at_exit=rollout_config.context == "exit" or self.stream.stepper == "jump",
        )

    def choices(self) -> Hashable:
        decision = self.decide()
        # chunks then end at other places of their own lists
        uneven = self.stream.step_table or self.stream.first_steps
        place = int(12 * decision.exit_place) if uneven else None  # of lists of 1, 2, 3 and 4 steps
        return decision.exit_index, place, decision.first_chunk

    def step_time(self, index: int) -> float:
        """Of the list that chunks after the first ones have."""
        times = [
            event.t[event.chunks.index(LATER_CHUNK)]
            for event in build_schedule(self.stream, LATER_CHUNK + 1)
            if LATER_CHUNK in event.chunks
        ]
        return (*times, 0.0)[min(index, len(times))]

    @property
    def most_steps(self) -> int:
        return self.stream.num_steps

    def exit_place(self) -> float:
        return self.decide().exit_place

    def has_longer_first(self, num_steps: int) -> bool:
        is_free = self.method.rollout.exit == "random"
        return is_free and self.stream.first_steps is not None and num_steps < self.most_steps

    @property
    def _decision(self) -> Decision:
        return self.rolled[-1][0] if self.rolled else self.decide()

    # ---- samples

    def sample(
        self, exit_index: int | None = None, exit: Exit | None = None, role: str | None = None
    ) -> Sample:
        number = len(self.rolled)
        drawn = replace(self.decide(number), first_chunk=self.decide().first_chunk)
        decision = self._exit_at(drawn, exit_index, exit)
        if role is None:
            role = "student" if number == 0 else f"student {number}"
        stream = self.stream
        if decision.num_steps is not None and not (exit and exit.from_full_list):
            stream = replace(stream, num_steps=decision.num_steps)
        x, t = self._roll_out(stream, decision, role)
        self.rolled.append((decision, x))
        return Sample(x, None, self.full(t), decision.exit_index)

    def _exit_at(self, decision: Decision, exit_index: int | None, exit: Exit | None) -> Decision:
        if exit_index is not None:
            place = (exit_index + 0.5) / self.num_steps
            return replace(decision, exit_index=exit_index, exit_place=place)
        if exit is None:
            return decision
        place = decision.exit_place if exit.place is None else exit.place
        of = self.num_steps if exit.from_full_list else exit.num_steps or self.num_steps
        return replace(
            decision,
            exit_place=place,
            exit_index=int(place * of),
            num_steps=exit.num_steps,
            first_place=exit.first_place,
            ends_at_exit=decision.ends_at_exit or exit.from_full_list,
        )

    def _roll_out(
        self, stream: StreamConfig, decision: Decision, role: str
    ) -> tuple[Tensor, float]:
        """The judged part ``[B, C, T, h, w]`` of a rollout, with the caller's grad mode, and the
        time of the state that its exit was made from; each ``role`` has its own noise.
        """
        method = self.method
        num_chunks = method.rollout.num_chunks
        self._check_length(num_chunks)
        first, end = decision.first_chunk, decision.first_chunk + num_chunks
        steps = steps_per_chunk(stream, end)
        seeds = [key_to_seed(method.seed, role, key) for key in self.keys]
        schedule = _tapped_from(first, _with_exits(stream, decision, end, steps))
        results = list(self._stream(method.student, stream, schedule, seeds))
        x = torch.cat([result.prediction for result in results[first:]], dim=2)
        t = results[-1].t
        if first == 0:
            return x, t
        so_far = torch.cat(
            [*(result.latents for result in results[:first]), results[first].latents[:, :, :1]],
            dim=2,
        )
        return torch.cat([method.as_image(so_far), x[:, :, 1:]], dim=2), t

    def _stream(
        self,
        network: nn.Module,
        stream: StreamConfig,
        schedule: Iterator[Denoise],
        seeds: list[int],
        cond: Tensor | None = None,
        latent_shape: tuple[int, int, int] | None = None,
        **hooks: Any,
    ) -> Iterator[ChunkResult]:
        """``rollout`` of a schedule as ``stream`` says, over a new cache."""
        shape = self.method.latent_shape if latent_shape is None else latent_shape
        return rollout(
            network,
            self.cond if cond is None else cond,
            schedule,
            KeyedNoise(seeds),
            latent_shape=shape,
            chunk_frames=stream.chunk_frames,
            cache=new_cache(network, stream, len(seeds), shape),
            commit=stream.commit,
            context_t=stream.context_t,
            stepper=stream.stepper,
            **hooks,
        )

    def jump_through(self) -> Tensor:
        return self.sample(exit=Exit(place=LAST)).x

    def data(self) -> Tensor:
        if "states" in self.batch:
            return self.pairs()[1]
        if "latents" not in self.batch:
            raise ValueError(
                f"objective={self.objective.name} needs clips; set data.kind to world, clips or"
                " latents"
            )
        if bool(self.batch["offset"].any()):
            raise ValueError(
                "clips are cut from the middle, the student's begin; set data.window_stride=null"
            )
        self.clean = self.batch["latents"].to(self.cond.device, self.dtype)
        self._check_chunks(self.clean)
        return self.clean

    def pairs(self) -> tuple[Tensor, Tensor]:
        if "states" not in self.batch:
            raise ValueError(
                f"objective={self.objective.name} needs pairs of noise and the teacher's clip; make"
                " them with tools/make_trajectories.py and set data.kind=trajectories"
            )
        states, times = self.batch["states"], self.batch["times"][0].tolist()
        start, end = time_indices(times, [1.0, 0.0])
        self.clean = states[:, end].to(self.cond.device, self.dtype)
        self._check_chunks(self.clean)
        return states[:, start].to(self.clean), self.clean

    def reward(self, x: Tensor) -> Tensor:
        raise ValueError(f"objective={self.objective.name} needs a reward, which clips do not have")

    def policy_samples(
        self, name: str, group_size: int = 1, at_random_exit: bool = False
    ) -> Tensor:
        latents = self.data()
        num_chunks = latents.shape[2] // self.stream.chunk_frames
        schedule = build_schedule(self.stream, num_chunks)
        if at_random_exit:
            longest = max(steps_per_chunk(self.stream, num_chunks).values())
            schedule = move_tap(schedule, self.choose(longest, "decision"))
        cond = self.cond.repeat_interleave(group_size, dim=0) if group_size > 1 else self.cond
        seeds = self.seeds("rollout", group_size)
        shape = (latents.shape[1], *latents.shape[3:])
        results = self._stream(self._network(name), self.stream, schedule, seeds, cond, shape)
        return torch.cat([result.prediction for result in results], dim=2)

    def seeds(self, what: str, group_size: int = 1) -> list[int]:
        """A seed for each member of each prompt's group."""
        return [
            key_to_seed(self.method.seed, what, key, member)
            for key in self.keys
            for member in range(group_size)
        ]

    def network(self, name: str) -> nn.Module:
        return self.method.trained[name]

    def chunk_weights(self, weight: Tensor, x: Tensor, per_token: bool) -> Tensor:
        frames = self.stream.chunk_frames
        if not per_token:
            return weight.T.expand(x.shape[2] // frames, -1).flatten()
        patch = tuple(self.method.student.config.patch_size)
        return patch_weights(weight, tuple(x.shape[2:]), patch, frames)

    def new_noising(
        self,
        number: int,
        group_size: int,
        law: Literal["steps"] | TimeLaw,
        shift: float,
        is_shared: bool,
    ) -> Noising:
        num_chunks = self.shape[1] // self.stream.chunk_frames
        shared = self.generator("decision")
        if law == "steps":
            lists = _times_per_chunk(self.stream, num_chunks)
            times = [float(choose_times(each, 1, shared)) for each in lists]
        else:
            times = sample_times(num_chunks, law, shift, shared, low=LEAST_TIME).tolist()
        name = f"noising{number}"
        if is_shared:
            seeds = [seed for seed in self.seeds(name) for _ in range(group_size)]
        else:
            seeds = self.seeds(name, group_size)
        return Noising(times, seeds, self.cond.repeat_interleave(group_size, dim=0))

    def noise_chunks(self, name: str, x: Tensor, noising: Noising, rows: slice) -> NoisedChunks:
        """A rollout of one step per chunk: a chunk begins as noise, to which the clip's chunk is
        added, and ends as that chunk, whatever the network says; so window, sink and context noise
        are those of the stream. Networks asked with the same noising see the same states.
        """
        clips = x[rows]
        chunks = clips.split(self.stream.chunk_frames, dim=2)
        x_t: list[Tensor] = []
        v_target: list[Tensor] = []
        v: list[Tensor] = []

        def begin(k: int, t: float, eps: Tensor) -> Tensor:
            x_t.append(add_noise(chunks[k], eps, t))
            v_target.append(velocity(chunks[k], eps))
            return x_t[k]

        def end(k: int, t: float, x0: Tensor) -> Tensor:
            v.append(v_from_x0(x_t[k], x0, t))
            return chunks[k]

        schedule = table([(t,) for t in noising.times], len(noising.times))
        results = self._stream(
            self._network(name),
            self.stream,
            schedule,
            noising.seeds[rows],
            noising.cond[rows],
            (clips.shape[1], *clips.shape[3:]),
            before_step=begin,
            after_x0=end,
        )
        for _ in results:
            pass
        t = torch.tensor(noising.times, device=x.device).repeat_interleave(len(clips))
        return NoisedChunks(torch.cat(x_t), t, torch.cat(v_target), torch.cat(v))

    def _network(self, name: str) -> nn.Module:
        return self.method.student if name == "student" else self.method.placed(name)

    def mean_velocity(self, name: str, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        network = self._network(name)
        options: dict[str, Any] = {"chunk_frames": self.stream.chunk_frames}
        if x.shape[2] > self.stream.chunk_frames:
            options["clean_context"] = self.clean_clip().to(x)
        if getattr(network, "takes_target", False):
            options["target_timestep"] = TIMESTEPS * s
        return network(x, TIMESTEPS * t, self.cond.to(x), **options, return_dict=False)[0]

    def velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        chunk_frames: int | None = None,
        clean_context: Tensor | None = None,
    ) -> Tensor:
        options: dict[str, Any] = {}
        if chunk_frames is not None:
            options["chunk_frames"] = chunk_frames
        if clean_context is not None:
            options["clean_context"] = clean_context
        cond = self.cond if cond is None else cond
        network = self.method.student
        return network(x_t, TIMESTEPS * t, cond, **options, return_dict=False)[0]

    def clean_clip(self) -> Tensor:
        """What the chunks of a whole clip see of those before them: the clip that was drawn last,
        or one of the student's own.
        """
        if self.clean is None and {"latents", "states"} & set(self.batch):
            self.data()
        if self.clean is None:
            with torch.no_grad():
                decision = replace(self.decide(), exit_place=LAST, first_chunk=0)
                self.clean = self._roll_out(self.stream, decision, "context")[0]
        return self.clean

    def teacher_velocity(self, x_t: Tensor, t: Tensor, prompted: bool = True) -> Tensor:
        cond = self.cond.to(x_t) if prompted else self._uncond(x_t)
        return self.method.teacher.predict(x_t, t, cond).to(x_t.device)

    def fake_velocity(self, x_t: Tensor, t: Tensor, prompted: bool = True) -> Tensor:
        network = self.method.trained["fake_score"]
        cond = self.cond.to(x_t) if prompted else self._uncond(x_t)
        with labelled(network, self._step_label()):
            return score_velocity(network, x_t, t, cond)

    def _step_label(self) -> int | None:
        """A number for each step of each number of steps; None where the fake score is not told."""
        if not self.method.rollout.fake_knows_steps:
            return None
        decision = self._decision
        n = decision.num_steps or self.num_steps
        return n * (n - 1) // 2 + decision.exit_index

    def _uncond(self, like: Tensor) -> Tensor:
        return self.method.uncond.to(like).expand(len(like), -1, -1)

    def logits(self, x_t: Tensor, t: Tensor, num_parts: int = 1) -> Tensor:
        heads = self.method.trained["discriminator"]
        cond = self.cond.to(x_t)
        if isinstance(heads, VideoDiscriminator) or not isinstance(heads, TrunkHeads):
            copies = len(x_t) // len(cond)
            return heads(x_t, cond.repeat_interleave(copies, dim=0) if copies > 1 else cond)
        trunk = self.method.trunk
        with labelled(trunk, None):
            call = lambda: score_velocity(trunk, x_t, t, cond)
            return heads(trunk, call, num_parts).flatten(1)

    def features(self, x_t: Tensor, t: Tensor) -> Tensor:
        trunk = self.method.teacher.transformer
        layer = f"blocks.{len(trunk.blocks) // 2}"
        with capture(trunk, [layer]) as found:
            score_velocity(trunk, x_t, t, self.cond.to(x_t))
        return found[0].flatten(1, -2).mean(1)

    # ---- frames

    def counted_frames(self, x: Tensor) -> Tensor | None:
        if self._decision.first_chunk == 0:
            return None
        counts = torch.ones(len(x), x.shape[2], device=x.device)
        counts[:, : self.stream.chunk_frames] = 0
        return counts

    # ---- what an update leaves behind

    def refresh_heads(self, share: float) -> None:
        joined = self.method.trained["discriminator"].heads
        for number, head in enumerate(joined.heads):
            if self.chance("refresh") >= share:
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(key_to_seed(self.method.seed, "head", self.step, number))
                fresh = QueryHead(*head.sizes)
            head.load_state_dict(fresh.state_dict())

    def pull_fake_score(self, keep: float) -> None:
        own = dict(self.method.student.named_parameters())
        with torch.no_grad():
            for name, parameter in self.method.trained["fake_score"].named_parameters():
                if name in own:
                    parameter.lerp_(own[name].to(parameter), 1 - keep)

    # ---- the end of a turn

    def finish(self, loss: Tensor) -> dict[str, float]:
        """The numbers of the turn, worth logging."""
        numbers = {"loss": loss.detach(), **self.numbers}
        if self.turn != "student" or not self.rolled:
            return as_floats(numbers)
        decision, x = self.rolled[0]
        numbers.update(latent_statistics(x.detach()))
        return {**as_floats(numbers), "exit_index": float(decision.exit_index)}

    def _check_length(self, num_chunks: int) -> None:
        frames, f = self.shape[1], self.stream.chunk_frames
        if frames != num_chunks * f:
            raise ValueError(
                f"clips have {frames} latent frames, rollouts {num_chunks} x {f}; set"
                f" rollout.num_chunks={max(1, frames // f)} or data.latent_frames={num_chunks * f}"
            )

    def _check_chunks(self, latents: Tensor) -> None:
        frames, f = latents.shape[2], self.stream.chunk_frames
        if frames % f:
            raise ValueError(
                f"chunk_frames={f} does not divide the {frames} latent frames of the clips; set"
                " data.latent_frames"
            )


def steps_per_chunk(stream: StreamConfig, num_chunks: int) -> Counter[int]:
    """How many steps each of the first chunks of a stream takes."""
    return Counter(chunk for event in build_schedule(stream, num_chunks) for chunk in event.chunks)


def patch_weights(
    r: Tensor, sizes: tuple[int, int, int], patch: tuple[int, int, int], chunk_frames: int
) -> Tensor:
    """r of each token ``[B, J]`` for its patch, ``[K B, 1, f, h, w]``.

    Args:
        sizes: (T, h, w) of the clips.
        patch: frames, height and width of a token's patch.
        chunk_frames: f.
    """
    of_patches = r.unflatten(1, [size // p for size, p in zip(sizes, patch)])
    p, q, s = patch
    places = repeat(of_patches, "n t h w -> n 1 (t p) (h q) (w s)", p=p, q=q, s=s)
    return torch.cat(places.split(chunk_frames, dim=2))


def _times_per_chunk(stream: StreamConfig, num_chunks: int) -> list[list[float]]:
    """The times at which a stream denoises each of its first chunks."""
    times: list[list[float]] = [[] for _ in range(num_chunks)]
    for event in build_schedule(stream, num_chunks):
        for chunk, t in zip(event.chunks, event.t):
            times[chunk].append(t)
    return times


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


def _with_exits(
    stream: StreamConfig, decision: Decision, num_chunks: int, steps: Counter[int]
) -> Iterator[Denoise]:
    """The schedule of a rollout, tapped at its exits."""
    schedule = build_schedule(stream, num_chunks)

    def exit_of(chunk: int) -> int:
        return decision.exit_step(chunk, steps[chunk])

    if decision.ends_at_exit:
        return truncate(schedule, exit_of)
    last = num_chunks - 1  # is nobody's context, so that its exit ends it
    return truncate(
        move_tap(schedule, exit_of),
        lambda chunk: exit_of(chunk) if chunk == last else steps[chunk],
    )


def _tapped_from(first_chunk: int, schedule: Iterator[Denoise]) -> Iterator[Denoise]:
    """The same schedule, without gradient before ``first_chunk``."""
    for event in schedule:
        yield replace(
            event, tap=tuple(t and i >= first_chunk for i, t in zip(event.chunks, event.tap))
        )


def _grouped(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """The batch with each sample ``size`` times, each with a key of its own."""
    if size == 1:
        return batch
    repeated: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            repeated[name] = value.repeat_interleave(size, dim=0)
        elif name == "keys":
            repeated[name] = [key_to_seed(key, member) for key in value for member in range(size)]
        elif isinstance(value, list):
            repeated[name] = [each for each in value for _ in range(size)]
        else:
            repeated[name] = value
    return repeated


def _is_unguided(objective: Objective) -> bool:
    return objective.guidance == type(objective.guidance)()
