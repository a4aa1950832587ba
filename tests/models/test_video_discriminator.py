"""Discriminators on a transformer's features: whose weights learn, what their logits see."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from streamvid.models.discriminators import TrunkHeads
from streamvid.models.video_discriminator import VideoDiscriminator
from streamvid.seeding import keyed_normal
from tests.fakes import TINY_WAN


def trunk():
    torch.manual_seed(0)
    return WanTransformer3DModel(**{**TINY_WAN, "num_layers": 3})


def inputs(num=2, frames=4):
    return keyed_normal((num, 4, frames, 4, 4), "x"), keyed_normal((num, 5, 8), "cond")


@pytest.mark.parametrize("train_trunk", [True, False])
def test_all_that_it_reads_learns_and_nothing_else(train_trunk):
    disc = VideoDiscriminator(trunk(), train_trunk=train_trunk)
    x, cond = inputs()
    x.requires_grad_()
    disc(x, cond).sum().backward()
    assert x.grad.abs().sum() > 0
    for name, parameter in disc.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.requires_grad == (
            name.startswith("heads")
            or (
                train_trunk
                and "norm_out" not in name
                and "proj_out" not in name
                and name != "trunk.scale_shift_table"
            )
        ), name


def test_a_logit_for_the_clip_or_one_a_chunk():
    x, cond = inputs()
    assert VideoDiscriminator(trunk())(x, cond).shape == (2, 1)
    assert VideoDiscriminator(trunk(), chunk_frames=2)(x, cond).shape == (2, 2)
    with pytest.raises(ValueError, match="chunk_frames=3 does not divide 4"):
        VideoDiscriminator(trunk(), chunk_frames=3)(x, cond)


def test_a_logit_a_token_is_read_where_the_token_is():
    """The heads see the patch embedding alone here, so that only the moved patch's logit may
    move.
    """
    network = trunk()
    network.blocks[0] = Passed()
    disc, (x, cond) = VideoDiscriminator(network, layers=[0], per_token=True), inputs()
    moved = x.clone()
    moved[:, :, 2, 2:, :2] += 1
    changed = ~torch.isclose(disc(x, cond), disc(moved, cond))
    assert changed.shape == (2, 16) and changed.nonzero().tolist() == [[0, 10], [1, 10]]


class Passed(nn.Module):
    def forward(self, hidden_states, *others):
        return hidden_states


def test_prompts_and_clips_matter_and_batches_do_not():
    disc, (x, cond) = VideoDiscriminator(trunk()), inputs()
    both = disc(x, cond)
    torch.testing.assert_close(disc(x[:1], cond[:1]), both[:1], rtol=1e-4, atol=1e-6)
    assert (
        not torch.isclose(disc(x, cond.flip(0)), both).any()
        and not torch.isclose(disc(x.flip(0), cond), both.flip(0)).any()
    )


class Blocks(nn.Module):
    """A trunk whose blocks keep each token to itself."""

    def __init__(self):
        super().__init__()
        self.patch_embedding = nn.Conv3d(4, 8, 1)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        tokens = self.patch_embedding(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)


def test_a_parts_logits_are_of_its_own_tokens():
    network, (x, _) = Blocks(), inputs()
    heads = TrunkHeads(network, [0, 1], num_logits=3)
    moved = x.clone()
    moved[:, :, 2] += 1
    one, other = (heads(network, lambda: network(clip), 4) for clip in (x, moved))  # noqa: B023
    assert one.shape == (2, 4, 3)
    changed = ~torch.isclose(one, other).all(dim=2)
    assert changed.tolist() == [[False, False, True, False]] * 2
    with pytest.raises(ValueError, match="5 parts do not divide"):
        heads(network, lambda: network(x), 5)


def test_heads_hold_nothing_of_the_trunk_and_begin_by_their_seed():
    network = Blocks()
    heads = TrunkHeads(network, [1], seed=3)
    assert not {id(p) for p in heads.parameters()} & {id(p) for p in network.parameters()}
    same, other = TrunkHeads(network, [1], seed=3), TrunkHeads(network, [1], seed=4)
    pairs = lambda a, b: all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert pairs(heads, same) and not pairs(heads, other)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: VideoDiscriminator(trunk(), layers=[3]), "blocks 0 to 2"),
        (lambda: VideoDiscriminator(trunk(), t=1.5), "t=1.5"),
        (
            lambda: VideoDiscriminator(trunk(), chunk_frames=2, per_token=True),
            "chunk_frames=2 and per_token: give one",
        ),
        (lambda: TrunkHeads(trunk(), []), r"layers=\[\]"),
    ],
)
def test_what_does_not_exist_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
