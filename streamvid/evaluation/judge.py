"""A judge of its own: a discriminator that no training has seen, asked which of two clips is the
true one.

It is trained on pairs (true clip, student clip) of one prompt, by the paired logistic loss with R1
and R2 (as AFD's, arXiv 2605.26105), and asked about the pairs of other prompts. A student that
can't be told from the truth wins half of them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from streamvid.core.adversary import approximate_penalty, discriminator_loss
from streamvid.models.video_discriminator import VideoDiscriminator
from streamvid.seeding import keyed_generator, keyed_normal


def win_rate(
    trunk: nn.Module,
    true: Tensor,
    made: Tensor,
    cond: Tensor,
    *,
    num_steps: int = 150,
    batch_size: int = 8,
    test_share: float = 0.4,
    lr: float = 1e-4,
    penalty: float = 100.0,
    seed: int = 0,
) -> dict[str, float]:
    """How often a student's clip is taken for the true one, over prompts that the judge was not
    trained on.

    Args:
        trunk: a Wan transformer that the judge starts from; copied.
        true, made: clips of the same prompts, latents ``[N, C, T, h, w]``.
        cond: the prompts ``[N, L, D]``.
        num_steps: of the judge's training.
        test_share: of the prompts, the last ones, that it is asked about.
        penalty: weight of R1 and of R2, at differences of .05.

    Returns:
        ``win_rate``, the share of test pairs in which the student's clip has the greater logit;
        ``gap``, the mean of the true clip's logit less the student's.

    Raises:
        ValueError: if the shapes differ, or there are fewer than 4 prompts.
    """
    if true.shape != made.shape or len(cond) != len(true) or len(true) < 4:
        raise ValueError(
            f"true clips {tuple(true.shape)}, made ones {tuple(made.shape)}, prompts {len(cond)};"
            " expected the same shape and at least 4 prompts"
        )
    judge = VideoDiscriminator(copy.deepcopy(trunk).float(), seed=seed).to(true.device)
    trained = [p for p in judge.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr, betas=(0.0, 0.99))
    num_train = max(2, round(len(true) * (1 - test_share)))
    for step in range(num_steps):
        generator = keyed_generator("judge", seed, step)
        rows = torch.randint(num_train, (batch_size,), generator=generator).to(true.device)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / num_steps)
        optimizer.zero_grad()
        key = ("judge noise", seed, step)
        _loss(judge, true[rows], made[rows], cond[rows], penalty, key).backward()
        optimizer.step()
    asked = slice(num_train, None)
    gap = _logits(judge, true[asked], cond[asked]) - _logits(judge, made[asked], cond[asked])
    return {"win_rate": (gap < 0).float().mean().item(), "gap": gap.mean().item()}


def _loss(
    judge: nn.Module, true: Tensor, made: Tensor, cond: Tensor, penalty: float, key: tuple
) -> Tensor:
    """The paired loss, with R1 on true clips and R2 on made ones."""
    of_true, of_made = judge(torch.cat([true, made]), torch.cat([cond, cond])).chunk(2)
    loss = discriminator_loss("paired", of_made, of_true)
    for side, x, known in (("true", true, of_true), ("made", made, of_made)):
        noise = keyed_normal(tuple(x.shape), *key, side).to(x)
        slope = approximate_penalty(lambda y: judge(y, cond), x, noise, 0.05, known=known)
        loss = loss + penalty * slope
    return loss


@torch.no_grad()
def _logits(judge: nn.Module, clips: Tensor, cond: Tensor) -> Tensor:
    """The judge's logits ``[N]``, in batches."""
    batches = zip(clips.split(16), cond.split(16))
    return torch.cat([judge(x, c)[:, 0] for x, c in batches])
