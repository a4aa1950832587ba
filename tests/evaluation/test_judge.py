"""The judge tells what can be told, and no more."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from streamvid.evaluation.judge import win_rate
from streamvid.seeding import keyed_normal
from tests.fakes import TINY_WAN


@pytest.fixture
def trunk():
    torch.manual_seed(0)
    return WanTransformer3DModel(**TINY_WAN)


def clips(name, num=60, scale=1.0):
    return scale * keyed_normal((num, 4, 2, 4, 4), name)


def ask(trunk, true, made, **options):
    return win_rate(
        trunk, true, made, keyed_normal((len(true), 5, 8), "cond"), num_steps=40, lr=3e-3, **options
    )


def test_clips_of_one_law_win_about_half_of_the_time(trunk):
    assert 0.25 <= ask(trunk, clips("a"), clips("b"))["win_rate"] <= 0.75


def test_clips_of_another_law_lose(trunk):
    result = ask(trunk, clips("a"), clips("b", scale=0.3), penalty=1.0)
    assert result["win_rate"] <= 0.1 and result["gap"] > 0


def test_the_trunk_is_not_touched_and_a_seed_gives_the_same_answer(trunk):
    before = [p.clone() for p in trunk.parameters()]
    assert ask(trunk, clips("a"), clips("b")) == ask(trunk, clips("a"), clips("b"))
    assert all(torch.equal(a, b) for a, b in zip(before, trunk.parameters()))


def test_clips_that_do_not_pair_are_refused(trunk):
    with pytest.raises(ValueError, match="at least 4 prompts"):
        ask(trunk, clips("a", 3), clips("b", 3))
    with pytest.raises(ValueError, match="the same shape"):
        ask(trunk, clips("a", 8), clips("b", 6))
