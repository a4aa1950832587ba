"""Moments: distances between two *sets* of samples, in features that need no training.

Maximum mean discrepancy in the features of random networks is the Embedding Loss (arXiv
2604.22379); a spectral and a relational distance look at what a mean of features misses.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, normalize

from streamvid.core.inject import temporal_difference
from streamvid.core.process import as_work


def mmd2(
    fx: Tensor,
    fy: Tensor,
    kernel: Literal["linear", "rbf"] = "linear",
    unbiased: bool = True,
    length: float = 1.0,
) -> Tensor:
    """The squared maximum mean discrepancy of features ``[N, D]`` and ``[M, D]``, a scalar (Gretton
    et al., 2012, eq. 3, 5).

    "linear" compares means, |mean fx - mean fy|^2; "rbf", exp(-|a - b|^2 / (2 length^2)), all
    moments.

    Args:
        unbiased: leaves pairs of a sample with itself out: mean 0 for equal laws, and sometimes
            negative. Otherwise equal batches give 0 exactly.

    Raises:
        ValueError: on another kernel, or a single sample with ``unbiased``.
    """
    if kernel not in ("linear", "rbf"):
        raise ValueError(f"kernel={kernel!r}, expected 'linear' or 'rbf'")
    if unbiased and min(len(fx), len(fy)) < 2:
        raise ValueError(
            f"{len(fx)} and {len(fy)} samples; an unbiased estimate needs at least 2 of each"
        )
    fx, fy = as_work(fx), as_work(fy)
    gram = lambda a, b: (
        a @ b.T if kernel == "linear" else (-torch.cdist(a, b).square() / (2 * length**2)).exp()
    )
    return (
        _mean_gram(gram(fx, fx), unbiased)
        + _mean_gram(gram(fy, fy), unbiased)
        - 2 * gram(fx, fy).mean()
    )


def _mean_gram(gram: Tensor, unbiased: bool) -> Tensor:
    if not unbiased:
        return gram.mean()
    return (gram.sum() - gram.diagonal().sum()) / (len(gram) * (len(gram) - 1))


class RandomFeatures(nn.Module):
    """Features ``[B, width]`` of a random, frozen convolutional network; a new seed is a new
    network.

    Of a clip, the mean over frames of the features of frames and, beside them, of differences
    between frames: what is there, and how it moves. Points ``[B, C, 1, 1]`` are images of one
    pixel, for which ``kernel`` is 1.

    Args:
        channels: C.
        seed: of the weights.
        width: of the features; a clip has twice as many.
        depth: convolutions.
        kernel: their size, odd.
    """

    def __init__(self, channels: int, seed: int, width: int = 128, depth: int = 3, kernel: int = 3):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [channels, *[width] * depth]
        self.convs = nn.ModuleList()
        for inward, outward in zip(sizes, sizes[1:]):
            conv = nn.Conv2d(inward, outward, kernel, padding=kernel // 2)
            conv.weight.data.normal_(0, (2 / (kernel**2 * inward)) ** 0.5, generator=generator)
            assert conv.bias is not None
            conv.bias.data.uniform_(-1, 1, generator=generator)
            self.convs.append(conv)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Features of images ``[B, C, H, W]`` or clips ``[B, C, T, H, W]``, with gradient to
        ``x``.
        """
        if x.ndim == 4:
            return self._of_images(x)
        clips = [x] if x.shape[2] < 2 else [x, temporal_difference(x)]
        return torch.cat(
            [
                self._of_images(c.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).mean(1)
                for c in clips
            ],
            1,
        )

    def _of_images(self, x: Tensor) -> Tensor:
        x = x.to(next(self.parameters()).dtype)
        for conv in self.convs:
            x = torch.nn.functional.leaky_relu(conv(x), 0.2)
        return x.mean((2, 3))


def spectral_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of the logarithmic amplitude spectra over height and width, averaged
    over each batch.

    It sees blur, which squared errors forgive. Batches of any sizes; a scalar.
    """
    spectrum = lambda z: torch.fft.rfft2(as_work(z), norm="ortho").abs().add(1e-6).log().mean(0)
    return (spectrum(x) - spectrum(y)).square().mean()


def relational_kl(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """KL of who is similar to whom: softmax of cosine similarities within a batch, teacher's ||
    student's (RDD, 2410.07679).

    Args:
        student, teacher: features ``[B, D]`` of the same samples, of any two widths; the teacher's
            get no gradient.

    Raises:
        ValueError: for a single sample, which has no relations.
    """
    if len(student) < 2:
        raise ValueError(f"{len(student)} sample has no relations; expected at least 2")
    aim = _log_similarities(teacher.detach(), temperature)  # sg
    return kl_div(
        _log_similarities(student, temperature), aim, reduction="batchmean", log_target=True
    )


def _log_similarities(features: Tensor, temperature: float) -> Tensor:
    features = normalize(as_work(features), dim=1)
    count = len(features)
    similar = (features @ features.T / temperature).flatten()
    # after the first number the diagonal ends each row of n + 1
    others = similar[1:].view(count - 1, count + 1)[:, :-1].reshape(count, count - 1)
    return log_softmax(others, dim=1)
