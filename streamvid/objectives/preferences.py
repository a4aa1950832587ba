"""Objectives that join a host: moments of sets, preferences, relations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamvid.core.fitting import flow_matching_loss
from streamvid.core.flowmap import distance
from streamvid.core.inject import dmd_gradient, surrogate
from streamvid.core.moments import RandomFeatures, mmd2, relational_kl
from streamvid.core.policy import pairwise, step_logp, winner_loser_gradient
from streamvid.core.process import add_noise, euler_step, renoise_step, x0_from_v
from streamvid.objectives.base import Distillation, Loss, ScoreMatching, Step, require
from streamvid.objectives.flowmap import follow_path
from streamvid.objectives.score import dmd_term


@dataclass
class EmbeddingLoss(ScoreMatching):
    """Embedding Loss: DMD, and the mean features of student and teacher samples in networks drawn
    anew each step.
    """

    name = "embedding_loss"
    paper = "2604.22379"
    needs = frozenset({"score", "pairs"})
    covers = True

    weight: float = 0.1
    """Of the features, at least 0."""
    num_nets: int = 2
    """Networks per step, at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, weight=(0, math.inf), num_nets=(1, math.inf))

    @property
    def note(self) -> str:
        return (
            "our reading of kernel, nets, weight; its batch noise takes the host from 1.2 to 2.5;"
            " compares all prompts together"
        )

    def student(self, step: Step) -> Loss:
        x = step.sample().x
        _, real = step.pairs()
        total = dmd_term(step, x)
        kernel = 1 if x.shape[-1] == 1 else 3
        for _ in range(self.num_nets):
            seed = step.choose(2**31)
            net = RandomFeatures(x.shape[1], seed, width=128, depth=2, kernel=kernel).to(x)
            gap = mmd2(net(x), net(real), unbiased=False)
            total = total + self.weight / self.num_nets * gap
        return total


@dataclass
class PSO(ScoreMatching):
    """PSO: of two next states that the student draws, the one with the better reward is made more
    likely than the other, against the student as it was; DMD holds the law meanwhile. Two steps.
    """

    name = "pso"
    paper = "2410.03190"
    needs = frozenset({"score", "lagged", "reward"})
    num_steps = 2
    role = "add-on"

    beta: float = 5.0
    """Temperature of the preference, above 0."""
    hold: float = 1.0
    """Weight of DMD, at least 0."""
    preference: float = 0.1
    """Weight of the preference, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, beta=(1e-6, math.inf), hold=(0, math.inf), preference=(0, math.inf))

    @property
    def note(self) -> str:
        return "chases a reward, here the teacher's density: modes narrow"

    def check_stream(self, stream: Any, num_chunks: int) -> None:
        num_steps = len(stream.step_table[-1]) if stream.step_table else stream.num_steps
        if num_steps < 2:
            raise ValueError(
                f"chunks of {num_steps} step have no next state, which pso compares; set"
                " stream.num_steps to 2 or more"
            )

    def student(self, step: Step) -> Loss:
        first = step.sample(0)
        assert first.x_t is not None
        zero = step.full(0.0)
        t = step.full(step.step_time(1))
        old = step.flow_map("lagged")
        with torch.no_grad():
            x0_old = euler_step(first.x_t, old(first.x_t, first.t, zero), first.t, zero)
            states = [renoise_step(x0_old, step.noise(), t) for _ in range(2)]
            rewards = [step.reward(euler_step(x, old(x, t, zero), t, zero)) for x in states]

        ratios = [
            step_logp(x, first.x, t, "mean") - step_logp(x, x0_old, t, "mean") for x in states
        ]
        is_better = rewards[0] > rewards[1]
        winner = torch.where(is_better, ratios[0], ratios[1])
        loser = torch.where(is_better, ratios[1], ratios[0])
        matching = self.hold * dmd_term(step, step.sample().x)
        return matching + self.preference * pairwise(winner, loser, self.beta, clip=0.1)


@dataclass
class DistillationDPO(ScoreMatching):
    """Distillation-DPO: a fake score of winners and one of losers; samples move by DMD's direction
    of their own side.

    Half of the samples are losers whatever they are, and to be pushed off has no end: so a loser is
    pushed, with the weight ``eta``, only while its fake score's data prediction is within ``stop``
    of the teacher's, and drawn as a winner is beyond. The released code has a small rate and
    clipped gradients (1e-5, norm .05) in place of such a bound.
    """

    name = "distillation_dpo"
    paper = "2504.11447"
    needs = frozenset({"score", "group", "reward", "second"})
    role = "add-on"

    eta: float = 0.2
    """Weight of the push, at least 0."""
    stop: float = 0.1
    """Mean distance of data predictions beyond which a loser is drawn, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, eta=(0, math.inf), stop=(0, math.inf))

    @property
    def note(self) -> str:
        return (
            "prefers the denser half of each prompt; the push of the other half ends at a distance,"
            " or it diverges"
        )

    def choose_winners(self, step: Step, x: Tensor) -> Tensor:
        """1 for samples whose reward is not below their prompt's median, ``[B]``; the only one of
        its prompt has nobody to lose to.
        """
        reward = step.reward(x.detach())
        won = torch.zeros_like(reward)
        for prompt in step.group.unique():
            rows = step.group == prompt
            won[rows] = (reward[rows] >= reward[rows].quantile(0.5)).to(reward.dtype)
        return won

    def student(self, step: Step) -> Loss:
        x = step.sample().x
        with torch.no_grad():
            won = self.choose_winners(step, x)
            t = step.times()
            x_t = step.noised(x, t)
            real = x0_from_v(x_t, step.real(x_t, t), t)
            of_winners = x0_from_v(x_t, step.fake_velocity(x_t, t), t)
            of_losers = x0_from_v(x_t, step.second_velocity(x_t, t), t)
            is_far = (of_losers - real).abs().flatten(1).mean(1) > self.stop
            push = torch.where(is_far, -1.0, self.eta)
            direction = winner_loser_gradient(
                dmd_gradient(x, of_winners, real), dmd_gradient(x, of_losers, real), won, push
            )
        return surrogate(x, direction, form="dot")

    def fake_score(self, step: Step) -> Loss:
        """Flow matching, one network to winners and one to losers."""
        with torch.no_grad():
            x = step.sample().x
        won = self.choose_winners(step, x)
        t = step.times()
        eps = step.noise()
        x_t = add_noise(x, eps, t)
        winners = flow_matching_loss(step.fake_velocity(x_t, t), x, eps, mask=won)
        if bool(won.all()):
            return winners
        return winners + flow_matching_loss(step.second_velocity(x_t, t), x, eps, mask=1 - won)


@dataclass
class RDD(Distillation):
    """RDD: the teacher's path in each of the student's steps, and who is like whom in the features
    of a frozen network.
    """

    name = "rdd"
    paper = "2410.07679"
    needs = frozenset({"score", "features", "pairs", "jumps"})
    num_steps = 4
    sampler = "jump"

    relation: float = 0.05
    """Weight of the relations, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, relation=(0, math.inf))

    def student(self, step: Step) -> Loss:
        noise, _ = step.pairs()
        index = step.choose(step.num_steps)
        x_t, aim, t, s = follow_path(step, noise, index)
        landed = step.jump(x_t, t, s)
        alike = relational_kl(step.features(landed, s), step.features(aim, s))
        return distance(landed, aim).mean() + self.relation * alike
