"""Learning rates, weight decay, and moving averages against their closed forms."""

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from streamvid.seeding import keyed_normal
from streamvid.training.ema import EMA, EMAConfig
from streamvid.training.optimizers import (
    OptimizerConfig,
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
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
    assert [learning_rate(config, update, 0.0) for update in range(6)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        1.0,
    ]


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
    """The update of a hidden matrix has the size of AdamW's (0.2 root mean square) whatever its
    gradient's size.
    """
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(16, 16))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = build_optimizer(
        dict(net.named_parameters()), OptimizerConfig(kind="muon", lr=0.1, weight_decay=0.0)
    )
    for p in net.parameters():
        p.grad = 1e-4 * torch.randn_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        rms = (p - before[name]).square().mean().sqrt().item() / 0.1
        assert rms == pytest.approx(1.0 if name.endswith("bias") else 0.2, rel=0.35), name
    assert set(optimizer.state[net[0].weight]) == {"momentum_buffer"}


@dataclass
class Moment:
    """What torchao's OptimState8bit has."""

    codes: torch.Tensor
    scale: torch.Tensor
    qmap: torch.Tensor
    signed: bool
    dtype: torch.dtype


class FakeAdamW8bit(torch.optim.AdamW):
    """The rate of a group is a tensor, which must stay that tensor, as in torchao."""

    def __init__(self, groups, lr, betas, eps):
        super().__init__(
            [{**group, "lr": torch.tensor(lr)} for group in groups], betas=betas, eps=eps
        )


def test_adamw_in_8_bits_is_given_and_keeps_what_it_needs(monkeypatch):
    """The wiring, without the package: groups, a rate that is filled, moments in parts."""
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    for name, content in (
        ("optim", {"AdamW8bit": FakeAdamW8bit}),
        ("optim.subclass_8bit", {"OptimState8bit": Moment}),
    ):
        module = ModuleType(f"torchao.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    net = nn.Linear(2, 2)
    names = {p: name for name, p in net.named_parameters()}
    optimizer = build_optimizer(
        dict(net.named_parameters()), OptimizerConfig(kind="adamw8bit", lr=0.5, weight_decay=0.25)
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    rates = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.125)
    assert [rate.item() for rate in rates] == [0.125] * 2
    assert all(rate is group["lr"] for rate, group in zip(rates, optimizer.param_groups))
    moments = {
        name: Moment(
            torch.ones(2, 2, dtype=torch.uint8),
            torch.ones(1),
            torch.ones(256),
            name == "exp_avg",
            torch.float32,
        )
        for name in ("exp_avg", "exp_avg_sq")
    }
    optimizer.state[net.weight] = {"step": torch.tensor(3.0), **moments}
    tensors = optimizer_tensors(optimizer, names)
    assert (
        all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()) and len(tensors) == 7
    )
    optimizer.state.clear()
    load_optimizer_tensors(optimizer, names, tensors)
    kept = optimizer.state[net.weight]
    assert kept["step"] == 3 and {name: kept[name].signed for name in moments} == {
        "exp_avg": True,
        "exp_avg_sq": False,
    }
    assert torch.equal(kept["exp_avg"].codes, moments["exp_avg"].codes)


def eight_bits(steps, seed=0):
    """A large matrix and a small vector after some updates in the direction of fixed noise, without
    a compiler.
    """
    pytest.importorskip("torchao")
    torch.manual_seed(seed)
    net = nn.Linear(64, 64)
    optimizer = build_optimizer(
        dict(net.named_parameters()), OptimizerConfig(kind="adamw8bit", lr=0.1)
    )
    update(net, optimizer, range(steps))
    return net, optimizer, {p: name for name, p in net.named_parameters()}


def update(net, optimizer, steps):
    for step in steps:
        set_learning_rate(optimizer, 0.1 / (1 + step))
        for p in net.parameters():
            p.grad = keyed_normal(tuple(p.shape), "gradient", step)
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()


def test_adamw_in_8_bits_is_nearly_adamw_with_a_quarter_of_its_state():
    net, optimizer, names = eight_bits(4)
    torch.manual_seed(0)
    whole = nn.Linear(64, 64)
    before = whole.weight.detach().clone()
    adamw = build_optimizer(dict(whole.named_parameters()), OptimizerConfig(lr=0.1))
    update(whole, adamw, range(4))
    torch.testing.assert_close(net.bias, whole.bias)  # too small to be worth it
    error = (net.weight - whole.weight).square().mean().sqrt() / (
        whole.weight - before
    ).square().mean().sqrt()
    assert 0 < error < 0.05
    held = {
        key: t.nbytes
        for key, t in optimizer_tensors(optimizer, names).items()
        if key.startswith("weight/")
    }
    assert sum(held.values()) == 2 * (4096 + 4 * 16 + 4 * 256) + 4


def test_adamw_in_8_bits_resumes_from_its_tensors(tmp_path):
    """Bitwise, through a file."""
    net, optimizer, names = eight_bits(2)
    save_file(optimizer_tensors(optimizer, names), tmp_path / "x.safetensors")
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    fresh, other, others = eight_bits(0, seed=1)
    fresh.load_state_dict(weights)
    load_optimizer_tensors(other, others, load_file(tmp_path / "x.safetensors"))
    update(net, optimizer, range(2, 4))
    update(fresh, other, range(2, 4))
    assert torch.equal(fresh.weight, net.weight) and torch.equal(fresh.bias, net.bias)
    tensors = optimizer_tensors(optimizer, names)
    tensors.pop("weight/exp_avg:scale")
    with pytest.raises(ValueError, match="exp_avg has of a moment in 8 bits only codes, qmap"):
        load_optimizer_tensors(other, others, tensors)


def test_adamw_in_8_bits_needs_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(
        ValueError,
        match="kind=adamw8bit needs torchao; `pip install 'streamvid.adamw8bit.'`, or set",
    ):
        build_optimizer(dict(nn.Linear(2, 2).named_parameters()), OptimizerConfig(kind="adamw8bit"))


def test_muon_resumes_from_its_tensors():
    """Saved, loaded into a fresh optimiser and stepped: the same as going on."""

    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        return net, build_optimizer(
            dict(net.named_parameters()), OptimizerConfig(kind="muon", lr=0.1)
        )

    def push(net, optimizer, seed):
        torch.manual_seed(seed)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    net, optimizer = make()
    push(net, optimizer, 1)
    saved = {
        k: v.clone()
        for k, v in optimizer_tensors(optimizer, {p: n for n, p in net.named_parameters()}).items()
    }
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
    assert [learning_rate(config, 0, progress) for progress in (0, 0.5, 0.75, 1)] == pytest.approx(
        [1, 1, 0.5, 0]
    )


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


def test_warm_up_of_the_average_counts_from_its_start():
    _, ema = average_of([], EMAConfig(decay=0.5, start_step=3, warmup=True))
    assert [ema.decay_at(update) for update in (2, 3, 4, 9, 11, 12)] == pytest.approx(
        [0, 1 / 10, 2 / 11, 7 / 16, 0.5, 0.5]
    )


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


@pytest.mark.parametrize(
    "wrong", [{"lr": 0}, {"betas": (0.9, 1.0)}, {"clip_norm": 0}, {"accumulate": 0}]
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        OptimizerConfig(**wrong)
