"""What a step over clips asks its networks, which frames it counts, and how copies follow."""

import pytest
import torch
from torch import nn

from streamvid.rollout.sampler import new_cache
from streamvid.rollout.schedule import StreamConfig
from tests.fakes import (
    Ar1Student,
    ClipStudent,
    ScoreOf,
    ar1_setting,
    ar1_teacher,
    noise,
    prompt_batch,
    step_where,
    wan_batch,
    wan_setting,
)

CHUNKS, CHUNK_FRAMES = 3, 2
STREAM = StreamConfig(num_steps=2, chunk_frames=CHUNK_FRAMES, stepper="jump")


@torch.no_grad()
def moved_wan_setting(name, **options):
    """With weights that are not as they begin, so that times, targets and prompts matter."""
    setting = wan_setting(name, STREAM, {"num_chunks": CHUNKS}, jumps=True, **options)
    for number, network in enumerate(setting.networks().values()):
        for parameter in network.parameters():
            parameter += 0.1 * noise(*parameter.shape, seed=number)
    return setting


# ---- networks


@torch.no_grad()
def test_the_mean_velocity_of_a_clip_is_what_a_stream_of_it_would_say():
    """Chunk by chunk: over the clean chunks before it, at its time, told its target."""
    setting = moved_wan_setting("ctm")
    student, clip = setting.student, noise(2, 4, CHUNKS * CHUNK_FRAMES, 4, 4, seed=2)
    batch = wan_batch(latents=clip, offset=torch.zeros(2, dtype=torch.long))
    step = setting.step_of("student", batch, 0)
    x, t, s = noise(*clip.shape, seed=3), torch.tensor([0.9, 0.6]), torch.tensor([0.5, 0.1])
    whole = step.mean_velocity("student", x, t, s).split(CHUNK_FRAMES, dim=2)
    cache = new_cache(student, STREAM, 2, (4, 4, 4))
    chunks = zip(x.split(CHUNK_FRAMES, dim=2), clip.split(CHUNK_FRAMES, dim=2))
    for k, (noisy, clean) in enumerate(chunks):
        told = {"cache": cache, "target_timestep": 1000 * s}
        alone = student(noisy, 1000 * t, step.cond, **told).sample
        torch.testing.assert_close(whole[k], alone, rtol=1e-4, atol=1e-4)
        student.commit(clean, torch.zeros(2), step.cond, cache)


@torch.no_grad()
def test_scores_are_asked_with_the_prompt_or_the_empty_one():
    setting = moved_wan_setting("dmd")
    step = setting.step_of("student", wan_batch(), 0)
    x_t, t = noise(2, 4, CHUNKS * CHUNK_FRAMES, 4, 4), torch.tensor([0.9, 0.6])
    empty = setting.uncond.expand(2, -1, -1)
    networks = {
        "teacher": setting.teacher.transformer,
        "fake": setting.networks()["fake_score"],
    }
    for name, network in networks.items():
        ask = getattr(step, f"{name}_velocity")
        for prompted, cond in ((True, step.cond), (False, empty)):
            expected = network(x_t, 1000 * t, cond, return_dict=False)[0]
            torch.testing.assert_close(ask(x_t, t, prompted), expected)


# ---- frames


def test_all_frames_count_but_those_of_the_first_chunk_of_a_part_from_the_middle():
    stream = StreamConfig(num_steps=1, chunk_frames=CHUNK_FRAMES)
    setting = ar1_setting(
        "dmd",
        ClipStudent(noise(2, 1, 10, 1, 1)),
        stream=stream,
        rollout={"num_chunks": CHUNKS, "rollout_chunks": 5},
        frames=CHUNKS * CHUNK_FRAMES,
        as_image=lambda latents: latents[:, :, -1:],
    )
    batch = prompt_batch(setting.teacher, range(2))
    counted = {}
    for first in (0, 1):
        number = step_where(setting, "student", lambda decision: decision.first_chunk == first)
        step = setting.step_of("student", batch, number)
        counted[first] = step.counted_frames(step.sample().x)
    assert counted[0] is None
    assert counted[1].tolist() == [[0, 0, 1, 1, 1, 1]] * 2


# ---- what follows the student


@torch.no_grad()
def test_copies_follow_the_student_after_its_turns_each_at_its_own_rate():
    setting = ar1_setting("dmd", Ar1Student())
    setting.objective = Follower()
    setting.copies = {name: nn.Linear(1, 1) for name in ("average", "lagged", "start")}
    setting.student = nn.Linear(1, 1)
    values = {"average": 1.0, "lagged": 2.0, "start": 3.0}
    for name, copy in setting.copies.items():
        for parameter in copy.parameters():
            parameter.fill_(values[name])
    for parameter in setting.student.parameters():
        parameter.fill_(11.0)
    setting.after_step("fake_score", 0)
    assert {name: copy.bias.item() for name, copy in setting.copies.items()} == values
    setting.after_step("student", 0)
    found = {name: copy.bias.item() for name, copy in setting.copies.items()}
    assert found == pytest.approx({"average": 6.0, "lagged": 2.9, "start": 3.0})


class Follower:
    average_decay = 0.5
    lagged_decay = 0.9

    def follows(self, name, step):
        return True

    def after_student(self, step):
        pass


@torch.no_grad()
def test_a_fake_score_that_is_pulled_keeps_a_share_of_itself():
    student, fake = Ar1Student(), ScoreOf(ar1_teacher(0.8, 3))
    student.weight = nn.Parameter(torch.tensor(5.0))  # of the same name as the fake score's
    setting = ar1_setting("dmd", student, fake)
    setting.step_of("student", None, 0).pull_fake_score(0.75)
    assert fake.weight.item() == pytest.approx(0.75 * 1 + 0.25 * 5)
    assert student.weight.item() == 5
