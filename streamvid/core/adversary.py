"""Adversaries: loss pairs, penalties, and heads on the features of a frozen network.

Logits are ``[B, K]``, K heads or positions, and a loss is the mean over both. A discriminator here
is a frozen trunk, whatever network it is, whose inner activations ``capture`` reads, and light
``FeatureHeads`` on them: the trunk is not theirs, so nobody trains it by accident, while the
gradient to the sample passes through it.

Shapes: features are maps ``[B, C, H, W]`` or ``[B, C, T, H, W]``, tokens ``[B, L, D]``, or vectors
``[B, D]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention, softplus

from streamvid.core.process import Time, as_work, euler_step

# ---- loss pairs ----------------------------------------------------------------------------------

AdversaryKind = Literal["ns", "hinge", "hinge_margin", "lsgan", "wgan", "paired"]

# Of each kind: the generator's loss of (fake, real), the discriminator's of (fake, real); larger
# means more real.
_Loss = Callable[[Tensor, Tensor], Tensor]
_PAIRS: dict[str, tuple[_Loss, _Loss]] = {
    "ns": (lambda f, r: softplus(-f), lambda f, r: softplus(f) + softplus(-r)),
    "hinge": (lambda f, r: -f, lambda f, r: relu(1 + f) + relu(1 - r)),
    "hinge_margin": (lambda f, r: relu(1 - f), lambda f, r: relu(1 + f) + relu(1 - r)),
    "lsgan": (lambda f, r: (f - 1).square(), lambda f, r: f.square() + (r - 1).square()),
    "wgan": (lambda f, r: -f, lambda f, r: f - r),
    "paired": (lambda f, r: softplus(r - f), lambda f, r: softplus(f - r)),
}


def generator_loss(kind: AdversaryKind, fake: Tensor, real: Tensor | None = None) -> Tensor:
    """The loss of the student, a scalar.

    ================  ===============  ==========================  ================================
    kind              student          discriminator               source
    ================  ===============  ==========================  ================================
    ``ns``            softplus(-f)     softplus(f) + softplus(-r)  non-saturating, arXiv 1406.2661
    ``hinge``         -f               relu(1 + f) + relu(1 - r)   arXiv 1705.02894
    ``hinge_margin``  relu(1 - f)      the same                    PCM, TDD: stops at the margin
    ``lsgan``         (f - 1)^2        f^2 + (r - 1)^2             arXiv 1611.04076
    ``wgan``          -f               f - r                       arXiv 1701.07875, with a penalty
    ``paired``        softplus(r - f)  softplus(f - r)             relativistic, compares by index
                                                                   (R3GAN, arXiv 2501.05441)
    ================  ===============  ==========================  ================================

    Args:
        fake: logits of student samples, with gradient.
        real: with "paired", logits of the real samples of the same index, which get no gradient;
            not used otherwise.

    Raises:
        ValueError: on another kind, or "paired" without ``real`` of one shape.
    """
    student, _ = _pair(kind)
    if kind == "paired" and (real is None or real.shape != fake.shape):
        raise ValueError(
            f"kind='paired' compares by index: fake {tuple(fake.shape)}, real {_shape(real)}"
        )
    other = fake if real is None else real  # only "paired" looks at it
    return student(as_work(fake), as_work(other).detach()).mean()  # sg


def discriminator_loss(kind: AdversaryKind, fake: Tensor, real: Tensor) -> Tensor:
    """The loss of the discriminator, a scalar; see ``generator_loss``. The samples are detached by
    the caller.
    """
    _, discriminator = _pair(kind)
    if fake.shape != real.shape:
        raise ValueError(
            f"logits of {tuple(fake.shape)} fakes and {tuple(real.shape)} reals, expected one shape"
        )
    return discriminator(as_work(fake), as_work(real)).mean()


def _pair(kind: str) -> tuple[_Loss, _Loss]:
    if kind not in _PAIRS:
        raise ValueError(f"kind={kind!r}, expected one of {tuple(_PAIRS)}")
    return _PAIRS[kind]


def _shape(x: Tensor | None) -> str:
    return "None" if x is None else str(tuple(x.shape))


# ---- penalties -----------------------------------------------------------------------------------


def approximate_penalty(
    logits_of: Callable[[Tensor], Tensor],
    x: Tensor,
    noise: Tensor,
    sigma: float,
    divide: bool = False,
    known: Tensor | None = None,
) -> Tensor:
    """``E |D(x + sigma noise) - D(x)|^2``, about sigma^2 times the squared norm of D's gradient (R1
    on reals, R2 on fakes, arXiv 1801.04406), and equal to it on average for a linear D.

    APT, arXiv 2501.08316: first derivatives only, so that attention kernels will do.

    Args:
        logits_of: x to ``[B, K]``.
        noise: standard normal, as ``x``.
        sigma: small against the data; APT has 0.01 for images, 0.1 for video, ASD 0.05.
        divide: divide the difference by sigma first, as Self-Forcing's code does.
        known: the logits of ``x``, where they are there already.

    Raises:
        ValueError: unless ``sigma`` > 0.
    """
    if sigma <= 0:
        raise ValueError(f"sigma={sigma}, expected a positive number")
    moved = as_work(logits_of(x + sigma * noise))
    moved = moved - as_work(logits_of(x) if known is None else known)
    return (moved / sigma if divide else moved).square().mean()


# ---- features and heads --------------------------------------------------------------------------


@contextmanager
def capture(network: nn.Module, layers: Sequence[str]) -> Iterator[list[Tensor]]:
    """While open, calls of ``network`` fill the list with what its submodules ``layers`` return, in
    this order.

        with capture(transformer, ["blocks.2", "blocks.4"]) as features:
            transformer(x_t, 1000 * t, cond)

    A further call replaces the features. A submodule's tuple counts for its first tensor.

    Raises:
        ValueError: if a submodule does not exist.
    """
    modules = dict(network.named_modules())
    unknown = [name for name in layers if name not in modules]
    if unknown:
        raise ValueError(
            f"no layer {unknown[0]!r} in {type(network).__name__}; its own are"
            f" {', '.join(list(modules)[1:9])}, ..."
        )
    found: list[Tensor] = [None] * len(layers)  # type: ignore[list-item]

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor | tuple) -> None:
            found[index] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [
        modules[name].register_forward_hook(keep(index)) for index, name in enumerate(layers)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def as_tokens(features: Tensor) -> Tensor:
    """Features of any of the three kinds as tokens ``[B, L, D]``."""
    if features.ndim == 2:
        return features[:, None]
    return features if features.ndim == 3 else features.flatten(2).transpose(1, 2)


class TokenHead(nn.Module):
    """One logit per token, averaged: ``[B, L, D]`` to ``[B, K]``. With ``film`` the time scales and
    shifts the hidden layer.

    Args:
        dim: D.
        num_logits: K.
        hidden: width of the hidden layer.
        film: whether ``forward`` takes a time.
    """

    def __init__(self, dim: int, num_logits: int = 1, hidden: int = 64, film: bool = False):
        super().__init__()
        self.inward = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden))
        self.outward = nn.Linear(hidden, num_logits)
        self.film = (
            nn.Sequential(nn.Linear(16, hidden), nn.SiLU(), nn.Linear(hidden, 2 * hidden))
            if film
            else None
        )

    def forward(self, features: Tensor, t: Tensor | None = None) -> Tensor:
        """Logits ``[B, K]`` of features at the times ``t`` ``[B]``, which only a head with ``film``
        looks at.

        Raises:
            ValueError: if such a head is given no times.
        """
        hidden = self.inward(as_tokens(features))
        if self.film is not None:
            if t is None:
                raise ValueError("a head with film looks at the times, t=None came; pass t [B]")
            scale, shift = self.film(_waves(t)).unsqueeze(1).chunk(2, dim=-1)
            hidden = hidden * (1 + scale) + shift
        return self.outward(nn.functional.silu(hidden)).mean(1)


class ConvHead(nn.Module):
    """Convolutions on a map, frame by frame, and a logit a place, averaged: ``[B, C, (T,) H, W]``
    to ``[B, K]``.
    """

    def __init__(self, channels: int, num_logits: int = 1, hidden: int = 64):
        super().__init__()
        groups = next(n for n in (8, 4, 2, 1) if hidden % n == 0)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.GroupNorm(groups, hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, num_logits, 1),
        )

    def forward(self, features: Tensor, t: Tensor | None = None) -> Tensor:
        """Logits ``[B, K]``."""
        frames = features.transpose(1, 2).flatten(0, 1) if features.ndim == 5 else features
        return self.layers(frames).flatten(2).mean(2).unflatten(0, (len(features), -1)).mean(1)


class QueryHead(nn.Module):
    """A learned register token attends to a layer's tokens: ``[B, L, D]`` to ``[B, hidden]``, for
    ``FeatureHeads``.

    The cross-attention head of APT (arXiv 2501.08316) and of Self-Forcing's discriminator.

    Args:
        dim: D.
        hidden: width of the register, a multiple of ``num_heads``.
        num_heads: of the attention.
    """

    def __init__(self, dim: int, hidden: int = 64, num_heads: int = 4):
        super().__init__()
        if hidden % num_heads:
            raise ValueError(f"hidden={hidden} is no multiple of num_heads={num_heads}")
        self.sizes = dim, hidden, num_heads
        self.num_heads = num_heads
        self.register_token = nn.Parameter(0.02 * torch.randn(hidden))
        self.norm = nn.LayerNorm(dim)
        self.to_q, self.to_kv = nn.Linear(hidden, hidden), nn.Linear(dim, 2 * hidden)
        self.q_norm, self.k_norm = (nn.RMSNorm(hidden // num_heads) for _ in range(2))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(hidden),
            nn.Linear(hidden, 4 * hidden),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * hidden, hidden),
        )

    def forward(self, features: Tensor) -> Tensor:
        """The summary in the register, ``[B, hidden]``."""
        tokens = as_tokens(features)
        query = self.register_token.expand(len(tokens), 1, -1)
        split = lambda x: x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # noqa: E731  [B, N, L, D]
        key, value = self.to_kv(self.norm(tokens)).chunk(2, dim=-1)
        q, k = self.q_norm(split(self.to_q(query))), self.k_norm(split(key))
        gathered = query + scaled_dot_product_attention(q, k, split(value)).transpose(1, 2).flatten(
            2
        )
        return (gathered + self.feed_forward(gathered))[:, 0]


class FeatureHeads(nn.Module):
    """A discriminator on captured features: one head per layer.

    Args:
        dims: channels or width of each layer's features.
        kind: "token", "film" and "conv" give the logits of all layers side by side, ``[B, layers *
            num_logits]`` (LADD, arXiv 2403.12015; time-modulated as in AddSR); "query" joins what a
            register gathers from each layer into ``[B, num_logits]`` for the clip as a whole (APT;
            ASD has a logit for each number of steps).
        num_logits: K.
        hidden: width of the heads.

    Raises:
        ValueError: on another kind, or without layers.
    """

    def __init__(
        self,
        dims: Sequence[int],
        kind: Literal["token", "film", "conv", "query"] = "token",
        num_logits: int = 1,
        hidden: int = 64,
    ):
        super().__init__()
        if kind not in ("token", "film", "conv", "query"):
            raise ValueError(f"kind={kind!r}, expected 'token', 'film', 'conv' or 'query'")
        if not len(dims):
            raise ValueError("dims is empty; name at least one layer's width")
        self.kind = kind
        self.heads = nn.ModuleList(_new_head(kind, dim, num_logits, hidden) for dim in dims)
        joined = hidden * len(dims)
        self.join = None
        if kind == "query":
            self.join = nn.Sequential(
                nn.LayerNorm(joined),
                nn.Linear(joined, hidden),
                nn.SiLU(),
                nn.Linear(hidden, num_logits),
            )

    def forward(self, features: Sequence[Tensor], t: Tensor | None = None) -> Tensor:
        """Logits ``[B, K]`` of the layers' features; ``t`` ``[B]`` is for kind "film"."""
        if self.join is not None:
            return self.join(torch.cat([head(f) for head, f in zip(self.heads, features)], dim=1))
        return torch.cat([head(f, t) for head, f in zip(self.heads, features)], dim=1)


def _new_head(kind: str, dim: int, num_logits: int, hidden: int) -> nn.Module:
    if kind == "query":
        return QueryHead(dim, hidden)
    return (
        ConvHead(dim, num_logits, hidden)
        if kind == "conv"
        else TokenHead(dim, num_logits, hidden, kind == "film")
    )


def _waves(t: Tensor, num: int = 8) -> Tensor:
    """Sines and cosines of times ``[B]``, ``[B, 2 num]``."""
    angles = t.float()[:, None] * (torch.pi * 2.0 ** torch.arange(num, device=t.device) / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class HeadPool(nn.Module):
    """Many heads in groups, of which a step uses a few, and some of which are made anew
    (NitroFusion, arXiv 2412.02030).

    Args:
        make_head: a group's index to a new head.
        num_groups: such as layers, or layers times noise levels.
        per_group: heads a group.
    """

    def __init__(self, make_head: Callable[[int], nn.Module], num_groups: int, per_group: int):
        super().__init__()
        if num_groups < 1 or per_group < 1:
            raise ValueError(
                f"num_groups={num_groups}, per_group={per_group}, expected at least 1 of each"
            )
        self.make_head = make_head
        self.groups = nn.ModuleList(
            nn.ModuleList(make_head(g) for _ in range(per_group)) for g in range(num_groups)
        )

    def take(self, generator: torch.Generator) -> list[nn.Module]:
        """One head a group, at random; a pool of one head a group draws nothing."""
        groups = self._heads()
        per_group = len(groups[0])
        if per_group == 1:
            return [group[0] for group in groups]
        chosen = torch.randint(per_group, (len(groups),), generator=generator)
        return [group[index] for group, index in zip(groups, chosen.tolist())]

    def _heads(self) -> list[list[nn.Module]]:
        return [list(group.children()) for group in self.groups]

    @torch.no_grad()
    def refresh(
        self,
        share: float,
        generator: torch.Generator,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> list[int]:
        """Give ``round(share * all)`` heads new weights and forget their optimiser state; returns
        which, counted through.

        Parameters stay the same objects, so that the optimiser goes on with them. 0 touches and
        draws nothing.
        """
        heads = [(g, head) for g, group in enumerate(self._heads()) for head in group]
        count = round(share * len(heads))
        if count == 0:
            return []
        chosen = torch.randperm(len(heads), generator=generator)[:count].tolist()
        for index in chosen:
            group, head = heads[index]
            head.load_state_dict(self.make_head(group).state_dict())
            for parameter in head.parameters():
                if optimizer is not None:
                    optimizer.state.pop(parameter, None)
        return sorted(chosen)


# ---- adversarial distribution matching -----------------------------------------------------------


def euler_pair(
    x_t: Tensor, t: Time, dt: float, v_real: Tensor, v_fake: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the teacher and the fake score each take ``x_t`` in an Euler step of ``dt``; a
    discriminator tells which is which.

    ADM (arXiv 2507.18569): x_real - x_fake = dt / t (x0_real - x0_fake), so a student whose fake
    score equals the teacher gives a discriminator nothing to see. The student's gradient passes
    through ``v_fake`` and ``x_t``.
    """
    return euler_step(x_t, v_real, t, t - dt), euler_step(x_t, v_fake, t, t - dt)
