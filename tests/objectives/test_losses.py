"""Losses of fixed networks are the numbers that they were before objectives and settings came
apart: what is drawn, in which order and from which keys, and what is made of it.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.objectives import find_objective
from streamvid.rollout.schedule import StreamConfig
from streamvid.seeding import keyed_normal
from streamvid.settings.rollouts import RolloutConfig
from streamvid.settings.video import OF_TEACHER, VideoSetting
from streamvid.teachers.wan import WanTeacher
from tests.fakes import TINY_WAN

BEFORE = json.loads(Path(__file__).with_name("losses_before.json").read_text())
KEYS = [11, 12]


def stream(**options):
    return StreamConfig(**{"num_steps": 4, "shift": 5.0, "chunk_frames": 2, **options})


TABLES = {
    "dmd_table": ((1.0, 0.9, 0.6, 0.3), (1.0, 0.9, 0.4), (1.0, 0.4)),
    "diagonal": ((1.0, 0.9, 0.6, 0.3), (1.0, 0.4)),
}
AFD_PARTS = {
    "group_size": 3,
    "noisings": 2,
    "clips_per_pass": 4,
    "time_law": "uniform",
    "shared_noise": False,
    "logit": "chunk",
    "normalize": "std",
}
AFD_TOKEN = {
    "logit": "token",
    "control": "independent",
    "baseline": "batch",
    "self_normalized": False,
}
DMD_EXIT = {"fake_updates_per_student": 2, "shift": 8.0, "time_law": "logit_normal"}
# objective, its options, its rollouts, the stream
CASES = {
    "dmd": ("dmd", {}, {"num_chunks": 3}, stream()),
    "dmd_exit": ("dmd", DMD_EXIT, {"num_chunks": 3, "context": "exit"}, stream()),
    "dmd_knows": (
        "dmd",
        {"normalizer": "none", "guidance_scale": 1.0},
        {"num_chunks": 3, "fake_knows_steps": True},
        stream(first_steps=6),
    ),
    "dmd_long": (
        "dmd",
        {},
        {"num_chunks": 2, "rollout_chunks": 4, "window_high": 0.7},
        stream(window_frames=4),
    ),
    "dmd_table": (
        "dmd",
        {},
        {"num_chunks": 3},
        stream(step_table=TABLES["dmd_table"], commit="reuse"),
    ),
    "diagonal": (
        "diagonal",
        {"motion_weight": 0.3, "frame_weights": "growing"},
        {"num_chunks": 3},
        stream(step_table=TABLES["diagonal"], commit="reuse"),
    ),
    "diagonal_learned": (
        "diagonal",
        {"motion_feature": "learned"},
        {"num_chunks": 2, "rollout_chunks": 3},
        stream(),
    ),
    "asd": ("asd", {"asd_weight": 0.7}, {"num_chunks": 2}, stream(num_steps=3)),
    "asd_first": (
        "asd",
        {"same_time": False, "logit": "frame", "noise_high": 0.5},
        {"num_chunks": 2},
        stream(num_steps=2, first_steps=4),
    ),
    "asd_shared": ("asd", {"lists": "shared"}, {"num_chunks": 2}, stream(num_steps=3)),
    "asd_real": ("asd", {"real_clips": True}, {"num_chunks": 2}, stream(num_steps=2)),
    "asd_long": ("asd", {}, {"num_chunks": 2, "rollout_chunks": 4}, stream(num_steps=2)),
    "afd": ("afd", {}, {}, stream()),
    "afd_parts": ("afd", AFD_PARTS, {}, stream()),
    "afd_token": ("afd", AFD_TOKEN, {}, stream(context_t=0.1)),
    "afd_gan": ("afd", {"policy": "gan"}, {}, stream(commit="reuse")),
    "flow": ("flow_matching", {}, {}, stream()),
    "flow_df": ("flow_matching", {"mode": "diffusion_forcing", "chunk_frames": 2}, {}, stream()),
    "flow_tf": (
        "flow_matching",
        {"mode": "teacher_forcing", "chunk_frames": 2, "uncond_share": 0.5},
        {},
        stream(),
    ),
    "traj": ("trajectory", {}, {}, stream(shift=1.0)),
    "traj_tf": (
        "trajectory",
        {"mode": "teacher_forcing", "level": "clip"},
        {},
        stream(shift=1.0),
    ),
}


def networks():
    """Student and teacher, whose last layers are not as they begin."""
    torch.manual_seed(0)
    student = CausalWanTransformer3DModel(**TINY_WAN)
    teacher = WanTransformer3DModel(**TINY_WAN)
    for number, network in enumerate((student, teacher)):
        set_last_layer(network, number)
    teacher = WanTeacher(teacher.requires_grad_(False).eval(), None, shift=1.0)
    teacher.uncond = keyed_normal((5, 8), "uncond")
    return student, teacher


def set_last_layer(network, number):
    weight = network.proj_out.weight
    with torch.no_grad():
        weight.copy_(0.05 * keyed_normal(tuple(weight.shape), "p", number))


def setting_of(name, options, rollout, stream):
    student, teacher = networks()
    objective = find_objective(name)(**options)
    if not objective.is_causal:
        torch.manual_seed(0)
        student = WanTransformer3DModel(**TINY_WAN)
        set_last_layer(student, 9)
    return VideoSetting(
        objective,
        student,
        stream,
        (4, 4, 4),
        teacher=teacher if objective.needs & OF_TEACHER else None,
        rollout=RolloutConfig(**rollout),
        uncond=teacher.uncond,
        seed=3,
        as_image=lambda latents: latents[:, :, -1:],
    )


def batch_of(setting):
    """Clips, pairs or prompts alone, as the objective needs."""
    frames = setting.rollout.num_chunks * setting.stream.chunk_frames
    if not {"fake_score"} & set(setting.networks()):
        frames = 4
    own = lambda shape, name, *numbers: torch.stack(
        [keyed_normal(shape, name, key, *numbers) for key in KEYS]
    )
    batch = {"cond": own((5, 8), "cond"), "keys": KEYS}
    if "clips" in setting.objective.needs:
        batch["latents"] = own((4, frames, 4, 4), "x")
        batch["offset"] = torch.zeros(2, dtype=torch.long)
    if "pairs" in setting.objective.needs:
        states = [own((4, frames, 4, 4), "s", number) for number in range(5)]
        batch["states"] = torch.stack(states, dim=1)
        batch["times"] = torch.tensor([[1.0, 0.75, 0.5, 0.25, 0.0]] * 2)
    return batch


@pytest.mark.parametrize("case", CASES)
def test_losses_are_what_they_were(case):
    name, options, rollout, stream = CASES[case]
    if name in ("diagonal", "asd") or (name == "dmd" and case != "dmd_exit"):
        options = {"fake_updates_per_student": 5, **options}
    setting = setting_of(name, options, rollout, stream)
    batch = batch_of(setting)
    found = {}
    for turn_and_step in BEFORE[case]:
        turn, step = turn_and_step.split()
        for network_name, network in setting.networks().items():
            network.requires_grad_(network_name == turn)
        found[turn_and_step] = setting.loss(turn, batch, int(step))[0].item()
    assert found == pytest.approx(BEFORE[case], rel=1e-5)


def test_every_number_that_is_kept_is_asked_for():
    assert set(BEFORE) == set(CASES) and all(BEFORE.values())
