"""The smallest networks that a method takes: students of numbers, and scores that are exact."""

from types import SimpleNamespace

import torch
from torch import nn

from streamvid.core.process import expand_time
from streamvid.seeding import keyed_normal
from streamvid.teachers.analytic import AnalyticTeacher

TINY_WAN = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
)


class Ar1Student(nn.Module):
    """Frames x_1 = mean + s z_1, x_{k+1} = mean + a (x_k - mean) + b z; the cache is a list of
    committed chunks.
    """

    def __init__(self, a=0.1, b=0.5, s=1.5, mean=0.0):
        super().__init__()
        self.a, self.b, self.s, self.mean = (
            nn.Parameter(torch.tensor(float(p))) for p in (a, b, s, mean)
        )

    def forward(self, hidden_states, timestep, encoder_hidden_states, cache):
        x0 = self.mean + self.s * hidden_states
        if cache:
            x0 = self.mean + self.a * (cache[-1] - self.mean) + self.b * hidden_states
        return SimpleNamespace(
            sample=(hidden_states - x0) / expand_time(timestep / 1000, hidden_states)
        )

    def new_cache(self, batch_size, height, width, **policy):
        return []

    def commit(self, latents, timestep, encoder_hidden_states, cache):
        cache.append(latents)


class ClipStudent(nn.Module):
    """Whose clip is its parameter ``[B, C, T, h, w]``; it counts its chunks by its commits."""

    def __init__(self, clip):
        super().__init__()
        self.clip = nn.Parameter(clip)
        self.calls = []  # (chunk, whether gradient flows)

    def forward(self, hidden_states, timestep, encoder_hidden_states, cache):
        frames = hidden_states.shape[2]
        self.calls.append((len(cache), torch.is_grad_enabled()))
        x0 = self.clip[:, :, len(cache) * frames : (len(cache) + 1) * frames]
        return SimpleNamespace(
            sample=(hidden_states - x0) / expand_time(timestep / 1000, hidden_states)
        )

    new_cache, commit = Ar1Student.new_cache, Ar1Student.commit


class ScoreOf(nn.Module):
    """A teacher in the call of a fake score, with a weight to train; keeps what it is given."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.weight = teacher, nn.Parameter(torch.tensor(1.0))
        self.inputs, self.grad_modes = [], []

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=False):
        self.inputs.append((hidden_states, timestep / 1000))
        self.grad_modes.append(torch.is_grad_enabled())
        return (
            self.weight
            * self.teacher.predict(hidden_states, timestep / 1000, encoder_hidden_states),
        )


def ar1_covariance(rho, frames):
    index = torch.arange(frames)
    return rho ** (index[:, None] - index[None]).abs().double()


def ar1_teacher(rho, frames, prompt_means=None):
    """The process with unit variance, one number a frame."""
    means = {prompt: torch.full((1, frames, 1, 1), m) for prompt, m in (prompt_means or {}).items()}
    return AnalyticTeacher(torch.zeros(1, frames, 1, 1), ar1_covariance(rho, frames), means)


def prompt_batch(teacher, keys, prompt=""):
    return {"cond": teacher.encode_prompt([prompt] * len(keys)), "keys": list(keys)}


def noise(*shape, seed=0):
    return keyed_normal(shape, "test", seed)


def run_turn(method, batch, turn, step=0):
    """As the trainer does it: only the turn's own parameters require gradients."""
    for name, network in method.networks().items():
        network.requires_grad_(name == turn)
        network.zero_grad(set_to_none=True)
    loss, numbers = method.loss(turn, batch, step)
    loss.backward()
    return {
        name: {k: p.grad for k, p in n.named_parameters()} for name, n in method.networks().items()
    }, numbers
