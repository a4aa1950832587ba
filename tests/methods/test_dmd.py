"""Properties of distribution matching on self-forced rollouts; the mathematics is exact where data
is Gaussian.
"""

import math

import pytest
import torch
from diffusers import WanTransformer3DModel
from streamvid.methods.dmd import DMD, Config, Method
from streamvid.methods.matching import Decision
from torch import nn

from streamvid.core.inject import dmd_gradient
from streamvid.core.process import x0_from_v
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.rollout.schedule import StreamConfig
from streamvid.teachers.analytic import AnalyticTeacher
from streamvid.teachers.wan import WanTeacher
from tests.fakes import (
    TINY_WAN,
    Ar1Student,
    ClipStudent,
    ScoreOf,
    ar1_covariance,
    ar1_teacher,
    noise,
    prompt_batch,
)

FRAMES, RHO = 3, 0.8
ONE_STEP = StreamConfig(num_steps=1, chunk_frames=1)
FOUR_STEPS = StreamConfig(num_steps=4, chunk_frames=1)
KEYS = range(6)


def ar1_method(student, fake=None, stream=ONE_STEP, teacher=None, as_image=None, **config):
    teacher = teacher or ar1_teacher(RHO, FRAMES)
    options = {"num_chunks": FRAMES, "guidance_scale": 1.0, **config}
    fake = ScoreOf(teacher) if fake is None else fake
    return DMD(
        Config(**options), student, teacher, stream, (1, 1, 1), fake_score=fake, as_image=as_image
    )


def gradients(method, turn, batch, step=0):
    loss, numbers = method.loss(turn, batch, step)
    loss.backward()
    assert all(math.isfinite(number) for number in numbers.values())
    return {name: parameter.grad for name, parameter in method.networks()[turn].named_parameters()}


# The gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [ONE_STEP, FOUR_STEPS])
def test_equal_scores_leave_the_student_exactly_where_it_is(stream):
    method = ar1_method(Ar1Student(), stream=stream)
    grads = gradients(method, "student", prompt_batch(method.teacher, KEYS))
    assert all(grad is None or (grad == 0).all() for grad in grads.values())


def test_the_gradient_at_the_predictions_is_the_score_difference_over_the_number_of_elements():
    student = ClipStudent(noise(6, 1, FRAMES, 1, 1))
    fake = ScoreOf(ar1_teacher(0.1, FRAMES))
    method = ar1_method(student, fake)
    (grad,) = gradients(method, "student", prompt_batch(method.teacher, KEYS)).values()
    (x_t, t), cond = fake.inputs[0], prompt_batch(method.teacher, KEYS)["cond"]
    assert t.shape == (6,) and len(set(t.tolist())) == 6  # one time a clip
    x0_fake, x0_real = (
        x0_from_v(x_t, of.predict(x_t, t, cond), t) for of in (fake.teacher, method.teacher)
    )
    g = dmd_gradient(student.clip.detach(), x0_fake, x0_real)
    torch.testing.assert_close(grad, g / g.numel(), rtol=1e-5, atol=1e-9)
    assert g.abs().max() > 0.01


def test_descent_narrows_a_student_that_is_too_wide_and_moves_one_that_is_beside_the_data():
    wide, beside = Ar1Student(RHO, 0.6, s=2.0), Ar1Student(RHO, 0.6, 1.0, mean=3.0)
    wide_scores = AnalyticTeacher(torch.zeros(1, 1, 1, 1), torch.tensor([[4.0]]))
    beside_scores = AnalyticTeacher(torch.full((1, 1, 1, 1), 3.0), torch.tensor([[1.0]]))
    for student, scores, parameter in ((wide, wide_scores, "s"), (beside, beside_scores, "mean")):
        method = ar1_method(student, ScoreOf(scores), teacher=ar1_teacher(RHO, 1), num_chunks=1)
        assert gradients(method, "student", prompt_batch(scores, range(64)))[parameter] > 0


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
    method = ar1_method(
        student, fake, teacher=teacher, guidance_scale=guidance_scale, normalizer="none"
    )
    fake.teacher.means = fake.teacher.means.repeat(2, 1)  # the same for both prompts
    grads = gradients(method, "student", prompt_batch(teacher, KEYS, "cat"))
    assert all(grad.abs() < 1e-6 for grad in grads.values())
    student.zero_grad()
    method.config.guidance_scale += 1
    assert gradients(method, "student", prompt_batch(teacher, KEYS, "cat"))["mean"].abs() > 0.01


def test_a_turn_trains_its_own_network_and_nothing_else():
    student, fake = Ar1Student(), ScoreOf(ar1_teacher(0.1, FRAMES))
    method = ar1_method(student, fake)
    batch = prompt_batch(method.teacher, KEYS)
    gradients(method, "student", batch)
    assert fake.weight.grad is None and all(p.grad is not None for p in student.parameters())
    student.zero_grad(set_to_none=True)
    gradients(method, "fake_score", batch)
    assert fake.weight.grad is not None and all(p.grad is None for p in student.parameters())


def test_no_graph_is_built_that_no_gradient_needs():
    """It would change nothing but the memory: that of the fake score in one turn, of a rollout in
    the other.
    """
    student = ClipStudent(noise(6, 1, FRAMES, 1, 1))
    method = ar1_method(student, stream=FOUR_STEPS, exit="last")
    batch = prompt_batch(method.teacher, KEYS)
    method.loss("student", batch, 0)
    assert [grad for _, grad in student.calls] == 3 * [False, False, False, True]
    method.loss("fake_score", batch, 0)
    assert not any(grad for _, grad in student.calls[12:])
    assert method.fake_score.grad_modes == [False, True]


def test_the_fake_score_is_fitted_to_the_students_clips():
    """For a network that says 0 the loss is mean |eps - x|^2, with the noise of its own input."""
    clip = noise(6, 1, FRAMES, 1, 1)
    fake = ScoreOf(ar1_teacher(0.1, FRAMES))
    method = ar1_method(ClipStudent(clip), fake)
    with torch.no_grad():
        fake.weight.zero_()
    loss, _ = method.loss("fake_score", prompt_batch(method.teacher, KEYS), 0)
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

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=False):
        t = (timestep / 1000).reshape(-1, 1, 1)
        x_t, covariance = hidden_states.flatten(1)[:, :, None], self.factor @ self.factor.T
        noisy = (1 - t) ** 2 * covariance + t**2 * torch.eye(FRAMES)
        r = torch.linalg.solve(noisy, x_t - (1 - t) * self.mean)
        return ((t * r - self.mean - (1 - t) * covariance @ r).view_as(hidden_states),)


def test_a_student_with_a_learned_fake_score_finds_the_process():
    """The whole alternation, from the wrong numbers to a = rho, b = sqrt(1 - rho^2), s = 1."""
    torch.manual_seed(0)
    student, fake = Ar1Student(a=0.1, b=0.5, s=1.5), LearnedGaussian()
    method = ar1_method(student, fake, normalizer="none", shift=1.0, fake_updates_per_student=2)
    networks = method.networks()
    optimizers = {
        name: torch.optim.Adam(n.parameters(), betas=(0.5, 0.99)) for name, n in networks.items()
    }
    steps = 240
    for step in range(steps):
        for turn in method.turns(step):
            keys = [1000 * step + 100 * (turn == "student") + i for i in range(32)]
            optimizers[turn].param_groups[0]["lr"] = 0.06 * (1 - step / steps)
            optimizers[turn].zero_grad()
            method.loss(turn, prompt_batch(method.teacher, keys), step)[0].backward()
            optimizers[turn].step()
    found = [p.item() for p in (student.a, student.b, student.s, student.mean)]
    assert found == pytest.approx([RHO, 0.6, 1.0, 0.0], abs=0.1)


# Decisions and noise ------------------------------------------------------------------------------------


def test_all_processes_end_their_rollouts_at_the_same_step():
    method = ar1_method(Ar1Student(), stream=FOUR_STEPS)
    halves = [prompt_batch(method.teacher, keys) for keys in (range(3), range(3, 6))]
    exits = [
        [method.loss("student", half, step)[1]["exit_index"] for half in halves]
        for step in range(30)
    ]
    assert all(first == second for first, second in exits)
    assert {first for first, _ in exits} == {0, 1, 2, 3}
    # repeated
    assert len({method.decide("student", 0, micro).exit_index for micro in range(30)}) == 4


def test_a_sample_does_not_depend_on_the_slice_that_it_comes_in():
    method = ar1_method(
        Ar1Student(), stream=StreamConfig(num_steps=4, chunk_frames=1, context_t=0.1)
    )
    for turn in ("student", "fake_score"):
        method.fake_score.inputs.clear()
        for keys in (range(6), range(2), range(2, 6)):
            method.loss(turn, prompt_batch(method.teacher, keys), 3)
        (whole, times), *parts = method.fake_score.inputs
        assert torch.equal(whole, torch.cat([x_t for x_t, _ in parts]))
        assert torch.equal(times, torch.cat([t for _, t in parts]))


def test_turns_and_steps_draw_different_clips():
    method = ar1_method(Ar1Student())
    for keys in (range(6), range(6, 12)):
        method.loss("fake_score", prompt_batch(method.teacher, keys), 0)
    (first, _), (second, _) = method.fake_score.inputs
    assert not torch.isclose(first, second).any()


def test_the_student_follows_the_fake_score_at_the_end_of_each_cycle():
    method = ar1_method(Ar1Student(), fake_updates_per_student=3, student_start_step=4)
    turns = [method.turns(step) for step in range(9)]
    assert turns == [
        ("fake_score", "student") if step in (5, 8) else ("fake_score",) for step in range(9)
    ]


def test_exit_last_always_runs_the_whole_list():
    method = ar1_method(Ar1Student(), stream=FOUR_STEPS, exit="last")
    assert {method.decide("student", step).exit_index for step in range(20)} == {3}


# Long rollouts ------------------------------------------------------------------------------------------


def long_method(student, fake=None, **config):
    """In its codec an image's latent is minus its frame's in a clip."""
    return ar1_method(
        student,
        fake,
        as_image=lambda latents: -latents[:, :, -1:],
        **{"rollout_chunks": 8, **config},
    )


@pytest.mark.parametrize("window", ["random", "last"])
def test_a_long_rollout_is_judged_and_trained_on_a_part_of_the_teachers_length(window):
    student = ClipStudent(noise(2, 1, 8, 1, 1))
    fake = ScoreOf(ar1_teacher(0.1, FRAMES))
    method = long_method(student, fake, window=window)
    firsts = set()
    for step in range(40):
        student.calls.clear(), fake.inputs.clear()
        student.zero_grad(set_to_none=True)
        (grad,) = gradients(
            method, "student", prompt_batch(method.teacher, range(2)), step
        ).values()
        first = method.decide("student", step).first_chunk
        firsts.add(first)
        assert fake.inputs[0][0].shape[2] == FRAMES
        assert student.calls == [(chunk, chunk >= first) for chunk in range(first + FRAMES)]
        # not the first chunk of a part from the middle
        trained = range(first + (1 if first else 0), first + FRAMES)
        assert grad.abs().sum((0, 1, 3, 4)).nonzero().flatten().tolist() == list(trained)
    assert firsts == (set(range(6)) if window == "random" else {5})


def test_a_part_from_the_middle_begins_with_an_image_and_one_from_the_start_is_left_alone():
    """The teacher knows no clip whose first latent is not an image's: its loss there was .787 where
    it has .123.
    """
    clip = noise(2, 1, 8, 1, 1)
    method = long_method(ClipStudent(clip))
    batch = prompt_batch(method.teacher, range(2))
    for first in range(6):
        x = method._roll_out(batch, method.stream, Decision(0, 0.0, first)).detach()
        part = clip[:, :, first : first + FRAMES].clone()
        part[:, :, 0] *= -1 if first else 1
        torch.testing.assert_close(x, part, rtol=0, atol=1e-6)


def test_the_loss_is_a_mean_over_the_frames_that_count():
    clip = noise(2, 1, 8, 1, 1)
    method = long_method(ClipStudent(clip), ScoreOf(ar1_teacher(0.1, FRAMES)))
    batch = prompt_batch(method.teacher, range(2))
    decision = Decision(0, 0.0, 2)
    judged = method._judge(method._roll_out(batch, method.stream, decision), batch, decision)
    loss, _ = method.student_terms(judged, batch, decision)
    expected = 0.5 * judged.gradient[:, :, 1:].square().mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)


def test_parts_from_the_middle_are_judged_where_the_teacher_knows_them():
    fake = ScoreOf(ar1_teacher(0.1, FRAMES))
    method = long_method(ClipStudent(noise(6, 1, 8, 1, 1)), fake, window_high=0.5)
    times = {True: [], False: []}
    for step in range(30):
        for turn in ("student", "fake_score"):
            fake.inputs.clear()
            method.loss(turn, prompt_batch(method.teacher, range(6 * step, 6 * step + 6)), step)
            times[method.decide(turn, step).first_chunk > 0].append(fake.inputs[0][1].max().item())
    assert max(times[True]) <= 0.5 and max(times[False]) > 0.9


def test_a_long_rollout_needs_images_and_two_chunks():
    with pytest.raises(ValueError, match="needs as_image"):
        ar1_method(Ar1Student(), rollout_chunks=8)
    with pytest.raises(ValueError, match="judge at least 2"):
        Config(num_chunks=1, rollout_chunks=2)
    with pytest.raises(ValueError, match="window_high"):
        Config(window_high=0.99)


# The causal Wan -----------------------------------------------------------------------------------------

WAN_STREAM = StreamConfig(num_steps=2, chunk_frames=2, window_frames=4, sink_frames=1)


def wan_method(student=None, stream=WAN_STREAM, **config):
    torch.manual_seed(0)
    teacher = WanTeacher(WanTransformer3DModel(**TINY_WAN), None, shift=5.0)
    teacher.uncond = noise(5, 8)
    causal = CausalWanTransformer3DModel(**TINY_WAN)
    options = {"num_chunks": 3, "guidance_scale": 3.0, **config}
    method = DMD(
        Config(**options),
        causal if student is None else student(causal),
        teacher,
        stream,
        (4, 4, 4),
    )
    return method, {"cond": noise(2, 5, 8, seed=1), "keys": [7, 8]}


@pytest.mark.parametrize("commit", ["clean", "reuse"])
def test_a_causal_wan_gets_the_same_finite_gradient_with_and_without_checkpointing(commit):
    stream = StreamConfig(
        num_steps=2, chunk_frames=2, window_frames=4, sink_frames=1, commit=commit
    )
    method, batch = wan_method(stream=stream, exit="last")
    for turn, network in method.networks().items():
        plain = gradients(method, turn, batch)
        assert all(grad is not None and grad.isfinite().all() for grad in plain.values())
        assert all(grad.any() for name, grad in plain.items() if name.endswith("weight"))
        network.zero_grad(set_to_none=True)
        network.enable_gradient_checkpointing()
        recomputed = gradients(method, turn, batch)
        network.disable_gradient_checkpointing()
        network.zero_grad(set_to_none=True)
        for name, grad in plain.items():
            torch.testing.assert_close(
                recomputed[name], grad, rtol=1e-5, atol=1e-7, msg=f"{turn} {name}"
            )


def test_the_fake_score_starts_as_a_float32_copy_of_the_teacher():
    method, batch = wan_method(guidance_scale=1.0)
    for theirs, ours in zip(
        method.teacher.transformer.parameters(), method.fake_score.parameters(), strict=True
    ):
        assert torch.equal(theirs, ours) and not theirs.requires_grad and ours.requires_grad
    assert all((grad == 0).all() for grad in gradients(method, "student", batch).values())


class Probed(nn.Module):
    """Adds a number of its own to what a student is given of each chunk."""

    def __init__(self, student):
        super().__init__()
        self.inner = student
        self.config, self.commit, self.new_cache = student.config, student.commit, student.new_cache
        self.probes = nn.Parameter(torch.zeros(3))

    def forward(self, hidden_states, timestep, encoder_hidden_states, cache):
        chunk = cache.num_committed_frames // 2
        return self.inner(
            hidden_states + self.probes[chunk], timestep, encoder_hidden_states, cache=cache
        )


def test_no_gradient_passes_from_a_chunk_to_the_ones_before_it():
    """Self-Forcing's cache does let it through, see ar_peers.md, D1."""
    method, batch = wan_method(Probed, normalizer="none")
    copy = method.fake_score

    class DiffersInTheSecondChunk(nn.Module):
        def forward(self, *args, **options):
            velocity = copy(*args, **options)[0]
            velocity[:, :, 2:4] += 1
            return (velocity,)

    method.config.guidance_scale = 1.0
    method.fake_score = DiffersInTheSecondChunk()
    probes = gradients(method, "student", batch)["probes"]
    assert probes[0] == 0 and probes[1] != 0 and probes[2] == 0


@pytest.mark.parametrize(
    "order", [{"order": "full_sequence", "commit": "none"}, {"order": "rolling"}]
)
def test_other_orders_train(order):
    stream = StreamConfig(num_steps=2, chunk_frames=2, **order)
    method, batch = wan_method(stream=stream, exit="last")
    assert all(grad is not None for grad in gradients(method, "student", batch).values())


def test_a_single_chunk_of_a_single_frame_trains():
    method, batch = wan_method(stream=StreamConfig(num_steps=1, chunk_frames=1), num_chunks=1)
    assert all(grad.isfinite().all() for grad in gradients(method, "student", batch).values())


# Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_chunks": 0},
        {"low": 0.5, "high": 0.4},
        {"rollout_chunks": 3},
        {"exit": "first"},
        {"shift": 0.0},
        {"fake_updates_per_student": 0},
        {"window": "first"},
        {"low": 2.0},
    ],
)
def test_a_wrong_setting_is_refused(wrong):
    with pytest.raises(ValueError, match=next(reversed(wrong))):
        Config(**wrong)


def test_networks_that_do_not_fit_are_refused():
    teacher = ar1_teacher(RHO, FRAMES)
    with pytest.raises(ValueError, match="no network to start the fake score from"):
        DMD(Config(), Ar1Student(), teacher, ONE_STEP, (1, 1, 1))
    teacher.uncond = None
    with pytest.raises(ValueError, match="needs the teacher's uncond"):
        DMD(Config(), Ar1Student(), teacher, ONE_STEP, (1, 1, 1), ScoreOf(teacher))
    teacher.provides = frozenset({"clips"})
    with pytest.raises(ValueError, match="DMD needs score .* AnalyticTeacher provides only clips"):
        DMD(Config(), Ar1Student(), teacher, ONE_STEP, (1, 1, 1), ScoreOf(teacher))
    with pytest.raises(ValueError, match="exit='last'"):
        ar1_method(Ar1Student(), stream=StreamConfig(num_steps=2, chunk_frames=1, order="rolling"))


def test_an_unknown_turn_is_refused():
    method = ar1_method(Ar1Student())
    with pytest.raises(ValueError, match="turn='teacher'"):
        method.loss("teacher", prompt_batch(method.teacher, KEYS), 0)
    assert Method is DMD
