"""TAEHV: the published names load strictly, and the layers do what a plain loop over frames does
with these names.
"""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from streamvid.codecs.load import open_codec
from streamvid.codecs.taehv import AutoencoderTAEHV
from streamvid.codecs.wan_vae import StreamingAutoencoderKLWan

FILES = {"taew2_1": (16, 1), "taew2_2": (48, 2)}  # latent channels, side of the pixel patches


def memory_blocks(part, places, channels):
    layers = {"conv.0": 2 * channels, "conv.2": channels, "conv.4": channels}
    for place in places:
        for layer, channels_in in layers.items():
            yield f"{part}.{place}.{layer}.weight", (channels, channels_in, 3, 3)
            yield f"{part}.{place}.{layer}.bias", (channels,)


def published_shapes(latent_channels, patch_size):
    """Names and shapes of a published file, written out."""
    pixels = 3 * patch_size**2
    return {
        "encoder.0.weight": (64, pixels, 3, 3),
        "encoder.0.bias": (64,),
        "encoder.2.conv.weight": (64, 128, 1, 1),
        "encoder.3.weight": (64, 64, 3, 3),
        "encoder.7.conv.weight": (64, 128, 1, 1),
        "encoder.8.weight": (64, 64, 3, 3),
        "encoder.12.conv.weight": (64, 64, 1, 1),
        "encoder.13.weight": (64, 64, 3, 3),
        "encoder.17.weight": (latent_channels, 64, 3, 3),
        "encoder.17.bias": (latent_channels,),
        **dict(memory_blocks("encoder", (4, 5, 6, 9, 10, 11, 14, 15, 16), 64)),
        "decoder.1.weight": (256, latent_channels, 3, 3),
        "decoder.1.bias": (256,),
        "decoder.7.conv.weight": (256, 256, 1, 1),
        "decoder.8.weight": (128, 256, 3, 3),
        "decoder.13.conv.weight": (256, 128, 1, 1),
        "decoder.14.weight": (64, 128, 3, 3),
        "decoder.19.conv.weight": (128, 64, 1, 1),
        "decoder.20.weight": (64, 64, 3, 3),
        "decoder.22.weight": (pixels, 64, 3, 3),
        "decoder.22.bias": (pixels,),
        **dict(memory_blocks("decoder", (3, 4, 5), 256)),
        **dict(memory_blocks("decoder", (9, 10, 11), 128)),
        **dict(memory_blocks("decoder", (15, 16, 17), 64)),
    }


def make_file(name):
    generator = torch.Generator().manual_seed(0)
    return {
        key: (
            1.4
            * torch.randn(shape, generator=generator)
            / max(1, torch.Size(shape[1:]).numel()) ** 0.5
        )
        for key, shape in published_shapes(*FILES[name]).items()
    }


@pytest.fixture(scope="module", params=FILES)
def opened(request, tmp_path_factory):
    """The tensors of a file and the codec that opens from it."""
    tensors, file = (
        make_file(request.param),
        tmp_path_factory.mktemp("taehv") / f"{request.param}.safetensors",
    )
    save_file(tensors, file)
    return tensors, open_codec(file)


def reference(tensors, part, frames, stride, patch_size):
    """A loop over frames ``[B, C, H, W]`` and layers by their published place; no time is mixed but
    as the list says.
    """
    last = {"encoder": 17, "decoder": 22}[part]
    spaces = {"encoder": (), "decoder": (6, 12, 18)}[part]
    relus = {"encoder": (1,), "decoder": (2, 21)}[part]
    for place in range(last + 1):
        name = f"{part}.{place}"
        if place in spaces:
            frames = [F.interpolate(x, scale_factor=2, mode="nearest") for x in frames]
        elif place in relus:
            frames = [x.clamp(min=0) for x in frames]
        elif f"{name}.conv.0.weight" in tensors:
            pasts = [torch.zeros_like(frames[0]), *frames[:-1]]
            frames = [memory_block(tensors, name, x, past) for x, past in zip(frames, pasts)]
        elif f"{name}.conv.weight" in tensors:
            weight = tensors[f"{name}.conv.weight"]
            if part == "encoder":
                s = weight.shape[1] // weight.shape[0]
                frames = [
                    F.conv2d(torch.cat(frames[i : i + s], 1), weight)
                    for i in range(0, len(frames), s)
                ]
            else:
                frames = [
                    y for x in frames for y in F.conv2d(x, weight).split(weight.shape[1], dim=1)
                ]
        elif f"{name}.weight" in tensors:
            s = stride if place in (3, 8, 13) and part == "encoder" else 1
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            frames = [F.conv2d(x, weight, bias, stride=s, padding=1) for x in frames]
        else:
            frames = [3 * torch.tanh(x / 3) for x in frames]
    return frames


def memory_block(tensors, name, x, past):
    y = torch.cat([x, past], dim=1)
    for layer in (0, 2, 4):
        y = F.conv2d(
            y,
            tensors[f"{name}.conv.{layer}.weight"],
            tensors[f"{name}.conv.{layer}.bias"],
            padding=1,
        )
        y = y.clamp(min=0) if layer < 4 else y
    return (x + y).clamp(min=0)


def test_the_names_and_shapes_are_the_published_ones():
    codec = AutoencoderTAEHV()
    assert {
        name: tuple(tensor.shape) for name, tensor in codec.state_dict().items()
    } == published_shapes(16, 1)
    assert (
        len(codec.state_dict()) == 128 and sum(p.numel() for p in codec.parameters()) == 11_315_539
    )
    assert sum(p.numel() for p in codec.encoder.parameters()) == 1_470_928


def test_a_file_tells_which_it_is(opened):
    tensors, codec = opened
    channels, patch = codec.latent_channels, codec.config.patch_size
    assert (channels, patch) in FILES.values() and codec.spatial_ratio == 8 * patch
    assert all(torch.equal(tensors[name], tensor) for name, tensor in codec.state_dict().items())
    assert not any(p.requires_grad for p in codec.parameters())


@torch.no_grad()
def test_decode_equals_a_plain_loop_over_frames(opened):
    tensors, codec = opened
    latents = 2 * torch.randn(2, codec.latent_channels, 3, 2, 3)
    frames = torch.stack(
        reference(tensors, "decoder", list(latents.unbind(2)), 1, codec.config.patch_size), dim=1
    )
    # published: the first three are dropped
    frames = F.pixel_shuffle(frames, codec.config.patch_size).clamp(0, 1)[:, 3:]
    decoded = codec.decode_latents(latents)
    assert decoded.shape == (2, 9, 3, 2 * codec.spatial_ratio, 3 * codec.spatial_ratio)
    assert 0.05 < (decoded > 0).float().mean() and 0.05 < (decoded < 1).float().mean()
    torch.testing.assert_close(decoded, frames, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_encode_equals_a_plain_loop_over_frames(opened):
    """Published: the last frame is repeated until the frames are a multiple of four."""
    tensors, codec = opened
    frames = torch.rand(1, 5, 3, 2 * codec.spatial_ratio, codec.spatial_ratio)
    held = [*frames.unbind(1), frames[:, 4], frames[:, 4], frames[:, 4]]
    patches = [F.pixel_unshuffle(frame, codec.config.patch_size) for frame in held]
    expected = torch.stack(
        reference(tensors, "encoder", patches, 2, codec.config.patch_size), dim=2
    )
    latents = codec.encode_frames(frames)
    assert latents.shape == (1, codec.latent_channels, 2, 2, 1)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1), (1, 3, 1), (2, 3)])
@torch.no_grad()
def test_streaming_decode_equals_the_whole_decode_to_the_bit(opened, chunks):
    _, codec = opened
    latents = torch.randn(1, codec.latent_channels, 5, 2, 2)
    state, frames = codec.new_decoder_state(), []
    for chunk in latents.split(chunks, dim=2):
        part, state = codec.decode_chunk(chunk, state)
        frames.append(part)
    assert frames[0].shape[1] == 4 * chunks[0] - 3 and torch.equal(
        torch.cat(frames, 1), codec.decode_latents(latents)
    )


@torch.no_grad()
def test_a_state_is_a_value_of_constant_size(opened):
    _, codec = opened
    a, b = torch.randn(2, 1, codec.latent_channels, 3, 2, 2).unbind()
    _, state = codec.decode_chunk(a[:, :, :1], codec.new_decoder_state())
    kept = [slot.clone() for slot in state]
    first, later = codec.decode_chunk(a[:, :, 1:], state)
    codec.decode_chunk(b, codec.new_decoder_state())
    again, _ = codec.decode_chunk(a[:, :, 1:], state)
    assert torch.equal(first, again) and all(
        torch.equal(x, y) for x, y in zip(state, kept, strict=True)
    )
    assert [slot.shape for slot in state] == [slot.shape for slot in later]
    # 4 latent pixels
    assert sum(slot.numel() for slot in state) == 4 * 3 * (256 + 4 * 128 + 16 * 64)


@torch.no_grad()
def test_latents_of_wans_encoder_are_decoded(opened):
    """Same channels, same sizes and frames, both normalised: the live decoder takes the large one's
    place.
    """
    _, fast = opened
    patch = (
        {}
        if fast.config.patch_size == 1
        else {
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
        }
    )
    channels = fast.latent_channels
    statistics = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    wan = StreamingAutoencoderKLWan(
        base_dim=4, z_dim=channels, num_res_blocks=1, **patch, **statistics
    ).eval()
    frames = torch.rand(1, 5, 3, 32, 32)
    latents = wan.encode_frames(frames)
    assert fast.decode_latents(latents).shape == wan.decode_latents(latents).shape == frames.shape


def test_half_precision_and_torch_files(tmp_path):
    tensors = {name: tensor.half() for name, tensor in make_file("taew2_1").items()}
    torch.save(tensors, tmp_path / "taew2_1.pth")
    codec = open_codec(tmp_path / "taew2_1.pth")
    assert all(
        torch.equal(tensors[name].float(), tensor) for name, tensor in codec.state_dict().items()
    )


def test_a_file_with_the_decoder_only(tmp_path):
    tensors = {
        name: tensor for name, tensor in make_file("taew2_1").items() if name.startswith("decoder.")
    }
    save_file(tensors, tmp_path / "decoder.safetensors")
    codec = open_codec(tmp_path / "decoder.safetensors")
    assert codec.decode_latents(torch.zeros(1, 16, 1, 1, 1)).shape == (1, 1, 3, 8, 8)
    with pytest.raises(ValueError, match="holds only the decoder; encode with the Wan autoencoder"):
        codec.encode_frames(torch.zeros(1, 1, 3, 8, 8))


def test_saved_as_a_folder_it_opens_as_a_folder(opened, tmp_path):
    _, codec = opened
    codec.save_pretrained(tmp_path / "vae")
    latents = torch.randn(1, codec.latent_channels, 2, 2, 2)
    again = open_codec(tmp_path)
    assert isinstance(again, AutoencoderTAEHV) and torch.equal(
        again.decode_latents(latents), codec.decode_latents(latents)
    )


CHANGES = {
    "missing": (lambda t: t.pop("decoder.8.weight"), "lacks decoder.8.weight and 0 more"),
    "unknown": (lambda t: t.update({"extra": torch.zeros(1)}), "has the unknown extra and 0 more"),
    "shape": (
        lambda t: t.update({"decoder.8.weight": torch.zeros(64, 256, 3, 3)}),
        "decoder.8.weight is \\(64, 256, 3, 3\\), expected \\(128",
    ),
    "other": (
        lambda t: (t.clear(), t.update({"conv_in.weight": torch.zeros(1)})),
        "expected TAEHV's names",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_does_not_fit_is_one_line(tmp_path, name):
    change, message = CHANGES[name]
    tensors, file = make_file("taew2_1"), tmp_path / "taew2_1.safetensors"
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message) as caught:
        open_codec(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_sizes_are_refused(opened):
    _, codec = opened
    channels = codec.latent_channels
    with pytest.raises(ValueError, match=f"latents \\[B, {channels}, T, h, w\\]"):
        codec.decode_latents(torch.zeros(1, 5, 2, 2, 2))
    with pytest.raises(ValueError, match="is not 1 \\+ 4 k"):
        codec.encode_frames(torch.zeros(1, 4, 3, 32, 32))
    with pytest.raises(ValueError, match=f"multiples of {codec.spatial_ratio}"):
        codec.encode_frames(torch.zeros(1, 5, 3, 32, 36))
    _, state = codec.decode_chunk(torch.zeros(1, channels, 1, 1, 2), codec.new_decoder_state())
    with pytest.raises(ValueError, match="the stream has .*= \\(1, 1, 2\\)"):
        codec.decode_chunk(torch.zeros(1, channels, 1, 2, 2), state)
