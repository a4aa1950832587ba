"""examples/dmd_loop.py trains, saves a folder that streams, and improves the start."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from streamvid.students.folder import TINY_START, load_student

EXAMPLE = Path(__file__).parents[2] / "examples" / "dmd_loop.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("dmd_loop", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_steps_move_the_student_and_leave_a_folder(example, tmp_path):
    numbers = example.distil(num_steps=2, out=tmp_path / "student", num_scored=1)
    assert all(math.isfinite(number) for number in numbers.values())
    before, after = load_student(TINY_START), load_student(tmp_path / "student")
    assert after.stream == before.stream
    changed = [
        not torch.equal(old, new)
        for old, new in zip(before.transformer.parameters(), after.transformer.parameters())
    ]
    assert all(changed)


class Constant(torch.nn.Module):
    """A score that predicts one and the same clip, whatever it is shown."""

    uncond = None

    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    def predict(self, x_t, t, cond):
        return (x_t - self.clip) / t.reshape(-1, 1, 1, 1, 1)


def test_the_student_moves_towards_the_teacher_and_away_from_the_fake_score(example, monkeypatch):
    """Descending the loss by hand ends where the teacher is."""
    monkeypatch.setattr(example, "GUIDANCE", 1.0)
    torch.manual_seed(0)
    shape = (2, 16, 9, 8, 8)
    target = torch.ones(shape)
    x = torch.zeros(shape, requires_grad=True)
    for _ in range(200):
        fake_score = Constant(x.detach().clone())  # one that knows the student exactly
        loss = example.student_loss(Constant(target), fake_score, x, torch.zeros(2, 1, 1))
        (gradient,) = torch.autograd.grad(loss, x)
        x = (x - 0.01 * x.numel() * gradient).detach().requires_grad_()
    assert (x - target).abs().max() < 0.05


def test_the_fake_score_learns_the_student_clips(example):
    """Its loss is least, and zero, for the velocity that leads to them."""
    torch.manual_seed(0)
    x, cond = torch.randn(2, 16, 9, 8, 8), torch.zeros(2, 1, 1)
    assert example.fake_score_loss(Constant(x), x, cond) < 1e-6
    assert example.fake_score_loss(Constant(x + 0.1), x, cond) > 1e-3


@pytest.mark.slow
def test_sixty_updates_raise_the_world_score(example, tmp_path):
    numbers = example.distil(num_steps=60, out=tmp_path / "student", num_scored=32)
    assert numbers["after"] > numbers["before"] + 0.01
