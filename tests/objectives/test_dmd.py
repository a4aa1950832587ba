"""Properties of distribution matching on self-forced rollouts; the mathematics is exact where data
is Gaussian.
"""

import pytest
import torch
from torch import nn

from streamvid.core.inject import dmd_gradient
from streamvid.core.process import x0_from_v
from streamvid.objectives.dmd import DMD
from streamvid.rollout.schedule import StreamConfig
from streamvid.teachers.analytic import AnalyticTeacher
from tests.fakes import (
    FOUR_STEPS,
    ONE_STEP,
    Ar1Student,
    ClipStudent,
    ScoreOf,
    ar1_covariance,
    ar1_setting,
    ar1_teacher,
    gradients,
    noise,
    prompt_batch,
    rolled_out,
    step_where,
    wan_batch,
    wan_setting,
)

FRAMES, RHO = 3, 0.8
KEYS = range(6)


# ---- the gradient


@pytest.mark.parametrize("stream", [ONE_STEP, FOUR_STEPS])
def test_equal_scores_leave_the_student_exactly_where_it_is(stream):
    setting = ar1_setting("dmd", Ar1Student(), stream=stream)
    grads = gradients(setting, "student", prompt_batch(setting.teacher, KEYS))
    assert all(grad is None or (grad == 0).all() for grad in grads.values())


def test_the_gradient_at_the_predictions_is_the_score_difference_over_the_number_of_elements():
    student = ClipStudent(noise(6, 1, FRAMES, 1, 1))
    fake = ScoreOf(ar1_teacher(0.1, FRAMES))
    setting = ar1_setting("dmd", student, fake)
    (grad,) = gradients(setting, "student", prompt_batch(setting.teacher, KEYS)).values()
    (x_t, t), cond = fake.inputs[0], prompt_batch(setting.teacher, KEYS)["cond"]
    assert t.shape == (6,) and len(set(t.tolist())) == 6  # one time per clip
    x0_fake, x0_real = (
        x0_from_v(x_t, of.predict(x_t, t, cond), t) for of in (fake.teacher, setting.teacher)
    )
    g = dmd_gradient(student.clip.detach(), x0_fake, x0_real)
    torch.testing.assert_close(grad, g / g.numel(), rtol=1e-5, atol=1e-9)
    assert g.abs().max() > 0.01


def test_descent_narrows_a_student_that_is_too_wide_and_moves_one_that_is_beside_the_data():
    wide, beside = Ar1Student(RHO, 0.6, s=2.0), Ar1Student(RHO, 0.6, 1.0, mean=3.0)
    wide_scores = AnalyticTeacher(torch.zeros(1, 1, 1, 1), torch.tensor([[4.0]]))
    beside_scores = AnalyticTeacher(torch.full((1, 1, 1, 1), 3.0), torch.tensor([[1.0]]))
    for student, scores, parameter in ((wide, wide_scores, "s"), (beside, beside_scores, "mean")):
        setting = ar1_setting("dmd", student, ScoreOf(scores), frames=1)
        assert gradients(setting, "student", prompt_batch(scores, range(64)))[parameter] > 0


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_guidance_is_uncond_plus_scale_times_the_difference(guidance_scale):
    """The fixed point of a guided teacher is at m_c + (s - 1)(m_c - m_u); other conventions have
    another.
    """
    teacher = ar1_teacher(RHO, FRAMES, {"cat": 0.5, "": -0.25})
    goal = 0.5 + (guidance_scale - 1) * (0.5 + 0.25)
    student = Ar1Student(RHO, 0.6, 1.0, mean=goal)
    fixed = AnalyticTeacher(torch.full((1, FRAMES, 1, 1), goal), ar1_covariance(RHO, FRAMES))
    fake = ScoreOf(fixed)
    fake.teacher.means = fake.teacher.means.repeat(2, 1)  # the same for both prompts
    options = {"guidance_scale": guidance_scale, "normalizer": "none"}
    setting = ar1_setting("dmd", student, fake, teacher=teacher, **options)
    grads = gradients(setting, "student", prompt_batch(teacher, KEYS, "cat"))
    assert all(grad.abs() < 1e-6 for grad in grads.values())
    student.zero_grad()
    setting.objective.guidance_scale += 1
    assert gradients(setting, "student", prompt_batch(teacher, KEYS, "cat"))["mean"].abs() > 0.01


def test_the_loss_is_a_mean_over_the_frames_that_count():
    """Those of the first chunk of a part from the middle do not."""
    fake = ScoreOf(ar1_teacher(0.1, FRAMES))
    setting = ar1_setting(
        "dmd",
        ClipStudent(noise(2, 1, 8, 1, 1)),
        fake,
        rollout={"rollout_chunks": 8},
        as_image=lambda latents: -latents[:, :, -1:],
    )
    batch = prompt_batch(setting.teacher, range(2))
    step = step_where(setting, "student", lambda decision: decision.first_chunk == 2)
    loss, _ = setting.loss("student", batch, step)
    x_t, t = fake.inputs[0]
    x0_fake, x0_real = (
        x0_from_v(x_t, of.predict(x_t, t, batch["cond"]), t)
        for of in (fake.teacher, setting.teacher)
    )
    g = dmd_gradient(rolled_out(setting, batch, step).detach(), x0_fake, x0_real)
    expected = 0.5 * g[:, :, 1:].square().mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)


# ---- the networks


def test_a_turn_trains_its_own_network_and_nothing_else():
    student, fake = Ar1Student(), ScoreOf(ar1_teacher(0.1, FRAMES))
    setting = ar1_setting("dmd", student, fake)
    batch = prompt_batch(setting.teacher, KEYS)
    gradients(setting, "student", batch)
    assert fake.weight.grad is None and all(p.grad is not None for p in student.parameters())
    student.zero_grad(set_to_none=True)
    gradients(setting, "fake_score", batch)
    assert fake.weight.grad is not None and all(p.grad is None for p in student.parameters())


def test_no_graph_is_built_that_no_gradient_needs():
    """It would change nothing but the memory: that of the fake score in one turn, of a rollout in
    the other.
    """
    student, fake = ClipStudent(noise(6, 1, FRAMES, 1, 1)), ScoreOf(ar1_teacher(RHO, FRAMES))
    setting = ar1_setting("dmd", student, fake, FOUR_STEPS, {"exit": "last"})
    batch = prompt_batch(setting.teacher, KEYS)
    setting.loss("student", batch, 0)
    assert [grad for _, grad in student.calls] == 3 * [False, False, False, True]
    setting.loss("fake_score", batch, 0)
    assert not any(grad for _, grad in student.calls[12:])
    assert fake.grad_modes == [False, True]


def test_the_fake_score_is_fitted_to_the_students_clips():
    """For a network that says 0 the loss is mean |eps - x|^2, with the noise of its own input."""
    clip = noise(6, 1, FRAMES, 1, 1)
    fake = ScoreOf(ar1_teacher(0.1, FRAMES))
    setting = ar1_setting("dmd", ClipStudent(clip), fake)
    with torch.no_grad():
        fake.weight.zero_()
    loss, _ = setting.loss("fake_score", prompt_batch(setting.teacher, KEYS), 0)
    x_t, t = fake.inputs[0]
    t = t.reshape(-1, 1, 1, 1, 1)
    eps = (x_t - (1 - t) * clip) / t
    torch.testing.assert_close(loss.detach(), (eps - clip).square().mean(), rtol=1e-4, atol=0)


class LearnedGaussian(nn.Module):
    """The velocity of N(m, L L^T) over the frames, m and L learned."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(FRAMES, 1))
        self.factor = nn.Parameter(torch.eye(FRAMES))

    def forward(self, hidden_states, timestep, cond, return_dict=False):
        t = (timestep / 1000).reshape(-1, 1, 1)
        x_t, covariance = hidden_states.flatten(1)[:, :, None], self.factor @ self.factor.T
        noisy = (1 - t) ** 2 * covariance + t**2 * torch.eye(FRAMES)
        r = torch.linalg.solve(noisy, x_t - (1 - t) * self.mean)
        return ((t * r - self.mean - (1 - t) * covariance @ r).view_as(hidden_states),)


def test_a_student_with_a_learned_fake_score_finds_the_process():
    """The whole alternation, from the wrong numbers to a = rho, b = sqrt(1 - rho^2), s = 1."""
    torch.manual_seed(0)
    student, fake = Ar1Student(a=0.1, b=0.5, s=1.5), LearnedGaussian()
    setting = ar1_setting("dmd", student, fake, normalizer="none", shift=1.0)
    optimizers = {
        name: torch.optim.Adam(n.parameters(), betas=(0.5, 0.99))
        for name, n in setting.networks().items()
    }
    steps = 240
    for step in range(steps):
        for turn in setting.turns(step):
            keys = [1000 * step + 100 * (turn == "student") + i for i in range(32)]
            optimizers[turn].param_groups[0]["lr"] = 0.06 * (1 - step / steps)
            optimizers[turn].zero_grad()
            setting.loss(turn, prompt_batch(setting.teacher, keys), step)[0].backward()
            optimizers[turn].step()
    found = [p.item() for p in (student.a, student.b, student.s, student.mean)]
    assert found == pytest.approx([RHO, 0.6, 1.0, 0.0], abs=0.1)


def test_the_student_follows_the_fake_score_at_the_end_of_each_cycle():
    objective = DMD(fake_updates_per_student=3, student_start_step=4)
    assert [objective.turns(step) for step in range(9)] == [
        ("fake_score", "student") if step in (5, 8) else ("fake_score",) for step in range(9)
    ]


# ---- the causal Wan


@pytest.mark.parametrize("commit", ["clean", "reuse"])
def test_a_causal_wan_gets_the_same_finite_gradient_with_and_without_checkpointing(commit):
    stream = StreamConfig(
        num_steps=2, chunk_frames=2, window_frames=4, sink_frames=1, commit=commit
    )
    setting = wan_setting("dmd", stream, {"num_chunks": 3, "exit": "last"}, guidance_scale=3.0)
    batch = wan_batch()
    for turn, network in setting.networks().items():
        plain = gradients(setting, turn, batch)
        assert all(grad is not None and grad.isfinite().all() for grad in plain.values())
        assert all(grad.any() for name, grad in plain.items() if name.endswith("weight"))
        network.zero_grad(set_to_none=True)
        network.enable_gradient_checkpointing()
        recomputed = gradients(setting, turn, batch)
        network.disable_gradient_checkpointing()
        network.zero_grad(set_to_none=True)
        for name, grad in plain.items():
            torch.testing.assert_close(
                recomputed[name], grad, rtol=1e-5, atol=1e-7, msg=f"{turn} {name}"
            )


def test_the_fake_score_starts_as_a_float32_copy_of_the_teacher():
    stream = StreamConfig(num_steps=2, chunk_frames=2)
    setting = wan_setting("dmd", stream, {"num_chunks": 3}, guidance_scale=1.0)
    for theirs, ours in zip(
        setting.teacher.transformer.parameters(),
        setting.networks()["fake_score"].parameters(),
        strict=True,
    ):
        assert torch.equal(theirs, ours) and not theirs.requires_grad and ours.requires_grad
    grads = gradients(setting, "student", wan_batch())
    assert all((grad == 0).all() for grad in grads.values())


# ---- errors


@pytest.mark.parametrize(
    "wrong",
    [
        {"low": 0.5, "high": 0.4},
        {"shift": 0.0},
        {"fake_updates_per_student": 0},
        {"low": 2.0},
        {"normalizer": "batch"},
    ],
)
def test_a_wrong_option_is_refused(wrong):
    with pytest.raises(ValueError, match=next(reversed(wrong))):
        DMD(**wrong)
