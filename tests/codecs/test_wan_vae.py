"""Wan's autoencoder as a streaming codec: what streams is diffusers' whole decode, and a state is a
value.
"""

import copy
import json

import pytest
import torch
from diffusers import AutoencoderKLWan

from streamvid.codecs.load import open_codec
from streamvid.codecs.wan_vae import StreamingAutoencoderKLWan

WAN21 = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1}
WAN22 = {
    **WAN21,
    "decoder_base_dim": 6,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
}
PUBLISHED_WAN22 = {
    **WAN22,
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "num_res_blocks": 2,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]}


def make_codec(**config):
    torch.manual_seed(0)
    return StreamingAutoencoderKLWan(**{**STATISTICS, **config}).requires_grad_(False).eval()


@pytest.fixture(scope="module", params=[WAN21, WAN22], ids=["wan2.1", "wan2.2"])
def codec(request):
    return make_codec(**request.param)


def raw_of(codec, latents):
    """What diffusers' pipeline gives to ``vae.decode``."""
    mean, std = (
        torch.tensor(codec.config[name])[None, :, None, None, None]
        for name in ("latents_mean", "latents_std")
    )
    return latents * std + mean


def frames_of(codec, latents):
    """diffusers' whole decode, in our layout and range."""
    return (codec.decode(raw_of(codec, latents)).sample.transpose(1, 2) + 1) / 2


def stream(codec, chunks):
    state, frames = codec.new_decoder_state(), []
    for chunk in chunks:
        part, state = codec.decode_chunk(chunk, state)
        frames.append(part)
    return torch.cat(frames, dim=1), state


def tensors_of(state):
    return [slot for features in state for slot in features if isinstance(slot, torch.Tensor)]


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1), (3, 1), (1, 3)])
def test_streaming_decode_equals_diffusers_whole_decode(codec, chunks, monkeypatch):
    """Chunks decoded each by itself lose three frames a chunk and see no past.

    diffusers puts the whole clip through the first 1 x 1 x 1 convolution, whose sums are then in
    another order; where it takes frame after frame, the two are equal to the bit.
    """
    latents = torch.randn(2, 4, 4, 1, 2)
    streamed, _ = stream(codec, latents.split(chunks, dim=2))
    ratio = codec.spatial_ratio
    assert streamed.shape == (2, 13, 3, ratio, 2 * ratio) and streamed.std() > 0.01
    torch.testing.assert_close(streamed, frames_of(codec, latents), atol=1e-5, rtol=0)
    assert torch.equal(streamed, codec.decode_latents(latents))
    apply = codec.post_quant_conv.forward
    monkeypatch.setattr(
        codec.post_quant_conv,
        "forward",
        lambda x: torch.cat([apply(z) for z in x.split(1, dim=2)], dim=2),
    )
    assert torch.equal(streamed, frames_of(codec, latents))


def test_a_first_chunk_gives_one_frame_and_four_for_each_further_latent_frame(codec):
    first, state = codec.decode_chunk(torch.randn(1, 4, 3, 1, 1), codec.new_decoder_state())
    second, _ = codec.decode_chunk(torch.randn(1, 4, 3, 1, 1), state)
    assert (first.shape[1], second.shape[1]) == (9, 12)


def test_streams_and_copies_do_not_touch_each_other(codec):
    """Neither another stream, nor diffusers' own decode in between, nor a second continuation
    changes a stream.
    """
    a, b = torch.randn(2, 1, 4, 4, 1, 2).unbind()
    first, state = codec.decode_chunk(a[:, :, :2], codec.new_decoder_state())
    copied, before = copy.deepcopy(state), [tensor.clone() for tensor in tensors_of(state)]
    other, other_state = codec.decode_chunk(b[:, :, :1], codec.new_decoder_state())
    codec.decode(b)
    rest, _ = codec.decode_chunk(a[:, :, 2:], state)
    other_rest, _ = codec.decode_chunk(b[:, :, 1:], other_state)
    again, _ = codec.decode_chunk(a[:, :, 2:], copied)
    assert torch.equal(torch.cat([first, rest], dim=1), codec.decode_latents(a)) and torch.equal(
        rest, again
    )
    assert torch.equal(torch.cat([other, other_rest], dim=1), codec.decode_latents(b))
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(state), before, strict=True))


def test_the_state_does_not_grow(codec):
    sizes = []
    state = codec.new_decoder_state()
    for latent in torch.randn(1, 4, 7, 1, 1).split(1, dim=2):
        state = codec.decode_chunk(latent, state)[1]
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(state)))
    assert sizes[0] > 0 and len(set(sizes[2:])) == 1


def test_latents_are_the_normalised_means_of_the_posterior(codec):
    ratio = codec.spatial_ratio
    frames = torch.rand(1, 5, 3, 2 * ratio, 3 * ratio)
    latents = codec.encode_frames(frames)
    assert latents.shape == (1, 4, 2, 2, 3)
    posterior = codec.encode(frames.transpose(1, 2) * 2 - 1).latent_dist
    torch.testing.assert_close(raw_of(codec, latents), posterior.mean, atol=1e-5, rtol=1e-5)


def test_the_encoder_is_causal(codec):
    frames = torch.rand(1, 9, 3, 32, 32)
    changed = torch.cat([frames[:, :5], torch.rand(1, 4, 3, 32, 32)], dim=1)
    a, b = codec.encode_frames(frames), codec.encode_frames(changed)
    assert torch.equal(a[:, :, :2], b[:, :, :2]) and not torch.equal(a[:, :, 2], b[:, :, 2])


@pytest.mark.parametrize(
    "config, tile", [(WAN21, (16, 16, 8, 8)), (WAN22, (32, 48, 16, 32))], ids=["wan2.1", "wan2.2"]
)
def test_tiles_stream_each_with_its_own_state(config, tile):
    """Equal to diffusers' tiled decode, which differs from the decode of the frame as a whole."""
    codec = make_codec(**config)
    latents = torch.randn(1, 4, 3, 3, 4)
    whole = frames_of(codec, latents)
    codec.enable_tiling(*tile)
    streamed, state = stream(codec, latents.split((1, 2), dim=2))
    assert len(state) > 1 and torch.equal(streamed, frames_of(codec, latents))
    assert streamed.shape == whole.shape and not torch.allclose(streamed, whole, atol=1e-3)
    small = torch.randn(1, 4, 2, 1, 1)
    assert len(codec.decode_chunk(small, ())[1]) == 1  # a frame of one tile is not tiled
    codec.disable_tiling()
    with pytest.raises(
        ValueError, match="the stream has .* tiles, this frame 1; .*new_decoder_state"
    ):
        codec.decode_chunk(latents, state)


def test_half_precision_weights_take_and_give_what_the_caller_has():
    codec = make_codec(**WAN21).to(torch.bfloat16)
    latents = torch.randn(1, 4, 3, 2, 2)
    frames, state = stream(codec, latents.split((1, 2), dim=2))
    assert frames.dtype == torch.float32 and {tensor.dtype for tensor in tensors_of(state)} == {
        torch.bfloat16
    }
    torch.testing.assert_close(
        frames, make_codec(**WAN21).decode_latents(latents), atol=0.05, rtol=0
    )
    assert codec.encode_frames(frames).dtype == torch.float32


def test_what_is_saved_is_diffusers_own(codec, tmp_path):
    codec.save_pretrained(tmp_path / "vae")
    assert (
        json.loads((tmp_path / "vae/config.json").read_text())["_class_name"] == "AutoencoderKLWan"
    )
    opened, theirs = open_codec(tmp_path), AutoencoderKLWan.from_pretrained(tmp_path / "vae")
    latents = torch.randn(1, 4, 2, 2, 2)
    assert isinstance(opened, StreamingAutoencoderKLWan) and not any(
        p.requires_grad for p in opened.parameters()
    )
    assert torch.equal(opened.decode_latents(latents), codec.decode_latents(latents))
    torch.testing.assert_close(
        frames_of(theirs.eval(), latents).detach(), codec.decode_latents(latents), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "config, parameters, tensors, ratios",
    [
        ({}, 126_892_531, 194, (16, 4, 8)),
        (PUBLISHED_WAN22, 704_688_668, 196, (48, 4, 16)),
    ],
    ids=["wan2.1", "wan2.2"],
)
def test_the_published_configurations(config, parameters, tensors, ratios):
    """Counts of the published checkpoints; and Wan 2.1's streaming state at 480 x 832, 944.3
    million numbers.
    """
    with torch.device("meta"):
        codec = StreamingAutoencoderKLWan(**config)
        assert (
            sum(p.numel() for p in codec.parameters()) == parameters
            and len(codec.state_dict()) == tensors
        )
        assert (codec.latent_channels, codec.temporal_ratio, codec.spatial_ratio) == ratios
        height, width = 480 // codec.spatial_ratio, 832 // codec.spatial_ratio
        frames, state = stream(
            codec, torch.zeros(1, codec.latent_channels, 3, height, width).split(1, dim=2)
        )
    assert frames.shape == (1, 9, 3, 480, 832)
    if not config:
        assert round(sum(tensor.numel() for tensor in tensors_of(state)) / 1e6, 1) == 944.3


def test_wrong_sizes_are_refused(codec):
    ratio = codec.spatial_ratio
    with pytest.raises(ValueError, match="num_frames=4 is not 1 \\+ 4 k; use 1 or 5"):
        codec.encode_frames(torch.rand(1, 4, 3, 32, 32))
    with pytest.raises(ValueError, match=f"24 x 36 pixels, expected multiples of {ratio}"):
        codec.encode_frames(torch.rand(1, 5, 3, 24, 36))
    with pytest.raises(ValueError, match="frames \\[B, T, 3, H, W\\]"):
        codec.encode_frames(torch.rand(1, 3, 5, 32, 32))
    with pytest.raises(ValueError, match="latents \\[B, 4, T, h, w\\]"):
        codec.decode_latents(torch.rand(1, 16, 2, 2, 2))
    _, state = codec.decode_chunk(torch.rand(2, 4, 1, 2, 2), codec.new_decoder_state())
    for shape in ((1, 4, 1, 2, 2), (2, 4, 1, 2, 3)):
        with pytest.raises(ValueError, match="the stream has .*= \\(2, 2, 2\\)"):
            codec.decode_chunk(torch.rand(shape), state)


def test_a_configuration_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="latents_std has 16 numbers, expected z_dim=4"):
        StreamingAutoencoderKLWan(**WAN21).decode_latents(torch.rand(1, 4, 1, 2, 2))
    with pytest.raises(ValueError, match="scale_factor_spatial 16, its config.json says 8"):
        make_codec(**{**WAN22, "scale_factor_spatial": 8}).decode_latents(torch.rand(1, 4, 1, 2, 2))
