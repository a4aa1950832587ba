"""The smallest student with a cache; elementwise, so that a batch of one is bitwise a part of a
batch.
"""

from types import SimpleNamespace

import pytest
import torch


class FakeCache:
    """Committed frames, kept as they come: a graph that the loop forgets to cut would stay in
    here.
    """

    def __init__(self):
        self.frames = []

    def append(self, kv):
        self.frames.append(kv)

    def summary(self):
        """Depends on every committed frame and on their order."""
        return sum((i + 1) * k.mean(dim=2, keepdim=True) for i, (k, v) in enumerate(self.frames))


class FakeStudent(torch.nn.Module):
    """A nonlinear velocity of the frames, their times, their prompt and the context."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7))
        # reaches an output through the context only
        self.key = torch.nn.Parameter(torch.tensor(0.3))
        self.calls = []  # (latent frames, timestep, what)

    def forward(self, hidden_states, timestep, cond, cache=None, return_kv=False):
        self.calls.append((hidden_states.shape[2], timestep.tolist(), "denoise"))
        t = (
            timestep.reshape(*timestep.shape, *[1] * (2 - timestep.ndim))[:, None, :, None, None]
            / 1000
        )
        prompt = cond.mean(dim=(1, 2)).reshape(-1, 1, 1, 1, 1)
        context = cache.summary() if cache is not None and cache.frames else 0
        joint = hidden_states.mean(dim=2, keepdim=True)  # frames of one forward see each other
        sample = torch.tanh(self.weight * hidden_states + 0.1 * joint + context + prompt) * (
            0.5 + t
        )
        kv = (self.key * hidden_states + t, hidden_states)
        return SimpleNamespace(sample=sample, kv=kv if return_kv else None)

    def new_cache(self, batch_size, height, width, **policy):
        return FakeCache()

    def commit(self, latents, timestep, cond, cache):
        cache.append(self(latents, timestep, cond, cache=cache, return_kv=True).kv)
        self.calls[-1] = (*self.calls[-1][:2], "commit")


@pytest.fixture
def student():
    return FakeStudent()


@pytest.fixture
def cond():
    return torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
