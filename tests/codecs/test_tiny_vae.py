"""The tiny codec: what streams is what is decoded at once, and what is shipped is good enough to
measure with.
"""

import copy

import pytest
import torch

from streamvid.codecs.base import last_frame_as_image
from streamvid.codecs.load import open_codec
from streamvid.codecs.tiny_vae import AutoencoderTinyVideo, reconstruction_loss
from streamvid.data.world import caption, render, sample_spec
from streamvid.evaluation.world_score import mean_scores, score
from streamvid.students.folder import TINY_TEACHER


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    codec = AutoencoderTinyVideo(latent_channels=4, widths=(16, 8, 8)).eval()
    for parameter in codec.parameters():  # the residual branches start at zero: give them weight
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    codec.set_statistics(torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([1.0, 2.0, 0.5, 1.5]))
    return codec


@pytest.mark.parametrize("chunks", [(5,), (1, 1, 1, 1, 1), (3, 2), (1, 4), (2, 2, 1)])
@torch.no_grad()
def test_streaming_decode_equals_the_whole_decode_to_the_bit(codec, chunks):
    latents = torch.randn(2, 4, 5, 2, 3)
    state, frames = codec.new_decoder_state(), []
    for chunk in latents.split(chunks, dim=2):
        part, state = codec.decode_chunk(chunk, state)
        frames.append(part)
    whole = codec.decode_latents(latents)
    assert whole.shape == (2, 17, 3, 16, 24)
    assert torch.equal(torch.cat(frames, dim=1), whole)


@torch.no_grad()
def test_two_streams_do_not_touch_each_other(codec):
    """States are values: a state can be kept and continued twice."""
    a, b = torch.randn(1, 4, 2, 2, 2), torch.randn(1, 4, 2, 2, 2)
    _, state = codec.decode_chunk(a[:, :, :1], codec.new_decoder_state())
    kept = [slot.clone() for slot in state]
    first, _ = codec.decode_chunk(a[:, :, 1:], state)
    codec.decode_chunk(b, codec.new_decoder_state())
    again, _ = codec.decode_chunk(a[:, :, 1:], state)
    assert torch.equal(first, again)
    assert all(torch.equal(slot, before) for slot, before in zip(state, kept))


@torch.no_grad()
def test_the_decoder_of_training_is_the_decoder_of_streaming(codec):
    latents = torch.randn(2, 4, 3, 2, 2)
    std = torch.tensor(codec.config.latents_std)[None, :, None, None, None]
    mean = torch.tensor(codec.config.latents_mean)[None, :, None, None, None]
    parallel = codec.raw_decode(latents * std + mean).clamp(0, 1)
    torch.testing.assert_close(parallel, codec.decode_latents(latents), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_half_precision_works_and_is_close(codec, dtype, given):
    """Weights in half precision met frames and latents in float32, and the layers refused the
    mixture.
    """
    low = copy.deepcopy(codec).to(dtype)
    frames, latents = torch.rand(1, 9, 3, 16, 16), torch.randn(1, 4, 3, 2, 2)
    encoded, decoded = low.encode_frames(frames.to(given)), low.decode_latents(latents.to(given))
    assert encoded.dtype == decoded.dtype == given
    torch.testing.assert_close(encoded.float(), codec.encode_frames(frames), atol=0.1, rtol=0.05)
    torch.testing.assert_close(decoded.float(), codec.decode_latents(latents), atol=0.03, rtol=0)
    first, state = low.decode_chunk(latents[:, :, :1].to(given), low.new_decoder_state())
    rest, _ = low.decode_chunk(latents[:, :, 1:].to(given), state)
    assert torch.equal(torch.cat([first, rest], dim=1), decoded)


@torch.no_grad()
def test_the_encoder_is_causal(codec):
    """Frames from 5 on leave the first two latent frames (frames 0 to 4) as they were."""
    frames = torch.rand(1, 9, 3, 16, 16)
    changed = frames.clone()
    changed[:, 5:] = torch.rand(1, 4, 3, 16, 16)
    a, b = codec.encode_frames(frames), codec.encode_frames(changed)
    torch.testing.assert_close(a[:, :, :2], b[:, :, :2], atol=1e-6, rtol=0)
    assert (a[:, :, 2] - b[:, :, 2]).abs().max() > 1e-3


@torch.no_grad()
def test_latents_are_normalised_by_the_stored_statistics(codec):
    frames = torch.rand(1, 5, 3, 16, 16)
    raw = codec.raw_encode(frames)
    expected = (raw[:, 1] - codec.config.latents_mean[1]) / codec.config.latents_std[1]
    torch.testing.assert_close(codec.encode_frames(frames)[:, 1], expected)


@torch.no_grad()
def test_save_and_load(codec, tmp_path):
    codec.save_pretrained(tmp_path / "vae")
    latents = torch.randn(1, 4, 2, 2, 2)
    assert torch.equal(open_codec(tmp_path).decode_latents(latents), codec.decode_latents(latents))


def test_the_loss_reaches_every_parameter(codec):
    loss, error = reconstruction_loss(
        codec, torch.rand(1, 5, 3, 16, 16), torch.zeros(1, 4, 2, 2, 2), 1e-3
    )
    loss.backward()
    assert error > 0 and all(parameter.grad is not None for parameter in codec.parameters())
    codec.zero_grad(set_to_none=True)


def test_wrong_sizes_are_refused(codec):
    with pytest.raises(ValueError, match="1 \\+ 4 k"):
        codec.encode_frames(torch.rand(1, 4, 3, 16, 16))
    with pytest.raises(ValueError, match="\\[B, 4, T, h, w\\]"):
        codec.decode_latents(torch.rand(1, 16, 2, 2, 2))


def test_a_folder_without_a_codec_or_with_another_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a diffusers folder"):
        open_codec(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderOther"}')
    with pytest.raises(ValueError, match="AutoencoderOther"):
        open_codec(tmp_path)


@torch.no_grad()
@pytest.mark.slow
def test_the_shipped_codec_reconstructs_held_out_clips():
    """At least 32 dB, and no world score loses more than 0.02 (mean over 48 clips of unseen
    combinations).
    """
    codec = open_codec(TINY_TEACHER)
    specs = [sample_spec(seed, held_out=True) for seed in range(40_000, 40_048)]
    clips = torch.stack([render(spec, 33) for spec in specs])
    decoded = torch.cat(
        [codec.decode_latents(codec.encode_frames(part)) for part in clips.split(16)]
    )
    assert -10 * (decoded - clips).square().mean().log10() >= 32
    prompts = [caption(spec, seed) for seed, spec in enumerate(specs)]
    truth = mean_scores(score(clip, prompt) for clip, prompt in zip(clips, prompts))
    found = mean_scores(score(clip, prompt) for clip, prompt in zip(decoded, prompts))
    assert {
        name: round(truth[name] - found[name], 3)
        for name in truth
        if truth[name] - found[name] > 0.02
    } == {}


@torch.no_grad()
def test_with_its_first_frame_as_an_image_a_cut_is_a_clip_of_its_own():
    """Latents of a cut from the middle, its first encoded as an image, are nearer to the cut's own
    than those of the stream.
    """
    codec = open_codec(TINY_TEACHER)
    frames = torch.stack([render(sample_spec(seed), 33) for seed in range(4)])
    whole, own = codec.encode_frames(frames), codec.encode_frames(frames[:, 12:])
    cut = torch.cat([last_frame_as_image(codec, whole[:, :, :4]), whole[:, :, 4:]], dim=2)
    error = lambda latents: (latents - own).square().mean(dim=(0, 1, 3, 4))
    assert error(cut)[0] < 0.2 * error(whole[:, :, 3:])[0]
    assert torch.equal(cut[:, :, 1:], whole[:, :, 4:])
