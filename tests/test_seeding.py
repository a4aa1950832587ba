"""Keyed draws, pinned by numbers: a change would make every stored run and published clip another
one.
"""

import pytest
import torch

from streamvid.seeding import key_to_seed, keyed_generator, keyed_normal


@pytest.mark.parametrize(
    "key, seed",
    [
        ((), 6510301506637419378),
        ((0,), 4246866556266386882),
        ((1, "rollout", -1), 5539105178219736667),
    ],
)
def test_the_seed_of_a_key(key, seed):
    assert key_to_seed(*key) == seed
    assert keyed_generator(*key).initial_seed() == seed


def test_the_numbers_of_a_key():
    """The second shape is of a size that torch draws by another formula."""
    torch.testing.assert_close(
        keyed_normal((2, 2), 7, "rollout", 3, 0),
        torch.tensor([[0.11489575, -2.3864129], [-0.23219545, 1.1247768]]),
        rtol=0,
        atol=1e-6,
    )
    many = keyed_normal((2, 10), 7, "rollout", 3, 0)
    torch.testing.assert_close(
        many[:, :2],
        torch.tensor([[0.373993, -1.810419], [0.011772, -0.878523]]),
        rtol=0,
        atol=1e-5,
    )


def test_a_draw_depends_on_its_key_alone():
    torch.manual_seed(1)
    first = keyed_normal((3,), "a", 1)
    torch.randn(5)
    assert torch.equal(keyed_normal((3,), "a", 1), first)
    others = [("a", 2), ("a", 1, 0), (1, "a"), ("a1",)]
    assert not any(torch.equal(keyed_normal((3,), *key), first) for key in others)
