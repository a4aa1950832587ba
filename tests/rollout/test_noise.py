"""Keyed noise: a draw is a function of its key and of nothing else."""

import torch

from streamvid.rollout.noise import KeyedNoise

SHAPE, WHERE = (3, 2, 4, 4), (torch.device("cpu"), torch.float32)


def test_independent_of_batch_and_history():
    noise = KeyedNoise([5, 6, 7])
    batch = noise.draw(2, 1, SHAPE, *WHERE)
    noise.draw(0, 0, SHAPE, *WHERE)
    torch.randn(3)
    assert torch.equal(noise.draw(2, 1, SHAPE, *WHERE), batch)
    assert torch.equal(KeyedNoise([6]).draw(2, 1, SHAPE, *WHERE)[0], batch[1])


def test_keys_do_not_run_together():
    draws = [
        KeyedNoise([seed]).draw(chunk, event, SHAPE, *WHERE).flatten()
        for seed in (1, 11)
        for chunk in (0, 1, 11)
        for event in (-1, 0, 1)
    ]
    correlations = torch.corrcoef(torch.stack(draws)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.5


def test_standard_normal_of_the_asked_type():
    draw = KeyedNoise(range(8)).draw(0, 0, (4, 8, 16, 16), torch.device("cpu"), torch.float64)
    assert draw.shape == (8, 4, 8, 16, 16) and draw.dtype == torch.float64
    assert abs(draw.mean()) < 0.02 and abs(draw.std() - 1) < 0.02
