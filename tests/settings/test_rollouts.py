"""Rollouts in training: who shares which draws, long ones, and context as a stream makes it.

Context in training is made as it is made in a stream: by the same passes, from the same states, at
the same times. A chunk once became context from its random exit, so that with reused keys a quarter
of the first chunk's were those of pure noise, where a stream writes all of them at the last time of
its list.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from streamvid.objectives.dmd import DMD
from streamvid.rollout.sampler import generate_latents
from streamvid.rollout.schedule import StreamConfig
from streamvid.seeding import key_to_seed
from streamvid.settings.rollouts import RolloutConfig
from streamvid.settings.video import VideoSetting
from tests.fakes import (
    FOUR_STEPS,
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
    step_where,
    wan_batch,
    wan_setting,
)

CHUNKS, KEYS = 3, [3, 4]
RHO = 0.8


# ---- decisions and noise


def test_all_processes_end_their_rollouts_at_the_same_step():
    setting = ar1_setting("dmd", Ar1Student(), stream=FOUR_STEPS)
    halves = [prompt_batch(setting.teacher, keys) for keys in (range(3), range(3, 6))]
    exits = [
        [setting.loss("student", half, step)[1]["exit_index"] for half in halves]
        for step in range(30)
    ]
    assert all(first == second for first, second in exits)
    assert {first for first, _ in exits} == {0, 1, 2, 3}


def test_each_part_of_an_accumulated_batch_has_an_exit_of_its_own():
    setting = ar1_setting("dmd", Ar1Student(), stream=FOUR_STEPS)
    batch = prompt_batch(setting.teacher, range(3))
    parts = [setting.step_of("student", {**batch, "micro": micro}, 0) for micro in range(30)]
    assert {part.decide().exit_index for part in parts} == {0, 1, 2, 3}


def test_a_sample_does_not_depend_on_the_slice_that_it_comes_in():
    stream = StreamConfig(num_steps=4, chunk_frames=1, context_t=0.1)
    fake = ScoreOf(ar1_teacher(RHO, CHUNKS))
    setting = ar1_setting("dmd", Ar1Student(), fake, stream)
    for turn in ("student", "fake_score"):
        fake.inputs.clear()
        for keys in (range(6), range(2), range(2, 6)):
            setting.loss(turn, prompt_batch(setting.teacher, keys), 3)
        (whole, times), *parts = fake.inputs
        assert torch.equal(whole, torch.cat([x_t for x_t, _ in parts]))
        assert torch.equal(times, torch.cat([t for _, t in parts]))


def test_other_keys_draw_other_clips():
    fake = ScoreOf(ar1_teacher(RHO, CHUNKS))
    setting = ar1_setting("dmd", Ar1Student(), fake)
    for keys in (range(6), range(6, 12)):
        setting.loss("fake_score", prompt_batch(setting.teacher, keys), 0)
    (first, _), (second, _) = fake.inputs
    assert not torch.isclose(first, second).any()


def test_each_draw_of_a_turn_is_another_and_a_named_one_is_the_same_again():
    setting = ar1_setting("dmd", Ar1Student())
    batch = prompt_batch(setting.teacher, range(4))
    step = setting.step_of("student", batch, 0)
    for draw in (step.noise, step.uniform):
        assert not torch.isclose(draw(), draw()).any()
        assert torch.equal(draw("one"), draw("one"))
        assert not torch.isclose(draw("one"), draw("other")).any()
    assert step.noise().shape == (4, 1, CHUNKS, 1, 1) and step.uniform().shape == (4,)
    assert not torch.isclose(step.times(), step.times()).any()
    assert len({step.choose(1000) for _ in range(4)}) > 1 and step.chance() != step.chance()


def test_samples_of_one_turn_have_noise_of_their_own():
    setting = ar1_setting("dmd", Ar1Student())
    step = setting.step_of("student", prompt_batch(setting.teacher, range(4)), 0)
    assert not torch.isclose(step.sample().x, step.sample().x).any()


def test_what_a_cost_depends_on_is_what_processes_share():
    setting = ar1_setting("dmd", Ar1Student(), stream=FOUR_STEPS)
    for step in range(20):
        decision = setting.step_of("student", None, step).decide()
        assert setting.choices("student", step)[0] == decision.exit_index
    assert len({setting.choices("student", step) for step in range(40)}) == 4


def test_exit_last_always_runs_the_whole_list():
    setting = ar1_setting("dmd", Ar1Student(), stream=FOUR_STEPS, rollout={"exit": "last"})
    exits = {setting.step_of("student", None, step).decide().exit_index for step in range(20)}
    assert exits == {3}


def test_an_exit_that_the_objective_names_is_where_gradient_flows():
    student = ClipStudent(noise(2, 1, CHUNKS, 1, 1))
    setting = ar1_setting("dmd", student, stream=FOUR_STEPS, rollout={"context": "exit"})
    step = setting.step_of("student", prompt_batch(setting.teacher, KEYS), 0)
    sample = step.sample(exit_index=2)
    assert student.calls == [(chunk, i == 2) for chunk in range(CHUNKS) for i in range(3)]
    assert sample.index == 2 and sample.t.tolist() == pytest.approx([step.step_time(2)] * 2)


def test_a_group_has_a_prompts_samples_side_by_side_each_with_noise_of_its_own():
    setting = ar1_setting("dmd", Ar1Student(), rollout={"group_size": 3})
    batch = {**prompt_batch(setting.teacher, KEYS), "cond": noise(2, 5, 8)}
    step = setting.step_of("student", batch, 0)
    x = step.sample().x
    assert step.group.tolist() == [0, 0, 0, 1, 1, 1] and len(x) == 6
    assert torch.equal(step.cond, batch["cond"][step.group])
    assert len({row.flatten()[0].item() for row in x}) == 6
    alone = setting.step_of("student", {"cond": batch["cond"][1:], "keys": KEYS[1:]}, 0)
    assert torch.equal(alone.sample().x, x[3:])


# ---- long rollouts


def long_setting(student, fake=None, **options):
    """In its codec an image's latent is minus its frame's in a clip."""
    names = set(RolloutConfig.__dataclass_fields__) & set(options)
    rollout = {"rollout_chunks": 8, **{name: options.pop(name) for name in names}}
    as_image = lambda latents: -latents[:, :, -1:]
    return ar1_setting("dmd", student, fake, rollout=rollout, as_image=as_image, **options)


@pytest.mark.parametrize("window", ["random", "last"])
def test_a_long_rollout_is_judged_and_trained_on_a_part_of_the_teachers_length(window):
    student = ClipStudent(noise(2, 1, 8, 1, 1))
    fake = ScoreOf(ar1_teacher(0.1, CHUNKS))
    setting = long_setting(student, fake, window=window)
    firsts = set()
    for step in range(40):
        student.calls.clear(), fake.inputs.clear()
        student.zero_grad(set_to_none=True)
        batch = prompt_batch(setting.teacher, range(2))
        (grad,) = gradients(setting, "student", batch, step).values()
        first = setting.step_of("student", None, step).decide().first_chunk
        firsts.add(first)
        assert fake.inputs[0][0].shape[2] == CHUNKS
        assert student.calls == [(chunk, chunk >= first) for chunk in range(first + CHUNKS)]
        # not the first chunk of a part from the middle
        trained = range(first + (1 if first else 0), first + CHUNKS)
        assert grad.abs().sum((0, 1, 3, 4)).nonzero().flatten().tolist() == list(trained)
    assert firsts == (set(range(6)) if window == "random" else {5})


def test_a_part_from_the_middle_begins_with_an_image_and_one_from_the_start_is_left_alone():
    """The teacher knows no clip whose first latent is not an image's: its loss there was .787 where
    it has .123.
    """
    clip = noise(2, 1, 8, 1, 1)
    setting = long_setting(ClipStudent(clip))
    batch = prompt_batch(setting.teacher, range(2))
    for first in range(6):
        step = step_where(setting, "student", lambda decision: decision.first_chunk == first)
        part = clip[:, :, first : first + CHUNKS].clone()
        part[:, :, 0] *= -1 if first else 1
        x = rolled_out(setting, batch, step).detach()
        torch.testing.assert_close(x, part, rtol=0, atol=1e-6)


def test_parts_from_the_middle_are_judged_where_the_teacher_knows_them():
    fake = ScoreOf(ar1_teacher(0.1, CHUNKS))
    setting = long_setting(ClipStudent(noise(6, 1, 8, 1, 1)), fake, window_high=0.5)
    times = {True: [], False: []}
    for step in range(30):
        for turn in ("student", "fake_score"):
            fake.inputs.clear()
            batch = prompt_batch(setting.teacher, range(6 * step, 6 * step + 6))
            setting.loss(turn, batch, step)
            is_cut = setting.step_of(turn, None, step).decide().first_chunk > 0
            times[is_cut].append(fake.inputs[0][1].max().item())
    assert max(times[True]) <= 0.5 and max(times[False]) > 0.9


def test_a_long_rollout_needs_images_and_two_chunks():
    with pytest.raises(ValueError, match="needs as_image"):
        ar1_setting("dmd", Ar1Student(), rollout={"rollout_chunks": 8})
    with pytest.raises(ValueError, match="judge at least 2"):
        RolloutConfig(num_chunks=1, rollout_chunks=2)
    with pytest.raises(ValueError, match="window_high"):
        RolloutConfig(window_high=1.5)


# ---- the causal Wan


class Probed(nn.Module):
    """Adds a number of its own to what a student is given of each chunk."""

    def __init__(self, student):
        super().__init__()
        self.inner = student
        self.config, self.commit, self.new_cache = student.config, student.commit, student.new_cache
        self.probes = nn.Parameter(torch.zeros(3))

    def forward(self, hidden_states, timestep, cond, cache):
        chunk = cache.num_committed_frames // 2
        return self.inner(hidden_states + self.probes[chunk], timestep, cond, cache=cache)


class DiffersInTheSecondChunk(nn.Module):
    """A fake score that is off there."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *args, **options):
        velocity = self.network(*args, **options)[0]
        velocity[:, :, 2:4] += 1
        return (velocity,)


def test_no_gradient_passes_from_a_chunk_to_the_ones_before_it():
    """It would, if keys and values in the cache kept their graph."""
    stream = StreamConfig(num_steps=2, chunk_frames=2, window_frames=4, sink_frames=1)
    options = {"guidance_scale": 1.0, "normalizer": "none"}
    setting = wan_setting("dmd", stream, {"num_chunks": 3}, Probed, **options)
    setting.trained["fake_score"] = DiffersInTheSecondChunk(setting.networks()["fake_score"])
    probes = gradients(setting, "student", wan_batch())["probes"]
    assert probes[0] == 0 and probes[1] != 0 and probes[2] == 0


@pytest.mark.parametrize(
    "order", [{"order": "full_sequence", "commit": "none"}, {"order": "rolling"}]
)
def test_other_orders_train(order):
    stream = StreamConfig(num_steps=2, chunk_frames=2, **order)
    setting = wan_setting("dmd", stream, {"num_chunks": 3, "exit": "last"})
    grads = gradients(setting, "student", wan_batch())
    assert all(grad is not None for grad in grads.values())


def test_a_single_chunk_of_a_single_frame_trains():
    setting = wan_setting("dmd", ONE_STEP, {"num_chunks": 1})
    grads = gradients(setting, "student", wan_batch())
    assert all(grad.isfinite().all() for grad in grads.values())


# ---- context

TABLE = ((1.0, 0.95, 0.8, 0.47), (1.0, 0.95, 0.47), (1.0, 0.47))
STREAMS = {
    "clean": StreamConfig(num_steps=4, chunk_frames=1),
    "noised": StreamConfig(num_steps=4, chunk_frames=1, context_t=0.2),
    "reused": StreamConfig(num_steps=4, chunk_frames=1, commit="reuse"),
    "euler": StreamConfig(num_steps=3, chunk_frames=1, stepper="euler"),
    "first steps": StreamConfig(num_steps=2, first_steps=4, chunk_frames=1),
    "table": StreamConfig(step_table=TABLE, chunk_frames=1),
    "table, reused": StreamConfig(step_table=TABLE, chunk_frames=1, commit="reuse"),
}


class Writes(Ar1Student):
    """Keeps what is written to its context: (the chunk's number, time, state), whichever way it is
    written.
    """

    def __init__(self):
        super().__init__(a=0.4, b=0.7, s=1.1)
        self.written = []
        self.calls = 0

    def forward(self, hidden_states, timestep, cond, cache, return_kv=False):
        self.calls += 1
        output = super().forward(hidden_states, timestep, cond, cache)
        output.kv = torch.cat(
            [timestep.reshape(1, -1), hidden_states.flatten()[None]], dim=1
        ).detach()
        return output

    def commit(self, latents, timestep, cond, cache):
        self.written.append((len(cache), timestep[0].item(), latents.clone()))
        super().commit(latents, timestep, cond, cache)

    def new_cache(self, batch_size, height, width, **policy):
        self.written.clear()
        return _Cache(self.written)


class _Cache(list):
    def __init__(self, written):
        super().__init__()
        self.written = written

    def append(self, entry):
        if entry.ndim == 2:  # keys and values of a denoising pass
            time, state = entry[0, 0].item(), entry[:, len(KEYS) :]
            self.written.append((len(self), time, state.clone()))
            entry = state.reshape(len(KEYS), 1, 1, 1, 1)
        super().append(entry)


def streamed_context(student, stream, seeds, cond):
    with torch.no_grad():
        generate_latents(
            student, cond, stream, seeds=seeds, latent_shape=(1, 1, 1), num_chunks=CHUNKS
        )
    return list(student.written)


def assert_same(context, streamed):
    assert len(streamed) == CHUNKS - 1
    assert [entry[:2] for entry in context] == [entry[:2] for entry in streamed]
    for (_, _, state), (_, _, expected) in zip(context, streamed):
        assert torch.equal(state, expected)


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("name", ["dmd", "diagonal"])
def test_matching_writes_the_context_of_a_stream_at_every_exit(name, stream):
    student = Writes()
    setting = ar1_setting(name, student, stream=stream)
    batch = prompt_batch(setting.teacher, KEYS)
    seeds = [key_to_seed(0, "student", key) for key in KEYS]
    streamed = streamed_context(student, stream, seeds, batch["cond"])
    exits = set()
    for step in range(12):
        for turn in setting.turns(1):
            exits.add(setting.step_of(turn, None, step).decide().exit_index)
            setting.loss(turn, batch, step)
            assert_same(student.written, streamed)
    assert exits == set(range(setting.num_steps))


@pytest.mark.parametrize("first_steps", [None, 4])
def test_asd_writes_the_context_of_a_stream_of_n_steps(first_steps):
    student = Writes()
    stream = StreamConfig(num_steps=4, chunk_frames=1, first_steps=first_steps)
    setting = ar1_setting(
        "asd", student, stream=stream, asd_weight=0.0, discriminator=nn.Linear(1, 1)
    )
    batch = prompt_batch(setting.teacher, KEYS)
    seeds = [key_to_seed(0, "student", key) for key in KEYS]
    drawn = Counter()
    for step in range(40):
        n = setting.objective.draw(setting.step_of("student", None, step)).num_steps
        drawn[n] += 1
        setting.loss("student", batch, step)
        written = list(student.written)
        of_n_steps = replace(stream, num_steps=n)
        assert_same(written, streamed_context(student, of_n_steps, seeds, batch["cond"]))
    assert set(drawn) == {1, 2, 3, 4}


def test_a_gan_on_own_clips_writes_the_context_of_a_stream():
    student, stream = Writes(), STREAMS["reused"]
    setting = ar1_setting(
        "afd", student, stream=stream, policy="gan", discriminator=nn.Linear(1, 1)
    )
    batch = {
        "latents": noise(len(KEYS), 1, CHUNKS, 1, 1),
        "cond": torch.zeros(len(KEYS), 1, 1),
        "keys": KEYS,
        "offset": torch.zeros(len(KEYS)),
    }
    seeds = [key_to_seed(0, "rollout", key, 0) for key in KEYS]
    streamed = streamed_context(student, stream, seeds, batch["cond"])
    for number in range(8):
        step = setting.step_of("student", batch, number)
        step.policy_samples("student", at_random_exit=True)
        assert_same(student.written, streamed)


def test_the_context_of_the_exit_costs_fewer_forwards_and_is_not_that_of_a_stream():
    student, forwards = Writes(), {}
    for context in ("streamed", "exit"):
        setting = ar1_setting(
            "dmd", student, stream=STREAMS["reused"], rollout={"context": context}
        )
        batch = prompt_batch(setting.teacher, KEYS)
        step = step_where(setting, "student", lambda decision: decision.exit_index == 0)
        student.calls = 0
        rolled_out(setting, batch, step)
        forwards[context] = student.calls
    assert forwards == {"streamed": 4 + 4 + 1, "exit": 3}
    assert [time for _, time, _ in student.written] == [1000.0, 1000.0]


# ---- errors


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_chunks": 0},
        {"group_size": 0},
        {"rollout_chunks": 3},
        {"exit": "first"},
        {"window": "first"},
        {"context": "clean"},
        {"window_high": 0.0},
    ],
)
def test_a_wrong_setting_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RolloutConfig(**wrong)


def test_networks_that_do_not_fit_are_refused():
    teacher = ar1_teacher(RHO, CHUNKS)
    build = lambda fake=None: VideoSetting(
        DMD(), Ar1Student(), ONE_STEP, (1, 1, 1), teacher, fake_score=fake
    )
    with pytest.raises(ValueError, match="no network to start the fake score from"):
        build()
    teacher.uncond = None
    with pytest.raises(ValueError, match="needs the teacher's uncond"):
        build(ScoreOf(teacher))
    teacher.provides = frozenset({"clips"})
    with pytest.raises(ValueError, match="dmd needs .* score, but AnalyticTeacher provides only"):
        build(ScoreOf(teacher))
    with pytest.raises(ValueError, match="exit='last'"):
        ar1_setting("dmd", Ar1Student(), stream=replace(FOUR_STEPS, order="rolling"))


@pytest.mark.parametrize(
    "name, missing", [("pso", "a reward"), ("distillation_dpo", "a reward and a second fake score")]
)
def test_an_objective_that_needs_what_clips_lack_is_refused(name, missing):
    with pytest.raises(ValueError) as error:
        ar1_setting(name, Ar1Student(), rollout={"group_size": 2})
    assert f"objective={name} needs {missing}, which clips do not have" in str(error.value)


def test_an_unknown_turn_is_refused():
    setting = ar1_setting("dmd", Ar1Student())
    with pytest.raises(ValueError, match="turn='teacher', expected one of student, fake_score"):
        setting.loss("teacher", prompt_batch(setting.teacher, KEYS), 0)
