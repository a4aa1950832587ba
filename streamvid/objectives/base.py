"""What a preset is made of, and what its losses may use.

A preset is data: one loss a phase, and how often the phases take turns. A loss is a function of a
``Context``, which holds the networks as callables, this step's batch, and the only source of random
numbers. Nothing here knows how large a sample is, so the same presets serve points, images ``[B, C,
H, W]`` and clips ``[B, C, T, H, W]``.

Phases: "student", "critic" (the fake score), "disc" (heads on frozen features). In a phase only its
own network's parameters require gradients; gradients through the *inputs* of the others reach the
student where a loss asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from streamvid.core.fitting import flow_matching_loss
from streamvid.core.guidance import GuidanceSpec, guide
from streamvid.core.process import add_noise, euler_step, renoise_step, x0_from_v
from streamvid.core.times import sample_times, step_times

Loss = Callable[["Context"], Tensor]


@dataclass(frozen=True)
class Preset:
    """One published objective."""

    paper: str
    """Its arXiv id."""
    student: Loss
    """The student's loss."""
    critic: Loss | None = None
    """The fake score's; None where there is none."""
    disc: Loss | None = None
    """The discriminator heads'; None where there are none."""
    steps: int = 1
    """Steps that the student is trained for, and sampled with."""
    critic_updates: int = 2
    """Updates of the fake score for each of the student."""
    critic_knows_step: bool = True
    """Of several steps, tell the fake score which one made a sample. Papers fit one to the mixture
    of all steps' outputs, which can be right while every step is wrong."""
    guidance: GuidanceSpec = field(default_factory=GuidanceSpec)
    """Of teacher and fake score."""
    heads: Literal["token", "film", "query"] = "token"
    """Kind of the discriminator heads, see ``core.adversary.FeatureHeads``."""
    num_logits: int = 1
    """Logits of each head."""
    rate: float = 1.0
    """Of the student's learning rate, against that of the others."""
    average: float | None = None
    """Decay of the student's average, where a loss uses it as target."""
    sampler: Literal["renoise", "jump", "euler"] = "renoise"
    """From step to step: fresh noise on the data prediction, the flow map's own jump, or an Euler
    step of its velocity."""
    after_student: Callable[[Context], None] | None = None
    """Called after each update of the student."""
    role: Literal["complete", "add-on", "baseline"] = "complete"
    """An add-on is shown with a host; a baseline is known to fall short and is there to show it."""
    covers: bool = False
    """Whether it claims to cover modes that distribution matching alone drops."""
    on_points: bool = True
    """Whether it makes sense on single points; motion does not."""
    note: str = ""
    """What a reader of the table should know."""


@dataclass(frozen=True)
class Sample:
    """A student's sample and where its last prediction was made."""

    x: Tensor
    x_t: Tensor  # the state that it was predicted from
    t: Tensor  # [B], its time
    index: int  # of the step, 0 for the first


class Networks(Protocol):
    """The networks of a laboratory or a run, as callables of ``(x, t [B], ..., cond)``."""

    # mean velocity from t to s
    def student(self, x: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor: ...

    # of the student's averaged weights
    def average(self, x: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor: ...

    # a slow copy: an old policy
    def lagged(self, x: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor: ...

    # the student before distillation
    def start(self, x: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor: ...

    # velocity; cond None is unconditional
    def teacher(self, x: Tensor, t: Tensor, cond: Any) -> Tensor: ...

    # made_at: of ``Sample.t``
    def critic(self, x: Tensor, t: Tensor, cond: Any, made_at: Tensor) -> Tensor: ...

    def logits(self, x: Tensor, t: Tensor, cond: Any) -> Tensor: ...  # [B, K]


@dataclass
class Context:
    """This step: networks, batch, and random numbers.

    Everything random comes from ``rng``, so that an option at its neutral value leaves the stream
    of numbers alone.
    """

    networks: Networks
    cond: Tensor  # [B], the prompts of the batch
    shape: tuple[int, ...]  # of a sample, without the batch
    rng: torch.Generator
    preset: Preset
    data: Callable[[Tensor], Tensor]  # prompts to real samples
    # prompts to (noise, the guided teacher's sample of it)
    pairs: Callable[[Tensor], tuple[Tensor, Tensor]]
    reward: Callable[[Tensor, Tensor], Tensor] | None = None  # samples and prompts to [B]
    progress: float = 0.0  # of the run, in [0, 1]
    dtype: torch.dtype = torch.float32
    # when the last sample was predicted, which the fake score is told
    made_at: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return len(self.cond)

    # ---- draws

    def noise(self) -> Tensor:
        return torch.randn(self.batch_size, *self.shape, generator=self.rng, dtype=self.dtype)

    def uniform(self) -> Tensor:
        return torch.rand(self.batch_size, generator=self.rng, dtype=self.dtype)

    def times(
        self,
        law: str = "uniform",
        low: float = 0.02,
        high: float = 0.98,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> Tensor:
        return sample_times(self.batch_size, law, 1.0, self.rng, low, high, mean, std).to(
            self.dtype
        )

    def noised(self, x: Tensor, t: Tensor) -> Tensor:
        """Detached ``x`` with fresh noise; use ``add_noise`` where gradients are to pass."""
        return add_noise(x.detach(), self.noise(), t)  # sg

    # ---- networks

    def jump(self, x: Tensor, t: Tensor, s: Tensor | float = 0.0) -> Tensor:
        """Where the student lands at ``s``."""
        s = torch.as_tensor(s, dtype=x.dtype).expand_as(t)
        return euler_step(x, self.networks.student(x, t, s, self.cond), t, s)

    def flow_map(self, name: str = "student") -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The mean velocity ``u(x, t, s)`` of "student", "average", "lagged" or "start"."""
        network = getattr(self.networks, name)
        return lambda x, t, s: network(
            x, t, torch.as_tensor(s, dtype=x.dtype).expand_as(t), self.cond
        )

    def sample(self, exit_index: int | None = None) -> Sample:
        """A sample by the student's own steps, of which only the last has gradients (backward
        simulation, DMD2).

        Args:
            exit_index: the step that it ends with; None draws one for the batch.
        """
        times = step_times(self.preset.steps, 1.0)
        if exit_index is None:
            exit_index = (
                int(torch.randint(len(times), (), generator=self.rng)) if len(times) > 1 else 0
            )
        x_t = self.noise()
        for i, time in enumerate(times[: exit_index + 1]):
            t = torch.full((self.batch_size,), time, dtype=self.dtype)
            with nullcontext() if i == exit_index else torch.no_grad():
                x = self.jump(x_t, t)
            if i < exit_index:
                x_t = renoise_step(x, self.noise(), times[i + 1])
        self.made_at = t if self.preset.critic_knows_step else torch.ones_like(t)
        return Sample(x, x_t, t, exit_index)

    def scales(self) -> tuple[Tensor, Tensor]:
        """This step's guidance scales of the teacher and of the fake score, ``[B]``."""
        return self.preset.guidance.draw(self.batch_size, self.rng)

    def real(self, x_t: Tensor, t: Tensor, scale: Tensor | float | None = None) -> Tensor:
        """The teacher's velocity, guided; None is the preset's scale."""
        return self._guided(
            self.networks.teacher, x_t, t, self.scales()[0] if scale is None else scale
        )

    def fake(self, x_t: Tensor, t: Tensor, scale: Tensor | float | None = None) -> Tensor:
        """The fake score's velocity for what ``sample`` made last, guided; None is the preset's
        scale where it is compared.
        """
        return self._guided(self.critic, x_t, t, self.scales()[1] if scale is None else scale)

    def critic(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        """The fake score's own velocity for what ``sample`` made last."""
        return self.networks.critic(
            x_t, t, cond, torch.ones_like(t) if self.made_at is None else self.made_at
        )

    def _guided(self, network: Any, x_t: Tensor, t: Tensor, scale: Tensor | float) -> Tensor:
        cond = network(x_t, t, self.cond)
        if bool((torch.as_tensor(scale) == 1).all()):
            return cond
        return guide(cond, network(x_t, t, None), torch.as_tensor(scale, dtype=x_t.dtype))

    def predictions(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The data predictions of fake score and teacher at one point, with this step's scales."""
        real_scale, fake_scale = self.scales()
        return x0_from_v(x_t, self.fake(x_t, t, fake_scale), t), x0_from_v(
            x_t, self.real(x_t, t, real_scale), t
        )

    def logits(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.networks.logits(x_t, t, self.cond)


def fit_critic(law: str = "uniform", weight: Callable[[Tensor], Tensor] | None = None) -> Loss:
    """Flow matching of the fake score to the student's samples, in the preset's ``fake_train``
    combination.

    Where that is guided, or the fake score is compared without the prompt, one batch in five has no
    prompt.
    """

    def loss(ctx: Context) -> Tensor:
        with torch.no_grad():
            x = ctx.sample().x
        t, eps = ctx.times(law), ctx.noise()
        spec = ctx.preset.guidance
        unconditional = (
            spec != GuidanceSpec(real=spec.real) and float(torch.rand((), generator=ctx.rng)) < 0.2
        )
        x_t = add_noise(x, eps, t)
        v = ctx.critic(x_t, t, None) if unconditional else ctx.fake(x_t, t, spec.fake_train)
        return flow_matching_loss(v, x, eps, None if weight is None else weight(t))

    return loss
