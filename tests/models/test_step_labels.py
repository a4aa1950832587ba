"""Labels on the time embedding: nothing at first, a shift of its bias afterwards, and gone
outside.
"""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.lora import LoraConfig, adapt
from streamvid.models.step_labels import add_step_labels, labelled
from tests.fakes import TINY_WAN


def velocity(network):
    generator = torch.Generator().manual_seed(1)
    x, cond = (
        torch.randn(2, 4, 3, 4, 4, generator=generator),
        torch.randn(2, 5, 8, generator=generator),
    )
    return network(x, torch.tensor([300.0, 800.0]), cond, return_dict=False)[0]


@pytest.mark.parametrize("cls", [WanTransformer3DModel, CausalWanTransformer3DModel])
def test_a_label_is_a_shift_of_the_time_embedding(cls):
    torch.manual_seed(0)
    network = cls(**TINY_WAN).eval()
    before = velocity(network)
    add_step_labels(network, 3)
    with labelled(network, 1):
        assert torch.equal(velocity(network), before)  # they begin at zero
    nn.init.normal_(network.step_labels.weight)
    assert torch.equal(velocity(network), before)  # only within
    with labelled(network, None):
        assert torch.equal(velocity(network), before)
    with labelled(network, 2):
        told = velocity(network)
    with torch.no_grad():
        network.condition_embedder.time_embedder.linear_2.bias += network.step_labels.weight[2]
    torch.testing.assert_close(told, velocity(network))
    assert (told - before).abs().max() > 1e-3


def test_the_label_goes_away_with_an_error_too():
    network = WanTransformer3DModel(**TINY_WAN)
    add_step_labels(network, 1)
    with pytest.raises(RuntimeError), labelled(network, 0):
        raise RuntimeError
    assert not network.condition_embedder.time_embedder._forward_hooks


def test_a_network_of_another_form_is_refused():
    with pytest.raises(ValueError, match="time embedding, which Linear does not have"):
        add_step_labels(nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match="set fake_score.lora_rank=0"):
        add_step_labels(adapt(WanTransformer3DModel(**TINY_WAN), LoraConfig(rank=2)), 3)
