"""Distances between sets: zero where they should be, closed forms for Gaussians, and gradients to
the student only.
"""

import math

import pytest
import torch

from streamvid.core.moments import RandomFeatures, mmd2, relational_kl, spectral_distance


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_equal_batches_are_at_no_distance(kernel):
    x = normals(20, 5)
    assert abs(mmd2(x, x, kernel, unbiased=False).item()) < 1e-12
    shuffled = x[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    y = normals(20, 5, seed=1)
    torch.testing.assert_close(mmd2(shuffled, y, kernel), mmd2(x, y, kernel))


def test_the_linear_form_compares_means():
    x, y = normals(20, 5), normals(30, 5, seed=1)
    torch.testing.assert_close(mmd2(x, y, unbiased=False), (x.mean(0) - y.mean(0)).square().sum())


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_the_unbiased_form_is_zero_on_average(kernel):
    values = torch.stack(
        [
            mmd2(normals(64, 4, seed=2 * i), normals(64, 4, seed=2 * i + 1), kernel)
            for i in range(300)
        ]
    )
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean()) < 3 * error and values.min() < 0
    biased = torch.stack(
        [
            mmd2(normals(64, 4, seed=2 * i), normals(64, 4, seed=2 * i + 1), kernel, False)
            for i in range(50)
        ]
    )
    assert biased.min() > 0


def test_the_rbf_form_of_gaussians():
    """E k(x, y) = (l^2 / (l^2 + s1^2 + s2^2))^(d/2) exp(-|dm|^2 / (2 (l^2 + s1^2 + s2^2))) for
    isotropic Gaussians.
    """
    d, length, s1, s2 = 2, 1.5, 1.0, 0.6
    offset = torch.tensor([0.8, -0.5], dtype=torch.float64)

    def mean_kernel(a, b, gap):
        width = length**2 + a**2 + b**2
        return (length**2 / width) ** (d / 2) * math.exp(-gap / (2 * width))

    expected = (
        mean_kernel(s1, s1, 0)
        + mean_kernel(s2, s2, 0)
        - 2 * mean_kernel(s1, s2, float(offset @ offset))
    )
    ours = mmd2(s1 * normals(3000, d), s2 * normals(3000, d, seed=1) + offset, "rbf", length=length)
    assert ours.item() == pytest.approx(expected, abs=0.012)


def test_random_features_are_a_function_of_their_seed():
    x = normals(2, 3, 8, 8).float()
    assert torch.equal(RandomFeatures(3, seed=1)(x), RandomFeatures(3, seed=1)(x))
    assert not torch.allclose(RandomFeatures(3, seed=1)(x), RandomFeatures(3, seed=2)(x))


def test_features_of_points_images_and_clips():
    net = RandomFeatures(2, seed=0, width=16)
    assert net(torch.zeros(5, 2, 1, 1)).shape == (5, 16)
    clip = normals(3, 2, 4, 6, 6).float().requires_grad_()
    features = net(clip)
    assert features.shape == (3, 32)
    torch.testing.assert_close(
        features[:, :16], torch.stack([net(clip[:, :, i]) for i in range(4)]).mean(0)
    )
    backwards = net(clip.flip(2))
    torch.testing.assert_close(backwards[:, :16], features[:, :16])  # the same frames
    assert (backwards[:, 16:] - features[:, 16:]).abs().max() > 1e-3  # that move the other way
    features.sum().backward()
    assert clip.grad.abs().sum() > 0 and not any(p.requires_grad for p in net.parameters())


def test_matching_features_moves_a_batch():
    """Descent on the student's points alone takes their law towards the data's."""
    data, points = (
        normals(256, 2, 1, 1, seed=1).float() + 2,
        normals(256, 2, 1, 1).float().requires_grad_(),
    )
    for step in range(100):
        net = RandomFeatures(2, seed=step, width=64, kernel=1)
        (slope,) = torch.autograd.grad(mmd2(net(points), net(data), unbiased=False), points)
        points.data -= 2 * slope
    assert (points.mean(0) - data.mean(0)).abs().max() < 0.4


def test_spectra_see_blur_and_no_shift():
    x = normals(16, 1, 16, 16)
    blurred = (x + x.roll(1, -1)) / 2
    assert spectral_distance(x, x) == 0
    assert spectral_distance(x, x.roll(3, -2)).item() < 1e-12
    assert spectral_distance(x, blurred) > 0.3


def test_relations():
    a, b = normals(6, 4), normals(6, 9, seed=1)
    assert abs(relational_kl(a, a).item()) < 1e-12
    torch.testing.assert_close(relational_kl(3 * a, a), relational_kl(a, a))  # cosines
    assert relational_kl(a, b) > 0
    student, teacher = a.clone().requires_grad_(), b.clone().requires_grad_()
    relational_kl(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None


def test_relations_of_three_in_numbers():
    """Unit vectors at 0, 90 and 180 degrees, whose cosines are 0, 0 and -1, against three alike,
    all of whose relations are even.
    """
    angles = torch.tensor([0, 90, 180], dtype=torch.float64).deg2rad()
    spread = torch.stack([angles.cos(), angles.sin()], dim=1)
    alike = torch.ones(3, 2, dtype=torch.float64)
    near = 1 / (1 + math.exp(-1 / 0.5))  # of the first's two relations, of cosines 0 and -1
    lopsided = -(math.log(2 * near) + math.log(2 * (1 - near))) / 2
    expected = 2 / 3 * lopsided  # the second's relations are even in both
    assert relational_kl(spread, alike, temperature=0.5).item() == pytest.approx(expected)


def test_bad_requests_are_refused():
    x = normals(4, 2)
    with pytest.raises(ValueError, match="kernel='cosine'"):
        mmd2(x, x, "cosine")
    with pytest.raises(ValueError, match="at least 2"):
        mmd2(x[:1], x)
    with pytest.raises(ValueError, match="no relations"):
        relational_kl(x[:1], x[:1])
