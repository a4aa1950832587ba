"""Every preset on images and on clips with small networks: it runs, and only those who may receive
a gradient do.
"""

import copy
import math

import pytest
import torch
from torch import nn

from streamvid.core.adversary import FeatureHeads, generator_loss
from streamvid.core.process import add_noise, expand_time
from streamvid.objectives import all_presets
from streamvid.objectives.base import Context
from streamvid.objectives.preferences import distillation_dpo, teacher_refinement

IMAGE, CLIP = (4, 6, 6), (4, 3, 4, 4)
# gradients pass the inputs of fake score and teacher
THROUGH_BOTH = {"sid", "sid_lsg", "few_step_sid", "sida"}
THROUGH_CRITIC = THROUGH_BOTH | {"adm", "dmdx"}  # of the fake score


class Net(nn.Module):
    """A convolution of each frame that knows t, s and the prompt."""

    def __init__(self):
        super().__init__()
        self.conv, self.prompt, self.time = (
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Embedding(3, 4),
            nn.Linear(2, 4),
        )

    def features(self, x, t, s, cond):
        index = torch.full((len(x),), 2) if cond is None else cond
        shift = self.prompt(index) + self.time(torch.stack([t, s], 1))
        shift = shift.reshape(len(x), 4, *[1] * (x.ndim - 2))
        frames = x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x
        mixed = self.conv(frames)
        if x.ndim == 5:
            mixed = mixed.unflatten(0, (len(x), -1)).transpose(1, 2)
        return torch.tanh(mixed + shift)

    def forward(self, x, t, s, cond):
        return self.features(x, t, s, cond)


class Networks:
    """As ``objectives.base.Networks``."""

    def __init__(self, preset):
        torch.manual_seed(0)
        nets = {
            name: Net()
            for name in (
                "student",
                "average",
                "lagged",
                "start",
                "teacher",
                "critic",
                "second_critic",
            )
        }
        self.nets = nets
        self.heads = FeatureHeads([4], preset.heads, preset.num_logits, hidden=8)
        for name in ("student", "average", "lagged", "start"):
            setattr(self, name, nets[name])
        for name in ("teacher", "second_critic"):
            setattr(self, name, lambda x, t, cond, net=nets[name]: net(x, t, t, cond))
        self.critic = lambda x, t, cond, made_at: nets["critic"](x, t, made_at, cond)

    def features(self, x, t, cond):
        return self.nets["start"].features(x, t, t, cond).flatten(2).mean(2)

    def logits(self, x, t, cond):
        return self.heads([self.nets["start"].features(x, t, t, cond)], t)

    def parameters(self, phase):
        """What the phase trains."""
        own = {"student": ["student"], "critic": ["critic", "second_critic"], "disc": []}[phase]
        return [p for name in own for p in self.nets[name].parameters()] + (
            list(self.heads.parameters()) if phase == "disc" else []
        )

    def everything(self):
        return [
            *(p for net in self.nets.values() for p in net.parameters()),
            *self.heads.parameters(),
        ]


def context(preset, shape, progress=0.7, seed=0):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda cond: torch.randn(len(cond), *shape, generator=rng)
    return Context(
        networks=Networks(preset),
        cond=torch.tensor([0, 1, 0, 1]),
        shape=shape,
        rng=rng,
        preset=preset,
        data=draw,
        pairs=lambda cond: (draw(cond), draw(cond)),
        reward=lambda x, cond: x.flatten(1).mean(1),
        progress=progress,
    )


def cases():
    return [(name, scale) for name in all_presets() for scale in (1.0, 2.0)]


@pytest.mark.parametrize("shape", [IMAGE, CLIP], ids=["image", "clip"])
@pytest.mark.parametrize("name, scale", cases())
def test_a_phase_trains_its_own_network(name, scale, shape):
    """Its loss is finite, all its network's parameters that matter get a gradient, and nobody
    else's do.
    """
    preset = all_presets()[name](scale)
    if not preset.on_points and shape == IMAGE:
        return
    for phase in ("student", "critic", "disc"):
        loss = getattr(preset, phase)
        if loss is None:
            continue
        for seed in range(3):  # whatever step or branch is drawn
            ctx = context(preset, shape, seed=seed)
            own = {id(p) for p in ctx.networks.parameters(phase)}
            for p in ctx.networks.everything():
                p.requires_grad_(id(p) in own)
            value = loss(ctx)
            assert value.ndim == 0 and torch.isfinite(value)
            value.backward()
            touched = [p for p in ctx.networks.everything() if p.grad is not None]
            assert touched and all(id(p) in own for p in touched)
            assert any(p.grad.abs().sum() > 0 for p in touched)


@pytest.mark.parametrize("name", sorted(set(all_presets()) - {"flow_dmd"}))
def test_who_could_get_a_gradient(name):
    """With every parameter listening, the student's loss reaches the fake score only where the
    method says that it passes through its input, and never the teacher's parameters except
    there.
    """
    preset = all_presets()[name](1.0)
    ctx = context(preset, IMAGE)
    preset.student(ctx).backward()
    heard = lambda net: any(
        p.grad is not None and p.grad.abs().sum() > 0 for p in ctx.networks.nets[net].parameters()
    )
    assert heard("student")
    assert heard("critic") == (name in THROUGH_CRITIC)
    assert heard("teacher") == (name in THROUGH_BOTH)
    assert not heard("average") or name == "ctm"  # CTM's way from s to 0
    assert not heard("lagged") and not heard("second_critic")


def test_an_unguided_batch_draws_no_scale():
    """Guidance 1 runs no second pass and leaves the noise stream alone."""
    preset = all_presets()["dmd"](1.0)
    ctx = context(preset, IMAGE)
    calls = []
    teacher = ctx.networks.teacher
    ctx.networks.teacher = lambda x, t, cond: calls.append(cond) or teacher(x, t, cond)
    before = ctx.rng.get_state()
    x = torch.randn(4, *IMAGE)
    ctx.real(x, torch.full((4,), 0.5))
    assert len(calls) == 1 and torch.equal(ctx.rng.get_state(), before)


def test_f_distill_with_the_reverse_divergence_is_dmd_and_its_game():
    """h = 1: the direction of DMD2, bit for bit."""
    from streamvid.objectives import score

    one, two = score.f_distill(1.0, divergence="rkl"), score.dmd2(1.0)
    losses = []
    for preset in (one, two):
        ctx = context(score.dmd2(1.0) if preset is two else preset, IMAGE)
        ctx.preset = one  # one step for both
        losses.append(preset.student(ctx))
    assert torch.equal(*losses)


def test_uni_dad_without_its_second_teacher_is_dmd2():
    from streamvid.objectives import score

    preset = score.uni_dad(2.0, source=1.0, target=0.0)
    ours, theirs = (p.student(context(p, IMAGE)) for p in (preset, score.dmd2(2.0)))
    assert torch.equal(ours, theirs)


def test_backward_simulation_ends_anywhere_with_gradient_on_the_last_step_only():
    preset = all_presets()["tdm"](1.0)
    ctx = context(preset, IMAGE)
    found = {ctx.sample().index for _ in range(40)}
    assert found == {0, 1, 2, 3}
    sample = ctx.sample(2)
    assert sample.x.requires_grad and not sample.x_t.requires_grad
    assert sample.t.tolist() == [0.5] * 4


def test_distillation_plus_plus_at_weight_zero_asks_nobody():
    ctx = context(all_presets()["dmd"](1.0), IMAGE)
    ctx.networks.teacher = None
    before, x0 = ctx.rng.get_state(), torch.randn(4, *IMAGE)
    assert teacher_refinement(ctx, x0, torch.full((4,), 0.5), 0.0) is x0
    assert torch.equal(ctx.rng.get_state(), before)
    ctx = context(all_presets()["dmd"](1.0), IMAGE)
    # a teacher that is sure of 7
    ctx.networks.teacher = lambda x, t, cond: (x - 7.0) / expand_time(t, x)
    mixed = teacher_refinement(ctx, x0, torch.full((4,), 0.5), 0.25)
    torch.testing.assert_close(mixed, 0.75 * x0 + 0.25 * 7.0, rtol=1e-5, atol=1e-5)


def test_every_row_of_the_table_is_there_and_documented():
    presets = all_presets()
    assert len(presets) >= 45
    for name, make in presets.items():
        assert make.__doc__, name
        assert make(1.0).paper.count(".") == 1 and 1 <= make(2.0).steps <= 4


def test_the_student_learns_from_the_heads_it_is_shown():
    """A game on features alone moves a sample to what the heads call real."""
    preset = all_presets()["ladd"](1.0)
    ctx = context(preset, IMAGE)
    x = torch.randn(4, *IMAGE, requires_grad=True)
    t = torch.full((4,), 0.3)
    noised = lambda x: add_noise(x, torch.zeros_like(x), t)
    before = generator_loss("hinge", ctx.logits(noised(x), t))
    (slope,) = torch.autograd.grad(before, x)
    after = generator_loss("hinge", ctx.logits(noised(copy.copy(x.detach()) - 50 * slope), t))
    assert after < before


def test_the_fake_score_is_told_which_step_made_a_sample():
    """One fit to the mixture of all steps' outputs can be right while every step is wrong."""
    from dataclasses import replace

    for knows, seen in ((True, {1.0, 0.75, 0.5, 0.25}), (False, {1.0})):
        preset = replace(all_presets()["tdm"](1.0), critic_knows_step=knows)
        told = set()
        for seed in range(30):
            ctx = context(preset, IMAGE, seed=seed)
            critic = ctx.networks.critic
            ctx.networks.critic = lambda x, t, cond, made_at, net=critic: (
                told.update(made_at.tolist()) or net(x, t, cond, made_at)
            )
            preset.critic(ctx)
            preset.student(ctx)
        assert told == seen


def test_a_loser_that_is_far_is_drawn_back_and_one_that_is_near_pushed_off():
    """Pushed whatever the distance, half of the samples had no end to go to: the row diverged."""

    def gradient(eta, stop):
        preset = distillation_dpo(eta=eta, stop=stop)
        ctx = context(preset, IMAGE)
        preset.student(ctx).backward()
        return torch.cat(
            [p.grad.flatten() for p in ctx.networks.parameters("student") if p.grad is not None]
        )

    winners = gradient(0.0, math.inf)
    pushed, drawn = gradient(0.2, math.inf) - winners, gradient(0.2, 0.0) - winners
    assert drawn.norm() > 1e-6
    torch.testing.assert_close(pushed, -0.2 * drawn, rtol=1e-3, atol=1e-6)
