"""Small functions that objectives use, against numbers worked out by hand."""

import pytest
import torch

from streamvid.objectives.diagonal import frame_weights
from streamvid.settings.rollouts import latent_statistics


def clip(*frames):
    """A clip ``[1, 1, T, 1, 2]`` of frames of two numbers."""
    return torch.tensor(frames, dtype=torch.float64)[None, None, :, None]


def test_statistics_of_a_clip_that_grows():
    """The last frame is three times the first; 1 between the first two, 5 between the others."""
    numbers = latent_statistics(clip((1, -1), (2, -2), (-3, 3)))
    assert {name: number.item() for name, number in numbers.items()} == {
        "latent_rms": pytest.approx((14 / 3) ** 0.5),
        "latent_max": 3,
        "drift": pytest.approx(3),
        "motion": pytest.approx((1 + 5) / 2),
    }


def test_statistics_of_one_frame():
    numbers = latent_statistics(clip((1, -1)))
    assert numbers["motion"] == 0 and numbers["drift"] == 1


def test_growing_weights_in_numbers():
    """Mean gaps of 1 and 3 make shares of 1/4 and 1, plus 1: 1.25 and 2, of mean 1.625."""
    gap = clip((1, -1), (-3, 3)).expand(2, 3, -1, -1, -1)
    expected = [0.7 * 1.25 / 1.625 + 0.3 * 1 / 1.1, 0.7 * 2 / 1.625 + 0.3 * 1.2 / 1.1]
    torch.testing.assert_close(
        frame_weights("growing", gap), torch.tensor([expected, expected], dtype=torch.float64)
    )
