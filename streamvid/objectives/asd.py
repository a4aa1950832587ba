"""Adversarial self-distillation: the student with n steps learns from itself with n + 1.

ASD, arXiv 2511.01419, on top of distribution matching, which stays its anchor. A turn draws one
number of steps n. With G^n(z) the student's clip in n steps per chunk, a = G^n(z1) and
b = sg G^{n+1}(z2), both noised,

    student:        L_DMD(a) + alpha softplus(D^n(b_t) - D^n(a_t))
    discriminator:  softplus(D^n(a_t) - D^n(b_t))
                    + lam (|D^n(b_t + s d) - D^n(b_t)|^2 + |D^n(a_t + s d') - D^n(a_t)|^2)
    fake_score:     as in DMD, on samples of all n

D^n is the n-th logit of one head on frozen features of the fake score: registers that attend to the
tokens of some blocks. So one checkpoint serves 1, 2, .. N steps. At n = N there is nobody to learn
from but the scores, unless ``real_clips`` gives D one class more: clips of the data set, which the
N-step student is then compared with.

First-frame enhancement is ``stream.first_steps``: chunk 0, which has no context to lean on, takes
that many steps whatever n is, in training as in streaming. The paper adds it at inference only.

Left open by the paper, hence the fields: alpha, the noise of D's inputs, how flat the penalty holds
D (600 at s = .05 holds it very flat), logits of clips or of latent frames. Departures: softplus in
place of a loss that is unbounded below if taken literally; n-step clips come from the list of n
steps that n-step streaming uses (``lists: respaced``), so that training and streaming agree;
``lists: shared`` is the first n steps of the list of N, Self-Forcing's random exit.

What to watch: ``gap_n``, the mean of D^n(b_t) - D^n(a_t). Pinned at 0, D sees no difference and the
term does nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from streamvid.core.adversary import approximate_penalty, discriminator_loss, generator_loss
from streamvid.core.process import add_noise
from streamvid.objectives.base import LAST, Exit, Step, fit_fake_score
from streamvid.objectives.dmd import DMD, matching_terms


@dataclass(frozen=True)
class Turn:
    """What a turn has drawn: n, and where its sample exits."""

    num_steps: int
    exit: Exit
    is_complete: bool  # whether the sample's exit is its last step


@dataclass
class ASD(DMD):
    """DMD at every number of steps, and a game of n steps against n + 1."""

    name: ClassVar[str] = "asd"
    paper: ClassVar[str] = "2511.01419"
    num_steps: ClassVar[int] = 2
    heads: ClassVar[Literal["token", "film", "query"]] = "film"
    trunk: ClassVar[Literal["teacher", "fake_score"]] = "fake_score"

    asd_weight: float = 1.0
    """alpha, of the adversarial term in the student's loss; 0 leaves DMD at all numbers of steps.
    Where D sees a difference, its gradient at 1 can be ten times that of DMD (watch
    ``grad_norm``)."""
    lists: Literal["respaced", "shared"] = "respaced"
    """The times of n steps: evenly spaced before the shift, or the first n of the list of N."""
    discriminator_updates_per_cycle: int = 2
    """Updates of the discriminator between two of the student; at most
    ``fake_updates_per_student``."""
    same_time: bool = True
    """Whether both clips of a pair are noised to one time; their noise always differs."""
    noise_low: float = 0.02
    """Least time to which D's inputs are noised, before the shift; in [0, 1)."""
    noise_high: float = 0.98
    """Greatest, before the shift; in (0, 1]."""
    r1_weight: float = 600.0
    """lam of the clips of n + 1 steps; 0 leaves it out."""
    r2_weight: float = 600.0
    """lam of those of n."""
    penalty_sigma: float = 0.05
    """s, in units of the latents' deviation."""
    logit: Literal["clip", "frame"] = "clip"
    """A logit for the clip as a whole, or one per latent frame."""
    layers: tuple[int, ...] | None = None
    """Blocks of the fake score that the heads read; null: at a third, half and the end."""
    real_clips: bool = False
    """Compare the N-step clips with the data set's, which then has to have clips (data.kind world,
    clips or latents)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("lists", ("respaced", "shared")), ("logit", ("clip", "frame"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected one of {choices}")
        for name in ("asd_weight", "r1_weight", "r2_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 0")
        if not 1 <= self.discriminator_updates_per_cycle <= self.fake_updates_per_student:
            raise ValueError(
                f"discriminator_updates_per_cycle={self.discriminator_updates_per_cycle}, expected"
                f" 1 to fake_updates_per_student={self.fake_updates_per_student}"
            )
        if not 0 <= self.noise_low < self.noise_high <= 1:
            raise ValueError(
                f"noise_low={self.noise_low}, noise_high={self.noise_high}, expected 0 <= low <"
                " high <= 1"
            )
        if self.penalty_sigma <= 0:
            raise ValueError(f"penalty_sigma={self.penalty_sigma}, expected a positive number")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"score", "clips"} if self.real_clips else {"score"})

    @property
    def feature_layers(self) -> Sequence[int] | None:
        return self.layers

    def num_logits_for(self, num_steps: int) -> int:
        """How many n have something better to be compared with."""
        return num_steps if self.real_clips else num_steps - 1

    def check_stream(self, stream: Any, num_chunks: int) -> None:
        if stream.order != "autoregressive" or stream.step_table:
            raise ValueError(
                "asd draws the number of steps; set stream.order='autoregressive' and no step_table"
            )
        if stream.num_steps < 2 and not self.real_clips:
            raise ValueError(
                f"stream.num_steps={stream.num_steps}: a student of one step has no other to learn"
                " from; set 2 to 4"
            )
        if stream.first_steps is None:
            return
        if stream.first_steps < stream.num_steps:
            raise ValueError(
                f"stream.first_steps={stream.first_steps} is below"
                f" stream.num_steps={stream.num_steps}, the most that n can be"
            )
        if self.lists == "shared":
            raise ValueError(
                "stream.first_steps needs lists='respaced': a shared list ends all chunks at its"
                " n-th step"
            )

    def turns(self, step: int) -> tuple[str, ...]:
        """The fake score in every step; the discriminator in the last ones of a cycle, before the
        student.
        """
        cycle = self.fake_updates_per_student
        plays = step % cycle >= cycle - self.discriminator_updates_per_cycle
        is_last = (step + 1) % cycle == 0 and self.has_begun(step)
        return (
            "fake_score",
            *(["discriminator"] if plays else []),
            *(["student"] if is_last else []),
        )

    def choices(self, step: Step) -> Hashable:
        turn = self.draw(step)
        return step.choices(), turn.num_steps, turn.exit

    # ---- losses

    def student(self, step: Step) -> Tensor:
        turn = self.draw(step)
        worse = step.sample(exit=turn.exit).x
        loss = matching_terms(step, worse, self.normalizer).loss
        is_compared = turn.num_steps <= self.num_logits_for(step.most_steps) and turn.is_complete
        if self.asd_weight == 0 or not is_compared:
            return loss
        with torch.no_grad():
            better = self._sample_better(step, turn)  # sg
            better_logits = self._logits(step, turn, *self._noise(step, better, "better"))
        logits = self._logits(step, turn, *self._noise(step, worse, "worse"))
        adversarial = generator_loss("paired", logits, better_logits)
        step.record(adversarial=adversarial)
        return loss + self.asd_weight * adversarial

    def discriminator(self, step: Step) -> Tensor:
        turn = self.draw(step)
        with torch.no_grad():
            worse = step.sample(exit=turn.exit).x
            better = self._sample_better(step, turn)
        inputs = {
            "better": self._noise(step, better, "better"),
            "worse": self._noise(step, worse, "worse"),
        }
        logits = {name: self._logits(step, turn, *each) for name, each in inputs.items()}
        adversarial = discriminator_loss("paired", logits["worse"], logits["better"])
        penalty = torch.zeros_like(adversarial)
        for name, weight in (("better", self.r1_weight), ("worse", self.r2_weight)):
            if weight:
                of_side = self._penalty(step, turn, name, *inputs[name], logits[name])
                penalty = penalty + weight * of_side
        step.record(adversarial=adversarial, penalty=penalty)
        gap = (logits["better"] - logits["worse"]).mean()
        step.record(**{f"gap_{turn.num_steps}": gap})
        return adversarial + penalty

    def fake_score(self, step: Step) -> Tensor:
        """Flow matching to the student's samples of a drawn number of steps."""
        return fit_fake_score(step, exit=self.draw(step).exit)

    # ---- their parts

    def draw(self, step: Step) -> Turn:
        """n is drawn evenly from those that have a pair, and, where the scores judge, N too.

        In the student's turn any step of the n may carry the gradient, as in DMD, so that all steps
        of all lists are trained. What the discriminator sees is complete, but for the first chunk
        where that has a list of its own: it exits where it likes, and in both clips of a pair
        alike.
        """
        most, plays = step.most_steps, step.turn == "discriminator"
        n = 1 + step.choose(self.num_logits_for(most) if plays else most, "num_steps")
        if self.lists == "shared":  # the first n of N steps
            return Turn(n, Exit(n, (n - 0.5) / most, from_full_list=True), is_complete=True)
        place = LAST if plays else step.exit_place()
        first_place = None
        if step.has_longer_first(n):
            first_place = step.chance("num_steps")
        return Turn(n, Exit(n, place, first_place), is_complete=int(place * n) == n - 1)

    def _sample_better(self, step: Step, turn: Turn) -> Tensor:
        """What the n-step samples are compared with: the student's own of one step more, or the
        data.
        """
        if turn.num_steps == step.most_steps:
            return step.data()
        n = turn.num_steps + 1
        if self.lists == "shared":
            exit = Exit(n, (n - 0.5) / step.most_steps, from_full_list=True)
        else:
            exit = Exit(n, LAST, turn.exit.first_place)
        return step.sample(exit=exit, role="student_with_more_steps").x

    def _noise(self, step: Step, x: Tensor, side: str) -> tuple[Tensor, Tensor]:
        """A sample noised for the discriminator, with gradient, and its time ``[B]``."""
        name = ("asd_t",) if self.same_time else ("asd_t", side)
        t = step.times_of("uniform", 1.0, self.noise_low, self.noise_high, name)
        return add_noise(x, step.noise("asd_eps", side), t), t

    def _logits(self, step: Step, turn: Turn, x_t: Tensor, t: Tensor) -> Tensor:
        """D^n of noised samples, ``[B, 1]`` or ``[B, T]``; in the plane one per layer."""
        parts = x_t.shape[2] if self.logit == "frame" else 1
        num_logits = self.num_logits_for(step.most_steps)
        return step.logits(x_t, t, parts)[:, turn.num_steps - 1 :: num_logits]

    def _penalty(
        self, step: Step, turn: Turn, side: str, x_t: Tensor, t: Tensor, logits: Tensor
    ) -> Tensor:
        """The approximate R1 or R2 at ``x_t``, whose logits are known."""
        noise = step.noise("asd_penalty", side)
        logits_of = lambda x: logits if x is x_t else self._logits(step, turn, x, t)
        return approximate_penalty(logits_of, x_t, noise, self.penalty_sigma)
