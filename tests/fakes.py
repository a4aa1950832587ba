"""The smallest networks that an objective takes: students of numbers, and scores that are exact."""

import math
from types import SimpleNamespace

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from streamvid.core.process import expand_time
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.jump_embedding import add_jump_embedding
from streamvid.objectives import find_objective
from streamvid.rollout.schedule import StreamConfig
from streamvid.seeding import keyed_normal
from streamvid.settings.rollouts import RolloutConfig
from streamvid.settings.video import VideoSetting
from streamvid.teachers.analytic import AnalyticTeacher
from streamvid.teachers.wan import WanTeacher

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
ONE_STEP = StreamConfig(num_steps=1, chunk_frames=1)
FOUR_STEPS = StreamConfig(num_steps=4, chunk_frames=1)


class Ar1Student(nn.Module):
    """Frames x_1 = mean + s z_1, x_{k+1} = mean + a (x_k - mean) + b z; the cache is a list of
    committed chunks.
    """

    def __init__(self, a=0.1, b=0.5, s=1.5, mean=0.0):
        super().__init__()
        self.a, self.b, self.s, self.mean = (
            nn.Parameter(torch.tensor(float(p))) for p in (a, b, s, mean)
        )

    def forward(self, hidden_states, timestep, cond, cache):
        x0 = self.mean + self.s * hidden_states
        if cache:
            x0 = self.mean + self.a * (cache[-1] - self.mean) + self.b * hidden_states
        return SimpleNamespace(
            sample=(hidden_states - x0) / expand_time(timestep / 1000, hidden_states)
        )

    def new_cache(self, batch_size, height, width, **policy):
        return []

    def commit(self, latents, timestep, cond, cache):
        cache.append(latents)


class ClipStudent(nn.Module):
    """Whose clip is its parameter ``[B, C, T, h, w]``; it counts its chunks by its commits."""

    def __init__(self, clip):
        super().__init__()
        self.clip = nn.Parameter(clip)
        self.calls = []  # (chunk, whether gradient flows)

    def forward(self, hidden_states, timestep, cond, cache):
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

    def forward(self, hidden_states, timestep, cond, return_dict=False):
        self.inputs.append((hidden_states, timestep / 1000))
        self.grad_modes.append(torch.is_grad_enabled())
        return (self.weight * self.teacher.predict(hidden_states, timestep / 1000, cond),)


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


def ar1_setting(
    name, student, fake=None, stream=ONE_STEP, rollout=None, frames=3, teacher=None, **options
):
    """An objective on clips of single numbers, without guidance; the fake score is the teacher,
    unless another is given.

    Args:
        rollout: of ``RolloutConfig``; ``num_chunks`` is ``frames``.
        options: of the objective, and "discriminator" and "as_image".
    """
    parts = {key: options.pop(key, None) for key in ("discriminator", "as_image")}
    teacher = ar1_teacher(0.8, frames) if teacher is None else teacher
    kind = find_objective(name)
    if "guidance_scale" in kind.__dataclass_fields__:
        options.setdefault("guidance_scale", 1.0)
    return VideoSetting(
        kind(**options),
        student,
        stream,
        (1, 1, 1),
        teacher=teacher,
        rollout=RolloutConfig(**{"num_chunks": frames, **(rollout or {})}),
        fake_score=ScoreOf(teacher) if fake is None else fake,
        **parts,
    )


def wan_setting(name, stream, rollout=None, student=None, jumps=False, **options):
    """An objective with a causal Wan student and a Wan teacher, tiny and random.

    Args:
        rollout: of ``RolloutConfig``.
        student: makes another of the causal network.
        jumps: whether the student is told where to land.
    """
    torch.manual_seed(0)
    teacher = WanTeacher(WanTransformer3DModel(**TINY_WAN), None, shift=5.0)
    teacher.uncond = noise(5, 8)
    causal = CausalWanTransformer3DModel(**TINY_WAN)
    if jumps:
        add_jump_embedding(causal)
    return VideoSetting(
        find_objective(name)(**options),
        causal if student is None else student(causal),
        stream,
        (4, 4, 4),
        teacher=teacher,
        rollout=RolloutConfig(**(rollout or {})),
    )


def wan_batch(**more):
    """Two prompts for ``wan_setting``."""
    return {"cond": noise(2, 5, 8, seed=1), "keys": [7, 8], **more}


def rolled_out(setting, batch, step=0, turn="student", **exit):
    """The student's sample, as a turn's loss has it."""
    return setting.step_of(turn, batch, step).sample(**exit).x


def step_where(setting, turn, is_wanted, steps=300):
    """The first training step whose decision is such."""
    decisions = ((step, setting.step_of(turn, None, step).decide()) for step in range(steps))
    return next(step for step, decision in decisions if is_wanted(decision))


def gradients(setting, turn, batch, step=0):
    """Of the turn's network, by name; its numbers are finite."""
    loss, numbers = setting.loss(turn, batch, step)
    loss.backward()
    assert all(math.isfinite(number) for number in numbers.values())
    return {name: p.grad for name, p in setting.networks()[turn].named_parameters()}


def run_turn(setting, batch, turn, step=0):
    """As the trainer does it: only the turn's own parameters require gradients."""
    for name, network in setting.networks().items():
        network.requires_grad_(name == turn)
        network.zero_grad(set_to_none=True)
    loss, numbers = setting.loss(turn, batch, step)
    loss.backward()
    return {
        name: {k: p.grad for k, p in n.named_parameters()} for name, n in setting.networks().items()
    }, numbers
