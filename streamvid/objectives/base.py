"""What an objective is made of, and what its losses may use.

An *objective* is one published way to train a student, written once. It is a dataclass: its fields
are its options, its methods are its losses, one for each network that it trains: ``student``, and
where it has them ``fake_score`` (follows the student's samples), ``discriminator`` and others. A
loss is a function of a ``Step``, which gives draws, samples, data and the networks' predictions.
A *setting* makes steps: ``settings/plane.py`` over points, ``settings/video.py`` over images and
clips that a causal student rolls out. Nothing here knows how large a sample is.

    class SiD(ScoreMatching):
        alpha: float = 1.2

        def student(self, step: Step) -> Tensor:
            return sid_term(step, step.sample().x, self.alpha)

In a turn only its own network's parameters require gradients; gradients through the *inputs* of the
others reach the student where a loss asks for them.

Shapes: B samples of a step, ``...`` one sample: ``C 1 1`` points, ``C T h w`` clips.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from streamvid.core.fitting import flow_matching_loss
from streamvid.core.guidance import GuidanceSpec, guide
from streamvid.core.process import add_noise, euler_step, x0_from_v
from streamvid.core.times import TimeLaw

NETWORKS = ("fake_score", "motion", "discriminator", "student")
"""What objectives train, in the order of their turns."""

LAST = math.nextafter(1.0, 0.0)
"""The exit's place that is always a chunk's last step."""
Loss = Tensor | Sequence[Callable[[], Tensor]]
"""A scalar, or parts that add up to it, each differentiated before the next is made."""


def parts_of(loss: Loss) -> Sequence[Callable[[], Tensor]]:
    """The calls that make a loss's parts; one where it came as a scalar."""
    return [lambda: loss] if isinstance(loss, Tensor) else loss


@dataclass
class Objective:
    """One objective; a subclass has a loss ``name(step) -> Loss`` for each network that it trains.

    Facts are class attributes, options are fields.
    """

    name: ClassVar[str] = ""
    """Its key: ``objective: name`` in a run file."""
    paper: ClassVar[str] = ""
    """Its arXiv id."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What it asks of its setting: "score" and "features" of the teacher; "clips", real samples;
    "pairs", stored (noise, teacher's sample); "jumps", a student that is told where to land;
    "average", "lagged" and "start", copies of the student; "group", several samples per prompt;
    "reward", a judge of samples; "second", another fake score."""
    num_steps: ClassVar[int] = 1
    """Steps that it is published for. The plane samples with them; a stream has its own."""
    sampler: ClassVar[Literal["renoise", "jump", "euler"]] = "renoise"
    """How its student goes from step to step: fresh noise on the data prediction, the flow map's
    own jump, or an Euler step of its velocity."""
    average_decay: ClassVar[float] = 0.95
    """Of the moving average of the student, where a loss uses it as a target."""
    lagged_decay: ClassVar[float] = 0.99
    """Of the slower copy, an old policy."""
    heads: ClassVar[Literal["token", "film", "query"]] = "token"
    """Kind of the discriminator heads on points, see ``core.adversary.FeatureHeads``; clips have
    registers ("query")."""
    rate: ClassVar[float] = 1.0
    """Of the student's learning rate in the plane, against that of the other networks."""
    role: ClassVar[Literal["complete", "add-on", "baseline", "start"]] = "complete"
    """A start makes the network that others distil; an add-on is shown with a host; a baseline is
    known to fall short and is there to show it."""
    covers: ClassVar[bool] = False
    """Whether it claims to cover modes that distribution matching alone drops."""
    on_points: ClassVar[bool] = True
    """Whether it makes sense on single points; motion does not."""

    trunk: ClassVar[Literal["teacher", "fake_score"]] = "teacher"
    """Whose features the discriminator of clips reads."""

    @property
    def guidance(self) -> GuidanceSpec:
        """Of teacher and fake score."""
        return GuidanceSpec()

    @property
    def note(self) -> str:
        """What a reader of a table should know."""
        return ""

    @classmethod
    def networks(cls) -> tuple[str, ...]:
        """The networks that it can train, in the order of their turns."""
        return tuple(name for name in NETWORKS if hasattr(cls, name))

    def turns(self, step: int) -> tuple[str, ...]:
        """Which networks a training step updates, in order; a function of its number only."""
        return self.networks()

    def choices(self, step: Step) -> Hashable:
        """What of a turn's random choices its cost depends on."""
        return step.choices()

    def after_student(self, step: Step) -> None:
        """Called after each update of the student."""

    @property
    def is_causal(self) -> bool:
        """Whether it trains a student that sees chunk after chunk."""
        return True

    def follows(self, name: str, step: int) -> bool:
        """Whether the copy "average" or "lagged" moves towards the student after this step."""
        return True

    def num_logits_for(self, num_steps: int) -> int:
        """Logits of each discriminator head for a student of so many steps."""
        return 1

    @property
    def feature_layers(self) -> Sequence[int] | None:
        """Blocks that the discriminator of clips reads; None is a third, a half and the last."""
        return None

    def new_networks(
        self,
        networks: Mapping[str, nn.Module],
        latent_shape: tuple[int, int, int],
        stream: Any,
        seed: int,
    ) -> dict[str, nn.Module]:
        """Networks for clips that only this objective has.

        Args:
            networks: "student", and "fake_score" and a given "discriminator" where there are such.
            latent_shape: (C, h, w).
            stream: a ``rollout.schedule.StreamConfig``, how the student is streamed.
            seed: of their first weights.
        """
        return {}

    def check_stream(self, stream: Any, num_chunks: int) -> None:
        """A ValueError if a student that is streamed so can't be trained by this objective.

        Args:
            stream: a ``rollout.schedule.StreamConfig``.
            num_chunks: of the clips.
        """

    def student(self, step: Step) -> Loss:
        """The student's loss."""
        raise NotImplementedError


@dataclass
class Distillation(Objective):
    """Objectives that learn from a teacher's velocity or samples."""

    guidance_scale: float = 4.0
    """Of the teacher, ``uncond + s (cond - uncond)``; 1 is none, 3 to 6 are usual."""
    time_law: TimeLaw = "uniform"
    """Law of the nominal time at which networks are compared and fitted."""
    shift: float = 5.0
    """Shift of that law; 1 is none."""
    low: float = 0.02
    """Least time, after the shift; in [0, 1)."""
    high: float = 0.98
    """Greatest time, after the shift; in (0, 1]."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low={self.low}, high={self.high}, expected 0 <= low < high <= 1")
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift}, expected a positive number; 1 is no shift")

    @property
    def guidance(self) -> GuidanceSpec:
        """A guided teacher, a plain fake score (DMD, arXiv 2405.14867)."""
        return GuidanceSpec(real=self.guidance_scale)


@dataclass
class ScoreMatching(Distillation):
    """Objectives with a fake score, the trainable score of the student's distribution."""

    needs: ClassVar[frozenset[str]] = frozenset({"score"})

    fake_updates_per_student: int = 2
    """Updates of the fake score for each of the student; 1 to 10."""
    student_start_step: int = 0
    """Steps that warm up the fake score alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fake_updates_per_student < 1:
            raise ValueError(
                f"fake_updates_per_student={self.fake_updates_per_student}, expected at least 1"
            )

    def turns(self, step: int) -> tuple[str, ...]:
        """The fake score in every step; after it, in the last of each cycle, the others too."""
        is_last = (step + 1) % self.fake_updates_per_student == 0
        rest = [name for name in self.networks() if name != "fake_score"]
        return ("fake_score", *rest) if is_last and self.has_begun(step) else ("fake_score",)

    def has_begun(self, step: int) -> bool:
        """Whether the student is trained already."""
        return step >= self.student_start_step

    def fake_score(self, step: Step) -> Loss:
        """Flow matching to the student's samples."""
        return fit_fake_score(step)


@dataclass(frozen=True)
class Sample:
    """A student's sample and where the prediction that carries its gradient was made."""

    x: Tensor  # [B, ...]
    x_t: Tensor | None  # the state that it was predicted from, where the setting keeps it
    t: Tensor  # [B], its time
    index: int  # of the step, 0 for the first


@dataclass(frozen=True)
class Exit:
    """How a sample ends, where an objective says it."""

    num_steps: int | None = None
    """Of the list of steps; None is the student's own."""
    place: float | None = None
    """In [0, 1): of m steps, the one numbered int(m * place) carries gradient; None is drawn."""
    first_place: float | None = None
    """The same for the first chunk of a clip, where it has a list of its own."""
    from_full_list: bool = False
    """Whether the steps are the first ones of the student's own list, so that the exit ends it."""


@dataclass(frozen=True)
class NoisedChunks:
    """What a network says of noised samples; the first axis is chunk by sample, ``[K B]``."""

    x_t: Tensor  # [K B, ...]
    t: Tensor  # [K B]
    v_target: Tensor  # eps - x0
    v: Tensor  # the network's


class Step(ABC):
    """What a loss may use, in one turn of one training step.

    Draws are named by their order: the first noise of a turn, the second, ... A setting that keys
    them by sample gives the same numbers whatever the batch or the processes.
    """

    objective: Objective
    turn: str
    progress: float = 0.0
    """Of the run, in [0, 1]."""
    num_steps: int
    """Steps that the student is sampled with."""
    group: Tensor
    """``[B]``, which samples have one prompt."""
    tangent: Literal["jvp", "fd"] = "jvp"
    """How the student's derivative is had, see ``core.flowmap.total_derivative``."""
    difference: float = 2e-4
    """Of time, where it is a difference: the fastest wave of Wan's time embedding turns by one
    radian in .001."""

    def __init__(self) -> None:
        self.numbers: dict[str, Tensor] = {}

    # ---- draws

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """B."""

    @abstractmethod
    def noise(self, *name: str) -> Tensor:
        """``[B, ...]`` normal."""

    @abstractmethod
    def uniform(self, *name: str) -> Tensor:
        """``[B]`` in [0, 1)."""

    @abstractmethod
    def times_of(
        self, law: TimeLaw, shift: float, low: float, high: float, name: tuple[str, ...] = ()
    ) -> Tensor:
        """``[B]`` of any law, bounds and shift."""

    def times(
        self, law: TimeLaw | None = None, low: float | None = None, high: float | None = None
    ) -> Tensor:
        """``[B]``; None is the objective's own law and bounds, the shift always is."""
        own = self.objective
        assert isinstance(own, Distillation), "others say their law in times_of"
        return self.times_of(
            own.time_law if law is None else law,
            own.shift,
            own.low if low is None else low,
            own.high if high is None else high,
        )

    @abstractmethod
    def choose(self, count: int, name: str = "choice") -> int:
        """One of ``count``, the same for all samples and all processes."""

    @abstractmethod
    def chance(self, name: str = "chance") -> float:
        """In [0, 1), the same for all samples and all processes."""

    def choices(self) -> Hashable:
        """The shared draws on which the cost of the turn depends."""
        return None

    @abstractmethod
    def full(self, value: float) -> Tensor:
        """``[B]`` of one value, such as a time."""

    def noised(self, x: Tensor, t: Tensor) -> Tensor:
        """Detached ``x`` with fresh noise; use ``add_noise`` where gradients are to pass."""
        return add_noise(x.detach(), self.noise(), t)  # sg

    # ---- samples

    @abstractmethod
    def sample(
        self, exit_index: int | None = None, exit: Exit | None = None, role: str | None = None
    ) -> Sample:
        """The student's own samples, of which only one step has gradients.

        Args:
            exit_index: the step that has them, and that they end with; None leaves it to the
                setting.
            exit: the same, said in more detail.
            role: names the noise; None is one of its own for each call.
        """

    @abstractmethod
    def jump_through(self) -> Tensor:
        """The student's samples by its own jumps ``t -> s``, with gradient through the last."""

    @property
    def most_steps(self) -> int:
        """Steps of all chunks but the first, which may have more."""
        return self.num_steps

    def exit_place(self) -> float:
        """Where this turn's samples exit, in [0, 1); shared by all processes."""
        raise NotImplementedError

    def has_longer_first(self, num_steps: int) -> bool:
        """Whether a sample of so many steps has a first chunk whose list and exit are its own."""
        return False

    def policy_samples(
        self, name: str, group_size: int = 1, at_random_exit: bool = False
    ) -> Tensor:
        """Whole samples ``[B G, ...]`` of "student" or "lagged", G of each prompt, as they are
        streamed.

        Args:
            at_random_exit: the predictions at a random step, which may carry gradient.
        """
        raise NotImplementedError

    def chunk_weights(self, weight: Tensor, x: Tensor, per_token: bool) -> Tensor:
        """Weights ``[B, J]`` of ``policy_samples`` as those of ``noise_chunks``.

        Args:
            per_token: whether there is one per token of a network; else one per chunk, or one.
        """
        return weight.T.flatten()

    def group_of_everyone(self, count: int, group_size: int) -> Tensor:
        """Which prompt each of all processes' ``policy_samples`` is of, ``[count]``."""
        return torch.arange(count, device=self.group.device) // group_size

    def new_noising(
        self,
        number: int,
        group_size: int,
        law: Literal["steps"] | TimeLaw,
        shift: float,
        is_shared: bool,
    ) -> Any:
        """Times and noise for ``policy_samples``, the same for every network that is asked.

        Args:
            number: which of the turn's.
            law: "steps" takes the times of the student's own list.
            is_shared: whether the samples of a prompt share their noise.
        """
        raise NotImplementedError

    def noise_chunks(self, name: str, x: Tensor, noising: Any, rows: slice) -> NoisedChunks:
        """What "student", "lagged" or "start" says of each noised chunk of samples, over the clean
        chunks before it.

        Args:
            x: of ``policy_samples``, all of them.
            noising: from ``new_noising``.
            rows: the samples that are wanted.
        """
        raise NotImplementedError

    def network(self, name: str) -> Any:
        """A network that only this objective has, see ``Objective.new_networks``."""
        raise NotImplementedError

    @abstractmethod
    def data(self) -> Tensor:
        """Real samples of the prompts."""

    def teacher_samples(self) -> Tensor:
        """Finished samples of the teacher for the prompts; the real ones, where those are its."""
        return self.data()

    @abstractmethod
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Stored noises, and the guided teacher's samples of them."""

    @abstractmethod
    def reward(self, x: Tensor) -> Tensor:
        """``[B]``, how good samples are for their prompts."""

    @abstractmethod
    def step_time(self, index: int) -> float:
        """When the student's step ``index`` begins: 1 for the first, 0 after the last."""

    # ---- networks

    @abstractmethod
    def mean_velocity(self, name: str, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """``u(x, t, s)`` of "student", "average", "lagged" or "start" with the prompts."""

    @abstractmethod
    def teacher_velocity(self, x_t: Tensor, t: Tensor, prompted: bool = True) -> Tensor:
        """The teacher's velocity, without guidance."""

    @abstractmethod
    def fake_velocity(self, x_t: Tensor, t: Tensor, prompted: bool = True) -> Tensor:
        """The fake score's velocity for what ``sample`` made last, without guidance."""

    def second_velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity of another fake score, trained in the same turn (Distillation-DPO)."""
        raise NotImplementedError(f"{type(self).__name__} has one fake score, expected two")

    @abstractmethod
    def logits(self, x_t: Tensor, t: Tensor, num_parts: int = 1) -> Tensor:
        """``[B, P K]`` of the discriminator.

        Args:
            num_parts: P, stretches of a clip with logits of their own.
        """

    @abstractmethod
    def features(self, x_t: Tensor, t: Tensor) -> Tensor:
        """``[B, D]`` of a frozen network."""

    def counted_frames(self, x: Tensor) -> Tensor | None:
        """Which frames of samples carry gradient, ``[B, T]`` of 0 and 1; None is all of them."""
        return None

    def flow_map(self, name: str = "student") -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The mean velocity ``u(x, t, s)`` as a function, see ``mean_velocity``."""
        return lambda x, t, s: self.mean_velocity(name, x, t, _expanded(s, t, x))

    def jump(self, x: Tensor, t: Tensor, s: Tensor | float = 0.0) -> Tensor:
        """Where the student lands at ``s``."""
        s = _expanded(s, t, x)
        return euler_step(x, self.mean_velocity("student", x, t, s), t, s)

    def scales(self) -> tuple[Tensor, Tensor]:
        """This turn's guidance scales of the teacher and of the fake score, ``[B]``."""
        return self.objective.guidance.draw(self.batch_size, self.uniform)

    def real(self, x_t: Tensor, t: Tensor, scale: Tensor | float | None = None) -> Tensor:
        """The teacher's velocity, guided; None is the objective's scale."""
        return _guided(self.teacher_velocity, x_t, t, self.scales()[0] if scale is None else scale)

    def fake(self, x_t: Tensor, t: Tensor, scale: Tensor | float | None = None) -> Tensor:
        """The fake score's velocity, guided; None is the objective's scale where it is compared."""
        return _guided(self.fake_velocity, x_t, t, self.scales()[1] if scale is None else scale)

    def predictions(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The data predictions of fake score and teacher at one point, with this turn's scales."""
        real_scale, fake_scale = self.scales()
        fake = x0_from_v(x_t, self.fake(x_t, t, fake_scale), t)
        return fake, x0_from_v(x_t, self.real(x_t, t, real_scale), t)

    # ---- what an update leaves behind

    def refresh_heads(self, share: float) -> None:
        """Make a share of the discriminator's heads anew (NitroFusion)."""
        raise NotImplementedError(f"{type(self).__name__} can't make heads anew")

    def pull_fake_score(self, keep: float) -> None:
        """Move the fake score's weights towards the student's (Flash-DMD)."""
        raise NotImplementedError(f"{type(self).__name__} can't move the fake score's weights")

    def record(self, **numbers: Tensor) -> None:
        """Numbers worth logging."""
        self.numbers.update({name: value.detach() for name, value in numbers.items()})

    def accumulate(self, **numbers: Tensor) -> None:
        """Add to what is recorded, the share of one of a loss's parts."""
        for name, value in numbers.items():
            self.numbers[name] = self.numbers.get(name, torch.zeros_like(value)) + value.detach()


class ClipStep(Protocol):
    """What objectives that train a causal student's start use: clips, the student itself, keys."""

    batch: dict[str, Any]
    """``latents [B, C, T, h, w]`` and ``offset [B]``, or ``states [B, n, C, T, h, w]`` and ``times
    [B, n]``; ``cond [B, L, D]``."""
    keys: list[int]
    """A seed per sample."""
    seed: int
    stream: Any
    """A ``rollout.schedule.StreamConfig``."""
    uncond: Tensor | None
    """Embedding of the empty prompt ``[L, D]``."""

    def velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        chunk_frames: int | None = None,
        clean_context: Tensor | None = None,
    ) -> Tensor:
        """The student's velocity at times ``[B]`` or ``[B, T]``.

        Args:
            cond: None is the batch's.
            chunk_frames: a chunk sees those before it; None sees the whole clip.
            clean_context: a noisy chunk sees these before it, ``[B, C, T, h, w]``.
        """
        ...


def require(objective: Objective, **bounds: tuple[float, float]) -> None:
    """Check options against the bounds ``name=(least, greatest)``, which are allowed themselves.

    Raises:
        ValueError: on the first option out of its bounds.
    """
    for name, (least, greatest) in bounds.items():
        value = getattr(objective, name)
        if not least <= value <= greatest:
            expected = f"at least {least}" if greatest == math.inf else f"{least} to {greatest}"
            raise ValueError(f"{objective.name}: {name}={value}, expected {expected}")


def fit_fake_score(
    step: Step,
    law: TimeLaw | None = None,
    weight: Callable[[Tensor], Tensor] | None = None,
    exit: Exit | None = None,
) -> Tensor:
    """Flow matching of the fake score to the student's samples, in the guidance's ``fake_train``
    combination.

    Where that is guided, or the fake score is compared without the prompt, one batch in five has no
    prompt.
    """
    with torch.no_grad():
        x = step.sample(exit=exit).x
    t, eps = step.times(law), step.noise()
    spec = step.objective.guidance
    sees_no_prompt = spec != GuidanceSpec(real=spec.real) and step.chance() < 0.2
    x_t = add_noise(x, eps, t)
    if sees_no_prompt:
        v = step.fake_velocity(x_t, t, prompted=False)
    else:
        v = step.fake(x_t, t, spec.fake_train)
    return flow_matching_loss(v, x, eps, None if weight is None else weight(t))


def _guided(network: Any, x_t: Tensor, t: Tensor, scale: Tensor | float) -> Tensor:
    prompted = network(x_t, t)
    scale = torch.as_tensor(scale)
    if not scale.is_meta and bool((scale == 1).all()):
        return prompted
    scale = scale.to(x_t.device, x_t.dtype)
    return guide(prompted, network(x_t, t, prompted=False), scale)


def _expanded(s: Tensor | float, t: Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(s, dtype=x.dtype, device=x.device).expand_as(t)
