"""A world in which everything is known: laws are Gaussians of the plane, and teacher, student, fake
score and discriminator are exact.

A *law* is a tensor ``[3]``, a mean and a logarithmic width, in float64. Of a law the noised
density, its velocity and its flow map have closed forms, so a student with these three numbers is a
generator of one step, of many steps, and a flow map.
"""

import torch

from streamvid.objectives.base import parts_of
from streamvid.settings.plane import PlaneStep

TEACHER = torch.tensor([0.7, -0.4, -0.5], dtype=torch.float64)


def spread(law, t):
    """The deviation of the noised law, ``[B]``."""
    return ((1 - t) ** 2 * (2 * law[2]).exp() + t**2).sqrt()


def flow_map(law, x, t, s):
    """The mean velocity of the law's probability flow from t to s; at s = t its velocity.

    The flow keeps ``(x - (1 - t) m) / spread``; this is ``(x_t - x_s) / (t - s)`` with the division
    done by hand.
    """
    t, s = t[:, None], s[:, None]
    mean, square = law[:2], (2 * law[2]).exp()
    at_t, at_s = spread(law, t), spread(law, s)
    slope = (t + s - square * (2 - t - s)) / (at_t * (at_t + at_s))
    return (slope * (x.flatten(1) - (1 - t) * mean) - mean).reshape(x.shape)


def log_normal(x, mean, deviation):
    """``[B]``, up to a constant."""
    square = (x.flatten(1) - mean).square().sum(1)
    return -square / (2 * deviation.flatten() ** 2) - x.shape[1] * deviation.flatten().log()


def log_density(law, x, t):
    """Of the noised law."""
    return log_normal(x, (1 - t)[:, None] * law[:2], spread(law, t))


class GaussianLab:
    """As ``settings.plane.Laboratory``.

    Args:
        objective: ADM has a discriminator of other states.
        student: the law of the student's samples.
        fake: the law that the fake score is of; None is the student's.
        teacher: the law of the teacher's samples, and of the data.
    """

    shape = (2, 1, 1)

    def __init__(self, objective, student=TEACHER, fake=None, teacher=TEACHER):
        self.objective = objective
        self.teacher_law = teacher
        self.student_law = student.clone().requires_grad_()
        self.velocity_law = self.student_law  # of TwinFlow's u(x, t, t)
        self.twin_law = self.student_law.detach().clone()  # of its u(x, -t, -t)
        self.fake_law = (student if fake is None else fake).clone().requires_grad_()
        self.second_law = self.fake_law.detach()
        self.unprompted = torch.zeros(3, dtype=torch.float64)
        self.confidence = torch.ones((), dtype=torch.float64, requires_grad=True)
        self.tells_steps = objective.name == "adm"  # whether logits are of Euler steps
        self.likes = None  # a direction that logits and reward rise in; None: what is exact

    def mean_velocity(self, name, x, t, s, cond):
        if name != "student":
            return flow_map(self.student_law.detach(), x, t, s)
        if self.objective.name == "twinflow" and torch.equal(s, t):
            law = self.twin_law if bool((t < 0).all()) else self.velocity_law
            return flow_map(law, x, t.abs(), t.abs())
        return flow_map(self.student_law, x, t, s)

    def teacher(self, x, t, cond):
        return flow_map(self.teacher_law if cond is not None else self.unprompted, x, t, t)

    def fake_score(self, x, t, cond, made_at):
        return flow_map(self.fake_law if cond is not None else self.unprompted, x, t, t)

    def second_fake_score(self, x, t, cond):
        return flow_map(self.second_law, x, t, t)

    def features(self, x, t, cond):
        return torch.cat([x.flatten(1), torch.ones_like(x[:, 0, 0])], 1)

    def logits(self, x, t, cond):
        """The log ratio of the densities of reals and fakes, times ``confidence``."""
        if self.likes is not None:
            return self.confidence * (x.flatten(1) @ self.likes)[:, None]
        if self.tells_steps:
            real, fake = self._stepped(x, t, self.teacher_law), self._stepped(x, t, self.fake_law)
        else:
            law = self.student_law.detach()
            real, fake = log_density(self.teacher_law, x, t), log_density(law, x, t)
        return self.confidence * (real - fake)[:, None]

    def _stepped(self, x, t, law):
        """The log density of the student's noised samples after an Euler step of a law's flow."""
        dt = self.objective.dt
        law = law.detach()
        own = self.student_law.detach()
        before = (t + dt)[:, None]
        deviation = spread(own, before)
        middle = ((1 - before) * own[:2])[..., None, None]
        time = before.flatten()
        mean = middle - dt * flow_map(law, middle, time, time)
        moved = middle + 1.0
        slope = (moved - dt * flow_map(law, moved, time, time) - mean).flatten(1)[:, :1]
        return log_normal(x, mean.flatten(1), slope * deviation)

    def data(self, cond, rng):
        x = torch.randn(len(cond), 2, 1, 1, generator=rng, dtype=torch.float64)
        return self._mapped(x)

    def pairs(self, cond, rng):
        noise = torch.randn(len(cond), 2, 1, 1, generator=rng, dtype=torch.float64)
        return noise, self._mapped(noise)

    def _mapped(self, noise):
        return self.teacher_law[:2, None, None] + self.teacher_law[2].exp() * noise

    def reward(self, x, cond):
        if self.likes is not None:
            return x.flatten(1) @ self.likes
        return log_density(self.teacher_law, x, torch.zeros_like(x[:, 0, 0, 0]))


class GaussianStep(PlaneStep):
    """A step over exact networks, in float64; for one prompt."""

    def __init__(self, lab, objective, seed=0, count=256, progress=0.7):
        cond = torch.zeros(count, dtype=torch.long)
        rng = torch.Generator().manual_seed(seed)
        super().__init__(lab, objective, "student", cond, rng, progress, torch.float64)


def gradients(objective, lab, law, turn="student", number=8, progress=0.7, count=256):
    """Of a turn's loss, at ``law``: ``[number, ...]``, one for each of so many batches."""
    found = []
    for seed in range(number):
        step = GaussianStep(lab, objective, seed, count, progress)
        step.turn = turn
        loss = sum(make_part() for make_part in parts_of(getattr(objective, turn)(step)))
        slope = None
        if loss.requires_grad:  # the fit without a prompt is not to ``law``
            (slope,) = torch.autograd.grad(loss, law, allow_unused=True)
        found.append(torch.zeros_like(law) if slope is None else slope)
    return torch.stack(found)
