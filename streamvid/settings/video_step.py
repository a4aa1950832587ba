"""One turn of an objective over clips: its draws, its samples and what its networks predict.

Samples are rollouts, see ``settings.rollouts``. A flow map ``u(x_t, t, s)`` of a whole clip is one
block-causal pass in which each noisy chunk sees the clean chunks before it: those of the clip that
the step drew last, as a stream sees its own.

Images are clips of one latent frame.

Shapes: B batch, C channels, T latent frames of a clip, h w latent size, L D of a prompt embedding,
K logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from streamvid.core.adversary import QueryHead, capture
from streamvid.core.fitting import couple
from streamvid.core.process import add_noise, v_from_x0, velocity
from streamvid.core.times import TimeLaw, choose_times, sample_times
from streamvid.data.trajectories import time_indices
from streamvid.models.discriminators import TrunkHeads
from streamvid.models.step_labels import labelled
from streamvid.objectives.base import LAST, Distillation, Exit, NoisedChunks, Sample, Step
from streamvid.rollout.loop import ChunkResult, rollout
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.sampler import new_cache
from streamvid.rollout.schedule import (
    Denoise,
    StreamConfig,
    build_schedule,
    chunk_times,
    move_tap,
    table,
)
from streamvid.seeding import key_to_seed, keyed_generator, keyed_normal
from streamvid.settings.rollouts import (
    Decision,
    frame_shape,
    latent_statistics,
    patch_weights,
    tapped_from,
    with_exits,
)
from streamvid.teachers.base import TIMESTEPS, score_velocity
from streamvid.training.method import as_floats

if TYPE_CHECKING:  # a setting makes steps
    from streamvid.settings.video import VideoSetting

LATER_CHUNK = 7  # one that has the last list of any step table
LEAST_TIME = 0.02  # of a time law for finished clips; a student's own steps are as they are


@dataclass(frozen=True)
class Noising:
    """How finished clips are noised: a time per chunk, a seed and a prompt per clip."""

    times: list[float]
    seeds: list[int]
    cond: Tensor  # [B, L, D]


class VideoStep(Step):
    """One turn over clips.

    Draws are keyed by (seed, name, sample's key), so that they depend on neither batch nor
    processes; what all samples share is keyed by (seed, name, step, turn).
    """

    tangent = "fd"  # attention's fast kernels have no forward mode

    def __init__(self, setting: VideoSetting, turn: str, batch: dict[str, Any] | None, step: int):
        super().__init__()
        self.setting = setting
        self.objective = setting.objective
        self.turn = turn
        self.step = step
        self.progress = setting.progress
        self.stream = setting.stream
        self.num_steps = setting.num_steps
        self.seed = setting.seed
        self.uncond = setting.uncond
        self.micro = 0 if batch is None else batch.get("micro", 0)
        self.counts: Counter[str] = Counter()  # draws without a name, by kind
        self.shared: dict[str, torch.Generator] = {}
        self.rolled: list[tuple[Decision, Tensor]] = []  # what was sampled, in order
        self.clean: Tensor | None = None
        self.batch = {} if batch is None else _grouped(batch, setting.rollout.group_size)
        if batch is not None:
            self.cond: Tensor = self.batch["cond"]
            self.keys: list[int] = self.batch["keys"]
            self.group = torch.arange(self.batch_size, device=self.cond.device)
            self.group = self.group // setting.rollout.group_size

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
        channels, height, width = self.setting.latent_shape
        frames = self.setting.rollout.num_chunks * self.stream.chunk_frames
        return channels, frames, height, width

    def noise(self, *name: str) -> Tensor:
        label = self._label("score_eps", name)
        draws = [keyed_normal(self.shape, self.setting.seed, *label, key) for key in self.keys]
        return torch.stack(draws).to(self.cond.device, self.dtype)

    def uniform(self, *name: str) -> Tensor:
        label = self._label("uniform", name)
        generators = [keyed_generator(self.setting.seed, *label, key) for key in self.keys]
        draws = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        return draws.to(self.cond.device, self.dtype)

    def times(
        self, law: TimeLaw | None = None, low: float | None = None, high: float | None = None
    ) -> Tensor:
        window_high = self.setting.rollout.window_high
        if window_high is not None and self._decision.first_chunk > 0:
            assert isinstance(self.objective, Distillation), "others say their law in times_of"
            high = min(self.objective.high if high is None else high, window_high)
        return super().times(law, low, high)

    def times_of(
        self, law: TimeLaw, shift: float, low: float, high: float, name: tuple[str, ...] = ()
    ) -> Tensor:
        label = self._label("score_t", name)
        generators = [keyed_generator(self.setting.seed, *label, key) for key in self.keys]
        draws = [sample_times(1, law, shift, generator, low, high) for generator in generators]
        return torch.cat(draws).to(self.cond.device, self.dtype)

    def choose(self, count: int, name: str = "choice") -> int:
        return int(torch.randint(count, (), generator=self.generator(name)))

    def chance(self, name: str = "chance") -> float:
        return float(torch.rand((), generator=self.generator(name), dtype=torch.float64))

    def generator(self, name: str) -> torch.Generator:
        """What all samples and processes share in this turn, by name; it goes on where it was."""
        if name not in self.shared:
            key = (self.setting.seed, name, self.step, self.turn, self.micro)
            self.shared[name] = keyed_generator(*key)
        return self.shared[name]

    def full(self, value: float) -> Tensor:
        return torch.full((self.batch_size,), value, device=self.cond.device, dtype=self.dtype)

    def _label(self, kind: str, name: tuple[str, ...]) -> tuple[str | int, ...]:
        """The name of a draw; without one, which of its kind it is in this turn."""
        if name:
            return name
        number = self.counts[kind]
        self.counts[kind] += 1
        return (kind,) if number == 0 else (kind, number)

    # ---- what is shared by all processes

    def decide(self, number: int = 0) -> Decision:
        """The shared choices of the turn's rollout of that number, from (seed, step, turn)."""
        setting = self.setting
        rollout_config = setting.rollout
        key = (setting.seed, "decision", self.step, self.turn, self.micro)
        generator = keyed_generator(*key, *([number] if number else []))
        any_step, any_place = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        chunks = rollout_config.rollout_chunks or rollout_config.num_chunks
        places = chunks - rollout_config.num_chunks + 1
        exit_place = any_step if rollout_config.exit == "random" else LAST
        at_random = rollout_config.window == "random"
        return Decision(
            exit_index=int(exit_place * setting.num_steps),
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
        times = chunk_times(self.stream, LATER_CHUNK + 1)[LATER_CHUNK]
        return (*times, 0.0)[min(index, len(times))]

    @property
    def most_steps(self) -> int:
        return self.stream.num_steps

    def exit_place(self) -> float:
        return self.decide().exit_place

    def has_longer_first(self, num_steps: int) -> bool:
        is_free = self.setting.rollout.exit == "random"
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
        setting = self.setting
        num_chunks = setting.rollout.num_chunks
        self._check_length(num_chunks)
        first, end = decision.first_chunk, decision.first_chunk + num_chunks
        seeds = [key_to_seed(setting.seed, role, key) for key in self.keys]
        schedule = tapped_from(first, with_exits(stream, decision, end))
        results = list(self._stream(setting.student, stream, schedule, seeds))
        x = torch.cat([result.prediction for result in results[first:]], dim=2)
        t = results[-1].t
        if first == 0:
            return x, t
        so_far = torch.cat(
            [*(result.latents for result in results[:first]), results[first].latents[:, :, :1]],
            dim=2,
        )
        assert setting.as_image is not None, "the setting checks it"
        return torch.cat([setting.as_image(so_far), x[:, :, 1:]], dim=2), t

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
        shape = self.setting.latent_shape if latent_shape is None else latent_shape
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
            longest = max(map(len, chunk_times(self.stream, num_chunks)))
            schedule = move_tap(schedule, self.choose(longest, "decision"))
        cond = self.cond.repeat_interleave(group_size, dim=0) if group_size > 1 else self.cond
        seeds = self.seeds("rollout", group_size)
        results = self._stream(
            self._network(name), self.stream, schedule, seeds, cond, frame_shape(latents)
        )
        return torch.cat([result.prediction for result in results], dim=2)

    def seeds(self, what: str, group_size: int = 1) -> list[int]:
        """A seed for each member of each prompt's group."""
        return [
            key_to_seed(self.setting.seed, what, key, member)
            for key in self.keys
            for member in range(group_size)
        ]

    def network(self, name: str) -> nn.Module:
        return self.setting.trained[name]

    def chunk_weights(self, weight: Tensor, x: Tensor, per_token: bool) -> Tensor:
        frames = self.stream.chunk_frames
        if not per_token:
            return weight.T.expand(x.shape[2] // frames, -1).flatten()
        student: Any = self.setting.student  # a diffusers model, which has a config
        _, _, length, height, width = x.shape
        patch = tuple(student.config.patch_size)
        return patch_weights(weight, (length, height, width), patch, frames)

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
            lists = chunk_times(self.stream, num_chunks)
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
            frame_shape(clips),
            before_step=begin,
            after_x0=end,
        )
        for _ in results:
            pass
        t = torch.tensor(noising.times, device=x.device).repeat_interleave(len(clips))
        return NoisedChunks(torch.cat(x_t), t, torch.cat(v_target), torch.cat(v))

    def _network(self, name: str) -> nn.Module:
        return self.setting.student if name == "student" else self.setting.placed(name)

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
        network = self.setting.student
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
        teacher = self.setting.teacher
        assert teacher is not None, "the setting checks it"
        cond = self.cond.to(x_t) if prompted else self._uncond(x_t)
        return teacher.predict(x_t, t, cond).to(x_t.device)

    def fake_velocity(self, x_t: Tensor, t: Tensor, prompted: bool = True) -> Tensor:
        network = self.setting.trained["fake_score"]
        cond = self.cond.to(x_t) if prompted else self._uncond(x_t)
        with labelled(network, self._step_label()):
            return score_velocity(network, x_t, t, cond)

    def _step_label(self) -> int | None:
        """A number for each step of each number of steps; None where the fake score is not told."""
        if not self.setting.rollout.fake_knows_steps:
            return None
        decision = self._decision
        n = decision.num_steps or self.num_steps
        return n * (n - 1) // 2 + decision.exit_index

    def _uncond(self, like: Tensor) -> Tensor:
        uncond = self.setting.uncond
        assert uncond is not None, "the setting checks it"
        return uncond.to(like).expand(len(like), -1, -1)

    def logits(self, x_t: Tensor, t: Tensor, num_parts: int = 1) -> Tensor:
        heads = self.setting.trained["discriminator"]
        cond = self.cond.to(x_t)
        if not isinstance(heads, TrunkHeads):  # reads clips by itself
            copies = len(x_t) // len(cond)
            return heads(x_t, cond.repeat_interleave(copies, dim=0) if copies > 1 else cond)
        trunk = self.setting.trunk
        call = lambda: score_velocity(trunk, x_t, t, cond)
        return heads(trunk, call, num_parts).flatten(1)

    def features(self, x_t: Tensor, t: Tensor) -> Tensor:
        trunk: Any = self.setting.teacher_network
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
        discriminator = self.setting.trained["discriminator"]
        assert isinstance(discriminator, TrunkHeads), "others have no heads by layers"
        for number, head in enumerate(discriminator.heads.heads):
            if self.chance("refresh") >= share:
                continue
            assert isinstance(head, QueryHead)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(key_to_seed(self.setting.seed, "head", self.step, number))
                fresh = QueryHead(*head.sizes)
            head.load_state_dict(fresh.state_dict())

    def pull_fake_score(self, keep: float) -> None:
        own = dict(self.setting.student.named_parameters())
        followers = dict(self.setting.trained["fake_score"].named_parameters())
        shared = followers.keys() & own.keys()  # a student that is told its target has more
        couple([followers[name] for name in shared], [own[name] for name in shared], keep)

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
