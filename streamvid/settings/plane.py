"""The networks of the laboratory: one small perceptron in four roles, and heads on a frozen one's
features.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from streamvid.core.adversary import FeatureHeads, HeadPool
from streamvid.objectives.base import Preset
from streamvid.settings.targets import Target

WIDTH = 128
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
    """Student, teacher and all that a preset may ask for, as ``objectives.base.Networks``.

    Args:
        target: the teacher.
        start: the pretrained network that student, fake score and frozen features begin as.
        preset: says which networks there are.
    """

    def __init__(self, target: Target, start: PointNet, preset: Preset):
        self.target, self.preset = target, preset
        self.frozen = copy.deepcopy(start).requires_grad_(False)
        self.trained = {"student": copy.deepcopy(start)}
        if preset.critic is not None:
            self.trained["critic"] = copy.deepcopy(start)
            self.second = copy.deepcopy(start)
        if preset.disc is not None:
            dims = [WIDTH] * len(start.hidden)
            self.trained["disc"] = FeatureHeads(dims, preset.heads, preset.num_logits, hidden=64)
        self.average_net, self.lagged_net = (
            copy.deepcopy(start).requires_grad_(False) for _ in range(2)
        )

    def parameters(self, phase: str) -> list[nn.Parameter]:
        """What a phase trains."""
        networks = [self.trained[phase]] + ([self.second] if phase == "critic" else [])
        return [p for network in networks for p in network.parameters()]

    def student_parameters(self) -> list[nn.Parameter]:
        return list(self.trained["student"].parameters())

    def critic_parameters(self) -> list[nn.Parameter]:
        return list(self.trained["critic"].parameters())

    def student(self, x: Tensor, t: Tensor, s: Tensor, cond: Tensor | None) -> Tensor:
        return self.trained["student"](x, t, s, cond)

    def average(self, x: Tensor, t: Tensor, s: Tensor, cond: Tensor | None) -> Tensor:
        return self.average_net(x, t, s, cond)

    def lagged(self, x: Tensor, t: Tensor, s: Tensor, cond: Tensor | None) -> Tensor:
        return self.lagged_net(x, t, s, cond)

    def start(self, x: Tensor, t: Tensor, s: Tensor, cond: Tensor | None) -> Tensor:
        return self.frozen(x, t, s, cond)

    def teacher(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return self.target.velocity(x, t, cond)

    def critic(self, x: Tensor, t: Tensor, cond: Tensor | None, made_at: Tensor) -> Tensor:
        # the start knows s = t, which is that of one step
        return self.trained["critic"](x, t, t * made_at, cond)

    def second_critic(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return self.second(x, t, t, cond)

    def features(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return self.frozen.features(x, t, t, cond)[-1]

    def logits(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return self.trained["disc"](self.frozen.features(x, t, t, cond), t)

    def refresh_heads(self, share: float, rng: torch.Generator) -> None:
        """Make some heads anew, as ``core.adversary.HeadPool`` does; here the heads of the layers
        are the pool.
        """
        heads = self.trained["disc"].heads
        pool = HeadPool(
            lambda g: type(heads[0])(
                WIDTH, self.preset.num_logits, 64, self.preset.heads == "film"
            ),
            len(heads),
            1,
        )
        pool.groups = nn.ModuleList(nn.ModuleList([head]) for head in heads)
        if float(torch.rand((), generator=rng)) < share * len(heads):
            pool.refresh(1 / len(heads), rng)
