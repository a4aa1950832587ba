"""AFD: who is compared with whom, what the update does where its answer is known, and that context
is the stream's.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from streamvid.core.times import step_times
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.objectives.afd import AFD, preferences
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.sampler import new_cache
from streamvid.rollout.schedule import StreamConfig
from streamvid.settings.video import VideoSetting
from streamvid.settings.video_step import Noising
from tests.fakes import ONE_STEP, TINY_WAN, Ar1Student, noise, run_turn

STREAM = StreamConfig(num_steps=2, chunk_frames=2)
STREAM_TIMES = step_times(2, 5.0)
NUMBERS = StreamConfig(num_steps=2, chunk_frames=1, shift=1.0)


class Slope(nn.Module):
    """D = w mean(x)."""

    def __init__(self, w=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(float(w)))

    def forward(self, latents, cond):
        return self.w * latents.mean(dim=(1, 2, 3, 4))[:, None]


def wan_setting(discriminator=None, stream=STREAM, **options):
    torch.manual_seed(0)
    student = CausalWanTransformer3DModel(**TINY_WAN)
    objective = AFD(**options)
    setting = VideoSetting(objective, student, stream, (4, 4, 4), discriminator=discriminator)
    return setting, student


def number_setting(student, slope, stream=ONE_STEP, **options):
    """Of clips of single numbers, with plain squares and no reference."""
    discriminator = slope if isinstance(slope, nn.Module) else Slope(slope)
    objective = AFD(self_normalized=False, lam_prior=0.0, **options)
    return VideoSetting(objective, student, stream, (1, 1, 1), discriminator=discriminator)


def wan_batch(num=2):
    return {
        "latents": noise(num, 4, 4, 4, 4, seed=2),
        "cond": noise(num, 5, 8, seed=1),
        "keys": list(range(7, 7 + num)),
        "offset": torch.zeros(num, dtype=torch.long),
    }


def number_batch(keys, mean=2.0):
    keys = list(keys)
    return {
        "latents": mean + noise(len(keys), 1, 1, 1, 1, seed=3),
        "cond": torch.zeros(len(keys), 1, 1),
        "keys": keys,
        "offset": torch.zeros(len(keys), dtype=torch.long),
    }


# ---- turns and rollouts


def test_the_discriminator_is_first_and_warms_up_alone():
    setting, _ = wan_setting(Slope(), discriminator_updates=2, student_start_step=3)
    assert setting.turns(2) == ("discriminator", "discriminator") and setting.turns(3) == (
        "discriminator",
        "discriminator",
        "student",
    )


@pytest.mark.parametrize("policy", ["nft", "gan"])
def test_each_turn_trains_its_own_network(policy):
    setting, _ = wan_setting(policy=policy)
    for turn in setting.networks():
        grads, numbers = run_turn(setting, wan_batch(), turn)
        trained = [g for g in grads[turn].values() if g is not None]
        assert (
            trained and all(g.isfinite().all() for g in trained) and any(g.any() for g in trained)
        )
        assert all(g is None for name, of in grads.items() if name != turn for g in of.values())
        assert {"r", "win_rate", "gap"} <= set(numbers)


def test_rollouts_are_the_old_policys():
    setting, student = wan_setting(Slope(1.0))
    before = setting.loss("discriminator", wan_batch(), 0)[1]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert setting.loss("discriminator", wan_batch(), 0)[1] == before
    setting.after_step("student", 0)
    assert setting.loss("discriminator", wan_batch(), 0)[1] != before


def test_the_old_policy_is_a_lagged_average_and_the_reference_stays():
    setting, student = wan_setting(Slope(), old_decay=0.75, refresh_every=2)
    old, start = setting.copies["lagged"], setting.copies["start"]
    first = [p.clone() for p in old.parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    setting.after_step("student", 0), setting.after_step("discriminator", 1)
    assert all(torch.equal(a, b) for a, b in zip(first, old.parameters()))
    setting.after_step("student", 1)
    for before, now, reference in zip(first, old.parameters(), start.parameters()):
        torch.testing.assert_close(now, before + 0.25)
        assert torch.equal(reference, before)
    state = setting.extra_state()
    assert len(state) == len(old.state_dict()) and all(name.startswith("lagged.") for name in state)
    next(iter(state.values())).zero_()  # live: a checkpoint restores in place
    assert not next(iter(old.state_dict().values())).any()


def test_times_are_the_streams_and_the_same_for_all_samples():
    setting, _ = wan_setting(Slope())
    draws = []
    for number in range(30):
        step = setting.step_of("student", wan_batch(), number)
        draws.append(step.new_noising(0, 2, "steps", 5.0, is_shared=True).times)
    assert all(len(draw) == 2 for draw in draws)
    drawn = {round(t, 6) for draw in draws for t in draw}
    assert drawn == {round(t, 6) for t in STREAM_TIMES}
    assert any(a != b for a, b in draws)


# ---- noised chunks


@pytest.mark.parametrize("window", [None, 4])
def test_a_chunk_is_noised_over_the_clean_ones_before_it_as_it_is_streamed(window):
    stream = StreamConfig(num_steps=2, chunk_frames=2, window_frames=window)
    setting, student = wan_setting(Slope(), stream)
    batch = wan_batch()
    clips, cond, times = noise(2, 4, 6, 4, 4, seed=5), batch["cond"], [1.0, 0.5, 0.8]
    with torch.no_grad():
        step, noising = setting.step_of("student", batch, 0), Noising(times, [1, 2], cond)
        out = step.noise_chunks("student", clips, noising, slice(None))
        cache = new_cache(student, stream, 2, (4, 4, 4))
        for k, t in enumerate(times):
            rows, chunk = slice(2 * k, 2 * k + 2), clips[:, :, 2 * k : 2 * k + 2]
            eps = KeyedNoise([1, 2]).draw(k, 0, (4, 2, 4, 4), clips.device, clips.dtype)
            torch.testing.assert_close(out.x_t[rows], (1 - t) * chunk + t * eps)
            torch.testing.assert_close(out.v_target[rows], eps - chunk)
            v = student(out.x_t[rows], torch.full((2,), 1000 * t), cond, cache=cache).sample
            torch.testing.assert_close(out.v[rows], v, rtol=1e-4, atol=1e-5)
            student.commit(chunk, torch.zeros(2), cond, cache)
    assert out.t.tolist() == pytest.approx([1.0, 1.0, 0.5, 0.5, 0.8, 0.8])


def test_networks_asked_with_one_noise_see_one_state():
    setting, student = wan_setting(Slope())
    batch, clips = wan_batch(), noise(2, 4, 4, 4, 4)
    with torch.no_grad():
        student.proj_out.weight.add_(0.1)
        step = setting.step_of("student", batch, 0)
        noising = Noising([0.9, 0.4], [1, 2], batch["cond"])
        one, other = (
            step.noise_chunks(name, clips, noising, slice(None)) for name in ("student", "lagged")
        )
    assert torch.equal(one.x_t, other.x_t) and torch.equal(one.v_target, other.v_target)
    assert not torch.equal(one.v, other.v)


@torch.no_grad()
@pytest.mark.parametrize("shared_noise", [True, False])
def test_a_prompts_clips_are_side_by_side_and_know_no_other_prompt(shared_noise):
    setting, _ = wan_setting(Slope())
    both = wan_batch()
    second = {name: values[1:] for name, values in both.items()}
    steps = [setting.step_of("student", batch, 0) for batch in (both, second)]
    of_both, alone = (step.policy_samples("lagged", 3) for step in steps)
    torch.testing.assert_close(of_both[3:], alone)
    of_both, alone = (step.new_noising(0, 3, "steps", 5.0, shared_noise) for step in steps)
    assert of_both.seeds[3:] == alone.seeds and torch.equal(of_both.cond[3:], alone.cond)
    assert len(set(alone.seeds)) == (1 if shared_noise else 3)


# ---- the update


@pytest.mark.parametrize("shared_noise", [True, False])
def test_noise_that_a_prompts_clips_share_is_not_in_the_update(shared_noise):
    """In one step the gradient to the student's mean is -2 E A (x + v_old - eps), of which -2 E A x
    is left.
    """
    student, batch = Ar1Student(s=1.5, mean=0.5), number_batch(range(5))
    setting = number_setting(student, 0.3, group_size=4, shared_noise=shared_noise)
    grads, _ = run_turn(setting, batch, "student")
    with torch.no_grad():
        x = setting.step_of("student", batch, 0).policy_samples("lagged", 4)
    x = x.view(5, 4)
    advantage = 0.3 * (x - x.mean(1, keepdim=True))
    exact = torch.allclose(grads["student"]["mean"], -2 * (advantage * x).mean(), rtol=1e-4)
    assert exact == shared_noise


@pytest.mark.parametrize("self_normalized", [False, True])
def test_a_discriminator_that_sees_no_difference_moves_nothing(self_normalized):
    """At r = 1/2 the two branches pull against each other with one force."""
    setting, _ = wan_setting(Slope(0.0), self_normalized=self_normalized)
    grads, numbers = run_turn(setting, wan_batch(), "student")
    assert (
        all(g.abs().max() < 1e-7 for g in grads["student"].values()) and numbers["weight_std"] == 0
    )


def test_away_from_the_old_policy_it_is_pulled_back():
    setting, student = wan_setting(Slope(0.0), lam_prior=0.0)
    with torch.no_grad():
        student.proj_out.weight.add_(0.05 * noise(*student.proj_out.weight.shape))
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    gaps = []
    for _ in range(25):
        loss, numbers = setting.loss("student", wan_batch(), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gaps.append(numbers["velocity_gap"])
    assert gaps[-1] < 0.5 * gaps[0]


def test_the_student_moves_where_the_discriminator_says():
    """The mean follows the sign of the slope; a clip above its group's mean draws, one below it
    pushes.
    """
    for slope, sign in ((3.0, -1), (-3.0, 1)):
        student = Ar1Student(mean=0.0, s=1.0)
        setting = number_setting(student, slope, NUMBERS, group_size=8, beta=1.0)
        grads, _ = run_turn(setting, number_batch(range(64)), "student")
        assert grads["student"]["mean"].sign() == sign


def update_of_mean(control, slope=3.0, prompts=64, steps=1):
    """The mean update of the student's mean, over decisions."""
    student, total = Ar1Student(mean=0.0, s=1.0), 0.0
    setting = number_setting(student, slope, NUMBERS, group_size=2, beta=1.0, control=control)
    for step in range(steps):
        batch = number_batch(range(1000 * step, 1000 * step + prompts))
        total += run_turn(setting, batch, "student", step)[0]["student"]["mean"].item() / steps
    return total


def test_a_negated_reward_moves_the_other_way_and_one_that_is_independent_of_the_clips_nowhere():
    reward, negated = update_of_mean("none"), update_of_mean("negated")
    assert reward < 0 < negated and negated == pytest.approx(-reward, rel=0.05)
    assert abs(update_of_mean("independent", steps=12)) < 0.2 * abs(reward)


def advantages_of(setting, logits, number=0):
    """What a student's turn makes of the logits of its samples."""
    step = setting.step_of("student", wan_batch(), number)
    return setting.objective._advantages(step, torch.tensor(logits)[:, None])[:, 0]


def test_advantages_of_another_prompt_are_the_same_numbers():
    setting, _ = wan_setting(Slope(), control="independent", baseline="batch")
    logits = [1.0, 2.0, 3.0, 4.0, 5.0, 9.0]  # -3, -2, -1, 0, 1 and 5 from their mean
    moved = [advantages_of(setting, logits, number) for number in range(20)]
    assert all(row.abs().tolist() == [1, 5, 3, 2, 1, 0] for row in moved)
    signs = {tuple(row[[0, 2, 4]].sign().tolist()) for row in moved}
    assert signs >= {(1, -1, -1), (-1, 1, 1)} and len(signs) == 8


def test_a_discriminator_of_no_updates_stays_as_its_seed_makes_it():
    heads = [
        wan_setting(discriminator_updates=0, discriminator_seed=seed)[0] for seed in (None, 0, 1)
    ]
    assert heads[0].turns(0) == ("student",)
    weights = [
        torch.cat([p.flatten() for p in each.networks()["discriminator"].parameters()])
        for each in heads
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_it_finds_the_teachers_mean_from_clips_alone():
    """Teacher N(2, 1), student N(0, 1): logistic regression for D, the policy step for the
    student.
    """
    student = Ar1Student(mean=0.0, s=1.0)
    options = {"group_size": 4, "beta": 0.5, "old_decay": 0.5, "r1_weight": 0.0, "r2_weight": 0.0}
    setting = number_setting(student, 0.0, **options)
    optimizers = {"student": torch.optim.SGD([student.mean], 0.02)}
    optimizers["discriminator"] = torch.optim.Adam(
        setting.networks()["discriminator"].parameters(), 0.05
    )
    means = []
    for step in range(300):
        for turn in setting.turns(step):
            batch = number_batch(range(100 * step, 100 * step + 16))
            batch["latents"] = 2.0 + noise(16, 1, 1, 1, 1, seed=1000 + step)
            optimizers[turn].zero_grad()
            setting.loss(turn, batch, step)[0].backward()
            optimizers[turn].step()
            setting.after_step(turn, step)
        means.append(student.mean.item())
    assert sum(means[-100:]) / 100 == pytest.approx(2.0, abs=0.3)


def test_advantages_compare_clips_of_one_prompt():
    logits = [1.0, 3.0, 10.0, 20.0]
    setting, _ = wan_setting(Slope(), group_size=2)
    assert advantages_of(setting, logits).tolist() == [-1, 1, -5, 5]
    setting, _ = wan_setting(Slope(), group_size=2, baseline="batch")
    assert advantages_of(setting, logits).tolist() == [-7.5, -5.5, 1.5, 11.5]


@pytest.mark.parametrize(
    "options", [{}, {"logit": "token"}, {"logit": "chunk", "noisings": 2, "normalize": "std"}]
)
def test_learning_from_some_clips_at_a_time_is_the_same_update(options):
    """6 clips as 4 and 2: the same gradient, loss and numbers, each part differentiated before the
    next is made.
    """
    whole, some = (
        wan_setting(group_size=3, clips_per_pass=size, **options)[0] for size in (None, 4)
    )
    expected, numbers = run_turn(whole, wan_batch(), "student")
    assert some.loss("student", wan_batch(), 0)[1] == pytest.approx(numbers, rel=1e-5)
    for part, _ in some.losses("student", wan_batch(), 0):
        part.backward()
    grads = torch.cat([p.grad.flatten() for p in some.student.parameters()])
    goal = torch.cat([grad.flatten() for grad in expected["student"].values()])
    assert (grads - goal).norm() < 1e-5 * goal.norm()


def test_a_part_is_made_when_the_one_before_has_been_differentiated(monkeypatch):
    """Made ahead, two of them would have their activations in memory: what the parts are there to
    spare.
    """
    setting, _ = wan_setting(group_size=3, clips_per_pass=2)
    made = []
    update = type(setting.objective)._update

    def watched(objective, step, x, noising, rows, r):
        made.append(rows.start)
        return update(objective, step, x, noising, rows, r)

    monkeypatch.setattr(type(setting.objective), "_update", watched)
    numbers = []
    for count, (_, of_part) in enumerate(setting.losses("student", wan_batch(), 0), 1):
        assert len(made) == count
        numbers.append(of_part)
    assert made == [0, 2, 4] and not any(numbers[:-1]) and "nft" in numbers[-1]


def test_preferences_are_of_pairs():
    numbers = preferences(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [2.0]]))
    assert numbers["win_rate"] == 0.5 and numbers["gap"] == 0.5


def test_a_logit_a_chunk_gives_each_its_own_advantage():
    setting, _ = wan_setting(logit="chunk", group_size=2)
    _, numbers = run_turn(setting, wan_batch(), "student")
    assert (
        setting.networks()["discriminator"](wan_batch()["latents"], wan_batch()["cond"]).shape
        == (2, 2)
        and numbers["weight_std"] >= 0
    )


def test_a_logit_a_token_weighs_its_own_patch():
    setting, _ = wan_setting(logit="token", group_size=2)
    batch = wan_batch()
    assert setting.networks()["discriminator"](batch["latents"], batch["cond"]).shape == (2, 16)
    r = torch.arange(32.0).view(2, 16)
    step = setting.step_of("student", batch, 0)
    weights = step.chunk_weights(r, batch["latents"], per_token=True)
    assert weights.shape == (4, 1, 2, 4, 4)
    for n, frame, y, x in ((0, 0, 0, 0), (1, 1, 3, 0), (0, 2, 1, 2), (1, 3, 2, 3)):
        assert (
            weights[2 * (frame // 2) + n, 0, frame % 2, y, x]
            == r[n, 4 * frame + 2 * (y // 2) + x // 2]
        )
    grads, _ = run_turn(setting, batch, "student")
    assert any(g.any() for g in grads["student"].values() if g is not None)


class Slopes(nn.Module):
    """D of a token = w x, and of the clip their sum: the log ratio of clips whose numbers are
    independent, whole and in parts.
    """

    def __init__(self, w, per_token):
        super().__init__()
        self.w, self.per_token = nn.Parameter(torch.tensor(w)), per_token

    def forward(self, latents, cond):
        logits = self.w * latents.flatten(1)
        return logits if self.per_token else logits.sum(1, keepdim=True)


def test_advantages_of_tokens_say_the_same_with_less_noise():
    """Clips of 16 independent numbers of variance s^2: the gradient to their mean is -2 w s^2 (1 -
    1/G) either way, but what a token is weighed by is a sixteenth of what the clip is.
    """
    slopes = {}
    for logit in ("clip", "token"):
        student = Ar1Student(s=1.5, mean=0.0)
        student.config = SimpleNamespace(patch_size=(1, 1, 1))
        discriminator = Slopes(0.02, logit == "token")
        stream = StreamConfig(num_steps=1, chunk_frames=16)
        setting = number_setting(student, discriminator, stream, group_size=4, logit=logit)
        own = []
        for step in range(60):
            batch = {
                **number_batch(range(8 * step, 8 * step + 8)),
                "latents": torch.zeros(8, 1, 16, 1, 1),
            }
            own.append(run_turn(setting, batch, "student")[0]["student"]["mean"])
        slopes[logit] = torch.stack(own)
    expected = -2 * 0.02 * 1.5**2 * (1 - 1 / 4)
    for own in slopes.values():
        assert (own.mean() - expected).abs() < 4 * own.std() / len(own) ** 0.5
    assert slopes["token"].var() < slopes["clip"].var() / 4


# ---- errors


@pytest.mark.parametrize(
    "wrong",
    [
        {"group_size": 0},
        {"beta": 0.0},
        {"old_decay": 1.0},
        {"lam_prior": -1.0},
        {"advantage_clip": 0.0},
        {"group_size": 1},
        {"clips_per_pass": 0},
        {"control": "random"},
        {"discriminator_updates": -1},
    ],
)
def test_a_wrong_setting_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AFD(**wrong)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="set 'autoregressive'"):
        wan_setting(Slope(), StreamConfig(num_steps=2, chunk_frames=2, order="rolling"))
    with pytest.raises(ValueError, match="set 'clean'"):
        wan_setting(Slope(), StreamConfig(num_steps=2, chunk_frames=2, commit="reuse"))
    setting, _ = wan_setting(Slope())
    batch = wan_batch()
    with pytest.raises(ValueError, match="does not divide"):
        setting.loss("student", {**batch, "latents": batch["latents"][:, :, :3]}, 0)
    with pytest.raises(ValueError, match="window_stride=null"):
        setting.loss("student", {**batch, "offset": torch.ones(2, dtype=torch.long)}, 0)
    with pytest.raises(ValueError, match="turn='critic'"):
        setting.loss("critic", batch, 0)
