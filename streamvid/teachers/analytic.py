"""A teacher whose data is Gaussian, so that all it says is exact: the oracle of the tests.

For x_0 ~ N(m, S) and x_t = a x_0 + b eps, with a = 1 - t and b = t (diagonal, where frames differ
in time),

    r = (a S a + b^2)^-1 (x_t - a m),
    E[x_0 | x_t] = m + S a r,   E[eps | x_t] = b r,   v = E[eps] - E[x_0]
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import repeat
from torch import Tensor


class AnalyticTeacher:
    """The exact velocity of a Gaussian over clips; a prompt chooses its mean.

    Args:
        mean: ``[C, T, h, w]``, of the empty prompt; its shape is that of the clips.
        covariance: ``[n, n]`` with n = C T h w, over flattened clips; positive semi-definite.
        prompt_means: means ``[C, T, h, w]`` of other prompts. An embedding is one-hot, ``[1, number
            of prompts]``.

    Raises:
        ValueError: if the shapes do not fit together.
    """

    provides: frozenset[str] = frozenset({"score"})

    def __init__(
        self, mean: Tensor, covariance: Tensor, prompt_means: Mapping[str, Tensor] | None = None
    ):
        means = {"": mean, **(prompt_means or {})}
        if covariance.shape != (mean.numel(), mean.numel()) or any(
            m.shape != mean.shape for m in means.values()
        ):
            raise ValueError(
                f"covariance {tuple(covariance.shape)} and means"
                f" {[tuple(m.shape) for m in means.values()]}; expected [n, n] with"
                f" n={mean.numel()}, and means of one shape"
            )
        self.prompts = list(means)
        self.means = torch.stack([m.flatten() for m in means.values()]).double()  # [P, n]
        self.covariance = covariance.double()
        self.uncond = self.encode_prompt([""])[0]

    def encode_prompt(self, prompts: list[str]) -> Tensor:
        """One-hot embeddings ``[B, 1, P]``.

        Raises:
            ValueError: on a prompt that has no mean.
        """
        unknown = [prompt for prompt in prompts if prompt not in self.prompts]
        if unknown:
            raise ValueError(
                f"no mean for the prompt {unknown[0]!r}; expected one of {self.prompts}"
            )
        return torch.eye(len(self.prompts))[[self.prompts.index(prompt) for prompt in prompts]][
            :, None
        ]

    def predict(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """See ``Teacher.predict``; computed in float64, returned in the precision of ``x_t``."""
        b = _each_number(t.double(), x_t)
        a = 1 - b
        mean = cond[:, 0].double() @ self.means
        # [B, n, n]
        noisy = a[:, :, None] * self.covariance * a[:, None] + torch.diag_embed(b.square())
        r = torch.linalg.solve(noisy, x_t.double().flatten(1) - a * mean)
        x0 = mean + (a * r) @ self.covariance
        return (b * r - x0).view_as(x_t).to(x_t.dtype)


def _each_number(t: Tensor, x_t: Tensor) -> Tensor:
    """Times ``[B]`` or ``[B, T]`` for each number of the flattened clips, ``[B, n]``."""
    _, channels, frames, height, width = x_t.shape
    t = t if t.ndim == 2 else repeat(t, "b -> b t", t=frames)
    return repeat(t, "b t -> b (c t h w)", c=channels, h=height, w=width)
