"""A streaming distribution-matching stack on an AR(1) process, from noise to fixed point,
exactly.

Frames have covariance S_ij = rho^|i - j|. The teacher is the exact bidirectional denoiser. The
student is causal, x_1 = s z_1, x_{k+1} = a ctx_k + b z_{k+1}, with ctx_k = (1 - c) x_k + c eps_k
what the loop commits, detached. Distribution matching recovers a = rho / (1 - c), b^2 = 1 - rho^2
((1 - c)^2 + c^2) / (1 - c)^2 and s = 1, although no gradient flows through the context.

Everything is linear in the Gaussian draws, so that a batch of their scaled unit vectors has second
moments that are exactly the identity, and batch means are expectations.
"""

from types import SimpleNamespace

import pytest
import torch

from streamvid.core.inject import dmd_gradient, surrogate
from streamvid.core.process import add_noise
from streamvid.rollout.loop import rollout
from streamvid.rollout.noise import CONTEXT_EVENT, INITIAL_EVENT
from streamvid.rollout.schedule import autoregressive

NUM_FRAMES, RHO, T = 6, 0.8, 0.5
KEYS = [(k, event) for event in (INITIAL_EVENT, CONTEXT_EVENT, "score") for k in range(NUM_FRAMES)]
BATCH = len(KEYS)
PROMPTS = torch.zeros(BATCH, 1, 1, dtype=torch.float64)


class UnitNoise:
    """Sample i is sqrt(B) in the i-th draw and 0 in every other."""

    def __len__(self):
        return BATCH

    def draw(self, chunk, event, shape_per_sample, device, dtype):
        unit = torch.zeros(BATCH, dtype=dtype)
        unit[KEYS.index((chunk, event))] = BATCH**0.5
        return unit.reshape(-1, *[1] * len(shape_per_sample))


class LinearStudent(torch.nn.Module):
    """x_{k+1} = a ctx_k + b z as a velocity at t = 1; its cache is a list of the committed
    frames.
    """

    def __init__(self):
        super().__init__()
        self.a, self.b, self.s = (
            torch.nn.Parameter(torch.tensor(p, dtype=torch.float64)) for p in (0.1, 0.5, 1.5)
        )

    def forward(self, hidden_states, timestep, cond, cache):
        x0 = self.a * cache[-1] + self.b * hidden_states if cache else self.s * hidden_states
        return SimpleNamespace(sample=hidden_states - x0)

    def commit(self, latents, timestep, cond, cache):
        cache.append(latents)


def denoise(x_t, covariance):
    """The data prediction of N(0, covariance) over the frames of ``[B, 1, K, 1, 1]``."""
    eye = torch.eye(NUM_FRAMES, dtype=torch.float64)
    gain = (1 - T) * covariance @ torch.linalg.inv((1 - T) ** 2 * covariance + T**2 * eye)
    return torch.einsum("ij,bcjhw->bcihw", gain, x_t)


def clip_of(student, context_t):
    results = rollout(
        student,
        PROMPTS,
        autoregressive((1.0,), NUM_FRAMES),
        UnitNoise(),
        latent_shape=(1, 1, 1),
        chunk_frames=1,
        cache=[],
        context_t=context_t,
    )
    return torch.cat([result.prediction for result in results], dim=2)  # [B, 1, K, 1, 1]


def covariance_of(x):
    frames = x.detach().flatten(1)
    return frames.T @ frames / BATCH


@pytest.mark.parametrize("context_t, tolerance", [(0.0, 1e-9), (0.357, 1e-6)])
def test_streaming_distribution_matching_recovers_the_process(context_t, tolerance):
    index = torch.arange(NUM_FRAMES)
    teacher = RHO ** (index[:, None] - index[None]).abs().double()
    student = LinearStudent()
    shape = (1, 1, 1, 1)
    score_noise = [
        UnitNoise().draw(k, "score", shape, None, torch.float64) for k in range(NUM_FRAMES)
    ]
    for _ in range(400):
        x = clip_of(student, context_t)
        x_t = add_noise(x.detach(), torch.cat(score_noise, dim=2), T)
        g = dmd_gradient(
            x, denoise(x_t, covariance_of(x)), denoise(x_t, teacher), normalizer="none"
        )
        gradients = torch.autograd.grad(surrogate(x, g, "sum") / BATCH, student.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(student.parameters(), gradients):
                parameter -= 0.5 * gradient
    clean = 1 - context_t
    b = (1 - RHO**2 * (clean**2 + context_t**2) / clean**2) ** 0.5
    assert [student.a.item(), student.b.item(), student.s.item()] == pytest.approx(
        [RHO / clean, b, 1], abs=tolerance
    )
    assert (covariance_of(clip_of(student, context_t)) - teacher).abs().max() < 4 * tolerance
