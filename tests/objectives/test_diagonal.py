"""Diagonal distillation: the flow term's gradient in closed form, and rollouts that end where
streaming does.
"""

import pytest
import torch
from torch import nn

from streamvid.core.inject import dmd_gradient
from streamvid.core.process import x0_from_v
from streamvid.objectives.base import Exit
from streamvid.objectives.diagonal import Diagonal, MotionFeature, frame_weights
from streamvid.rollout.sampler import generate_latents
from streamvid.rollout.schedule import StreamConfig, build_schedule, cost_of
from streamvid.seeding import key_to_seed
from tests import fakes
from tests.fakes import (
    ONE_STEP,
    Ar1Student,
    ClipStudent,
    ScoreOf,
    ar1_setting,
    ar1_teacher,
    gradients,
    noise,
    prompt_batch,
    rolled_out,
    wan_batch,
)

FRAMES = 4
TABLE = ((1.0, 0.9, 0.8, 0.6), (1.0, 0.9, 0.6), (1.0, 0.6))
DIAGONAL = StreamConfig(step_table=TABLE, chunk_frames=1, commit="reuse")
KEYS = range(5)


def gaussian_setting(student, fake, stream=ONE_STEP, rollout=None, **options):
    return ar1_setting("diagonal", student, fake, stream, rollout, FRAMES, **options)


def student_gradient(setting, turn="student"):
    network = setting.networks()[turn]
    network.zero_grad(set_to_none=True)
    loss, numbers = setting.loss(turn, prompt_batch(setting.teacher, KEYS), 0)
    loss.backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None], numbers


class Offset(nn.Module):
    """The teacher as a fake score whose velocity is off by ``offset``, the same or other for each
    frame.
    """

    def __init__(self, offset):
        super().__init__()
        self.teacher, self.offset = ar1_teacher(0.8, FRAMES), offset

    def forward(self, hidden_states, timestep, cond, return_dict=False):
        return (self.teacher.predict(hidden_states, timestep / 1000, cond) + self.offset,)


def clip_student(seed=0):
    return ClipStudent(noise(len(KEYS), 1, FRAMES, 1, 1, seed=seed))


# ---- the flow term


@pytest.mark.parametrize("kind", ["even", "growing"])
def test_the_flow_gradient_is_the_transposed_difference_of_the_weighted_motion_gradient(kind):
    """In the released code it is zero, for want of a graph."""
    student, fake = clip_student(), ScoreOf(ar1_teacher(0.1, FRAMES))
    (with_flow,), numbers = student_gradient(
        gaussian_setting(student, fake, motion_weight=0.7, frame_weights=kind)
    )
    setting = gaussian_setting(student, fake, motion_weight=0.0)
    (without,), _ = student_gradient(setting)
    (x_t, t), cond = fake.inputs[-1], prompt_batch(setting.teacher, KEYS)["cond"]
    moving = student.clip.detach().diff(dim=2)
    fake_moves, real_moves = (
        x0_from_v(x_t, s.predict(x_t, t, cond), t).diff(dim=2)
        for s in (fake.teacher, setting.teacher)
    )
    g = (
        dmd_gradient(moving, fake_moves, real_moves)
        * frame_weights(kind, fake_moves - real_moves)[:, None, :, None, None]
    )
    g = 0.7 * g / g.numel()
    expected = torch.cat([-g[:, :, :1], g[:, :, :-1] - g[:, :, 1:], g[:, :, -1:]], dim=2)
    torch.testing.assert_close(with_flow - without, expected, rtol=1e-4, atol=1e-7)
    assert expected.abs().max() > 0.01 and numbers["flow"] > 0


def test_an_offset_that_is_the_same_in_all_frames_is_no_motion():
    torch.manual_seed(0)
    steady, moving = torch.full((1, 1, 1, 1, 1), 0.5), 0.5 * noise(1, 1, FRAMES, 1, 1)
    for offset, alike in ((steady, True), (moving, False)):
        (with_flow,), _ = student_gradient(
            gaussian_setting(clip_student(), Offset(offset), motion_weight=1.0)
        )
        (without,), _ = student_gradient(
            gaussian_setting(clip_student(), Offset(offset), motion_weight=0.0)
        )
        assert torch.allclose(with_flow, without, atol=1e-5) is alike
        assert without.abs().max() > 1e-3


def test_equal_scores_leave_the_student_exactly_where_it_is():
    (grad,), _ = student_gradient(
        gaussian_setting(clip_student(), ScoreOf(ar1_teacher(0.8, FRAMES)), motion_weight=1.0)
    )
    assert (grad == 0).all()


def test_growing_weights_have_mean_one_and_grow():
    weights = frame_weights("growing", noise(3, 2, 6, 4, 4))
    torch.testing.assert_close(weights.mean(1), torch.ones(3))
    assert (weights.diff(dim=1) > 0).all()
    assert (frame_weights("even", noise(3, 2, 6, 4, 4)) == 1).all()


# ---- the learned feature


def test_a_learned_feature_begins_as_the_difference():
    fake = ScoreOf(ar1_teacher(0.1, FRAMES))
    grads = [
        student_gradient(gaussian_setting(clip_student(), fake, motion_feature=motion))[0][0]
        for motion in ("difference", "learned")
    ]
    torch.testing.assert_close(*grads)


def test_the_feature_learns_to_tell_motion_from_noise_and_nothing_else_learns_with_it():
    student, fake = clip_student(), ScoreOf(ar1_teacher(0.8, FRAMES))
    setting = gaussian_setting(student, fake, motion_feature="learned")
    assert setting.turns(1) == ("fake_score", "motion", "student")
    optimizer = torch.optim.Adam(setting.networks()["motion"].parameters(), 3e-3)
    losses = []
    for step in range(60):
        loss, _ = setting.loss("motion", prompt_batch(setting.teacher, KEYS), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert student.clip.grad is None and fake.weight.grad is None


def test_the_feature_keeps_the_shape_of_what_moves():
    moving = noise(2, 3, 5, 4, 6)
    feature = MotionFeature(3)
    assert torch.equal(feature(moving), moving) and feature.predict(moving).shape == moving.shape


# ---- diagonal denoising and forcing


def test_a_clip_takes_seventeen_forwards_where_four_steps_and_clean_context_take_thirty_five():
    published = StreamConfig(step_table=TABLE, chunk_frames=3, commit="reuse")
    cost = cost_of(build_schedule(published, 7), 3, "reuse", commit_last=True)
    assert (cost.nfe, cost.commits) == (17, 0)
    clean = cost_of(
        build_schedule(StreamConfig(num_steps=4, chunk_frames=3), 7), 3, "clean", commit_last=True
    )
    assert clean.nfe + clean.commits == 35


class CountsSteps(Ar1Student):
    """Which has to tell the rollout its keys and values."""

    def __init__(self):
        super().__init__()
        self.times = []
        self.exits = []  # those that carry gradient

    def forward(self, hidden_states, timestep, cond, cache, return_kv=False):
        self.times.append((len(cache), round(float(timestep[0]) / 1000, 3)))
        if torch.is_grad_enabled():
            self.exits.append(self.times[-1])
        output = super().forward(hidden_states, timestep, cond, cache)
        output.kv = hidden_states.detach()
        return output

    def new_cache(self, batch_size, height, width, **policy):
        return []


@pytest.mark.parametrize(
    "place, last", [(0.0, (0, 0, 0)), (0.5, (2, 1, 1)), (0.3, (1, 0, 0)), (0.99, (3, 2, 1))]
)
@pytest.mark.parametrize("context", ["streamed", "exit"])
def test_all_chunks_exit_at_the_same_fraction_of_their_lists(context, place, last):
    """The exits are the same whether a chunk then takes the rest of its steps or not; the last
    chunk never does.
    """
    student, fake = CountsSteps(), ScoreOf(ar1_teacher(0.8, FRAMES))
    setting = gaussian_setting(student, fake, DIAGONAL, {"context": context})
    rolled_out(setting, prompt_batch(setting.teacher, KEYS), exit=Exit(place=place))
    lists = [(chunk, TABLE[min(chunk, 2)], last[min(chunk, 2)]) for chunk in range(FRAMES)]
    assert student.exits == [(chunk, times[index]) for chunk, times, index in lists]
    whole = range(FRAMES - 1) if context == "streamed" else ()
    assert student.times == [
        (chunk, t)
        for chunk, times, index in lists
        for t in times[: None if chunk in whole else index + 1]
    ]


def wan_setting(rollout=None, **options):
    stream = StreamConfig(
        step_table=TABLE, chunk_frames=2, window_frames=4, sink_frames=1, commit="reuse"
    )
    return fakes.wan_setting("diagonal", stream, {"num_chunks": 3, **(rollout or {})}, **options)


@pytest.mark.parametrize("motion", ["difference", "learned"])
def test_a_causal_wan_gets_a_finite_gradient_in_each_turn(motion):
    setting = wan_setting(motion_feature=motion)
    for turn in setting.turns(1):
        grads = gradients(setting, turn, wan_batch()).values()
        assert all(g is not None and g.isfinite().all() for g in grads)
        assert any(g.any() for g in grads)


def test_training_rolls_out_what_will_be_streamed():
    setting, batch = wan_setting({"exit": "last"}), wan_batch()
    streamed = generate_latents(
        setting.student,
        batch["cond"],
        setting.stream,
        seeds=[key_to_seed(0, "student", key) for key in batch["keys"]],
        latent_shape=(4, 4, 4),
        num_chunks=3,
    )
    with torch.no_grad():
        assert torch.equal(rolled_out(setting, batch), streamed)


# ---- errors


@pytest.mark.parametrize(
    "wrong", [{"motion_weight": -1.0}, {"motion_feature": "flow"}, {"frame_weights": "late"}]
)
def test_a_wrong_option_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Diagonal(**wrong)


def test_a_clip_of_one_frame_is_refused():
    with pytest.raises(ValueError, match="have no motion"):
        ar1_setting("diagonal", Ar1Student(), frames=1)
