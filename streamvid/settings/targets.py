"""Teachers that are mixtures of Gaussians in the plane: their velocity is exact, and so is what a
student should become.

Points are ``[B, 2, 1, 1]``, images of one pixel, so that the loss core runs on them as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from streamvid.core.guidance import guide
from streamvid.core.process import euler_step


@dataclass(frozen=True)
class Target:
    """A mixture for each prompt, all components of one width.

    ``prompts[p]`` holds the weights ``[K]`` of the components under prompt p; without a prompt they
    are averaged.
    """

    name: str
    means: Tensor  # [K, 2]
    width: float
    prompts: Tensor  # [P, K], rows that add up to 1
    scale: float = 1.0  # of the guidance that students are distilled with
    # components that the start was pretrained on, the first so many; None is all
    known: int | None = None

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    @property
    def pretraining(self) -> Target:
        """The law that the start knows."""
        if self.known is None:
            return self
        return Target(
            self.name,
            self.means[: self.known],
            self.width,
            torch.full((1, self.known), 1 / self.known),
        )

    def weights(self, cond: Tensor | None, count: int) -> Tensor:
        """``[B, K]`` for prompts ``[B]``, or without."""
        return self.prompts.mean(0).expand(count, -1) if cond is None else self.prompts[cond]

    def velocity(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """The exact velocity ``E[eps - x0 | x_t]`` at times ``[B]``."""
        x, means = x_t.flatten(1)[:, None], self.means.to(x_t)  # [B, 1, 2], [K, 2]
        t = t.reshape(-1, 1, 1)
        a, variance = 1 - t, (1 - t) ** 2 * self.width**2 + t**2
        residual = (x - a * means) / variance  # [B, K, 2]
        log_share = (
            self.weights(cond, len(x)).to(x_t).log() - (residual.square() * variance).sum(2) / 2
        )
        share = log_share.softmax(1)[..., None]
        # E[eps] - E[x0] of each component
        each = t * residual - means - a * self.width**2 * residual
        return (share * each).sum(1).reshape(x_t.shape)

    def sample(self, cond: Tensor, generator: torch.Generator) -> Tensor:
        """Points of the prompts, unguided."""
        component = torch.multinomial(self.prompts[cond], 1, generator=generator)[:, 0]
        points = self.means[component] + self.width * torch.randn(len(cond), 2, generator=generator)
        return points[:, :, None, None]

    def log_density(self, x: Tensor, cond: Tensor) -> Tensor:
        """``[B]``, up to a constant."""
        square = (x.flatten(1)[:, None] - self.means.to(x)).square().sum(2)
        return (self.weights(cond, len(x)).to(x).log() - square / (2 * self.width**2)).logsumexp(1)

    def guided(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """The velocity at this target's guidance scale."""
        v = self.velocity(x_t, t, cond)
        return v if self.scale == 1 else guide(v, self.velocity(x_t, t, None), self.scale)

    @torch.no_grad()
    def flow(self, noise: Tensor, cond: Tensor, num_steps: int = 64) -> Tensor:
        """The guided teacher's samples of noises: Euler steps of its probability flow."""
        x, times = noise, torch.linspace(1, 0, num_steps + 1)
        for t, s in zip(times, times[1:]):
            t, s = t.expand(len(x)), s.expand(len(x))
            x = euler_step(x, self.guided(x, t, cond), t, s)
        return x


def ring(num_modes: int = 8, radius: float = 2.0, width: float = 0.15) -> Target:
    """Equal modes on a circle."""
    angles = 2 * math.pi * torch.arange(num_modes) / num_modes
    means = radius * torch.stack([angles.cos(), angles.sin()], 1)
    return Target("ring", means, width, torch.full((1, num_modes), 1 / num_modes))


def moons(num: int = 32, width: float = 0.12) -> Target:
    """Two half circles, one in the other's arms, of many narrow components."""
    angles = math.pi * torch.arange(num) / (num - 1)
    upper = torch.stack([angles.cos(), angles.sin()], 1)
    lower = torch.stack([1 - angles.cos(), 0.5 - angles.sin()], 1)
    means = 1.6 * (torch.cat([upper, lower]) - torch.tensor([0.5, 0.25]))
    return Target("moons", means, width, torch.full((1, 2 * num), 1 / (2 * num)))


def prompts(width: float = 0.3, scale: float = 2.0) -> Target:
    """Two prompts with two modes each, of which they have the inner ones nearly in common; guidance
    parts them.
    """
    means = torch.tensor([[-1.8, 0.8], [-0.6, -0.8], [0.6, -0.8], [1.8, 0.8]])
    weights = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]])
    return Target("prompts", means, width, weights, scale)


def narrow() -> Target:
    """The ring, for a student that has seen three of its modes: what does an objective make of the
    other five?
    """
    base = ring()
    return Target("narrow", base.means, base.width, base.prompts, known=3)


TARGETS: dict[str, Callable[[], Target]] = {"ring": ring, "moons": moons, "prompts": prompts}
"""On which every objective is compared."""

COVERAGE: dict[str, Callable[[], Target]] = {"narrow": narrow}
"""For those that claim to cover modes, and distribution matching beside them."""
