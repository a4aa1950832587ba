"""The setting of points in the plane: one small perceptron in all roles, heads on a frozen one's
features, and the steps over them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from streamvid.core.adversary import FeatureHeads, HeadPool, TokenHead
from streamvid.core.fitting import couple
from streamvid.core.process import add_noise, euler_step, renoise_step, velocity
from streamvid.core.times import TimeLaw, sample_times
from streamvid.objectives.base import Exit, NoisedChunks, Objective, Sample, Step
from streamvid.settings.targets import Target

WIDTH = 128
HIDDEN = 64  # of the discriminator's heads
# octaves of the time features: high ones make du/dt rough, and the exact tangents unusable
NUM_WAVES = 3


class PointNet(nn.Module):
    """``u(x [B, 2, 1, 1], t [B], s [B], cond [B] or None)``: a mean velocity, of the same shape as
    ``x``.
    """

    def __init__(self, num_prompts: int):
        super().__init__()
        self.prompts = nn.Embedding(num_prompts + 1, WIDTH)  # the last is "no prompt"
        self.inward = nn.Linear(2 + 2 * 2 * NUM_WAVES, WIDTH)
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.outward = nn.Linear(WIDTH, 2)

    def features(self, x: Tensor, t: Tensor, s: Tensor, cond: Tensor | None) -> list[Tensor]:
        """The activations ``[B, WIDTH]`` of the hidden layers."""
        if cond is None:
            cond = torch.full((len(x),), self.prompts.num_embeddings - 1)
        h = self.inward(torch.cat([x.flatten(1), _waves(t), _waves(s)], 1)) + self.prompts(cond)
        found = []
        for layer in self.hidden:
            h = h + nn.functional.silu(layer(nn.functional.silu(h)))
            found.append(h)
        return found

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Tensor | None) -> Tensor:
        return self.outward(nn.functional.silu(self.features(x, t, s, cond)[-1])).reshape(x.shape)


def _waves(t: Tensor) -> Tensor:
    angles = t[:, None] * (torch.pi / 2 * 2.0 ** torch.arange(NUM_WAVES))
    return torch.cat([angles.sin(), angles.cos()], 1)


class Laboratory:
    """Student, teacher and all that an objective may ask for, on points.

    Args:
        target: the teacher.
        start: the pretrained network that student, fake score and frozen features begin as.
        objective: says which networks there are.
        num_pairs: stored pairs of noise and teacher's sample per prompt.
        seed: of the stored noises.
    """

    shape = (2, 1, 1)
    """Of a point."""

    def __init__(
        self,
        target: Target,
        start: PointNet,
        objective: Objective,
        num_pairs: int = 64,
        seed: int = 0,
    ):
        self.target = target
        self.objective = objective
        self.frozen = copy.deepcopy(start).requires_grad_(False)
        self.trained: dict[str, nn.Module] = {"student": copy.deepcopy(start)}
        if "fake_score" in objective.networks():
            self.trained["fake_score"] = copy.deepcopy(start)
            self.second = copy.deepcopy(start)
        if "discriminator" in objective.networks():
            dims = [WIDTH] * len(start.hidden)
            self.num_logits = objective.num_logits_for(objective.num_steps)
            self.discriminator = FeatureHeads(dims, objective.heads, self.num_logits, HIDDEN)
            self.trained["discriminator"] = self.discriminator
        self.copies = {
            "average": copy.deepcopy(start).requires_grad_(False),
            "lagged": copy.deepcopy(start).requires_grad_(False),
            "start": self.frozen,
        }
        self.noises, self.samples = _store_pairs(target, num_pairs, seed)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """What a network's turn trains."""
        networks = [self.trained[name]]
        if name == "fake_score":
            networks.append(self.second)
        return [p for network in networks for p in network.parameters()]

    def mean_velocity(
        self, name: str, x: Tensor, t: Tensor, s: Tensor, cond: Tensor | None
    ) -> Tensor:
        """Of "student", "average", "lagged" or "start"."""
        network = self.trained["student"] if name == "student" else self.copies[name]
        return network(x, t, s, cond)

    def teacher(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """The teacher's velocity."""
        return self.target.velocity(x, t, cond)

    def fake_score(self, x: Tensor, t: Tensor, cond: Tensor | None, made_at: Tensor) -> Tensor:
        """The fake score's velocity, for samples that were predicted at ``made_at``."""
        # the start knows s = t, which is that of one step
        return self.trained["fake_score"](x, t, t * made_at, cond)

    def second_fake_score(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """Another fake score's velocity."""
        return self.second(x, t, t, cond)

    def features(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """``[B, WIDTH]`` of the start."""
        return self.frozen.features(x, t, t, cond)[-1]

    def logits(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """``[B, K]`` of the heads on the start's features."""
        return self.trained["discriminator"](self.frozen.features(x, t, t, cond), t)

    def data(self, cond: Tensor, rng: torch.Generator) -> Tensor:
        """Real points of the prompts."""
        return self.target.sample(cond, rng)

    def pairs(self, cond: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Stored noises, and the guided teacher's samples of them."""
        rows = torch.randint(self.noises.shape[1], (len(cond),), generator=rng)
        return self.noises[cond, rows], self.samples[cond, rows]

    def reward(self, x: Tensor, cond: Tensor) -> Tensor:
        """``[B]``, the teacher's log density."""
        return self.target.log_density(x, cond)

    def refresh_heads(self, share: float, rng: torch.Generator) -> None:
        """Make some heads anew, as ``core.adversary.HeadPool`` does; here the heads of the layers
        are the pool.
        """
        heads = self.discriminator.heads
        is_film = self.objective.heads == "film"
        num_logits = self.num_logits
        pool = HeadPool(
            lambda group: TokenHead(WIDTH, num_logits, HIDDEN, is_film), len(heads), per_group=1
        )
        pool.groups = nn.ModuleList(nn.ModuleList([head]) for head in heads)
        if float(torch.rand((), generator=rng)) < share * len(heads):
            pool.refresh(1 / len(heads), rng)


def _store_pairs(target: Target, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noises and the guided teacher's samples of them, ``[prompts, size, 2, 1, 1]`` both."""
    generator = torch.Generator().manual_seed(seed)
    noises = [torch.randn(size, 2, 1, 1, generator=generator) for _ in range(target.num_prompts)]
    samples = [
        target.flow(noise, torch.full((size,), prompt)) for prompt, noise in enumerate(noises)
    ]
    return torch.stack(noises), torch.stack(samples)


@dataclass(frozen=True)
class Noising:
    """How finished points are noised, and their prompts; the first axis is the point."""

    t: Tensor
    eps: Tensor
    cond: Tensor


class PlaneStep(Step):
    """A step over a laboratory's networks, all of whose draws come from one generator, in the order
    in which a loss asks.

    So an option at its neutral value leaves the stream of numbers alone.

    Args:
        lab: the networks.
        objective: what is trained.
        turn: which network.
        cond: the prompts of the batch, ``[B]``.
        rng: of all draws.
        progress: of the run, in [0, 1].
        dtype: of draws and samples.
    """

    def __init__(
        self,
        lab: Laboratory,
        objective: Objective,
        turn: str,
        cond: Tensor,
        rng: torch.Generator,
        progress: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.lab = lab
        self.objective: Objective = objective
        self.turn = turn
        self.cond = cond
        self.group = cond
        self.rng = rng
        self.progress = progress
        self.num_steps = objective.num_steps
        self.dtype = dtype
        self.made_at: Tensor | None = None  # when the last sample was predicted
        self.named: dict[tuple[str, ...], Tensor] = {}  # draws that a loss asks for by name

    # ---- draws

    @property
    def batch_size(self) -> int:
        return len(self.cond)

    def noise(self, *name: str) -> Tensor:
        if not name:
            return self.draw_noise(self.batch_size)
        if name not in self.named:
            self.named[name] = self.draw_noise(self.batch_size)
        return self.named[name]

    def draw_noise(self, count: int) -> Tensor:
        """``[count, 2, 1, 1]``."""
        shape = (count, *self.lab.shape)
        return torch.randn(shape, generator=self.rng, dtype=self.dtype)

    def uniform(self, *name: str) -> Tensor:
        return torch.rand(self.batch_size, generator=self.rng, dtype=self.dtype)

    def times_of(
        self, law: TimeLaw, shift: float, low: float, high: float, name: tuple[str, ...] = ()
    ) -> Tensor:
        if name in self.named:
            return self.named[name]
        t = sample_times(self.batch_size, law, shift, self.rng, low, high).to(self.dtype)
        if name:
            self.named[name] = t
        return t

    def choose(self, count: int, name: str = "choice") -> int:
        return int(torch.randint(count, (), generator=self.rng))

    def chance(self, name: str = "chance") -> float:
        return float(torch.rand((), generator=self.rng))

    def full(self, value: float) -> Tensor:
        return torch.full((self.batch_size,), value, dtype=self.dtype)

    # ---- samples

    def step_time(self, index: int, num_steps: int | None = None) -> float:
        count = self.num_steps if num_steps is None else num_steps
        return 1 - index / count

    def exit_place(self) -> float:
        return self.chance()

    def sample(
        self, exit_index: int | None = None, exit: Exit | None = None, role: str | None = None
    ) -> Sample:
        """By the student's own steps, of which only the last has gradients (backward simulation,
        DMD2); without an exit one is drawn.
        """
        of = self.num_steps
        if exit is not None:
            of = exit.num_steps or of
            exit_index = int((self.exit_place() if exit.place is None else exit.place) * of)
        if exit_index is None:
            exit_index = self.choose(of) if of > 1 else 0
        x_t = self.noise()
        with torch.no_grad():
            for index in range(exit_index):
                x = self.jump(x_t, self.full(self.step_time(index, of)))
                x_t = renoise_step(x, self.noise(), self.step_time(index + 1, of))
        t = self.full(self.step_time(exit_index, of))
        self.made_at = t
        return Sample(self.jump(x_t, t), x_t, t, exit_index)

    def jump_through(self) -> Tensor:
        x = self.noise()
        last = self.num_steps - 1
        with torch.no_grad():
            for index in range(last):
                x = self.jump(x, self.full(self.step_time(index)), self.step_time(index + 1))
        return self.jump(x, self.full(self.step_time(last)), 0.0)

    def policy_samples(
        self, name: str, group_size: int = 1, at_random_exit: bool = False
    ) -> Tensor:
        """By Euler steps of the policy's velocity, all of which a GAN trains."""
        cond = self.cond.repeat_interleave(group_size)
        x = self.draw_noise(len(cond))
        with torch.set_grad_enabled(torch.is_grad_enabled() and at_random_exit):
            for index in range(self.num_steps):
                now = torch.full((len(x),), self.step_time(index), dtype=self.dtype)
                after = torch.full((len(x),), self.step_time(index + 1), dtype=self.dtype)
                v = self.lab.mean_velocity(name, x, now, now, cond)
                x = euler_step(x, v, now, after)
        return x

    def group_of_everyone(self, count: int, group_size: int) -> Tensor:
        return self.cond.repeat_interleave(group_size)

    def chunk_weights(self, weight: Tensor, x: Tensor, per_token: bool) -> Tensor:
        return weight.mean(1)  # of the heads on all layers

    def new_noising(
        self,
        number: int,
        group_size: int,
        law: Literal["steps"] | TimeLaw,
        shift: float,
        is_shared: bool,
    ) -> Noising:
        cond = self.cond.repeat_interleave(group_size)
        of_law: TimeLaw = "uniform" if law == "steps" else law
        t = sample_times(len(cond), of_law, shift, self.rng, 0.02, 0.98).to(self.dtype)
        if is_shared:
            eps = self.draw_noise(self.batch_size).repeat_interleave(group_size, dim=0)
        else:
            eps = self.draw_noise(len(cond))
        return Noising(t, eps, cond)

    def noise_chunks(self, name: str, x: Tensor, noising: Noising, rows: slice) -> NoisedChunks:
        t, eps, cond = noising.t[rows], noising.eps[rows], noising.cond[rows]
        x_t = add_noise(x[rows], eps, t)
        v = self.lab.mean_velocity(name, x_t, t, t, cond)
        return NoisedChunks(x_t, t, velocity(x[rows], eps), v)

    def data(self) -> Tensor:
        return self.lab.data(self.cond, self.rng)

    def teacher_samples(self) -> Tensor:
        """Stored ones of the guided teacher; ``data`` is unguided."""
        return self.lab.pairs(self.cond, self.rng)[1]

    def pairs(self) -> tuple[Tensor, Tensor]:
        return self.lab.pairs(self.cond, self.rng)

    def reward(self, x: Tensor) -> Tensor:
        return self.lab.reward(x, self.cond)

    # ---- networks

    def mean_velocity(self, name: str, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.lab.mean_velocity(name, x, t, s, self.cond)

    def teacher_velocity(self, x_t: Tensor, t: Tensor, prompted: bool = True) -> Tensor:
        return self.lab.teacher(x_t, t, self.cond if prompted else None)

    def fake_velocity(self, x_t: Tensor, t: Tensor, prompted: bool = True) -> Tensor:
        """Told which step made the samples: papers fit one to the mixture of all steps' outputs,
        which can be right while every step is wrong.
        """
        made_at = torch.ones_like(t) if self.made_at is None else self.made_at
        return self.lab.fake_score(x_t, t, self.cond if prompted else None, made_at)

    def second_velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.lab.second_fake_score(x_t, t, self.cond)

    def logits(self, x_t: Tensor, t: Tensor, num_parts: int = 1) -> Tensor:
        copies = len(x_t) // self.batch_size
        t = t if len(t) == len(x_t) else t.repeat_interleave(copies)
        return self.lab.logits(x_t, t, self.cond.repeat_interleave(copies))

    def features(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.lab.features(x_t, t, self.cond)

    # ---- what an update leaves behind

    def refresh_heads(self, share: float) -> None:
        self.lab.refresh_heads(share, self.rng)

    def pull_fake_score(self, keep: float) -> None:
        fake_score = self.lab.trained["fake_score"]
        couple(fake_score.parameters(), self.lab.parameters("student"), keep)
