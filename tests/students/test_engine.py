"""Engine options: what is read from a text, and what a prepared student computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from streamvid.codecs.wan_vae import StreamingAutoencoderKLWan
from streamvid.models.linear import PrepackedGELU, PrepackedLinear, prepack
from streamvid.rollout.sampler import generate
from streamvid.students.engine import EngineOptions, describe_engine, engine_options, prepare
from streamvid.students.folder import TINY_STUDENT, Student, load_student


@pytest.fixture(scope="module")
def student() -> Student:
    return load_student(TINY_STUDENT)


@torch.no_grad()
def show(student: Student, num_frames: int = 21) -> Tensor:
    """Frames [1, T, 3, 64, 64] of a stream whose context fills up."""
    config = replace(student.stream, num_steps=2, step_table=(), window_frames=6)
    cond = student.prompts.encode(["a small red circle moves up"])
    cond = cond.to(student.transformer.patch_embedding.weight.dtype)
    size = dict(seeds=[3], height=64, width=64, num_frames=num_frames)
    return generate(student.transformer, student.codec, cond, config, **size)


def test_a_text_names_options():
    """What ``names`` writes, ``engine_options`` reads."""
    options = EngineOptions(attention="auto", prepacked=True, compile=True)
    assert options.names == ("attention=auto", "prepacked", "compile")
    assert engine_options(",".join(options.names)) == options
    assert engine_options(" ") == EngineOptions()


@pytest.mark.parametrize("text", ["prepackd", "attention", "compile=yes"])
def test_what_is_no_option_is_refused(text):
    with pytest.raises(ValueError, match=r"^engine option '.*; (expected|write)"):
        engine_options(text)


def test_without_options_it_is_the_student(student):
    assert prepare(student, EngineOptions()) is student


@pytest.mark.parametrize(
    "text, tolerance",
    [
        ("prepacked", 1e-4),
        ("attention=products", 1e-4),
        ("attention=auto", 0),  # on this student torch's own is the fastest
        ("joint_decode", 1e-5),
        ("same_precision", 0),
        ("prepacked,attention=products,joint_decode", 1e-4),
    ],
)
def test_options_change_rounding_only(student, text, tolerance):
    """A stream is near the plain one, frame by frame, and the student given stays as it was."""
    plain = show(student)
    options = engine_options(text)
    prepared = prepare(student, options)
    difference = (show(prepared) - plain).abs().max()
    assert difference <= tolerance
    assert difference > 0 or not tolerance, "the option does nothing"
    assert torch.equal(show(student), plain)


def test_the_codec_follows_the_transformers_precision():
    """Frames differ by less than two of 256 levels on average."""
    student = load_student(TINY_STUDENT, dtype=torch.bfloat16)
    prepared = prepare(student, engine_options("same_precision"))
    assert {each.dtype for each in prepared.codec.parameters()} == {torch.bfloat16}
    assert {each.dtype for each in student.codec.parameters()} == {torch.float32}
    difference = (show(prepared) - show(student)).abs()
    assert 0 < difference.mean() < 2 / 256


def test_chunks_decoded_jointly_are_chunks_decoded_in_order(student):
    """Of any length, at the start of a stream and after it."""
    codec = prepare(student, engine_options("joint_decode")).codec
    latents = torch.randn(1, codec.latent_channels, 7, 2, 2, generator=torch.Generator())
    expected = student.codec.decode_latents(latents)
    state, frames = codec.new_decoder_state(), []
    for chunk in latents.split((2, 4, 1), dim=2):
        some, state = codec.decode_chunk(chunk, state)
        frames.append(some)
    assert [len(some[0]) for some in frames] == [5, 16, 4]
    torch.testing.assert_close(torch.cat(frames, dim=1), expected, atol=1e-5, rtol=0)


def test_what_cannot_be_had_is_one_line(student):
    with pytest.raises(ValueError, match="^attention=flash_5: .*must be one of"):
        prepare(student, EngineOptions(attention="flash_5"))
    with pytest.raises(ValueError, match="^prepacked and compile exclude each other"):
        prepare(student, EngineOptions(prepacked=True, compile=True))
    wan = StreamingAutoencoderKLWan(base_dim=4, num_res_blocks=1)
    with pytest.raises(ValueError, match="^joint_decode: .* one latent frame at a time"):
        prepare(replace(student, codec=wan), EngineOptions(joint_decode=True))


def test_the_choice_of_attention_is_one_line(student):
    assert describe_engine(student) == "cpu, float32, attention: native"
    prepared = prepare(student, EngineOptions(attention="auto"))
    assert describe_engine(prepared) == "cpu, float32, attention: native (auto)"
    prepared = prepare(student, EngineOptions(attention="products"))
    assert describe_engine(prepared) == "cpu, float32, attention: products"


# ---- prepacked layers ----------------------------------------------------------------------------


def test_prepacked_layers_keep_names_and_parameters(student):
    """So that a prepared student is saved, fingerprinted and given adapters as before."""
    transformer = prepare(student, EngineOptions(prepacked=True)).transformer
    before, after = student.transformer.state_dict(), transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)
    layers = [each for each in transformer.modules() if isinstance(each, PrepackedLinear)]
    assert len(layers) == 2 * len(transformer.blocks) + 1  # the feed-forward, and time_proj
    assert sum(isinstance(each, PrepackedGELU) for each in transformer.modules()) == len(
        transformer.blocks
    )


def packed_layer() -> tuple[nn.Linear, PrepackedLinear, Tensor]:
    torch.manual_seed(0)
    plain = nn.Linear(300, 256)
    model = nn.Sequential(plain)
    prepack(model)
    return plain, model[0], torch.randn(2, 5, 300)


@torch.no_grad()
def test_a_changed_weight_is_packed_anew():
    """Written in place, as an optimiser does, or exchanged, as an adapter's merge may do."""
    plain, layer, x = packed_layer()
    assert isinstance(layer, PrepackedLinear)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-5)
    plain.weight.mul_(-2)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-5)
    layer.weight.data = torch.ones(256, 300)
    plain.weight.data = torch.ones(256, 300)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-4, rtol=1e-5)


@torch.inference_mode()
def test_weights_made_in_inference_mode_are_packed():
    """They count no writes."""
    plain, layer, x = packed_layer()
    torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-5)


def test_a_gradient_flows_through_a_prepacked_layer():
    plain, layer, x = packed_layer()
    grads = [
        torch.autograd.grad(module(x).square().sum(), [plain.weight, plain.bias])
        for module in (plain, layer)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_a_prepacked_layer_takes_other_precisions():
    """A cast module computes in its new precision, packed or not."""
    plain, layer, x = packed_layer()
    expected = plain(x)
    layer(x)
    for dtype, tolerance in [(torch.float64, 1e-5), (torch.bfloat16, 0.1)]:
        out = layer.to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(student):
    """While the context grows, and after it."""
    prepared = prepare(student, engine_options("compile,attention=auto"))
    torch.testing.assert_close(show(prepared, 33), show(student, 33), atol=1e-4, rtol=0)
