"""A step of every objective points to the teacher, which a wrong sign does not.

The networks are exact ones of Gaussians (``gaussians.py``), so that a loss has no excuse: off the
teacher's law its gradient moves mean and width to it, and on it the gradient vanishes. What is
special about an objective is a row of a table, with its reason.
"""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch

from streamvid.core.process import x0_from_v
from streamvid.objectives import all_objectives
from streamvid.objectives.base import ScoreMatching
from streamvid.objectives.score import EMD, GNDM, TDM, SwiftBrush
from streamvid.settings.targets import ring
from streamvid.studies.plane import for_target
from tests.objectives.gaussians import TEACHER, GaussianLab, GaussianStep, flow_map, gradients

KINDS = {name: kind for name, kind in all_objectives().items() if kind.on_points}
MEAN = torch.tensor([0.4, 0.3, 0.0], dtype=torch.float64)
WIDTH = torch.tensor([0.0, 0.0, 0.4], dtype=torch.float64)
LIKES = torch.tensor([0.6, -0.8], dtype=torch.float64)
SURE = 4.5  # standard errors


@dataclass(frozen=True)
class Case:
    """How an objective is tested."""

    name: str
    options: dict = field(default_factory=dict)
    progress: float = 0.7
    settles: float = 0.02
    """The gradient that may be left at the teacher's law, against that off it."""
    width: str = "the teacher's"
    """Where the width goes."""
    number: int = 24
    """Batches, more where a loss takes one step of four at random."""

    def __str__(self):
        return "-".join([self.name, *self.options, f"{self.progress:.1f}"])

    def make(self, guidance_scale=1.0):
        objective = for_target(KINDS[self.name], replace(ring(), scale=guidance_scale))
        return replace(objective, **self.options)


EULER = {
    "lcm": 0.5,  # its distance is linear, so a small error weighs more
    **dict.fromkeys(("cd", "tcd", "tdd", "slam"), 0.25),
    **dict.fromkeys(("accvideo", "arcflow"), 0.2),
    **dict.fromkeys(("pcm", "scott"), 0.1),
}
"""The teacher's Euler steps stop a little short, and a flow map of them is a little narrow."""

SPECIAL = [
    # the residual has no fake score that holds the spread
    Case("sds", width="falls"),
    Case("add", width="falls a little", settles=0.02),
    # of all samples the denser ones win
    Case("pso", width="falls a little", settles=0.5),
    Case("pso", {"preference": 0.0}),
    # features of sets are noisy, and outweigh the rest at the published weight
    Case("embedding_loss", {"num_nets": 1}),
    Case("embedding_loss", {"weight": 0.001}),
    # losers are drawn as winners are: who wins is no question of direction
    Case("distillation_dpo", {"stop": 0.0}),
    # each term alone
    Case("tad_sr"),
    Case("tad_sr", {"regression": 0.0, "gan": 0.0}),
    Case("tad_sr", {"regression": 0.0}),
    Case("rdd", settles=0.25, number=64),
    Case("rdd", {"relation": 5.0}, settles=0.25, number=64),
    Case("rcm", {"matching": 20.0}),
    Case("boot", settles=0.2),
    Case("boot", {"boundary": 20.0}, settles=0.2),
    Case("afd"),
    Case("afd", {"policy": "gan"}),
    Case("twinflow"),
    Case("twinflow", {"short_step": 0.1}),
    Case("uni_dad", {"source": 0.0}),
    Case("uni_dad", {"target": 0.0}),
    Case("msd", progress=0.0),
    Case("msd"),
    Case("dmdx", progress=0.0),
    Case("dmdx"),
]
CASES = SPECIAL + [
    Case(name, settles=EULER.get(name, 0.02))
    for name in KINDS
    if name not in {case.name for case in SPECIAL}
]


def measure(case, lab, law, turn="student", guidance_scale=1.0):
    """Which way a step goes, ``[3]``, and its standard error."""
    number = case.number if lab.likes is None else 2 * case.number
    objective = case.make(guidance_scale)
    if case.name == "dmdx":
        lab.tells_steps = case.progress >= objective.share
    found = -gradients(objective, lab, law, turn, number, case.progress)
    return found.mean(0), found.std(0) / math.sqrt(number)


def student_step(case, student):
    lab = GaussianLab(case.make(), student)
    return measure(case, lab, lab.student_law)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_moves_mean_and_width_to_the_teachers(case):
    step, error = student_step(case, TEACHER + MEAN)
    towards = -MEAN / MEAN.norm()
    assert step @ towards > SURE * (error @ towards.abs())
    assert step[:2] @ towards[:2] > 0.95 * step[:2].norm()  # and nowhere else

    wide, wide_error = student_step(case, TEACHER + WIDTH)
    assert wide[2] < -SURE * wide_error[2]

    narrow, narrow_error = student_step(case, TEACHER - WIDTH)
    if case.width == "falls":
        assert narrow[2] < -SURE * narrow_error[2]
    else:
        assert narrow[2] > SURE * narrow_error[2]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_at_the_teachers_law_a_step_goes_nowhere(case):
    step, error = student_step(case, TEACHER)
    off_mean, _ = student_step(case, TEACHER + MEAN)
    off_width = (student_step(case, TEACHER + WIDTH)[0] - student_step(case, TEACHER - WIDTH)[0])[2]
    left = step.abs() - SURE * error
    assert (left[:2] < max(0.02, case.settles / 5) * off_mean[:2].norm()).all()
    if case.width == "falls":
        assert left[2] > 0
        return
    assert left[2] < case.settles * off_width.abs() / 2
    if case.width == "falls a little":
        assert step[2] < -SURE * error[2]


# ---- the players, one at a time ------------------------------------------------------------------

PLAYING = [case for case in CASES if "discriminator" in KINDS[case.name].networks()]
PLAYING = [case for case in PLAYING if case.options.get("gan") != 0.0]
REWARDED = [Case("pso", {"hold": 0.0})]


@pytest.mark.parametrize("case", PLAYING + REWARDED, ids=str)
def test_the_student_goes_where_it_is_liked(case):
    """All else is at rest, and the discriminator, or the reward, likes what is further along one
    direction.
    """
    if case.name == "msd" and case.progress == 0.0:
        pytest.skip("MSD's warm-up has no game")
    lab = GaussianLab(case.make(), TEACHER)
    lab.likes = LIKES
    step, error = measure(case, lab, lab.student_law)
    assert step[:2] @ LIKES > SURE * (error[:2] @ LIKES.abs())
    assert step[:2] @ LIKES > 0.9 * step[:2].norm()


class Improving(GaussianLab):
    """The student's second step lands where the teacher is, its first where its law is."""

    def mean_velocity(self, name, x, t, s, cond):
        if name == "student" and bool((t < 1).all()):
            return flow_map(self.teacher_law, x, t, s)
        return super().mean_velocity(name, x, t, s, cond)


@pytest.mark.parametrize("case", PLAYING, ids=str)
def test_the_discriminators_loss_falls_when_it_is_told_right(case):
    """The log ratio of the densities of reals and fakes, a tenth of it, and then some more."""
    # asd's reals are the student's own samples of one step more
    kind = Improving if case.name == "asd" else GaussianLab
    lab = kind(case.make(), TEACHER + MEAN)
    lab.confidence = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    step, error = measure(case, lab, lab.confidence, "discriminator")
    assert step > SURE * error


MATCHING = [case for case in CASES if issubclass(KINDS[case.name], ScoreMatching)]


@pytest.mark.parametrize("case", MATCHING, ids=str)
def test_the_fake_score_follows_the_student(case):
    """From another law it moves to the student's, and there it stays."""
    for offset in (MEAN, WIDTH, -WIDTH):
        if case.name == "distillation_dpo" and offset is not MEAN:
            continue  # winners are denser, a fake score of theirs is narrower
        lab = GaussianLab(case.make(), TEACHER, fake=TEACHER + offset)
        step, error = measure(case, lab, lab.fake_law, "fake_score")
        towards = -offset / offset.norm()
        assert step @ towards > SURE * (error @ towards.abs())
    lab = GaussianLab(case.make(), TEACHER)
    step, error = measure(case, lab, lab.fake_law, "fake_score")
    known = 2 if case.name == "distillation_dpo" else 3
    assert (step.abs() < SURE * error)[:known].all()


IDENTITY = {"sid", "sid_lsg", "few_step_sid", "sida", "rcm"}


BY_DIFFERENCE = [c for c in MATCHING if c.name not in IDENTITY and "num_nets" not in c.options]


@pytest.mark.parametrize("case", BY_DIFFERENCE, ids=str)
def test_the_student_leaves_where_the_fake_score_sees_too_much_of_it(case):
    """The student is right, its fake score is off by ``MEAN``: the student moves the other way.

    Not score identity, which takes the fake score's slope, too, for the student's.
    """
    if case.progress == 0.0:
        pytest.skip("a warm-up has no fake score")
    lab = GaussianLab(case.make(), TEACHER, fake=TEACHER + MEAN)
    step, error = measure(case, lab, lab.student_law)
    away = -MEAN / MEAN.norm()
    assert step @ away > SURE * (error @ away.abs())


# ---- guidance ------------------------------------------------------------------------------------

PLAIN = {"swiftbrush", "snoopi"}
"""One scale for both scores cancels: they settle at the plain prompt."""
GUIDED = [
    case
    for case in CASES
    if case.make().needs <= {"score", "clips", "average", "jumps", "group"}
    and case.progress != 0.0
    and case.name not in {"sds", "few_step_sid", "twinflow", "afd"}
]


@pytest.mark.parametrize("case", GUIDED, ids=str)
def test_where_a_guided_objective_settles(case):
    """Of equal widths, the guided teacher is a Gaussian whose mean is ``scale`` times the prompt's,
    measured from that of no prompt, which is 0.
    """
    scale = 2.0
    factor = torch.tensor([scale, scale, 1.0], dtype=torch.float64)
    guided = TEACHER * factor
    aim = TEACHER if case.name in PLAIN else guided
    objective = case.make(scale)
    fake = aim / factor if case.name == "sid_lsg" else aim  # its guided combination is fitted
    lab = GaussianLab(objective, aim, fake)
    lab.unprompted = torch.tensor([0.0, 0.0, float(TEACHER[2])], dtype=torch.float64)
    step, error = measure(case, lab, lab.student_law, guidance_scale=scale)
    if issubclass(KINDS[case.name], ScoreMatching):
        fit, fit_error = measure(case, lab, lab.fake_law, "fake_score", scale)
        assert (fit.abs() < SURE * fit_error)[:2].all()

    off = aim + MEAN
    lab_off = GaussianLab(objective, off, off / factor if case.name == "sid_lsg" else off)
    lab_off.unprompted = lab.unprompted
    away, away_error = measure(case, lab_off, lab_off.student_law, guidance_scale=scale)
    towards = -MEAN / MEAN.norm()
    assert away @ towards > SURE * (away_error @ towards.abs())
    assert (step[:2].abs() - SURE * error[:2] < 0.1 * away[:2].norm()).all()


def test_zero_guidance_of_few_step_sid_moves_beyond_the_prompt():
    """The fake score without the prompt stands for the student: guidance in disguise."""
    case = Case("few_step_sid")
    lab = GaussianLab(case.make(3.0), TEACHER)
    lab.unprompted = torch.tensor([0.0, 0.0, float(TEACHER[2])], dtype=torch.float64)
    step, error = measure(case, lab, lab.student_law, guidance_scale=3.0)
    outwards = TEACHER[:2] / TEACHER[:2].norm()
    assert step[:2] @ outwards > SURE * (error[:2] @ outwards.abs())


# ---- what a direction does not show --------------------------------------------------------------


def test_twinflow_moves_its_jump_from_the_fake_flow_to_the_real_one():
    """Jump and real flow are the teacher's, the flow at negative times is off by ``MEAN``."""
    case = Case("twinflow")
    for scale in (1.0, 2.0):
        lab = GaussianLab(case.make(scale), TEACHER)
        lab.unprompted = lab.teacher_law
        lab.velocity_law = TEACHER.clone().requires_grad_()
        lab.twin_law = (TEACHER + MEAN).requires_grad_()
        step, error = measure(case, lab, lab.student_law, guidance_scale=scale)
        away = -MEAN / MEAN.norm()
        assert step @ away > SURE * (error @ away.abs())
        twin, twin_error = measure(case, lab, lab.twin_law, guidance_scale=scale)
        assert twin @ away > SURE * (twin_error @ away.abs())
        lab.twin_law = TEACHER.clone().requires_grad_()
        twin, twin_error = measure(case, lab, lab.twin_law, guidance_scale=scale)
        assert (twin.abs() < SURE * twin_error).all()


def test_twinflows_secant_moves_the_jump_to_the_real_flow():
    """Real and fake flow are the teacher's: only the secant speaks, and where the jump is the
    teacher's, too, its mean rests.
    """
    case = Case("twinflow", {"short_step": 0.1}, number=96)

    def step_of(law):
        lab = GaussianLab(case.make(), law)
        lab.velocity_law = TEACHER.clone()
        lab.twin_law = TEACHER.clone()
        return measure(case, lab, lab.student_law)

    off, error = step_of(TEACHER + MEAN)
    towards = -MEAN / MEAN.norm()
    assert off @ towards > SURE * (error @ towards.abs())
    rest, error = step_of(TEACHER)
    assert (rest.abs() < SURE * error)[:2].all()


class Asked(GaussianStep):
    """Keeps where fake score and teacher were compared, and what they said."""

    def predictions(self, x_t, t):
        self.fake_said, self.real_said = super().predictions(x_t, t)
        self.t = t
        return self.fake_said, self.real_said


def test_tdm_compares_between_its_own_step_and_the_next():
    objective = TDM(guidance_scale=1.0, shift=1.0)
    for seed in range(12):
        step = Asked(GaussianLab(objective, TEACHER), objective, seed)
        samples = []
        sample = step.sample
        step.sample = lambda: samples.append(sample()) or samples[0]
        objective.student(step)
        begins = 1 - samples[0].index / 4
        low, high = max(begins - 0.25, 0.02), min(begins, 0.98)
        assert low <= float(step.t.min()) < low + 0.02
        assert high - 0.02 < float(step.t.max()) <= high


def test_gndm_divides_by_one_number_per_prompt():
    """Within a prompt the gradients keep the proportions of the score differences."""
    objective = GNDM(guidance_scale=1.0, shift=1.0)
    step = Asked(GaussianLab(objective, TEACHER + MEAN), objective, count=64)
    step.group = torch.arange(64) % 3
    x = step.sample().x.detach().requires_grad_()
    sample = step.sample()
    step.sample = lambda: replace(sample, x=x)
    (slope,) = torch.autograd.grad(objective.student(step), x)
    scales = ((step.fake_said - step.real_said) / (slope * x.numel())).flatten(1)
    for group in range(3):
        own = step.group == group
        expected = (x - step.real_said).abs().flatten(1).mean(1)[own].mean()
        torch.testing.assert_close(scales[own], expected.expand(int(own.sum()), 2))


def test_swiftbrushs_weights_are_those_of_variance_preserving_noise():
    """With alpha = (1 - t) / n and sigma = t / n, n^2 = t^2 + (1 - t)^2, the student's gradient is
    sigma^2 (eps_real - eps_fake), and the fake score's loss alpha^2 |eps_fake - eps|^2.
    """
    objective = SwiftBrush(guidance_scale=1.0, shift=1.0)
    step = Asked(GaussianLab(objective, TEACHER + MEAN), objective)
    x = step.sample().x.detach().requires_grad_()
    sample = step.sample()
    step.sample = lambda: replace(sample, x=x)
    (slope,) = torch.autograd.grad(objective.student(step), x)
    t = step.t[:, None, None, None]
    square = t**2 + (1 - t) ** 2
    eps_gap = (step.fake_said - step.real_said) * (1 - t) / t  # eps = (x_t - (1 - t) x0) / t
    torch.testing.assert_close(slope * x.numel(), t**2 / square * eps_gap)

    lab = GaussianLab(objective, TEACHER + MEAN, fake=TEACHER)
    loss = objective.fake_score(GaussianStep(lab, objective, seed=3))
    again = GaussianStep(lab, objective, seed=3)
    x = again.sample().x.detach()
    t = again.times()
    eps = again.noise()
    time = t[:, None, None, None]
    x_t = (1 - time) * x + time * eps
    guess = (x_t - (1 - time) * x0_from_v(x_t, again.fake_velocity(x_t, t), t)) / time
    alpha_square = (1 - time) ** 2 / (time**2 + (1 - time) ** 2)
    torch.testing.assert_close(loss, (alpha_square * (guess - eps).square()).mean())


def test_emd_with_one_step_and_a_held_z_is_dmd():
    """Its scale: DMD's plain direction, times (1 - t)^2, where the step on z is left out."""
    objective = EMD(guidance_scale=1.0, shift=1.0, num_langevin=1, gamma=0.001)
    lab = GaussianLab(objective, TEACHER + MEAN)
    emd = -gradients(objective, lab, lab.student_law, number=24).mean(0)

    def held(step):
        t = step.times(low=0.05, high=0.95)
        x = step.sample().x
        fake, real = step.predictions(step.noised(x, t), t)
        return ((1 - t)[:, None, None, None] ** 2 * (fake - real).detach() * x).mean()

    found = []
    for seed in range(24):
        (slope,) = torch.autograd.grad(held(GaussianStep(lab, objective, seed)), lab.student_law)
        found.append(-slope)
    dmd = torch.stack(found).mean(0)
    torch.testing.assert_close(emd[:2], dmd[:2], rtol=0.05, atol=0)


def test_emds_langevin_steps_carry_z_to_the_teacher():
    """Where they end, the student's samples are nearer to the teacher's than where they begin."""
    objective = EMD(guidance_scale=1.0, shift=1.0, num_langevin=8, gamma=0.3)
    step = GaussianStep(GaussianLab(objective, TEACHER + MEAN), objective, count=32768)
    jumped = []
    jump = step.jump
    step.jump = lambda *args: jumped.append(jump(*args)) or jumped[-1]
    objective.student(step)
    first, last = (jumped[i].detach().flatten(1).mean(0) for i in (0, -1))
    moved = (last - first) @ -MEAN[:2] / MEAN.norm()
    assert moved > 0.02
