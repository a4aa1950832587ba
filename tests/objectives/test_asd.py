"""Adversarial self-distillation: who learns from whom, in which logit, and what the discriminator
finds.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from streamvid.core.process import add_noise
from streamvid.objectives.asd import ASD
from streamvid.rollout.sampler import generate_latents
from streamvid.rollout.schedule import StreamConfig
from streamvid.seeding import key_to_seed
from streamvid.settings.rollouts import Decision
from tests import fakes
from tests.fakes import Ar1Student, ClipStudent, ar1_setting, noise, prompt_batch, run_turn

STREAM = StreamConfig(num_steps=4, chunk_frames=2, shift=5.0)
FIRST = replace(STREAM, first_steps=4, num_steps=3)


def wan_setting(stream=STREAM, fake_knows_steps=False, **options):
    rollout = {"num_chunks": 2, "fake_knows_steps": fake_knows_steps}
    setting = fakes.wan_setting("asd", stream, rollout, **options)
    return setting, fakes.wan_batch(latents=noise(2, 4, 4, 4, 4, seed=2), offset=torch.zeros(2))


def drawn(setting, turn, step):
    """What a turn draws: n, and where it exits."""
    return setting.objective.draw(setting.step_of(turn, None, step))


def exit_index(draw):
    """Of a list of n steps, the one that carries gradient."""
    return int(draw.exit.place * draw.num_steps)


def step_with(setting, turn, n):
    """A step whose draw is n, with the exit at the last of the n."""
    draws = ((step, drawn(setting, turn, step)) for step in range(200))
    return next(step for step, draw in draws if draw.num_steps == n and draw.is_complete)


# ---- decisions


def test_the_discriminator_plays_before_the_student():
    setting, _ = wan_setting(fake_updates_per_student=3, discriminator_updates_per_cycle=2)
    assert [setting.turns(step) for step in range(3)] == [
        ("fake_score",),
        ("fake_score", "discriminator"),
        ("fake_score", "discriminator", "student"),
    ]


@pytest.mark.parametrize("real_clips", [False, True])
def test_every_number_of_steps_is_drawn_and_a_pair_has_one_step_more(real_clips):
    setting, _ = wan_setting(real_clips=real_clips)
    student, disc = (
        Counter(drawn(setting, turn, step).num_steps for step in range(400))
        for turn in ("student", "discriminator")
    )
    assert set(student) == {1, 2, 3, 4} and set(disc) == {1, 2, 3, 4} - (
        set() if real_clips else {4}
    )
    assert min(student.values()) > 60


def test_every_step_of_every_list_is_trained_and_what_is_compared_is_complete():
    """Below N only the last steps once carried gradient, so that the middle one of three, the
    better side of n = 2, never did.
    """
    setting, _ = wan_setting()
    exits = {turn: {n: set() for n in range(1, 5)} for turn in ("student", "discriminator")}
    for turn in exits:
        for step in range(300):
            draw = drawn(setting, turn, step)
            exits[turn][draw.num_steps].add(exit_index(draw))
            assert draw.is_complete == (exit_index(draw) == draw.num_steps - 1)
    assert exits["student"] == {1: {0}, 2: {0, 1}, 3: {0, 1, 2}, 4: {0, 1, 2, 3}}
    assert exits["discriminator"] == {1: {0}, 2: {1}, 3: {2}, 4: set()}


@pytest.mark.parametrize("turn, numbers", [("student", (1, 2, 3, 4)), ("discriminator", (1, 2, 3))])
def test_the_first_chunk_has_an_exit_of_its_own(turn, numbers):
    """Its four steps once got 6.7, 5.8, 6.0 and 81.6 percent of the student's updates."""
    setting, _ = wan_setting(replace(STREAM, first_steps=4))
    exits = [drawn(setting, turn, step) for step in range(1200)]
    decisions = [
        Decision(0, each.exit.place, 0, each.num_steps, each.exit.first_place) for each in exits
    ]
    share = Counter(decision.exit_step(0, 4) for decision in decisions)
    assert all(abs(share[step] / len(decisions) - 0.25) < 0.05 for step in range(4))
    later = {(d.num_steps, d.exit_step(1, d.num_steps)) for d in decisions}
    everything = {(n, step) for n in numbers for step in range(n)}
    assert later == (everything if turn == "student" else {(n, n - 1) for n in numbers})


# ---- what the fake score is told


def label_of(setting, batch, turn, step):
    """Which label's vector the fake score's turn trains; the loss is asked for nothing else."""
    labels = setting.networks()["fake_score"].step_labels.weight
    (grad,) = torch.autograd.grad(setting.loss(turn, batch, step)[0], labels)
    (label,) = grad.abs().sum(1).nonzero().flatten().tolist()
    return label


def test_each_step_of_each_number_of_steps_has_a_label_of_its_own():
    setting, batch = wan_setting(fake_knows_steps=True)
    of = {}
    for step in range(400):
        draw = drawn(setting, "fake_score", step)
        if (draw.num_steps, exit_index(draw)) not in of:
            label = label_of(setting, batch, "fake_score", step)
            of[draw.num_steps, exit_index(draw)] = label
    assert of == {(n, step): n * (n - 1) // 2 + step for n in range(1, 5) for step in range(n)}
    assert setting.networks()["fake_score"].step_labels.num_embeddings == 10
    assert not hasattr(wan_setting()[0].networks()["fake_score"], "step_labels")


def test_the_fake_score_learns_its_labels_and_the_discriminator_is_not_told():
    plain, batch = wan_setting()
    told, _ = wan_setting(fake_knows_steps=True)
    step = step_with(told, "fake_score", 3)
    losses = [setting.loss("fake_score", batch, step)[0] for setting in (plain, told)]
    assert torch.equal(*losses)  # labels begin at zero

    nn.init.normal_(told.networks()["fake_score"].step_labels.weight)
    differs = lambda turn, step: plain.loss(turn, batch, step)[0] != told.loss(turn, batch, step)[0]
    assert differs("fake_score", step)
    assert not differs("discriminator", step_with(told, "discriminator", 2))
    step = step_with(told, "student", 2)
    first, second = (setting.loss("student", batch, step)[1] for setting in (plain, told))
    assert first["adversarial"] == second["adversarial"]
    assert first["gradient_rms"] != second["gradient_rms"]


# ---- rollouts


def pair_of(setting, batch, n):
    """The clips of n steps and of n + 1 that a discriminator's turn compares."""
    step = setting.step_of("discriminator", batch, step_with(setting, "discriminator", n))
    with torch.no_grad():
        setting.objective.discriminator(step)
    return [x for _, x in step.rolled]


@pytest.mark.parametrize(
    "stream, n", [(STREAM, 1), (STREAM, 2), (STREAM, 3), (FIRST, 1), (FIRST, 2)]
)
def test_the_clips_of_a_pair_are_what_streaming_in_so_many_steps_gives(stream, n):
    setting, batch = wan_setting(stream)
    # the first chunk exits where it likes, and its prediction is then not its end
    first = stream.chunk_frames if stream.first_steps is not None else 0
    for clip, steps, role in zip(
        pair_of(setting, batch, n), (n, n + 1), ("student", "student_with_more_steps"), strict=True
    ):
        seeds = [key_to_seed(0, role, key) for key in batch["keys"]]
        streamed = generate_latents(
            setting.student,
            batch["cond"],
            replace(stream, num_steps=steps),
            seeds=seeds,
            latent_shape=(4, 4, 4),
            num_chunks=2,
        )
        assert torch.equal(clip[:, :, first:], streamed[:, :, first:])


def test_first_frame_enhancement_gives_the_first_chunk_its_steps_at_every_n():
    student = ClipStudent(noise(2, 1, 3, 1, 1))
    setting = gaussian_setting(student, FIRST)
    for n, expected in ((1, [0] * 4 + [1] + [2]), (2, [0] * 4 + [1] * 2 + [2] * 2)):
        student.calls.clear()
        pair_of(setting, prompt_batch(setting.teacher, range(2)), n)
        assert [chunk for chunk, _ in student.calls][: len(expected)] == expected


def test_a_shared_list_ends_after_n_of_its_steps():
    student = ClipStudent(noise(2, 1, 3, 1, 1))
    setting = gaussian_setting(student, STREAM, lists="shared")
    for n in (1, 2, 3):
        student.calls.clear()
        pair_of(setting, prompt_batch(setting.teacher, range(2)), n)
        chunks = [chunk for chunk, _ in student.calls]
        assert chunks == [k for steps in (n, n + 1) for k in range(3) for _ in range(steps)]


def test_the_better_clip_carries_no_gradient():
    student = ClipStudent(noise(2, 1, 3, 1, 1))
    setting = gaussian_setting(student, STREAM, discriminator=SlopeOfMean(3))
    batch = prompt_batch(setting.teacher, range(2))
    student.calls.clear()
    setting.loss("student", batch, step_with(setting, "student", 2))
    # the last step of each chunk of the worse clip
    assert sum(grad for _, grad in student.calls) == 3
    assert sum(not grad for _, grad in student.calls) == 3 + 9


# ---- who learns


def test_each_turn_trains_its_own_network():
    setting, batch = wan_setting(r1_weight=1.0, r2_weight=1.0)
    for turn in setting.networks():
        grads, numbers = run_turn(
            setting,
            batch,
            turn,
            step_with(setting, "discriminator" if turn == "discriminator" else "student", 2),
        )
        for name, of_network in grads.items():
            assert all((grad is not None) == (name == turn) for grad in of_network.values()), (
                turn,
                name,
            )
        assert all(g.isfinite().all() for g in grads[turn].values())


@pytest.mark.parametrize("logit", ["clip", "frame"])
def test_n_steps_move_the_nth_logit_alone(logit):
    setting, batch = wan_setting(logit=logit)
    for n in (1, 2, 3):
        grads, numbers = run_turn(
            setting, batch, "discriminator", step_with(setting, "discriminator", n)
        )
        last = [
            name for name in grads["discriminator"] if "join" in name and name.endswith("weight")
        ][-1]
        rows = grads["discriminator"][last].abs().sum(1)
        assert rows.nonzero().flatten().tolist() == [n - 1]
        assert f"gap_{n}" in numbers


def test_without_a_pair_or_a_weight_the_student_has_dmd_alone():
    setting, batch = wan_setting()
    _, numbers = run_turn(setting, batch, "student", step_with(setting, "student", 4))
    assert "adversarial" not in numbers
    step = step_with(setting, "student", 2)
    assert "adversarial" in run_turn(setting, batch, "student", step)[1]
    plain, _ = wan_setting(asd_weight=0.0)
    assert "adversarial" not in run_turn(plain, batch, "student", step)[1]


def test_real_clips_are_what_the_most_steps_are_compared_with():
    setting, batch = wan_setting(real_clips=True)
    step = setting.step_of("discriminator", batch, step_with(setting, "discriminator", 4))
    asked, logits = [], step.logits
    step.logits = lambda x_t, t, parts: asked.append((x_t, t)) or logits(x_t, t, parts)
    setting.objective.discriminator(step)
    (better, t), eps = asked[0], step.noise("asd_eps", "better")
    torch.testing.assert_close(better, add_noise(batch["latents"], eps, t))
    assert "adversarial" in run_turn(setting, batch, "student", step_with(setting, "student", 4))[1]
    del batch["latents"]
    with pytest.raises(ValueError, match="data.kind"):
        setting.loss("student", batch, step_with(setting, "student", 4))
    assert "clips" in setting.objective.needs and "clips" not in ASD().needs


# ---- what the discriminator finds


class SlopeOfMean(nn.Module):
    """D^n = w_n mean(x_t)."""

    def __init__(self, num_logits):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(num_logits))

    def forward(self, latents, cond):
        return latents.mean(dim=(1, 2, 3, 4))[:, None] * self.w


def gaussian_setting(student, stream, discriminator=None, frames=3, **options):
    return ar1_setting(
        "asd",
        student,
        stream=replace(stream, chunk_frames=1),
        frames=frames,
        discriminator=SlopeOfMean(stream.num_steps - 1) if discriminator is None else discriminator,
        **options,
    )


def one_frame_setting(**config):
    """x ~ N(1, 3) in one step and N(1 + sqrt(3) / 2, 3) in two, compared at t = 1/2."""
    student = Ar1Student(s=3**0.5, mean=1.0)
    stream = StreamConfig(num_steps=2, shift=1.0)
    options = {"noise_low": 0.5, "noise_high": 0.5001, "r1_weight": 0.0, "r2_weight": 0.0}
    return gaussian_setting(student, stream, frames=1, **{**options, **config}), student


def test_the_logit_converges_to_the_log_ratio_of_its_pair():
    """For equal variances: slope (1 - t) (mu_2 - mu_1) / ((1 - t)^2 s^2 + t^2)."""
    setting, _ = one_frame_setting()
    optimizer = torch.optim.Adam(setting.networks()["discriminator"].parameters(), 0.05)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 100)
        optimizer.zero_grad()
        keys = range(1000 * step, 1000 * step + 64)
        setting.loss("discriminator", prompt_batch(setting.teacher, keys), step)[0].backward()
        optimizer.step()
    assert setting.networks()["discriminator"].w[0].item() == pytest.approx(
        0.5 * (3**0.5 / 2) / 1.0, rel=0.15
    )
    assert (setting.networks()["discriminator"].w[1:] == 0).all()


def test_the_student_moves_towards_the_clips_of_more_steps():
    setting, student = one_frame_setting(asd_weight=1.0)
    batch = prompt_batch(setting.teacher, range(512))
    step = step_with(setting, "student", 1)
    grads = []
    for slope in (0.0, 0.433):
        setting.networks()["discriminator"].w.data.fill_(slope)
        student.zero_grad()
        setting.loss("student", batch, step)[0].backward()
        grads.append(student.mean.grad.item())
    half = -0.433 * 0.5 / 2  # d softplus(D(b) - D(a)) / d mean is about -(1/2) w (1 - t)
    assert grads[1] - grads[0] < 0 and grads[1] - grads[0] == pytest.approx(half, rel=0.5)


def test_a_penalty_flattens_the_logit():
    slopes = []
    for weight in (0.0, 600.0):
        setting, _ = one_frame_setting(r1_weight=weight, r2_weight=weight)
        optimizer = torch.optim.SGD(setting.networks()["discriminator"].parameters(), 0.2)
        for step in range(40):
            optimizer.zero_grad()
            keys = range(1000 * step, 1000 * step + 64)
            setting.loss("discriminator", prompt_batch(setting.teacher, keys), step)[0].backward()
            optimizer.step()
        slopes.append(setting.networks()["discriminator"].w[0].item())
    assert 0 < slopes[1] < 0.6 * slopes[0]


# ---- errors


@pytest.mark.parametrize(
    "wrong",
    [
        {"asd_weight": -1.0},
        {"discriminator_updates_per_cycle": 9},
        {"noise_low": 0.9, "noise_high": 0.1},
        {"penalty_sigma": 0.0},
        {"lists": "own"},
        {"logit": "token"},
    ],
)
def test_a_wrong_setting_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ASD(**wrong)


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
        wan_setting(stream, **config)
