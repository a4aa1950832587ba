"""Every objective on images and on clips with small networks: it runs, it asks for what it says,
and only those who may receive a gradient do.
"""

import copy
import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from streamvid.core.adversary import FeatureHeads, generator_loss
from streamvid.core.process import add_noise
from streamvid.objectives import all_objectives, find_objective
from streamvid.objectives.base import NETWORKS, parts_of
from streamvid.objectives.dmd import DMD
from streamvid.objectives.preferences import DistillationDPO
from streamvid.objectives.score import DMD2, FDistill, FlashDMD, UniDAD
from streamvid.rollout.schedule import StreamConfig
from streamvid.settings.plane import PlaneStep
from streamvid.settings.targets import ring
from streamvid.studies.plane import for_target

IMAGE = (4, 6, 6)
CLIP = (4, 3, 4, 4)
# gradients pass the inputs of fake score and teacher
THROUGH_BOTH = {"sid", "sid_lsg", "few_step_sid", "sida"}
THROUGH_FAKE_SCORE = THROUGH_BOTH | {"adm", "dmdx"}


class Net(nn.Module):
    """A convolution of each frame that knows t, s and the prompt."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.prompt = nn.Embedding(3, 4)
        self.time = nn.Linear(2, 4)

    def forward(self, x, t, s, cond):
        index = torch.full((len(x),), 2) if cond is None else cond
        shift = self.prompt(index) + self.time(torch.stack([t, s], 1))
        shift = shift.reshape(len(x), 4, *[1] * (x.ndim - 2))
        frames = x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x
        mixed = self.conv(frames)
        if x.ndim == 5:
            mixed = mixed.unflatten(0, (len(x), -1)).transpose(1, 2)
        return torch.tanh(mixed + shift)


class ConvLab:
    """As ``settings.plane.Laboratory``, for samples of any shape."""

    def __init__(self, objective, shape):
        torch.manual_seed(0)
        self.shape = shape
        names = ("student", "average", "lagged", "start", "teacher", "fake_score", "second")
        self.nets = {name: Net() for name in names}
        self.heads = FeatureHeads(
            [4], objective.heads, objective.num_logits_for(objective.num_steps), hidden=8
        )

    @property
    def trained(self):
        return {**self.nets, "discriminator": self.heads}

    def mean_velocity(self, name, x, t, s, cond):
        return self.nets[name](x, t, s, cond)

    def teacher(self, x, t, cond):
        return self.nets["teacher"](x, t, t, cond)

    def fake_score(self, x, t, cond, made_at):
        return self.nets["fake_score"](x, t, made_at, cond)

    def second_fake_score(self, x, t, cond):
        return self.nets["second"](x, t, t, cond)

    def features(self, x, t, cond):
        return self.nets["start"](x, t, t, cond).flatten(2).mean(2)

    def logits(self, x, t, cond):
        return self.heads([self.nets["start"](x, t, t, cond)], t)

    def data(self, cond, rng):
        return torch.randn(len(cond), *self.shape, generator=rng)

    def pairs(self, cond, rng):
        return self.data(cond, rng), self.data(cond, rng)

    def reward(self, x, cond):
        return x.flatten(1).mean(1)

    def parameters(self, name):
        own = [self.trained[name]] + ([self.nets["second"]] if name == "fake_score" else [])
        return [p for net in own for p in net.parameters()]

    def everything(self):
        return [p for net in self.trained.values() for p in net.parameters()]


def make(name, scale):
    return for_target(find_objective(name), replace(ring(), scale=scale))


def total(loss):
    return sum(make_part() for make_part in parts_of(loss))


def new_step(objective, shape, progress=0.7, seed=0, kind=PlaneStep):
    rng = torch.Generator().manual_seed(seed)
    cond = torch.tensor([0, 1, 0, 1])
    return kind(ConvLab(objective, shape), objective, "student", cond, rng, progress)


POINTS = [name for name, kind in all_objectives().items() if kind.on_points]
"""The others need what only a causal student's clips have; they have tests of their own."""


def cases():
    shapes = {"image": IMAGE, "clip": CLIP}
    return [
        pytest.param(name, scale, shape, id=f"{name}-{scale}-{label}")
        for name in POINTS
        for scale in (1.0, 2.0)
        for label, shape in shapes.items()
    ]


@pytest.mark.parametrize("name, scale, shape", cases())
def test_a_turn_trains_its_own_network(name, scale, shape):
    """Its loss is finite, its network gets a gradient, and nobody else does."""
    objective = make(name, scale)
    for network in objective.networks():
        for seed in range(3):  # whatever step or branch is drawn
            step = new_step(objective, shape, seed=seed)
            own = {id(p) for p in step.lab.parameters(network)}
            for p in step.lab.everything():
                p.requires_grad_(id(p) in own)
            step.turn = network
            loss = total(getattr(objective, network)(step))
            assert loss.ndim == 0 and torch.isfinite(loss)
            loss.backward()
            touched = [p for p in step.lab.everything() if p.grad is not None]
            assert touched and all(id(p) in own for p in touched)
            assert any(p.grad.abs().sum() > 0 for p in touched)


@pytest.mark.parametrize("name", POINTS)
def test_who_could_get_a_gradient(name):
    """With every parameter listening, the student's loss reaches the fake score only where the
    method says that it passes through its input, and never the teacher's parameters except there.
    """
    objective = make(name, 1.0)
    step = new_step(objective, IMAGE)
    total(objective.student(step)).backward()

    def heard(network):
        return any(
            p.grad is not None and p.grad.abs().sum() > 0
            for p in step.lab.nets[network].parameters()
        )

    assert heard("student")
    assert heard("fake_score") == (name in THROUGH_FAKE_SCORE)
    assert heard("teacher") == (name in THROUGH_BOTH)
    assert not heard("average") or name == "ctm"  # CTM's way from s to 0
    assert not heard("lagged") and not heard("second")


OWN_TRUNK = {"asd", "afd"}
"""Their discriminators read the fake score, or a copy of the student."""


class NotingStep(PlaneStep):
    """Notes what is asked of it, in the words of ``Objective.needs``."""

    def __init__(self, *args):
        self.asked = set()
        self.landings = set()
        super().__init__(*args)
        self.velocity_of = self.lab.mean_velocity
        self.lab.mean_velocity = self.note_velocity

    def note_velocity(self, name, x, t, s, cond):
        if name != "student":
            self.asked.add(name)
        if bool((s == 0).all()):
            self.landings.add("data")
        else:
            self.landings.add("here" if torch.equal(s, t) else "between")
        return self.velocity_of(name, x, t, s, cond)

    @property
    def group(self):
        self.asked.add("group")
        return self.cond

    @group.setter
    def group(self, value):
        pass

    def data(self):
        self.asked.add("clips")
        return super().data()

    def teacher_samples(self):
        self.asked.add("clips")
        return super().teacher_samples()

    def pairs(self):
        self.asked.add("pairs")
        return super().pairs()

    def reward(self, x):
        self.asked.add("reward")
        return super().reward(x)

    def teacher_velocity(self, x_t, t, prompted=True):
        self.asked.add("score")
        return super().teacher_velocity(x_t, t, prompted)

    def second_velocity(self, x_t, t):
        self.asked.add("second")
        return super().second_velocity(x_t, t)

    def logits(self, *args):
        if self.objective.name not in OWN_TRUNK:
            self.asked.add("features")
        return super().logits(*args)

    def features(self, x_t, t):
        self.asked.add("features")
        return super().features(x_t, t)


@pytest.mark.parametrize("name", POINTS)
def test_it_needs_exactly_what_it_asks_for(name):
    """Told more, a setting would make copies, stores and heads for nobody; told less, it fails on
    the way.
    """
    objective = make(name, 2.0)
    asked, landings = set(), set()
    for progress in (0.0, 0.7):
        for seed in range(4):
            step = new_step(objective, IMAGE, progress, seed, NotingStep)
            for network in objective.networks():
                step.turn = network
                total(getattr(objective, network)(step))
            asked |= step.asked
            landings |= step.landings
    if "between" in landings or len(landings) > 1:
        asked.add("jumps")
    assert asked == objective.needs


@pytest.mark.parametrize("name", POINTS)
def test_every_objective_takes_all_its_turns(name):
    """Each network within a cycle, the fake score as often as its option says, in one order."""
    objective = make(name, 1.0)
    count = getattr(objective, "fake_updates_per_student", 1)
    turns = [objective.turns(step) for step in range(2 * count)]
    every = [turn for each in turns for turn in each]
    networks = objective.networks()
    assert set(every) == set(networks) and networks[-1] == "student"
    assert every.count("student") == (2 if "fake_score" in networks else 2 * count)
    if "fake_score" in networks:
        assert every.count("fake_score") == 2 * count
    assert all(list(each) == [n for n in NETWORKS if n in each] for each in turns)


def test_a_warm_up_is_the_fake_scores_alone():
    objective = DMD2(student_start_step=4, fake_updates_per_student=1)
    assert [objective.turns(step) for step in (0, 3)] == [("fake_score",)] * 2
    assert objective.turns(4) == ("fake_score", "discriminator", "student")


def test_an_unguided_batch_draws_no_scale():
    """Guidance 1 runs no second pass and leaves the noise stream alone."""
    step = new_step(make("dmd", 1.0), IMAGE)
    calls = []
    teacher = step.lab.teacher
    step.lab.teacher = lambda x, t, cond: calls.append(cond) or teacher(x, t, cond)
    before = step.rng.get_state()
    step.real(torch.randn(4, *IMAGE), step.full(0.5))
    assert len(calls) == 1 and torch.equal(step.rng.get_state(), before)


def test_f_distill_with_the_reverse_divergence_is_dmd_and_its_game():
    """h = 1: the direction of DMD2, bit for bit."""
    one = FDistill(divergence="rkl", shift=1.0)
    ours = one.student(new_step(one, IMAGE))
    theirs = DMD2(shift=1.0).student(new_step(one, IMAGE))  # one step for both
    assert torch.equal(ours, theirs)


def test_uni_dad_without_its_second_teacher_is_dmd2():
    one, two = UniDAD(source=1.0, target=0.0), DMD2()
    assert torch.equal(one.student(new_step(one, IMAGE)), two.student(new_step(two, IMAGE)))


def test_backward_simulation_ends_anywhere_with_gradient_on_the_last_step_only():
    step = new_step(make("tdm", 1.0), IMAGE)
    assert {step.sample().index for _ in range(40)} == {0, 1, 2, 3}
    sample = step.sample(2)
    assert sample.x.requires_grad and not sample.x_t.requires_grad
    assert sample.t.tolist() == [0.5] * 4


def test_backward_simulation_renoises_to_the_next_steps_level():
    """With a student whose data prediction is 0, the state that a step predicts from is noise of
    that step's level.
    """
    step = new_step(make("tdm", 1.0), IMAGE)
    step.mean_velocity = lambda name, x, t, s: x / t.reshape(-1, 1, 1, 1)
    for index, level in enumerate((1.0, 0.75, 0.5, 0.25)):
        states = torch.stack([step.sample(index).x_t for _ in range(20)])
        assert float(states.std()) == pytest.approx(level, rel=0.05)
        assert step.sample(index).t.tolist() == [level] * 4


def test_every_objective_is_documented():
    """It has a name, a paper and a line about itself, and so has each of its options."""
    for name, kind in all_objectives().items():
        assert (
            kind.name == name and kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")
        )
        assert kind.paper.count(".") == 1 and 1 <= kind.num_steps <= 4
        assert kind().note == kind().note.strip()


def test_an_unknown_objective_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="menflow.*did you mean meanflow?"):
        find_objective("menflow")


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("dmd2", {"gan": -1.0}, "dmd2: gan=-1.0, expected at least 0"),
        ("sid", {"alpha": 3.0}, "sid: alpha=3.0, expected 0 to 2"),
        ("dmd", {"normalizer": "batch"}, "normalizer='batch', expected 'sample' or 'none'"),
        ("f_distill", {"divergence": "tv"}, "tv"),
        ("scott", {"eta": 1.5}, "scott: eta=1.5, expected 0 to 1"),
        ("cd", {"low": 0.5, "high": 0.2}, "expected 0 <= low < high <= 1"),
        ("cd", {"shift": 0.0}, "shift=0.0, expected a positive number"),
        ("dmd", {"fake_updates_per_student": 0}, "expected at least 1"),
    ],
)
def test_an_option_out_of_its_range_is_refused(name, options, said):
    with pytest.raises(ValueError) as error:
        find_objective(name)(**options)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_pso_needs_a_next_step():
    for fits in (StreamConfig(num_steps=2), StreamConfig(step_table=((1.0,), (1.0, 0.5)))):
        find_objective("pso")().check_stream(fits, 2)
    for short in (StreamConfig(num_steps=1), StreamConfig(step_table=((1.0, 0.5), (1.0,)))):
        with pytest.raises(ValueError, match="chunks of 1 step have no next state, which pso"):
            find_objective("pso")().check_stream(short, 2)


def numeric_options():
    own = {field.name for field in dataclasses.fields(DMD)}
    return [
        (name, field.name)
        for name, kind in all_objectives().items()
        for field in dataclasses.fields(kind)
        if field.name not in own and field.type in ("float", "int")
    ]


@pytest.mark.parametrize("name, option", numeric_options())
def test_every_number_has_bounds(name, option):
    with pytest.raises(ValueError, match=option):
        find_objective(name)(**{option: -1})


def test_the_student_learns_from_the_heads_it_is_shown():
    """A game on features alone moves a sample to what the heads call real."""
    step = new_step(make("ladd", 1.0), IMAGE)
    x = torch.randn(4, *IMAGE, requires_grad=True)
    t = step.full(0.3)
    noised = lambda x: add_noise(x, torch.zeros_like(x), t)
    before = generator_loss("hinge", step.logits(noised(x), t))
    (slope,) = torch.autograd.grad(before, x)
    after = generator_loss("hinge", step.logits(noised(copy.copy(x.detach()) - 50 * slope), t))
    assert after < before


def test_the_fake_score_is_told_which_step_made_a_sample():
    """One fit to the mixture of all steps' outputs can be right while every step is wrong."""
    objective = make("tdm", 1.0)
    told = set()
    for seed in range(30):
        step = new_step(objective, IMAGE, seed=seed)
        fake_score = step.lab.fake_score
        step.lab.fake_score = lambda x, t, cond, made_at, net=fake_score: (
            told.update(made_at.tolist()) or net(x, t, cond, made_at)
        )
        objective.fake_score(step)
        objective.student(step)
    assert told == {1.0, 0.75, 0.5, 0.25}


def test_flash_dmd_pulls_its_fake_score_after_the_student():
    objective = FlashDMD(keep=0.75)
    step = new_step(objective, IMAGE)
    fake, student = step.lab.nets["fake_score"].conv.weight, step.lab.nets["student"].conv.weight
    expected = 0.75 * fake.detach().clone() + 0.25 * student.detach()
    objective.after_student(step)
    torch.testing.assert_close(fake.detach(), expected)


def test_a_loser_that_is_far_is_drawn_back_and_one_that_is_near_pushed_off():
    """Pushed whatever the distance, half of the samples had no end to go to: the row diverged."""

    def gradient(eta, stop):
        objective = DistillationDPO(guidance_scale=1.0, eta=eta, stop=stop)
        step = new_step(objective, IMAGE)
        objective.student(step).backward()
        return torch.cat(
            [p.grad.flatten() for p in step.lab.parameters("student") if p.grad is not None]
        )

    winners = gradient(0.0, math.inf)
    pushed, drawn = gradient(0.2, math.inf) - winners, gradient(0.2, 0.0) - winners
    assert drawn.norm() > 1e-6
    torch.testing.assert_close(pushed, -0.2 * drawn, rtol=1e-3, atol=1e-6)
