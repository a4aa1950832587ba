"""On-policy adversarial flow distillation: a student learns from a teacher of which only finished
clips are known.

AFD, arXiv 2605.26105; its engine is DiffusionNFT, arXiv 2509.16117. For a prompt y with the
teacher's clip x^T, a lagged copy of the student, the *old policy*, streams a clip x of its own, and

    discriminator:  minimise -log sigmoid(D(x^T, y) - D(x, y))    Bradley-Terry, clean clips, R1, R2
    student:        A = D(x, y) - baseline,  r = clip(A / 2c, -1/2, 1/2) + 1/2,
                    then on x_t = (1 - t) x + t eps
                    minimise c/b E[r |v+ - v*|^2 + (1 - r) |v- - v*|^2] + lam |v - v_ref|^2,
                    v* = eps - x,  v+ = (1 - b) v_old + b v,  v- = (1 + b) v_old - b v

At its optimum D is the log ratio of the teacher's and the policy's densities, up to a constant per
prompt, which is why the baseline is the mean over clips of one prompt; so the student takes a step
of policy improvement on their KL divergence, along the forward process: no score of the teacher, no
gradient through a sampler or through D. Each chunk is noised over the clean chunks of the same
rollout, so that the context is the one it is streamed with. The old policy follows the student as a
moving average; the reference is the student as it came.

What that is exact for: NFT's theorem takes v_old for the mean of v* given x_t, of which the optimum
is then v_old + (2 / b) Cov(r, v* | x_t). A student of few steps that noises its own data prediction
anew has no such velocity: its clips are not the end of its own flow. Its optimum is v_old + E[(2 r
- 1)(v* - v_old) | x_t] / b, which at r independent of the clip is off v_old by (2 E r - 1) times
the gap, self-distillation. Advantages that are centred keep E r = 1/2, and that term at zero on
average; clipping that cuts one side more does not. So advantages are clipped far out by default:
watch ``clipped``.

``policy: gan`` is the plain relativistic GAN with the same discriminator, for comparison: the
student's rollout carries gradient at one random step, and lowers -log sigmoid(D(x, y) - D(x^T, y)).

The paper's text leaves open, hence the fields: baseline, normalisation, times, the logit's reach,
the old policy's lag. Ours: the clips of a prompt share their noise. To first order the update is
sum_i A_i (v_old(x_t,i) - eps_i + x_i), and with one eps for all of a group, whose advantages add up
to 0, eps is not in it; each clip's own law is as it was. ``logit: token`` gives D a logit for each
token of its trunk, trained as a pair with the same token of the other clip, and each token's patch
the advantage of its own logit. Every token sees all of the clip, so at its optimum each of these
logits is the clip's log ratio and the update the same; before that they say where a clip is wrong,
and a patch is not moved by what is wrong elsewhere: for clips of n independent places the update's
variance is the n-th part. What a gain shows: at a reward r that is independent of x the expected
update is exactly zero, so that a frozen random head that gains is no proof against the
discriminator but a fixed reward whose direction happens to be a good one; others lose (``control``
and ``discriminator_updates: 0`` measure it). Departures: R1 and R2, without which D soon tells all
pairs apart; an explicit old policy, which is what pulls v back where r = 1/2 (with the student
itself in its place the update is a weighted regression that may run away).

Shapes: B prompts of a batch, G clips per prompt, C channels, T = K f latent frames in K chunks,
h w latent size, J logits per clip: 1, K, or one per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from streamvid.core.adversary import approximate_penalty, discriminator_loss, generator_loss
from streamvid.core.policy import group_advantage, nft_loss, optimality
from streamvid.core.times import TimeLaw
from streamvid.models.video_discriminator import VideoDiscriminator
from streamvid.objectives.base import Loss, Objective, Step, require


@dataclass
class AFD(Objective):
    """A discriminator's preferences move the student's velocity from a lagged policy."""

    name: ClassVar[str] = "afd"
    paper: ClassVar[str] = "2605.26105"
    num_steps: ClassVar[int] = 4
    sampler: ClassVar[Literal["renoise", "jump", "euler"]] = "euler"
    heads: ClassVar[Literal["token", "film", "query"]] = "film"
    rate: ClassVar[float] = 0.2

    policy: Literal["nft", "gan"] = "nft"
    """How the student follows the discriminator: the method's own update, or a plain GAN."""
    group_size: int = 2
    """G, clips that the old policy streams for each prompt of the student's batch; 2 to 24."""
    baseline: Literal["group", "batch"] = "group"
    """What a clip's logit is measured from: the mean over its prompt's clips, or over all of the
    batch."""
    normalize: Literal["raw", "std"] = "raw"
    """"std" divides advantages by their deviation over the batch, which keeps steps large near the
    optimum too: that of the centred logits, so that how much prompts differ in their means changes
    no step. DiffusionNFT's ``global_std`` divides by that of the logits as they are, which makes
    steps smaller where prompts differ; with a "batch" baseline it is the same."""
    advantage_clip: float = 5.0
    """c, the advantage at which r is 0 or 1."""
    beta: float = 0.1
    """b; an exact update shortens the distance to the teacher to 1 - 1 / (c b) of it, if advantages
    are raw."""
    lam_prior: float = 1e-4
    """Weight of the distance to the reference's velocity; 0 needs no reference."""
    self_normalized: bool = True
    """Divide each chunk's error of x0 by its mean absolute value, as DiffusionNFT's code does; else
    plain squares of v."""
    time_law: Literal["steps"] | TimeLaw = "steps"
    """"steps": the times of the student's own list; otherwise the law of the nominal time."""
    shift: float = 5.0
    """Shift of that law."""
    shared_noise: bool = True
    """Whether the G clips of a prompt are noised alike; in the sum of advantages times errors the
    noise then cancels."""
    noisings: int = 1
    """How often a rollout is noised, each time at new times, for one update; 1 to 4."""
    clips_per_pass: int | None = None
    """Of the B G clips, how many the student learns from at once: fewer take less memory for the
    same update, as long as they fill the device; null: all."""
    old_decay: float = 0.9
    """Of the old policy's moving average over the student; 0 copies it."""
    refresh_every: int = 1
    """Steps between updates of the old policy; rollouts are always its own, new ones in each
    turn."""
    student_start_step: int = 0
    """Steps that warm up the discriminator alone."""
    discriminator_updates: int = 1
    """Updates of the discriminator in each step; 0 leaves it as it came, a fixed reward of random
    direction."""
    discriminator_seed: int | None = None
    """Of its heads' first weights; null is the run's. With ``discriminator_updates: 0``, another
    reward."""
    control: Literal["none", "independent", "negated"] = "none"
    """What the method is compared with: "independent" gives each prompt's clips the advantages of
    another prompt's with a random sign, which say nothing of them and in expectation move nothing;
    "negated" turns the reward round."""
    r1_weight: float = 100.0
    """Of E |D(x + s n) - D(x)|^2 at teacher clips; 0 leaves it out."""
    r2_weight: float = 100.0
    """Of the same at student clips."""
    penalty_sigma: float = 0.05
    """s, in units of the latents' deviation."""
    logit: Literal["clip", "chunk", "token"] = "clip"
    """A logit for the clip as a whole, or one per chunk or token, each of which then has its own
    advantage."""
    discriminator_layers: tuple[int, ...] | None = None
    """Blocks that it reads; null: half-way and the last."""
    discriminator_t: float = 0.1
    """Noise level that its trunk is told, in [0, 1]."""
    train_trunk: bool = True
    """Whether the discriminator trains its trunk, a copy of the student as it came, or its heads
    only."""

    def __post_init__(self) -> None:
        require(self, discriminator_t=(0, 1))
        at_least = {
            "group_size": 1,
            "noisings": 1,
            "refresh_every": 1,
            "discriminator_updates": 0,
            "lam_prior": 0,
            "r1_weight": 0,
            "r2_weight": 0,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least {least}")
        for name in ("advantage_clip", "beta", "shift", "penalty_sigma"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}, expected a positive number")
        if self.control not in ("none", "independent", "negated"):
            raise ValueError(
                f"control={self.control!r}, expected 'none', 'independent' or 'negated'"
            )
        if self.clips_per_pass is not None and self.clips_per_pass < 1:
            raise ValueError(
                f"clips_per_pass={self.clips_per_pass}, expected at least 1, or null for all at"
                " once"
            )
        if not 0 <= self.old_decay < 1:
            raise ValueError(
                f"old_decay={self.old_decay}, expected a number in [0, 1); 1 would never follow"
            )
        if self.policy == "nft" and self.baseline == "group" and self.group_size == 1:
            raise ValueError(
                "baseline='group' compares clips of one prompt; set group_size to at least 2, or"
                " 'batch'"
            )

    # ---- what it asks for

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        copies = {"lagged"} if self.policy == "nft" else set()
        if copies and self.lam_prior:
            copies.add("start")
        return frozenset({"clips", *copies})

    @property
    def lagged_decay(self) -> float:  # type: ignore[override]
        return self.old_decay

    def follows(self, name: str, step: int) -> bool:
        return (step + 1) % self.refresh_every == 0

    def check_stream(self, stream: Any, num_chunks: int) -> None:
        if stream.order != "autoregressive":
            raise ValueError(
                f"stream.order={stream.order!r}, but afd trains chunk after chunk; set"
                " 'autoregressive'"
            )
        if self.policy == "nft" and stream.commit != "clean":
            raise ValueError(
                f"stream.commit={stream.commit!r}, but afd noises chunks over clean ones; set"
                " 'clean'"
            )

    def new_networks(
        self,
        networks: Mapping[str, nn.Module],
        latent_shape: tuple[int, int, int],
        stream: Any,
        seed: int,
    ) -> dict[str, nn.Module]:
        """The discriminator, where none is given: a copy of the student that reads whole clips."""
        if "discriminator" in networks:
            return {}
        return {
            "discriminator": VideoDiscriminator(
                copy.deepcopy(networks["student"]),
                self.discriminator_layers,
                self.discriminator_t,
                self.train_trunk,
                chunk_frames=stream.chunk_frames if self.logit == "chunk" else None,
                per_token=self.logit == "token",
                seed=seed if self.discriminator_seed is None else self.discriminator_seed,
            )
        }

    def turns(self, step: int) -> tuple[str, ...]:
        """The discriminator, then the student, which so meets one that has seen the policy as it
        is.
        """
        first = ("discriminator",) * self.discriminator_updates
        return (*first, "student") if step >= self.student_start_step else first

    def choices(self, step: Step) -> Hashable:
        """A GAN's rollouts end at a random step; the policy's are whole."""
        return step.choices() if self.policy == "gan" else None

    # ---- losses

    def discriminator(self, step: Step) -> Tensor:
        real = step.teacher_samples()
        policy = "student" if self.policy == "gan" else "lagged"
        with torch.no_grad():
            fake = step.policy_samples(policy, at_random_exit=self.policy == "gan")
        both = torch.stack([real, fake], dim=1).flatten(0, 1)  # two of each prompt
        real_logits, fake_logits = self._logits(step, both).unflatten(0, (-1, 2)).unbind(1)
        adversarial = discriminator_loss("paired", fake_logits, real_logits)
        penalty = torch.zeros_like(adversarial)
        sides = ((self.r1_weight, real, real_logits), (self.r2_weight, fake, fake_logits))
        for weight, x, logits in sides:
            if weight:
                penalty = penalty + weight * self._penalty(step, x, logits)
        step.record(adversarial=adversarial, penalty=penalty)
        step.record(**preferences(fake_logits, real_logits))
        return adversarial + penalty

    def student(self, step: Step) -> Loss:
        return self._play(step) if self.policy == "gan" else self._improve(step)

    def _play(self, step: Step) -> Tensor:
        """The student's side of a plain GAN."""
        logits = self._logits(step, step.policy_samples("student", at_random_exit=True))
        with torch.no_grad():
            real_logits = self._logits(step, step.teacher_samples())
        loss = generator_loss("paired", logits, real_logits)
        step.record(adversarial=loss, **preferences(logits, real_logits))
        return loss

    def _improve(self, step: Step) -> list[Callable[[], Tensor]]:
        """NFT's update in parts, one for each noising of each ``clips_per_pass`` clips."""
        with torch.no_grad():
            x = step.policy_samples("lagged", self.group_size)
            logits, real_logits = self._logits(step, x), self._logits(step, step.teacher_samples())
            advantages = self._advantages(step, logits)  # [B G, J]
            r = optimality(advantages, self.advantage_clip)
        step.record(
            **preferences(logits, real_logits.repeat_interleave(self.group_size, dim=0)),
            weight_std=r.std(correction=0),
            clipped=((r == 0) | (r == 1)).float().mean(),
        )
        size = len(x) if self.clips_per_pass is None else self.clips_per_pass
        parts: list[Callable[[], Tensor]] = []
        for number in range(self.noisings):
            noising = step.new_noising(
                number, self.group_size, self.time_law, self.shift, self.shared_noise
            )
            for start in range(0, len(x), size):
                rows = slice(start, start + size)
                parts.append(partial(self._update, step, x, noising, rows, r))
        return parts

    def _update(self, step: Step, x: Tensor, noising: Any, rows: slice, r: Tensor) -> Tensor:
        """Some of the samples' share of the student's loss.

        Args:
            r: of all of them.
        """
        share = len(x[rows]) / len(x) / self.noisings
        weight = step.chunk_weights(r[rows], x[rows], per_token=self.logit == "token")
        # without gradient first, so that their caches are gone when the student has its graph
        with torch.no_grad():
            v_old = step.noise_chunks("lagged", x, noising, rows).v
            v_ref = step.noise_chunks("start", x, noising, rows).v if self.lam_prior else None
        chunks = step.noise_chunks("student", x, noising, rows)
        states = (chunks.x_t, chunks.t) if self.self_normalized else (None, None)
        nft = nft_loss(chunks.v, v_old, chunks.v_target, weight, self.beta, *states)
        loss = self.advantage_clip / self.beta * nft
        gap = (chunks.v.detach() - v_old).abs().mean()
        step.accumulate(nft=share * loss, velocity_gap=share * gap)
        if v_ref is not None:
            prior = (chunks.v - v_ref).square().mean()
            step.accumulate(prior=share * prior)
            loss = loss + self.lam_prior * prior
        return share * loss

    # ---- their parts

    def _logits(self, step: Step, x: Tensor) -> Tensor:
        """``[B, J]`` of clean samples."""
        return step.logits(x, step.full(self.discriminator_t))

    def _penalty(self, step: Step, x: Tensor, logits: Tensor) -> Tensor:
        """The approximate R1 or R2 at ``x``, whose logits are known."""
        logits_of = lambda moved: logits if moved is x else self._logits(step, moved)
        return approximate_penalty(logits_of, x, step.noise("penalty"), self.penalty_sigma)

    def _advantages(self, step: Step, logits: Tensor) -> Tensor:
        """A ``[B G, J]`` of the old policy's samples, against those of all processes, or what they
        are compared with.
        """
        everyone, first = gather(logits)
        if len(everyone) == 1:
            raise ValueError(
                "one rollout has no other to be compared with; raise train.batch_size or"
                " options.group_size"
            )
        group = None
        if self.baseline == "group":
            group = step.group_of_everyone(len(everyone), self.group_size)
        std: Literal["batch", "none"] = "batch" if self.normalize == "std" else "none"
        advantages = group_advantage(everyone, group, std)[first : first + len(logits)]
        if self.control == "none":
            return advantages
        if self.control == "negated":
            return -advantages
        of_prompts = advantages.unflatten(0, (-1, self.group_size)).roll(1, dims=0)
        signs = [2.0 * step.choose(2, "decision") - 1 for _ in of_prompts]
        return (of_prompts * of_prompts.new_tensor(signs)[:, None, None]).flatten(0, 1)


def preferences(fake: Tensor, real: Tensor) -> dict[str, Tensor]:
    """How the discriminator judges pairs of student and teacher clips, from logits of one shape.

    ``r`` is its mean probability that the student's clip is the better one, ``win_rate`` the share
    of pairs of which it says so, ``gap`` the mean difference of logits, teacher less student. r
    near 0: too strong, or fooled by nothing; near 1: too slow, and the student gains on its errors;
    a gap pinned at 0 teaches nothing.
    """
    gap = (real - fake).detach().float()
    return {
        "r": torch.sigmoid(-gap).mean(),
        "win_rate": (gap < 0).float().mean(),
        "gap": gap.mean(),
    }


def gather(logits: Tensor) -> tuple[Tensor, int]:
    """The logits of all processes, in order, and where this one's begin."""
    if not (dist.is_available() and dist.is_initialized()):
        return logits, 0
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, logits.contiguous())
    return torch.cat(parts), dist.get_rank() * len(logits)
