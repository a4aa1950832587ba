"""Adversarial self-distillation: who learns from whom, in which logit, and what the discriminator
finds.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from streamvid.methods.asd import ASD, Config, Method
from torch import nn

from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.rollout.sampler import generate_latents
from streamvid.rollout.schedule import StreamConfig
from streamvid.seeding import key_to_seed
from streamvid.teachers.wan import WanTeacher
from tests.fakes import (
    TINY_WAN,
    Ar1Student,
    ClipStudent,
    ScoreOf,
    ar1_teacher,
    noise,
    prompt_batch,
    run_turn,
)

STREAM = StreamConfig(num_steps=4, chunk_frames=2, shift=5.0)
FIRST = replace(STREAM, first_steps=4, num_steps=3)


def wan_method(stream=STREAM, **config):
    torch.manual_seed(0)
    teacher = WanTeacher(WanTransformer3DModel(**TINY_WAN), None, shift=5.0)
    teacher.uncond = noise(5, 8)
    student = CausalWanTransformer3DModel(**TINY_WAN)
    method = ASD(Config(num_chunks=2, **config), student, teacher, stream, (4, 4, 4))
    return method, {
        "cond": noise(2, 5, 8, seed=1),
        "keys": [7, 8],
        "latents": noise(2, 4, 4, 4, 4, seed=2),
    }


def step_with(method, turn, n):
    """A step whose draw is n, with the exit at the last of the n."""
    draws = ((step, method.decide(turn, step)) for step in range(200))
    return next(step for step, draw in draws if draw.num_steps == n and draw.exit_index == n - 1)


# ---- Decisions -----------------------------------------------------------------------------------


def test_the_discriminator_plays_before_the_student():
    method, _ = wan_method(fake_updates_per_student=3, discriminator_updates_per_cycle=2)
    assert [method.turns(step) for step in range(3)] == [
        ("fake_score",),
        ("fake_score", "discriminator"),
        ("fake_score", "discriminator", "student"),
    ]


@pytest.mark.parametrize("real_clips", [False, True])
def test_every_number_of_steps_is_drawn_and_a_pair_has_one_step_more(real_clips):
    method, _ = wan_method(real_clips=real_clips)
    student = Counter(method.decide("student", step).num_steps for step in range(400))
    disc = Counter(method.decide("discriminator", step).num_steps for step in range(400))
    assert set(student) == {1, 2, 3, 4} and set(disc) == {1, 2, 3, 4} - (
        set() if real_clips else {4}
    )
    assert min(student.values()) > 60


def test_every_step_of_every_list_is_trained_and_what_is_compared_is_complete():
    """Below N only the last steps once carried gradient, so that the middle one of three, the
    better side of n = 2, never did.
    """
    method, _ = wan_method()
    exits = {turn: {n: set() for n in range(1, 5)} for turn in ("student", "discriminator")}
    for turn in exits:
        for step in range(300):
            decision = method.decide(turn, step)
            exits[turn][decision.num_steps].add(decision.exit_index)
            complete = decision.exit_index == decision.num_steps - 1
            assert method._is_compared(decision) == (complete and decision.num_steps < 4)
    assert exits["student"] == {1: {0}, 2: {0, 1}, 3: {0, 1, 2}, 4: {0, 1, 2, 3}}
    assert exits["discriminator"] == {1: {0}, 2: {1}, 3: {2}, 4: set()}


@pytest.mark.parametrize("turn, numbers", [("student", (1, 2, 3, 4)), ("discriminator", (1, 2, 3))])
def test_the_first_chunk_has_an_exit_of_its_own(turn, numbers):
    """Its four steps once got 6.7, 5.8, 6.0 and 81.6 percent of the student's updates."""
    method, _ = wan_method(replace(STREAM, first_steps=4))
    decisions = [method.decide(turn, step) for step in range(1200)]
    share = Counter(decision.exit_step(0, 4) for decision in decisions)
    assert all(abs(share[step] / len(decisions) - 0.25) < 0.05 for step in range(4))
    later = {(d.num_steps, d.exit_step(1, d.num_steps)) for d in decisions}
    everything = {(n, step) for n in numbers for step in range(n)}
    assert later == (everything if turn == "student" else {(n, n - 1) for n in numbers})


# ---- What the fake score is told -----------------------------------------------------------------


def test_each_step_of_each_number_of_steps_has_a_label_of_its_own():
    method, _ = wan_method(fake_knows_steps=True)
    decisions = [method.decide("fake_score", step) for step in range(400)]
    of = {(d.num_steps, d.exit_index): method._label(d) for d in decisions}
    assert of == {(n, step): n * (n - 1) // 2 + step for n in range(1, 5) for step in range(n)}
    assert method.fake_score.step_labels.num_embeddings == 10
    assert wan_method()[0]._label(decisions[0]) is None


def test_the_fake_score_learns_its_labels_and_the_discriminator_is_not_told():
    plain, batch = wan_method()
    told, _ = wan_method(fake_knows_steps=True)
    step = step_with(told, "fake_score", 3)
    losses = [method.loss("fake_score", batch, step)[0] for method in (plain, told)]
    assert torch.equal(*losses)  # labels begin at zero
    losses[1].backward()
    assert told.fake_score.step_labels.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [5]

    nn.init.normal_(told.fake_score.step_labels.weight)
    differs = lambda turn, step: plain.loss(turn, batch, step)[0] != told.loss(turn, batch, step)[0]
    assert differs("fake_score", step) and not differs(
        "discriminator", step_with(told, "discriminator", 2)
    )
    first, second = (
        method.loss("student", batch, step_with(told, "student", 2))[1] for method in (plain, told)
    )
    assert (
        first["adversarial"] == second["adversarial"]
        and first["gradient_rms"] != second["gradient_rms"]
    )


# ---- Rollouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stream, n", [(STREAM, 1), (STREAM, 2), (STREAM, 3), (FIRST, 1), (FIRST, 2)]
)
def test_the_clips_of_a_pair_are_what_streaming_in_so_many_steps_gives(stream, n):
    method, batch = wan_method(stream)
    decision = method.decide("discriminator", step_with(method, "discriminator", n))
    # the first chunk, whose prediction is then not its end
    exits_freely = stream.first_steps is not None
    with torch.no_grad():
        clips = (
            method._roll_out(batch, method.stream_of(decision), decision),
            method._better(batch, decision),
        )
    for clip, steps, role in zip(clips, (n, n + 1), ("student", "student_with_more_steps")):
        config = replace(stream, num_steps=steps)
        seeds = [key_to_seed(0, role, key) for key in batch["keys"]]
        streamed = generate_latents(
            method.student, batch["cond"], config, seeds=seeds, latent_shape=(4, 4, 4), num_chunks=2
        )
        first = stream.chunk_frames if exits_freely else 0
        assert torch.equal(clip[:, :, first:], streamed[:, :, first:])


def test_first_frame_enhancement_gives_the_first_chunk_its_steps_at_every_n():
    student = ClipStudent(noise(2, 1, 3, 1, 1))
    method = gaussian_method(student, FIRST)
    for n, expected in ((1, [0] * 4 + [1] + [2]), (2, [0] * 4 + [1] * 2 + [2] * 2)):
        student.calls.clear()
        decision = method.decide("discriminator", step_with(method, "discriminator", n))
        method._roll_out(
            prompt_batch(method.teacher, range(2)), method.stream_of(decision), decision
        )
        assert [chunk for chunk, _ in student.calls] == expected


def test_a_shared_list_ends_after_n_of_its_steps():
    student = ClipStudent(noise(2, 1, 3, 1, 1))
    method = gaussian_method(student, STREAM, lists="shared")
    for n in (1, 2, 3):
        student.calls.clear()
        decision = method.decide("discriminator", step_with(method, "discriminator", n))
        batch = prompt_batch(method.teacher, range(2))
        method._roll_out(batch, method.stream_of(decision), decision)
        assert Counter(chunk for chunk, _ in student.calls) == {0: n, 1: n, 2: n}
        student.calls.clear()
        method._better(batch, decision)
        assert Counter(chunk for chunk, _ in student.calls) == {0: n + 1, 1: n + 1, 2: n + 1}


def test_the_better_clip_carries_no_gradient():
    student = ClipStudent(noise(2, 1, 3, 1, 1))
    method = gaussian_method(student, STREAM, discriminator=SlopeOfMean())
    batch = prompt_batch(method.teacher, range(2))
    student.calls.clear()
    method.loss("student", batch, step_with(method, "student", 2))
    # the last step of each chunk of the worse clip
    assert sum(grad for _, grad in student.calls) == 3
    assert sum(not grad for _, grad in student.calls) == 3 + 9


# ---- Who learns ----------------------------------------------------------------------------------


def test_each_turn_trains_its_own_network():
    method, batch = wan_method(r1_weight=1.0, r2_weight=1.0)
    for turn in method.networks():
        grads, numbers = run_turn(
            method,
            batch,
            turn,
            step_with(method, "discriminator" if turn == "discriminator" else "student", 2),
        )
        for name, of_network in grads.items():
            assert all((grad is not None) == (name == turn) for grad in of_network.values()), (
                turn,
                name,
            )
        assert all(g.isfinite().all() for g in grads[turn].values())


@pytest.mark.parametrize("logit", ["clip", "frame"])
def test_n_steps_move_the_nth_logit_alone(logit):
    method, batch = wan_method(logit=logit)
    for n in (1, 2, 3):
        grads, numbers = run_turn(
            method, batch, "discriminator", step_with(method, "discriminator", n)
        )
        last = [
            name for name in grads["discriminator"] if "join" in name and name.endswith("weight")
        ][-1]
        rows = grads["discriminator"][last].abs().sum(1)
        assert rows.nonzero().flatten().tolist() == [n - 1]
        assert f"gap_{n}" in numbers


def test_without_a_pair_or_a_weight_the_student_has_dmd_alone():
    method, batch = wan_method()
    _, numbers = run_turn(method, batch, "student", step_with(method, "student", 4))
    assert "adversarial" not in numbers
    step = step_with(method, "student", 2)
    assert "adversarial" in run_turn(method, batch, "student", step)[1]
    plain, _ = wan_method(asd_weight=0.0)
    assert "adversarial" not in run_turn(plain, batch, "student", step)[1]


def test_real_clips_are_what_the_most_steps_are_compared_with():
    method, batch = wan_method(real_clips=True)
    decision = method.decide("discriminator", step_with(method, "discriminator", 4))
    assert torch.equal(method._better(batch, decision), batch["latents"])
    assert "adversarial" in run_turn(method, batch, "student", step_with(method, "student", 4))[1]
    del batch["latents"]
    with pytest.raises(ValueError, match="data.kind"):
        method.loss("student", batch, 0)


# ---- What the discriminator finds ----------------------------------------------------------------


class SlopeOfMean(nn.Module):
    """D^n = w_n x_t of a clip of one number, read from what the fake score is given."""

    def __init__(self, num_logits=4):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(num_logits))

    def forward(self, trunk, call, num_parts=1):
        call()
        x_t = trunk.inputs[-1][0]
        return x_t.mean(dim=(1, 2, 3, 4))[:, None, None] * self.w


def gaussian_method(student, stream, discriminator=None, frames=3, **config):
    teacher, options = (
        ar1_teacher(0.8, frames),
        {
            "num_chunks": frames,
            "guidance_scale": 1.0,
            **config,
        },
    )
    disc = SlopeOfMean() if discriminator is None else discriminator
    return ASD(
        Config(**options),
        student,
        teacher,
        replace(stream, chunk_frames=1),
        (1, 1, 1),
        ScoreOf(teacher),
        disc,
    )


def one_frame_method(**config):
    """x ~ N(1, 3) in one step and N(1 + sqrt(3) / 2, 3) in two, compared at t = 1/2."""
    student = Ar1Student(s=3**0.5, mean=1.0)
    stream = StreamConfig(num_steps=2, shift=1.0)
    options = {"noise_low": 0.5, "noise_high": 0.5001, "r1_weight": 0.0, "r2_weight": 0.0}
    return gaussian_method(student, stream, frames=1, **{**options, **config}), student


def test_the_logit_converges_to_the_log_ratio_of_its_pair():
    """For equal variances: slope (1 - t) (mu_2 - mu_1) / ((1 - t)^2 s^2 + t^2)."""
    method, _ = one_frame_method()
    optimizer = torch.optim.Adam(method.discriminator.parameters(), 0.05)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 100)
        optimizer.zero_grad()
        keys = range(1000 * step, 1000 * step + 64)
        method.loss("discriminator", prompt_batch(method.teacher, keys), step)[0].backward()
        optimizer.step()
    assert method.discriminator.w[0].item() == pytest.approx(0.5 * (3**0.5 / 2) / 1.0, rel=0.15)
    assert (method.discriminator.w[1:] == 0).all()


def test_the_student_moves_towards_the_clips_of_more_steps():
    method, student = one_frame_method(asd_weight=1.0)
    batch = prompt_batch(method.teacher, range(512))
    step = step_with(method, "student", 1)
    grads = []
    for slope in (0.0, 0.433):
        method.discriminator.w.data.fill_(slope)
        student.zero_grad()
        method.loss("student", batch, step)[0].backward()
        grads.append(student.mean.grad.item())
    half = -0.433 * 0.5 / 2  # d softplus(D(b) - D(a)) / d mean is about -(1/2) w (1 - t)
    assert grads[1] - grads[0] < 0 and grads[1] - grads[0] == pytest.approx(half, rel=0.5)


def test_a_penalty_flattens_the_logit():
    slopes = []
    for weight in (0.0, 600.0):
        method, _ = one_frame_method(r1_weight=weight, r2_weight=weight)
        optimizer = torch.optim.SGD(method.discriminator.parameters(), 0.2)
        for step in range(40):
            optimizer.zero_grad()
            keys = range(1000 * step, 1000 * step + 64)
            method.loss("discriminator", prompt_batch(method.teacher, keys), step)[0].backward()
            optimizer.step()
        slopes.append(method.discriminator.w[0].item())
    assert 0 < slopes[1] < 0.6 * slopes[0]


# ---- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"asd_weight": -1.0},
        {"discriminator_updates_per_cycle": 9},
        {"noise_low": 0.9, "noise_high": 0.1},
        {"penalty_sigma": 0.0},
        {"num_chunks": 0},
    ],
)
def test_a_wrong_setting_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)


@pytest.mark.parametrize(
    "stream, config, message",
    [
        (StreamConfig(num_steps=1), {}, "no other to learn from"),
        (StreamConfig(num_steps=4, first_steps=2), {}, "below stream.num_steps"),
        (StreamConfig(step_table=((1.0, 0.5),)), {}, "no step_table"),
        (StreamConfig(num_steps=2, first_steps=4), {"lists": "shared"}, "respaced"),
        (STREAM, {"layers": (7,)}, "blocks 0 to 1"),
    ],
)
def test_a_stream_that_does_not_fit_is_refused(stream, config, message):
    with pytest.raises(ValueError, match=message):
        wan_method(stream, **config)
    assert Method is ASD
