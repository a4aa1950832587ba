"""Properties of trajectory regression, and of the trajectories that it regresses on."""

import math

import pytest
import torch
from torch import nn

from streamvid.core.process import expand_time
from streamvid.core.times import step_times
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.objectives.trajectory import (
    TrajectoryRegression,
    grid_through,
    select_states,
    solve_trajectories,
)
from streamvid.rollout.schedule import StreamConfig, chunk_times
from streamvid.seeding import keyed_normal
from streamvid.settings.video import VideoSetting
from tests.fakes import TINY_WAN, ar1_covariance, ar1_teacher, noise

STREAM = StreamConfig(num_steps=2, shift=3.0, chunk_frames=2)
TIMES = (*step_times(2, 3.0), 0.0)  # 1, .75, 0
MODES = [
    (mode, level)
    for mode in ("diffusion_forcing", "teacher_forcing")
    for level in ("chunk", "clip")
]


def trajectories(batch=8, times=TIMES, frames=6):
    return {
        "states": noise(batch, len(times), 4, frames, 4, 4),
        "times": torch.tensor(times).repeat(batch, 1),
        "cond": noise(batch, 5, 8, seed=1),
        "keys": list(range(batch)),
    }


class Knows(nn.Module):
    """Predicts the given ends, off by ``error``; keeps what it is asked."""

    def __init__(self, x0, error=0.0):
        super().__init__()
        self.x0, self.error, self.calls = x0, nn.Parameter(torch.tensor(error)), []

    def forward(self, hidden_states, timestep, cond, return_dict=False, **chunk):
        t = timestep / 1000
        self.calls.append((hidden_states, t, chunk))
        return (
            (hidden_states - self.x0 - self.error) / expand_time(t, hidden_states).clamp_min(1e-3),
        )


def setting_of(student, stream=STREAM, mode="diffusion_forcing", level="chunk"):
    return VideoSetting(TrajectoryRegression(mode, level), student, stream, (4, 4, 4))


@pytest.mark.parametrize("mode, level", MODES)
def test_a_student_that_knows_the_ends_has_no_loss_and_one_that_is_off_its_square(mode, level):
    batch = trajectories()
    for error in (0.0, 0.5):
        student = Knows(batch["states"][:, -1], error)
        loss, _ = setting_of(student, mode=mode, level=level).loss("student", batch, 0)
        assert loss.item() == pytest.approx(error**2, abs=1e-6)


@pytest.mark.parametrize("mode, level", MODES)
def test_chunks_are_at_the_students_times_and_come_from_there(mode, level):
    batch = trajectories(batch=64)
    student = Knows(batch["states"][:, -1])
    setting_of(student, mode=mode, level=level).loss("student", batch, 0)
    x_t, t, chunk = student.calls[0]
    index = torch.stack([(t - time).abs() for time in TIMES]).argmin(0)  # [B, T]
    for b in range(64):
        for frame in range(6):
            assert torch.equal(x_t[b, :, frame], batch["states"][b, index[b, frame], :, frame])
    chunks = index[:, ::2]
    assert torch.equal(chunks, index[:, 1::2])
    seen = [set(chunks[:, n].tolist()) for n in range(3)]
    clean = {2} if (mode, level) == ("diffusion_forcing", "chunk") else set()
    assert seen == [{0, 1} | clean, {0, 1} | clean, {0, 1}]  # the last chunk is never clean
    assert any(len(set(row)) > 1 for row in chunks.tolist()) == (level == "chunk")
    assert ("clean_context" in chunk) == (mode == "teacher_forcing")
    if mode == "teacher_forcing":
        assert torch.equal(chunk["clean_context"], batch["states"][:, -1])


def test_entries_that_are_data_already_carry_no_loss():
    batch = trajectories(batch=64)
    student = Knows(batch["states"][:, -1])
    student.x0 = student.x0.clone().requires_grad_()
    loss, _ = setting_of(student).loss("student", batch, 0)
    (grad,) = torch.autograd.grad(loss + 0 * student.error, student.x0, allow_unused=True)
    noisy = student.calls[0][1] > 0
    assert not grad.abs().sum((1, 3, 4))[~noisy].any() and (~noisy).any()


def test_a_sample_does_not_depend_on_its_batch():
    batch = trajectories()
    student = Knows(batch["states"][:, -1])
    setting_of(student).loss("student", batch, 0)
    student.x0 = student.x0[3:]
    setting_of(student).loss("student", {name: value[3:] for name, value in batch.items()}, 0)
    assert torch.equal(student.calls[0][1][3:], student.calls[1][1])


def test_the_first_chunk_may_have_a_list_of_its_own():
    stream = StreamConfig(step_table=((1.0, 0.75), (1.0,)), chunk_frames=2)
    batch = trajectories(batch=64)
    student = Knows(batch["states"][:, -1])
    setting_of(student, stream, "teacher_forcing", "clip").loss("student", batch, 0)
    t = student.calls[0][1][:, ::2]
    assert set(t[:, 0].tolist()) == {1.0, 0.75} and set(t[:, 1:].flatten().tolist()) == {1.0}
    assert chunk_times(stream, 3) == [[1.0, 0.75], [1.0], [1.0]]


def test_times_that_the_student_does_not_use_are_not_drawn():
    batch = trajectories(batch=64, times=(1.0, 0.9, 0.75, 0.5, 0.0))
    student = Knows(batch["states"][:, -1])
    setting_of(student).loss("student", batch, 0)
    assert set(student.calls[0][1].flatten().tolist()) == set(TIMES)


def test_trajectories_of_another_step_list_are_refused():
    """Self-Forcing's script stores shift 8 where its training asks for shift 5."""
    batch = trajectories(times=(*step_times(2, 5.0), 0.0))
    with pytest.raises(
        ValueError,
        match=r"no states at t=0\.75, .* only at 1, 0\.833333, 0; .*streamvid trajectories",
    ):
        setting_of(Knows(batch["states"][:, -1])).loss("student", batch, 0)


def test_chunks_that_do_not_fit_the_clip_are_refused():
    batch = trajectories(frames=5)
    with pytest.raises(
        ValueError, match="chunk_frames=2 does not divide the trajectories' 5 latent frames"
    ):
        setting_of(Knows(batch["states"][:, -1])).loss("student", batch, 0)
    with pytest.raises(ValueError, match="mode='teacher'"):
        TrajectoryRegression(mode="teacher")


@pytest.mark.parametrize("mode, level", MODES)
def test_a_causal_wan_gets_a_gradient_everywhere(mode, level):
    torch.manual_seed(0)
    student = CausalWanTransformer3DModel(**TINY_WAN)
    loss, _ = setting_of(student, mode=mode, level=level).loss("student", trajectories(2), 0)
    loss.backward()
    assert loss.isfinite() and all(
        p.grad is not None and p.grad.isfinite().all() for p in student.parameters()
    )


def test_states_are_selected_a_chunk():
    states = torch.arange(3.0).reshape(1, 3, 1, 1, 1, 1).expand(2, 3, 1, 4, 2, 2)
    states = states + torch.arange(4.0).reshape(4, 1, 1) / 10  # frames
    chosen = select_states(states, torch.tensor([[0, 2], [1, 1]]), 2)[:, 0, :, 0, 0]
    torch.testing.assert_close(chosen, torch.tensor([[0.0, 0.1, 2.2, 2.3], [1.0, 1.1, 1.2, 1.3]]))


# ---- solving


def solve(times=TIMES, steps=100, guidance_scale=1.0, prompt="", seeds=(3, 4), teacher=None):
    teacher = teacher or ar1_teacher(0.8, 3)
    return solve_trajectories(
        teacher,
        teacher.encode_prompt([prompt] * len(seeds)).double(),
        list(seeds),
        times=times,
        grid=grid_through(times[:-1], step_times(steps, 3.0)),
        guidance_scale=guidance_scale,
        latent_shape=(1, 1, 1),
        latent_frames=3,
    )


def test_the_grid_passes_the_students_times_exactly_and_adds_only_those_that_are_new():
    grid = step_times(48, 5.0)
    assert grid_through(step_times(4, 5.0), grid) == pytest.approx(grid, abs=1e-12)
    assert set(step_times(4, 5.0)) <= set(grid_through(step_times(4, 5.0), grid))
    mixed = grid_through(step_times(4, 3.0), grid)
    # .9; the others are there
    assert set(step_times(4, 3.0)) <= set(mixed) and len(mixed) == 48 + 1
    assert list(mixed) == sorted(mixed, reverse=True)


def test_a_solution_goes_along_the_probability_flow():
    """For a Gaussian it is linear in the noise, with ((1 - t)^2 S + t^2)^(1/2), symmetric."""
    states = solve(steps=400)
    values, vectors = torch.linalg.eigh(ar1_covariance(0.8, 3))
    noisy = (
        torch.stack([keyed_normal((1, 3, 1, 1), "rollout", seed, 0, 0) for seed in (3, 4)])
        .flatten(1)
        .double()
    )
    for k, t in enumerate(TIMES):
        root = vectors @ torch.diag(((1 - t) ** 2 * values + t**2).sqrt()) @ vectors.T
        torch.testing.assert_close(states[:, k].flatten(1), noisy @ root, rtol=0, atol=0.01)
    assert torch.equal(states[:, 0].flatten(1), noisy)


def test_guidance_moves_the_ends():
    teacher = ar1_teacher(0.8, 3, {"cat": 1.0})
    plain, guided = (
        solve(prompt="cat", teacher=teacher, guidance_scale=s)[:, -1] for s in (1.0, 3.0)
    )
    torch.testing.assert_close(guided - plain, torch.full_like(plain, 2.0), rtol=0, atol=0.1)


def test_a_clip_does_not_depend_on_the_batch_it_is_solved_in():
    torch.testing.assert_close(solve()[1:], solve(seeds=(4,)), rtol=0, atol=1e-12)


def test_times_off_the_grid_are_refused():
    teacher = ar1_teacher(0.8, 3)
    with pytest.raises(ValueError, match="does not pass"):
        solve_trajectories(
            teacher,
            teacher.encode_prompt([""]),
            [0],
            times=(1.0, 0.7, 0.0),
            grid=(1.0, 0.5),
            guidance_scale=1.0,
            latent_shape=(1, 1, 1),
            latent_frames=3,
        )
    assert math.isclose(grid_through((1.0, 0.7), (1.0, 0.5))[1], 0.7)
