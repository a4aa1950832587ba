"""The Gaussian teacher is exact, and the guided prediction is one convention."""

import pytest
import torch

from streamvid.core.process import add_noise, eps_from_v, velocity, x0_from_v
from streamvid.seeding import keyed_normal
from streamvid.teachers.analytic import AnalyticTeacher
from streamvid.teachers.base import predict_guided

SHAPE = (2, 3, 1, 2)  # C, T, h, w
N = 12


def covariance():
    factor = keyed_normal((N, N), "factor").double()
    return factor @ factor.T / N


def teacher_of(**means):
    return AnalyticTeacher(
        torch.zeros(SHAPE), covariance(), {k: torch.full(SHAPE, m) for k, m in means.items()}
    )


def test_the_prediction_is_the_regression_on_samples():
    """E[x_0 | x_t] is the least-squares fit from x_t to x_0; here the sample moments are those of
    200000 draws.
    """
    teacher, t = teacher_of(cat=0.5), 0.6
    x0 = (
        0.5
        + keyed_normal((200_000, N), "z").double()
        @ torch.linalg.cholesky(covariance() + 1e-9 * torch.eye(N)).T
    )
    x_t = add_noise(x0, keyed_normal((200_000, N), "eps").double(), t)
    design = torch.cat([x_t, torch.ones(len(x_t), 1)], dim=1)
    fit = torch.linalg.lstsq(design, x0).solution
    clips = x_t[:5].reshape(5, *SHAPE)
    v = teacher.predict(clips, torch.full((5,), t), teacher.encode_prompt(["cat"] * 5))
    torch.testing.assert_close(
        x0_from_v(clips, v, t).flatten(1), design[:5] @ fit, rtol=0, atol=0.02
    )


def test_frames_may_differ_in_time_and_data_is_known_where_it_is_clean():
    teacher, x0 = teacher_of(), keyed_normal((2, *SHAPE), "x0").double()
    cond = teacher.encode_prompt(["", ""])
    times = torch.tensor([[0.0, 0.7, 1.0], [0.3, 0.3, 0.3]]).double()
    x_t = add_noise(x0, keyed_normal((2, *SHAPE), "eps").double(), times)
    v = teacher.predict(x_t, times, cond)
    torch.testing.assert_close(x0_from_v(x_t, v, times)[0, :, 0], x0[0, :, 0])
    torch.testing.assert_close(
        v[1:], teacher.predict(x_t[1:], torch.tensor([0.3]).double(), cond[1:])
    )


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_ends_of_time_are_finite(t):
    teacher, x = teacher_of(), keyed_normal((1, *SHAPE), "x").double()
    v = teacher.predict(x, torch.tensor([t]), teacher.encode_prompt([""]))
    known = x if t == 0 else torch.zeros_like(x)  # E[x0]; at t = 1 the noise is known instead
    torch.testing.assert_close(x0_from_v(x, v, t), known, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        eps_from_v(x, v, t), velocity(torch.zeros_like(x), x * t), rtol=0, atol=1e-9
    )


def test_guidance_is_uncond_plus_scale_times_the_difference():
    teacher, x, t = teacher_of(cat=1.0), keyed_normal((2, *SHAPE), "x"), torch.tensor([0.5, 0.9])
    cond = teacher.encode_prompt(["cat", "cat"])
    c, u = teacher.predict(x, t, cond), teacher.predict(x, t, teacher.encode_prompt(["", ""]))
    for scale in (0.0, 1.0, 4.0):
        torch.testing.assert_close(predict_guided(teacher, x, t, cond, scale), u + scale * (c - u))


def test_no_guidance_needs_no_negative_prompt():
    teacher, x, t = teacher_of(cat=1.0), keyed_normal((1, *SHAPE), "x"), torch.tensor([0.5])
    cond, teacher.uncond = teacher.encode_prompt(["cat"]), None
    assert torch.equal(predict_guided(teacher, x, t, cond, 1.0), teacher.predict(x, t, cond))
    with pytest.raises(ValueError, match="guidance_scale=2.0 needs the teacher's uncond"):
        predict_guided(teacher, x, t, cond, 2.0)


def test_wrong_sizes_and_unknown_prompts_are_refused():
    with pytest.raises(ValueError, match=r"expected \[n, n\] with n=12"):
        AnalyticTeacher(torch.zeros(SHAPE), torch.eye(3))
    with pytest.raises(ValueError, match="no mean for the prompt 'dog'"):
        teacher_of(cat=1.0).encode_prompt(["cat", "dog"])
