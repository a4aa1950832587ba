"""Properties of flow matching in its three modes."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.objectives.flow_matching import FlowMatching
from streamvid.rollout.schedule import StreamConfig
from streamvid.settings.video import VideoSetting
from tests.fakes import TINY_WAN, noise

CAUSAL = ("diffusion_forcing", "teacher_forcing")


class Zero(nn.Module):
    """Says 0 and keeps what it is asked; every prediction has a number of its own that gets its
    gradient.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, hidden_states, timestep, cond, return_dict=False, **chunk):
        self.output = torch.zeros_like(hidden_states).requires_grad_()
        self.calls.append((hidden_states, timestep / 1000, cond, chunk))
        return (self.output,)


def clips(batch=4, frames=6, offset=0):
    return {
        "latents": noise(batch, 4, frames, 4, 4),
        "cond": noise(batch, 5, 8, seed=1) + 10,
        "offset": torch.full((batch,), offset),
        "keys": list(range(batch)),
    }


def setting_of(student, **options):
    objective = FlowMatching(**{"chunk_frames": 2, "uncond_share": 0.0, **options})
    return VideoSetting(
        objective, student, StreamConfig(chunk_frames=2), (4, 4, 4), uncond=torch.zeros(5, 8)
    )


@pytest.mark.parametrize("mode", ["bidirectional", *CAUSAL])
def test_a_network_that_says_nothing_has_the_loss_of_the_velocity(mode):
    """mean |eps - x0|^2, with the noise that is in its own input."""
    student, batch = Zero(), clips()
    loss, numbers = setting_of(student, mode=mode).loss("student", batch, 0)
    x_t, t, _, _ = student.calls[0]
    t = (t if t.ndim == 2 else t[:, None].expand(-1, 6))[:, None, :, None, None]
    eps = (x_t - (1 - t) * batch["latents"]) / t
    torch.testing.assert_close(
        loss.detach(), (eps - batch["latents"]).square().mean(), rtol=1e-4, atol=0
    )
    assert numbers == {"loss": loss.item()}


def test_the_whole_clip_has_one_time_in_a_teacher_and_each_chunk_its_own_in_a_student():
    for mode, times_a_clip in (
        ("bidirectional", 1),
        ("diffusion_forcing", 3),
        ("teacher_forcing", 3),
    ):
        student = Zero()
        setting_of(student, mode=mode).loss("student", clips(), 0)
        t, chunk = student.calls[0][1], student.calls[0][3]
        assert [len(set(row.flatten().tolist())) for row in t] == [times_a_clip] * 4
        if mode != "bidirectional":
            assert torch.equal(t[:, ::2], t[:, 1::2]) and chunk["chunk_frames"] == 2
        assert ("clean_context" in chunk) == (mode == "teacher_forcing")


@pytest.mark.parametrize("mode", CAUSAL)
def test_a_cut_from_the_middle_has_no_loss_on_its_first_chunk(mode):
    student, batch = Zero(), clips()
    batch["offset"] = torch.tensor([0, 3, 0, 5])
    setting_of(student, mode=mode).loss("student", batch, 0)[0].backward()
    learns = student.output.grad.abs().sum((1, 3, 4)) > 0  # [B, T]
    assert learns[[0, 2]].all() and learns[[1, 3], 2:].all() and not learns[[1, 3], :2].any()


def test_a_teacher_learns_from_every_frame_of_a_cut():
    student = Zero()
    setting_of(student).loss("student", clips(offset=3), 0)[0].backward()
    assert (student.output.grad.abs().sum((1, 3, 4)) > 0).all()


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_prompts_are_dropped_at_the_configured_share(share):
    student = Zero()
    batch = clips(400, frames=2)
    setting_of(student, uncond_share=share).loss("student", batch, 0)
    dropped = (student.calls[0][2] == 0).all(dim=(1, 2))
    assert dropped.float().mean().item() == pytest.approx(share, abs=0.06)
    assert torch.equal(student.calls[0][2][~dropped], batch["cond"][~dropped])


def test_a_sample_does_not_depend_on_its_batch():
    student, batch = Zero(), clips()
    setting = setting_of(student, uncond_share=0.5)
    setting.loss("student", batch, 0)
    setting.loss("student", {name: value[2:] for name, value in batch.items()}, 0)
    for whole, part in zip(student.calls[0][:3], student.calls[1][:3]):
        assert torch.equal(whole[2:], part)


def outputs_over_clean(clean):
    """What a student makes of one noisy clip over a clean one, ``[B, C, T, h, w]``."""
    torch.manual_seed(0)
    student = CausalWanTransformer3DModel(**TINY_WAN).eval()
    batch = {"cond": noise(1, 5, 8, seed=1), "keys": [0], "latents": clean}
    step = setting_of(student, mode="teacher_forcing").step_of("student", batch, 0)
    x_t, t = noise(1, 4, 6, 4, 4, seed=3), torch.full((1, 6), 0.5)
    with torch.no_grad():
        return step.velocity(x_t, t, chunk_frames=2, clean_context=clean)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_clean_chunk_is_seen_by_later_chunks_only(changed):
    clean = noise(1, 4, 6, 4, 4, seed=4)
    before = outputs_over_clean(clean)
    clean[:, :, 2 * changed : 2 * changed + 2] += 1
    moved = (outputs_over_clean(clean) - before).abs().amax((0, 1, 3, 4)).reshape(3, 2).amax(
        1
    ) > 1e-4
    assert moved.tolist() == [chunk > changed for chunk in range(3)]


@pytest.mark.parametrize(
    "network, mode",
    [
        (WanTransformer3DModel, "bidirectional"),
        (CausalWanTransformer3DModel, "bidirectional"),
        (CausalWanTransformer3DModel, "diffusion_forcing"),
        (CausalWanTransformer3DModel, "teacher_forcing"),
    ],
)
def test_a_wan_of_either_kind_gets_a_gradient_everywhere(network, mode):
    torch.manual_seed(0)
    student = network(**TINY_WAN)
    loss, _ = setting_of(student, mode=mode).loss("student", clips(2), 0)
    loss.backward()
    assert loss.isfinite() and all(
        p.grad is not None and p.grad.isfinite().all() for p in student.parameters()
    )
