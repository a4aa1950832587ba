"""On-policy adversarial flow distillation: a student learns from a teacher of which only finished
clips are known.

AFD, arXiv 2605.26105; its engine is DiffusionNFT, arXiv 2509.16117. For a prompt y with the
teacher's clip x^T, a lagged copy of the student, the *old policy*, streams a clip x of its own, and

    discriminator:  minimise  -log sigmoid(D(x^T, y) - D(x, y))                     Bradley-Terry, clean clips, R1 and R2
    student:        A = D(x, y) - baseline,  r = clip(A / 2c, -1/2, 1/2) + 1/2,  then on x_t = (1 - t) x + t eps
                    minimise  c/b E[r |v+ - v*|^2 + (1 - r) |v- - v*|^2] + lam |v - v_ref|^2,   v* = eps - x
                    v+ = (1 - b) v_old + b v,   v- = (1 + b) v_old - b v

At its optimum D is the log ratio of the teacher's and the policy's densities, up to a constant a
prompt, which is why the baseline is the mean over clips of one prompt; so the student takes a step
of policy improvement on their KL divergence, along the forward process: no score of the teacher, no
gradient through a sampler or through D. Each chunk is noised over the clean chunks of the same
rollout, by a rollout of one step a chunk, so that the context is the one it is streamed with. The
old policy follows the student as a moving average; the reference is the student as it came.

What that is exact for: NFT's theorem takes v_old for the mean of v* given x_t, of which the optimum
is then v_old + (2 / b) Cov(r, v* | x_t). A student of few steps that noises its own data prediction
anew has no such velocity: its clips are not the end of its own flow. Its optimum is v_old + E[(2 r
- 1)(v* - v_old) | x_t] / b, which at r independent of the clip is off v_old by (2 E r - 1) times
the gap, self-distillation. Advantages that are centred keep E r = 1/2, and that term at zero on
average; clipping that cuts one side more does not. So advantages are clipped far out by default:
watch ``clipped``.

``policy: gan`` is the plain relativistic GAN with the same discriminator, for comparison: the
student's rollout, as in ``dmd``, carries gradient at one random step, and lowers -log sigmoid(D(x,
y) - D(x^T, y)).

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

Shapes: B prompts of a batch, G clips a prompt, C channels, T = K f latent frames in K chunks, h w
latent size, J logits a clip: 1, K, or one a token.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from einops import repeat
from torch import Tensor, nn

from streamvid.core.adversary import approximate_penalty, discriminator_loss, generator_loss
from streamvid.core.policy import group_advantage, nft_loss, optimality
from streamvid.core.process import add_noise, v_from_x0, velocity
from streamvid.core.times import TimeLaw, choose_times, sample_times
from streamvid.models.video_discriminator import VideoDiscriminator
from streamvid.rollout.loop import ChunkResult, rollout
from streamvid.rollout.noise import KeyedNoise, Noise
from streamvid.rollout.sampler import new_cache
from streamvid.rollout.schedule import Denoise, StreamConfig, build_schedule, move_tap, table
from streamvid.seeding import key_to_seed, keyed_generator, keyed_normal
from streamvid.training.method import as_floats

LEAST_TIME = 0.02  # of a time law; the student's own steps are as they are


@dataclass
class Config:
    """Settings of adversarial flow distillation."""

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
    """Of its heads' first weights; None is the run's. With ``discriminator_updates: 0``, another
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
    """A logit for the clip as a whole, or one a chunk or a token, each of which then has its own
    advantage."""
    discriminator_layers: tuple[int, ...] | None = None
    """Blocks that it reads; null: half-way and the last."""
    discriminator_t: float = 0.1
    """Noise level that its trunk is told, in [0, 1]."""
    train_trunk: bool = True
    """Whether the discriminator trains its trunk, a copy of the student as it came, or its heads
    only."""

    def __post_init__(self) -> None:
        for name, least in (
            ("group_size", 1),
            ("noisings", 1),
            ("refresh_every", 1),
            ("discriminator_updates", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least {least}")
        if self.control not in ("none", "independent", "negated"):
            raise ValueError(
                f"control={self.control!r}, expected 'none', 'independent' or 'negated'"
            )
        if self.clips_per_pass is not None and self.clips_per_pass < 1:
            raise ValueError(
                f"clips_per_pass={self.clips_per_pass}, expected at least 1, or null for all at"
                " once"
            )
        for name in ("advantage_clip", "beta", "shift", "penalty_sigma"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}, expected a positive number")
        for name in ("lam_prior", "r1_weight", "r2_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 0")
        if not 0 <= self.old_decay < 1:
            raise ValueError(
                f"old_decay={self.old_decay}, expected a number in [0, 1); 1 would never follow"
            )
        if self.policy == "nft" and self.baseline == "group" and self.group_size == 1:
            raise ValueError(
                "baseline='group' compares clips of one prompt; set group_size to at least 2, or"
                " 'batch'"
            )


@dataclass(frozen=True)
class NoisedChunks:
    """What a network says of noised chunks; the first axis is chunk by sample, ``[K B]``."""

    x_t: Tensor  # [K B, C, f, h, w]
    t: Tensor  # [K B]
    v_target: Tensor  # eps - x0
    v: Tensor  # the network's


class AFD:
    """The method.

    Args:
        config: see ``Config``.
        student: a causal Wan transformer.
        stream: how it is streamed; its rollouts in training are the same.
        discriminator: from latents ``[B, C, T, h, w]`` and prompts ``[B, L, D]`` to logits ``[B,
            J]``; None makes a ``VideoDiscriminator`` of a copy of the student.
        seed: of all random draws.

    Raises:
        ValueError: if these do not fit together.
    """

    needs: frozenset[str] = frozenset({"clips"})

    def __init__(
        self,
        config: Config,
        student: nn.Module,
        stream: StreamConfig,
        discriminator: nn.Module | None = None,
        seed: int = 0,
    ):
        if stream.order != "autoregressive":
            raise ValueError(
                f"stream.order={stream.order!r}, but afd trains chunk after chunk; set"
                " 'autoregressive'"
            )
        if config.policy == "nft" and stream.commit != "clean":
            raise ValueError(
                f"stream.commit={stream.commit!r}, but afd noises chunks over clean ones; set"
                " 'clean'"
            )
        self.config, self.student, self.stream, self.seed = config, student, stream, seed
        self.discriminator = self._new_discriminator() if discriminator is None else discriminator
        self.old = _frozen_copy(student) if config.policy == "nft" else None
        self.reference = (
            _frozen_copy(student) if self.old is not None and config.lam_prior else None
        )

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student, "discriminator": self.discriminator}

    def turns(self, step: int) -> tuple[str, ...]:
        """The discriminator, then the student, which so meets one that has seen the policy as it
        is.
        """
        first = ("discriminator",) * self.config.discriminator_updates
        return (*first, "student") if step >= self.config.student_start_step else first

    def choices(self, turn: str, step: int) -> int | None:
        """A GAN's rollouts end at a random step; the policy's are whole."""
        return step if self.config.policy == "gan" else None

    def loss(self, turn: str, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, float]]:
        """Batches hold the teacher's ``latents [B, C, T, h, w]``, ``cond [B, L, D]``, ``offset
        [B]`` and ``keys``.

        Raises:
            ValueError: if clips are cut from the middle or are no whole number of chunks, or if an
                advantage would have nothing to be compared with.
        """
        parts, numbers = zip(*self.losses(turn, batch, step))
        return torch.stack(parts).sum(), numbers[-1]

    def losses(
        self, turn: str, batch: dict[str, Any], step: int
    ) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """The loss in parts, the numbers with the last: a part for each noising of each
        ``clips_per_pass`` clips.
        """
        self._check(batch)
        decision = keyed_generator(self.seed, "decision", step, turn, batch.get("micro", 0))
        if turn not in self.networks():
            raise ValueError(f"turn={turn!r}, expected 'student' or 'discriminator'")
        if turn == "discriminator":
            yield self._discriminator_loss(batch, decision)
        elif self.config.policy == "nft":
            yield from self._nft_losses(batch, decision)
        else:
            yield self._gan_loss(batch, decision)

    @torch.no_grad()
    def after_step(self, turn: str, step: int) -> None:
        """The old policy follows the student."""
        if (
            turn == "student"
            and self.old is not None
            and (step + 1) % self.config.refresh_every == 0
        ):
            old, new = self._placed(self.old).parameters(), self.student.parameters()
            torch._foreach_lerp_(list(old), [p.detach() for p in new], 1 - self.config.old_decay)

    def extra_state(self) -> dict[str, Tensor]:
        """The old policy's weights; the reference never changes."""
        return (
            {}
            if self.old is None
            else {f"old.{k}": v for k, v in self._placed(self.old).state_dict().items()}
        )

    # ---- the turns

    def _discriminator_loss(
        self, batch: dict[str, Any], decision: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        c, real, cond = self.config, batch["latents"], batch["cond"]
        policy = self.student if self.old is None else self._placed(self.old)
        with torch.no_grad():
            fake = self._roll_out(policy, batch, self._seeds(batch, "rollout"), decision)
        real_logits, fake_logits = self.discriminator(
            torch.cat([real, fake]), torch.cat([cond, cond])
        ).chunk(2)
        adversarial = discriminator_loss("paired", fake_logits, real_logits)
        penalty = torch.zeros_like(adversarial)
        for weight, x, logits in (
            (c.r1_weight, real, real_logits),
            (c.r2_weight, fake, fake_logits),
        ):
            if weight:
                penalty = penalty + weight * self._penalty(x, logits, batch)
        numbers = {
            "adversarial": adversarial,
            "penalty": penalty,
            **preferences(fake_logits, real_logits),
        }
        return adversarial + penalty, as_floats(numbers)

    def _nft_losses(
        self, batch: dict[str, Any], decision: torch.Generator
    ) -> Iterator[tuple[Tensor, dict[str, float]]]:
        c, groups = self.config, self.config.group_size
        cond = batch["cond"].repeat_interleave(groups, dim=0)
        with torch.no_grad():
            x = self._roll_out(
                self._placed(self.old),
                {**batch, "cond": cond},
                self._seeds(batch, "rollout", groups),
            )
            logits, real_logits = (
                self.discriminator(x, cond),
                self.discriminator(batch["latents"], batch["cond"]),
            )
            advantages = self._controlled(self._advantages(logits), decision)  # [B G, J]
            r = optimality(advantages, c.advantage_clip)
        numbers = Counter(preferences(logits, real_logits.repeat_interleave(groups, dim=0)))
        numbers.update(weight_std=r.std(correction=0), clipped=((r == 0) | (r == 1)).float().mean())
        del logits, real_logits
        size = len(x) if c.clips_per_pass is None else c.clips_per_pass
        starts = range(0, len(x), size)
        for n in range(c.noisings):
            seeds, times = self._noising_seeds(batch, n), self._draw_times(decision, x)
            for start in starts:
                rows = slice(start, start + size)
                share = len(x[rows]) / len(x) / c.noisings
                noise = KeyedNoise(seeds[rows])
                ask = partial(
                    noise_chunks,
                    stream=self.stream,
                    clips=x[rows],
                    cond=cond[rows],
                    times=times,
                    noise=noise,
                )
                loss, parts = self._update_loss(ask, self._weights(r[rows], x[rows]))
                numbers.update({name: share * part for name, part in parts.items()})
                is_last = n + 1 == c.noisings and start == starts[-1]
                yield share * loss, as_floats(numbers) if is_last else {}

    def _update_loss(
        self, ask: Callable[[nn.Module], NoisedChunks], weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's loss on noised chunks, of which ``ask`` asks any network, with their r."""
        c = self.config
        # first, so that their caches are gone when the student's graph is there
        with torch.no_grad():
            v_old = ask(self._placed(self.old)).v
            v_ref = None if self.reference is None else ask(self._placed(self.reference)).v
        chunks = ask(self.student)
        states = (chunks.x_t, chunks.t) if c.self_normalized else (None, None)
        loss = (
            c.advantage_clip
            / c.beta
            * nft_loss(chunks.v, v_old, chunks.v_target, weight, c.beta, *states)
        )
        numbers = {"nft": loss.detach(), "velocity_gap": (chunks.v.detach() - v_old).abs().mean()}
        if v_ref is not None:
            prior = (chunks.v - v_ref).square().mean()
            loss, numbers["prior"] = loss + c.lam_prior * prior, prior.detach()
        return loss, numbers

    def _gan_loss(
        self, batch: dict[str, Any], decision: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        x = self._roll_out(self.student, batch, self._seeds(batch, "rollout"), decision)
        logits = self.discriminator(x, batch["cond"])
        with torch.no_grad():
            real_logits = self.discriminator(batch["latents"], batch["cond"])
        loss = generator_loss("paired", logits, real_logits)
        return loss, as_floats({"adversarial": loss, **preferences(logits, real_logits)})

    # ---- their parts

    def _roll_out(
        self,
        network: nn.Module,
        batch: dict[str, Any],
        seeds: list[int],
        decision: torch.Generator | None = None,
    ) -> Tensor:
        """A streamed clip ``[.., C, T, h, w]`` for each seed; for a GAN of the predictions at a
        random step, with gradient.
        """
        latents = batch["latents"]
        schedule = build_schedule(self.stream, self._num_chunks(latents))
        if self.config.policy == "gan":
            longest = max(map(len, self._step_times(self._num_chunks(latents))))
            schedule = move_tap(schedule, int(torch.randint(longest, (), generator=decision)))
        results = stream_over(
            network, self.stream, batch["cond"], schedule, KeyedNoise(seeds), latents
        )
        return torch.cat([result.prediction for result in results], dim=2)

    def _penalty(self, x: Tensor, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        """The approximate R1 or R2 at ``x``, whose logits are known."""
        noise = torch.stack(
            [keyed_normal(tuple(x.shape[1:]), self.seed, "penalty", key) for key in batch["keys"]]
        )

        def logits_of(moved: Tensor) -> Tensor:
            return logits if moved is x else self.discriminator(moved, batch["cond"])

        return approximate_penalty(logits_of, x, noise.to(x), self.config.penalty_sigma)

    def _advantages(self, logits: Tensor) -> Tensor:
        """A ``[B G, J]`` of the old policy's clips, against those of all processes."""
        c = self.config
        everyone, first = _gathered(logits)
        group = (
            torch.arange(len(everyone), device=logits.device) // c.group_size
            if c.baseline == "group"
            else None
        )
        if len(everyone) == 1:
            raise ValueError(
                "one rollout has no other to be compared with; raise train.batch_size or"
                " options.group_size"
            )
        std = "batch" if c.normalize == "std" else "none"
        return group_advantage(everyone, group, std)[first : first + len(logits)]

    def _controlled(self, advantages: Tensor, decision: torch.Generator) -> Tensor:
        """The advantages ``[B G, J]`` as they come, or what they are compared with."""
        c = self.config
        if c.control == "none":
            return advantages
        if c.control == "negated":
            return -advantages
        of_prompts = advantages.unflatten(0, (-1, c.group_size)).roll(1, dims=0)
        signs = 2 * torch.randint(2, (len(of_prompts), 1, 1), generator=decision) - 1
        return (of_prompts * signs.to(of_prompts)).flatten(0, 1)

    def _weights(self, r: Tensor, clips: Tensor) -> Tensor:
        """r ``[B G, J]`` of ``clips [B G, C, T, h, w]`` for their chunks, ``[K B G]`` or ``[K B G,
        1, f, h, w]``.
        """
        if self.config.logit != "token":
            return r.T.expand(self._num_chunks(clips), -1).flatten()
        patch, sizes = self.student.config.patch_size, clips.shape[2:]
        of_patches = r.unflatten(1, [size // p for size, p in zip(sizes, patch)])
        p, q, s = patch
        places = repeat(of_patches, "n t h w -> n 1 (t p) (h q) (w s)", p=p, q=q, s=s)
        return torch.cat(places.split(self.stream.chunk_frames, dim=2))

    def _draw_times(self, decision: torch.Generator, x: Tensor) -> list[float]:
        """A time for each chunk, the same for all samples and all processes."""
        num_chunks = self._num_chunks(x)
        if self.config.time_law == "steps":
            return [
                float(choose_times(times, 1, decision)) for times in self._step_times(num_chunks)
            ]
        return sample_times(
            num_chunks, self.config.time_law, self.config.shift, decision, low=LEAST_TIME
        ).tolist()

    def _step_times(self, num_chunks: int) -> list[list[float]]:
        """The times at which each chunk is denoised."""
        steps = [
            step
            for event in build_schedule(self.stream, num_chunks)
            for step in zip(event.chunks, event.t)
        ]
        return [[t for chunk, t in steps if chunk == k] for k in range(num_chunks)]

    def _seeds(self, batch: dict[str, Any], what: str, groups: int = 1) -> list[int]:
        return [
            key_to_seed(self.seed, what, key, member)
            for key in batch["keys"]
            for member in range(groups)
        ]

    def _noising_seeds(self, batch: dict[str, Any], n: int) -> list[int]:
        """Of the noise in which clips are learned from."""
        if not self.config.shared_noise:
            return self._seeds(batch, f"noising{n}", self.config.group_size)
        return [
            seed
            for seed in self._seeds(batch, f"noising{n}")
            for _ in range(self.config.group_size)
        ]

    def _num_chunks(self, latents: Tensor) -> int:
        return latents.shape[2] // self.stream.chunk_frames

    def _check(self, batch: dict[str, Any]) -> None:
        frames, f = batch["latents"].shape[2], self.stream.chunk_frames
        if frames % f:
            raise ValueError(
                f"chunk_frames={f} does not divide the teacher's {frames} latent frames; set"
                " data.latent_frames"
            )
        if bool(batch["offset"].any()):
            raise ValueError(
                "teacher clips are cut from the middle, student clips begin; set"
                " data.window_stride=null"
            )

    def _placed(self, network: nn.Module) -> nn.Module:
        """A network that the trainer does not know, on the student's device."""
        return network.to(next(self.student.parameters()).device)

    def _new_discriminator(self) -> VideoDiscriminator:
        c = self.config
        return VideoDiscriminator(
            copy.deepcopy(self.student),
            c.discriminator_layers,
            c.discriminator_t,
            c.train_trunk,
            chunk_frames=self.stream.chunk_frames if c.logit == "chunk" else None,
            per_token=c.logit == "token",
            seed=self.seed if c.discriminator_seed is None else c.discriminator_seed,
        )


def noise_chunks(
    network: nn.Module,
    stream: StreamConfig,
    clips: Tensor,
    cond: Tensor,
    times: Sequence[float],
    noise: Noise,
) -> NoisedChunks:
    """What a network says of each chunk of ``clips [B, C, T, h, w]`` at its own of ``times``, over
    the clean ones before it.

    A rollout of one step a chunk: a chunk begins as noise, to which the clip's chunk is added, and
    ends as that chunk, whatever the network says; so window, sink and context noise are those of
    the stream. Networks asked with the same noise see the same states.
    """
    chunks = clips.split(stream.chunk_frames, dim=2)
    x_t, v_target, v = [], [], []

    def begin(k: int, t: float, eps: Tensor) -> Tensor:
        x_t.append(add_noise(chunks[k], eps, t))
        v_target.append(velocity(chunks[k], eps))
        return x_t[k]

    def end(k: int, t: float, x0: Tensor) -> Tensor:
        v.append(v_from_x0(x_t[k], x0, t))
        return chunks[k]

    schedule = table([(t,) for t in times], len(times))
    for _ in stream_over(
        network, stream, cond, schedule, noise, clips, before_step=begin, after_x0=end
    ):
        pass
    t = torch.tensor(times, device=clips.device).repeat_interleave(len(clips))
    return NoisedChunks(torch.cat(x_t), t, torch.cat(v_target), torch.cat(v))


def stream_over(
    network: nn.Module,
    stream: StreamConfig,
    cond: Tensor,
    schedule: Iterable[Denoise],
    noise: Noise,
    like: Tensor,
    **hooks: Any,
) -> Iterator[ChunkResult]:
    """``rollout`` of a schedule as ``stream`` says, over a new cache, in the latent size of
    ``like``.
    """
    shape = (like.shape[1], *like.shape[3:])
    return rollout(
        network,
        cond,
        schedule,
        noise,
        latent_shape=shape,
        chunk_frames=stream.chunk_frames,
        cache=new_cache(network, stream, len(cond), shape),
        commit=stream.commit,
        context_t=stream.context_t,
        stepper=stream.stepper,
        **hooks,
    )


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


def _gathered(logits: Tensor) -> tuple[Tensor, int]:
    """The logits of all processes, in order, and where this one's begin."""
    if not (dist.is_available() and dist.is_initialized()):
        return logits, 0
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, logits.contiguous())
    return torch.cat(parts), dist.get_rank() * len(logits)


def _frozen_copy(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).requires_grad_(False).eval()


Method = AFD
