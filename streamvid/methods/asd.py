"""Adversarial self-distillation: the student with n steps learns from itself with n + 1.

ASD, arXiv 2511.01419, on top of distribution matching (``methods.matching``), which stays its
anchor. A turn draws one number of steps n. With G^n(z) the student's clip in n steps a chunk, a =
G^n(z1), b = sg G^{n+1}(z2), both noised,

    student:        L_DMD(a) + alpha softplus(D^n(b_t) - D^n(a_t))
    discriminator:  softplus(D^n(a_t) - D^n(b_t)) + lam (|D^n(b_t + s d) - D^n(b_t)|^2 + |D^n(a_t + s d') - D^n(a_t)|^2)
    fake_score:     as in DMD, on rollouts of all n

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

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from streamvid.core.adversary import approximate_penalty, discriminator_loss, generator_loss
from streamvid.core.process import add_noise
from streamvid.core.times import sample_times
from streamvid.methods.matching import LAST, Decision, DistributionMatching, Judged, MatchingConfig
from streamvid.models.discriminators import TrunkHeads
from streamvid.rollout.schedule import StreamConfig
from streamvid.seeding import keyed_generator, keyed_normal
from streamvid.teachers.base import Teacher
from streamvid.training.method import as_floats


@dataclass
class Config(MatchingConfig):
    """Settings of adversarial self-distillation."""

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
    """A logit for the clip as a whole, or one a latent frame."""
    layers: tuple[int, ...] | None = None
    """Blocks of the fake score that the heads read; null: at a third, half and the end."""
    real_clips: bool = False
    """Compare the N-step clips with the data set's, which then has to have clips (data.kind world,
    clips or latents)."""

    def __post_init__(self) -> None:
        super().__post_init__()
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


class ASD(DistributionMatching):
    """The method; the parts are those of ``DistributionMatching``, and

    Args:
        discriminator: heads ``(features, num_parts) -> [B, parts, N]``; None makes ``TrunkHeads``
            for the fake score.

    Raises:
        ValueError: if they do not fit together.
    """

    def __init__(
        self,
        config: Config,
        student: nn.Module,
        teacher: Teacher,
        stream: StreamConfig,
        latent_shape: tuple[int, int, int],
        fake_score: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        seed: int = 0,
        as_image: Callable[[Tensor], Tensor] | None = None,
    ):
        if stream.order != "autoregressive" or stream.step_table:
            raise ValueError(
                "asd draws the number of steps; set stream.order='autoregressive' and no step_table"
            )
        if stream.num_steps < 2 and not config.real_clips:
            raise ValueError(
                f"stream.num_steps={stream.num_steps}: a student of one step has no other to learn"
                " from; set 2 to 4"
            )
        if stream.first_steps is not None and stream.first_steps < stream.num_steps:
            raise ValueError(
                f"stream.first_steps={stream.first_steps} is below"
                f" stream.num_steps={stream.num_steps}, the most that n can be"
            )
        if stream.first_steps is not None and config.lists == "shared":
            raise ValueError(
                "stream.first_steps needs lists='respaced': a shared list ends all chunks at its"
                " n-th step"
            )
        super().__init__(config, student, teacher, stream, latent_shape, fake_score, seed, as_image)
        self.discriminator = self._new_heads() if discriminator is None else discriminator

    def networks(self) -> dict[str, nn.Module]:
        return {**super().networks(), "discriminator": self.discriminator}

    def turns(self, step: int) -> tuple[str, ...]:
        """Fake score in every step; the discriminator in the last ones of a cycle, before the
        student.
        """
        cycle = self.config.fake_updates_per_student
        before, *student = super().turns(step)
        plays = step % cycle >= cycle - self.config.discriminator_updates_per_cycle
        return (before, *(["discriminator"] if plays else []), *student)

    def loss(self, turn: str, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, float]]:
        """Batches hold ``cond [B, L, D]`` and ``keys``; with ``real_clips``, ``latents [B, C, T, h,
        w]`` too.
        """
        if self.config.real_clips and "latents" not in batch:
            raise ValueError(
                "real_clips=true needs clips in the data; set data.kind to world, clips or latents"
            )
        if turn == "discriminator":
            return self._discriminator_loss(batch, self.decide(turn, step, batch.get("micro", 0)))
        return super().loss(turn, batch, step)

    def decide(self, turn: str, step: int, micro: int = 0) -> Decision:
        """n is drawn evenly from those that have a pair, and, where the scores judge, N too.

        In the student's turn any step of the n may carry the gradient, as in DMD, so that all steps
        of all lists are trained. What the discriminator sees is complete, but for the first chunk
        where that has a list of its own: it exits where it likes, and in both clips of a pair
        alike.
        """
        decision = super().decide(turn, step, micro)
        most = self.stream.num_steps
        pairs = self.pairs if turn == "discriminator" else most
        generator = keyed_generator(self.seed, "num_steps", step, turn, micro)
        n = 1 + int(torch.randint(pairs, (), generator=generator))
        if self.config.lists == "shared":  # the first n of N steps
            return replace(decision, num_steps=n, exit_index=n - 1, exit_place=(n - 0.5) / most)
        place = LAST if turn == "discriminator" else decision.exit_place
        first_place = (
            float(torch.rand((), generator=generator, dtype=torch.float64))
            if self._exits_freely(n)
            else None
        )
        return replace(
            decision,
            num_steps=n,
            exit_index=int(place * n),
            exit_place=place,
            first_place=first_place,
        )

    def _exits_freely(self, n: int) -> bool:
        """Whether chunk 0 has an exit of its own: it has a list of its own, and is not compared
        with real clips.
        """
        return (
            self.config.exit == "random"
            and self.stream.first_steps is not None
            and n <= self.stream.num_steps - 1
        )

    def _is_compared(self, decision: Decision) -> bool:
        """Whether the game is played in a student's turn: n has a pair, and its clip is
        complete.
        """
        return decision.num_steps <= self.pairs and decision.exit_index == decision.num_steps - 1

    def ends_at_exit(self, decision: Decision) -> bool:
        return self.config.lists == "shared" or super().ends_at_exit(decision)

    @property
    def pairs(self) -> int:
        """How many n have something better to be compared with."""
        return self.stream.num_steps if self.config.real_clips else self.stream.num_steps - 1

    def stream_of(self, decision: Decision) -> StreamConfig:
        return (
            self.stream
            if self.config.lists == "shared"
            else replace(self.stream, num_steps=decision.num_steps)
        )

    def student_terms(
        self, judged: Judged, batch: dict[str, Any], decision: Decision
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, numbers = super().student_terms(judged, batch, decision)
        if self.config.asd_weight == 0 or not self._is_compared(decision):
            return loss, numbers
        with torch.no_grad():
            better = self._better(batch, decision)
            better_logits = self._logits(
                *self._disc_input(better, batch, "better"), batch, decision
            )
        logits = self._logits(*self._disc_input(judged.x, batch, "worse"), batch, decision)
        adversarial = generator_loss("paired", logits, better_logits)
        return loss + self.config.asd_weight * adversarial, {"adversarial": adversarial.detach()}

    def _discriminator_loss(
        self, batch: dict[str, Any], decision: Decision
    ) -> tuple[Tensor, dict[str, float]]:
        c = self.config
        with torch.no_grad():
            worse = self._roll_out(batch, self.stream_of(decision), decision)
            better = self._better(batch, decision)
        inputs = {
            "better": self._disc_input(better, batch, "better"),
            "worse": self._disc_input(worse, batch, "worse"),
        }
        logits = {name: self._logits(x_t, t, batch, decision) for name, (x_t, t) in inputs.items()}
        adversarial = discriminator_loss("paired", logits["worse"], logits["better"])
        penalty = torch.zeros_like(adversarial)
        for name, weight in (("better", c.r1_weight), ("worse", c.r2_weight)):
            if weight:
                penalty = penalty + weight * self._penalty(
                    name, *inputs[name], logits[name], batch, decision
                )
        numbers = {"adversarial": adversarial, "penalty": penalty}
        numbers[f"gap_{decision.num_steps}"] = (logits["better"] - logits["worse"]).mean()
        return adversarial + penalty, as_floats(numbers)

    # ---- their parts

    def _better(self, batch: dict[str, Any], decision: Decision) -> Tensor:
        """What the n-step clips are compared with: the student's own of one step more, or the
        data's.
        """
        if decision.num_steps == self.stream.num_steps:
            return batch["latents"]
        more = replace(decision, num_steps=decision.num_steps + 1, exit_place=LAST)
        if self.config.lists == "shared":
            more = replace(more, exit_place=decision.exit_place + 1 / self.stream.num_steps)
        return self._roll_out(batch, self.stream_of(more), more, role="student_with_more_steps")

    def _disc_input(self, x: Tensor, batch: dict[str, Any], side: str) -> tuple[Tensor, Tensor]:
        """A clip noised for the discriminator, with gradient, and its time ``[B]``."""
        c, keys = self.config, batch["keys"]
        eps = torch.stack(
            [keyed_normal(tuple(x.shape[1:]), self.seed, "asd_eps", side, key) for key in keys]
        )
        names = [("asd_t", key) if c.same_time else ("asd_t", side, key) for key in keys]
        draws = [
            sample_times(
                1, "uniform", 1.0, keyed_generator(self.seed, *n), c.noise_low, c.noise_high
            )
            for n in names
        ]
        t = torch.cat(draws).to(x)
        return add_noise(x, eps.to(x), t), t

    def _logits(self, x_t: Tensor, t: Tensor, batch: dict[str, Any], decision: Decision) -> Tensor:
        """D^n of noised clips, ``[B, 1]`` or ``[B, T]``."""
        call = lambda: self._fake_velocity(x_t, t, batch["cond"].to(x_t.dtype))
        parts = x_t.shape[2] if self.config.logit == "frame" else 1
        return self.discriminator(self.fake_score, call, parts)[..., decision.num_steps - 1]

    def _penalty(
        self,
        side: str,
        x_t: Tensor,
        t: Tensor,
        logits: Tensor,
        batch: dict[str, Any],
        decision: Decision,
    ) -> Tensor:
        """The approximate R1 or R2 at ``x_t``, whose logits are known."""
        keys = batch["keys"]
        noise = torch.stack(
            [
                keyed_normal(tuple(x_t.shape[1:]), self.seed, "asd_penalty", side, key)
                for key in keys
            ]
        )
        logits_of = lambda x: logits if x is x_t else self._logits(x, t, batch, decision)
        return approximate_penalty(logits_of, x_t, noise.to(x_t), self.config.penalty_sigma)

    def _new_heads(self) -> TrunkHeads:
        if not hasattr(self.fake_score, "blocks"):
            raise ValueError(
                "asd reads the blocks of a Wan transformer, but the fake score is a"
                f" {type(self.fake_score).__name__}; take a Wan teacher, or method=dmd"
            )
        depth = len(self.fake_score.blocks)
        layers = (
            sorted({depth // 3, depth // 2, depth - 1})
            if self.config.layers is None
            else self.config.layers
        )
        return TrunkHeads(self.fake_score, layers, num_logits=self.pairs, seed=self.seed)


Method = ASD
