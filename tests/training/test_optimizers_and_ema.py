"""Learning rates, weight decay, and moving averages against their closed forms."""

import pytest
import torch
from torch import nn

from streamvid.training.ema import EMA, EMAConfig
from streamvid.training.optimizers import (
    OptimizerConfig,
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)


def test_learning_rates():
    rates = {
        "constant": [1.0, 1.0, 1.0],
        "cosine": [1.0, 0.1 + 0.9 / 2, 0.1],
        "linear": [1.0, 0.1 + 0.9 / 2, 0.1],
    }
    for schedule, expected in rates.items():
        config = OptimizerConfig(lr=2.0, schedule=schedule, final_lr_ratio=0.1)
        got = [learning_rate(config, 100, progress) / 2 for progress in (0, 0.5, 1)]
        assert got == pytest.approx(expected)
    quarter = learning_rate(OptimizerConfig(lr=1.0, schedule="cosine"), 0, 0.25)
    assert quarter == pytest.approx(0.5 + 0.5 * 0.5**0.5)


def test_warm_up_counts_updates_from_one():
    """The first update at rate 0 would be wasted, and shift the moments of Adam."""
    config = OptimizerConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, update, 0.0) for update in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("decay_vectors", [False, True])
def test_weight_decay_spares_vectors_unless_asked(decay_vectors):
    layer = nn.Linear(2, 2)
    nn.init.ones_(layer.weight), nn.init.ones_(layer.bias)
    config = OptimizerConfig(lr=0.1, weight_decay=0.5, decay_vectors=decay_vectors)
    optimizer = build_optimizer(dict(layer.named_parameters()), config)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(layer.weight, torch.full((2, 2), 0.95))
    torch.testing.assert_close(layer.bias, torch.full((2,), 0.95 if decay_vectors else 1.0))


def test_muon_takes_hidden_matrices_and_kernels_only():
    """The update of a hidden matrix has the size of AdamW's (0.2 root mean square) whatever its gradient's size."""
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(16, 16))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = build_optimizer(dict(net.named_parameters()), OptimizerConfig(kind="muon", lr=0.1, weight_decay=0.0))
    for p in net.parameters():
        p.grad = 1e-4 * torch.randn_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        rms = (p - before[name]).square().mean().sqrt().item() / 0.1
        assert rms == pytest.approx(1.0 if name.endswith("bias") else 0.2, rel=0.35), name
    assert set(optimizer.state[net[0].weight]) == {"momentum_buffer"}


def test_muon_resumes_from_its_tensors():
    """Saved, loaded into a fresh optimiser and stepped: the same as going on."""
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        return net, build_optimizer(dict(net.named_parameters()), OptimizerConfig(kind="muon", lr=0.1))

    def push(net, optimizer, seed):
        torch.manual_seed(seed)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    net, optimizer = make()
    push(net, optimizer, 1)
    saved = {k: v.clone() for k, v in optimizer_tensors(optimizer, {p: n for n, p in net.named_parameters()}).items()}
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    push(net, optimizer, 2)
    again, resumed = make()
    again.load_state_dict(weights)
    load_optimizer_tensors(resumed, {p: n for n, p in again.named_parameters()}, saved)
    push(again, resumed, 2)
    for p, q in zip(net.parameters(), again.parameters()):
        assert torch.equal(p, q)


def test_decay_may_start_late():
    config = OptimizerConfig(lr=1.0, schedule="linear", decay_start=0.5)
    assert [learning_rate(config, 0, progress) for progress in (0, 0.5, 0.75, 1)] == pytest.approx([1, 1, 0.5, 0])


def average_of(values, config):
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    ema = EMA(dict(layer.named_parameters()), config)
    for value in values:
        nn.init.constant_(layer.weight, value)
        ema.update()
    return layer, ema


def test_average_in_closed_form():
    _, ema = average_of([1.0, 2.0, 3.0], EMAConfig(decay=0.9))
    assert ema.shadow["weight"].item() == pytest.approx(0.1 * (1 * 0.81 + 2 * 0.9 + 3))


def test_average_follows_until_start_and_then_warms_up():
    _, ema = average_of([5.0, 7.0], EMAConfig(decay=0.9, start_step=2))
    assert ema.shadow["weight"].item() == 7.0
    _, ema = average_of([5.0, 7.0, 8.0], EMAConfig(decay=0.9, start_step=2, warmup=True))
    assert ema.shadow["weight"].item() == pytest.approx(0.1 * 7 + 0.9 * 8)
    assert ema.decay_at(10**6) == 0.9


def test_averaged_weights_are_put_in_place_and_taken_out_again():
    layer, ema = average_of([1.0, 2.0], EMAConfig(decay=0.5))
    weight = layer.weight
    with pytest.raises(KeyError), ema.weights():
        assert layer.weight is weight and weight.item() == 1.25
        raise KeyError
    assert weight.item() == 2.0


def test_average_is_float32_where_the_weights_are_not():
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    ema = EMA(dict(layer.named_parameters()), EMAConfig(decay=0.999))
    assert ema.shadow["weight"].dtype == torch.float32


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"betas": (0.9, 1.0)}, {"clip_norm": 0}, {"accumulate": 0}])
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        OptimizerConfig(**wrong)
