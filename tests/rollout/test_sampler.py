"""Streaming and sampling: one result, whoever asks for it and however."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from streamvid.core.process import velocity
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.jump_embedding import add_jump_embedding
from streamvid.rollout import sampler
from streamvid.rollout.loop import rollout
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.sampler import (
    GuidedModel,
    generate,
    generate_latents,
    new_cache,
    stream,
    stream_latents,
)
from streamvid.rollout.schedule import StreamConfig, build_schedule
from tests.fakes import TINY_WAN

CONFIG = StreamConfig(num_steps=2, first_steps=3, chunk_frames=2, context_t=0.1)
SIZE = {"height": 8, "width": 8}
SHAPE = (3, 4, 4)


class CountingCodec:
    """Repeats a latent frame 4 times, the first of a stream once; pixels tell how many came
    before.
    """

    latent_channels, temporal_ratio, spatial_ratio = 3, 4, 2

    def new_decoder_state(self):
        return 0

    def decode_chunk(self, latents, state):
        frames = (
            latents.sigmoid().transpose(1, 2).repeat_interleave(4, dim=1)[:, 0 if state else 3 :]
        )
        return (
            frames.repeat_interleave(2, -1).repeat_interleave(2, -2) / (1 + state),
            state + latents.shape[2],
        )


@pytest.fixture
def codec():
    return CountingCodec()


def tiny_wan():
    torch.manual_seed(0)
    return CausalWanTransformer3DModel(
        **{**TINY_WAN, "in_channels": 3, "out_channels": 3, "text_dim": 3}
    ).eval()


CONFIGS = {
    "self-forcing": CONFIG,
    "reused context": StreamConfig(
        step_table=((1.0, 0.9, 0.4), (1.0, 0.4)), chunk_frames=2, commit="reuse"
    ),
    "rolling": StreamConfig(
        order="rolling", num_steps=2, chunk_frames=2, window_frames=6, sink_frames=1
    ),
    "endless positions": StreamConfig(
        chunk_frames=2, num_steps=1, window_frames=4, sink_frames=1, positions="window"
    ),
    "jumps": StreamConfig(num_steps=3, chunk_frames=2, stepper="jump"),
    "rolling jumps": StreamConfig(order="rolling", num_steps=2, chunk_frames=2, stepper="jump"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("real", [False, True], ids=["fake student", "Wan student"])
def test_stream_export_and_training_agree_bitwise(student, codec, cond, config, real):
    student = tiny_wan() if real else student
    if real and config.stepper == "jump":
        add_jump_embedding(student)
        torch.nn.init.normal_(student.condition_embedder.jump_embedder.linear_2.weight)
    size = {"seeds": [1, 2], "num_frames": 29, **SIZE}  # 8 latent frames, 4 chunks
    chunks = list(stream(student, codec, cond, config, **size))
    assert torch.equal(
        torch.cat([c.frames for c in chunks], 1), generate(student, codec, cond, config, **size)
    )
    endless = stream(student, codec, cond, config, seeds=[1, 2], **SIZE)
    training = rollout(
        student,
        cond,
        build_schedule(config, 4),
        KeyedNoise([1, 2]),
        latent_shape=SHAPE,
        chunk_frames=2,
        cache=new_cache(student, config, 2, SHAPE),
        commit=config.commit,
        context_t=config.context_t,
        stepper=config.stepper,
    )
    for chunk, trained in zip(chunks, training, strict=True):
        assert trained.prediction.requires_grad
        assert torch.equal(chunk.latents, trained.prediction.detach())
        # there, chunks begin while earlier ones wait, so an end is felt before it
        if config.order != "rolling":
            assert torch.equal(next(endless).frames, chunk.frames)


def test_a_stream_does_not_depend_on_its_batch(student, codec, cond):
    size = {"num_frames": 29, **SIZE}
    batch = generate(student, codec, cond, CONFIG, seeds=[1, 2], **size)
    assert torch.equal(batch[1:], generate(student, codec, cond[1:], CONFIG, seeds=[2], **size))


def test_alone_and_in_a_batch_noise_is_equal_to_the_bit_and_a_sample_up_to_rounding(codec):
    """Matrix products of another size round otherwise; a draw or a time that depends on the batch
    shows as 1e-2 and more.
    """
    torch.manual_seed(0)
    student, cond, seeds = tiny_wan(), torch.randn(5, 4, 3), [7, 1, 2, 9, 4]

    def made(rows):
        seen = []
        chunks = stream_latents(
            student,
            cond[rows],
            CONFIG,
            seeds=[seeds[row] for row in rows],
            latent_shape=SHAPE,
            num_chunks=3,
            before_step=lambda chunk, t, x: seen.append((t, x.clone())) or x,
        )
        latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
        return latents, torch.stack([x for t, x in seen if t == 1])

    latents, noise = made([0, 1, 2, 3, 4])
    for row in range(5):
        alone, drawn = made([row])
        assert torch.equal(drawn[:, 0], noise[:, row])
        torch.testing.assert_close(alone[0], latents[row], rtol=0, atol=1e-4)
    assert (latents[0] - latents[1]).abs().max() > 0.1


def test_chunks_have_their_frames_and_never_end(student, codec, cond):
    chunks = list(itertools.islice(stream(student, codec, cond, CONFIG, seeds=[1, 2], **SIZE), 5))
    assert [c.frames.shape for c in chunks] == [(2, 5, 3, 8, 8)] + [(2, 8, 3, 8, 8)] * 4
    assert [c.index for c in chunks] == list(range(5))
    assert all(c.latents.shape == (2, 3, 2, 4, 4) and not c.frames.requires_grad for c in chunks)


def test_streaming_leaves_the_viewers_grad_mode_alone(student, codec, cond):
    for chunk in stream(student, codec, cond, CONFIG, seeds=[1, 2], num_frames=13, **SIZE):
        assert torch.is_grad_enabled()
        assert not chunk.latents.is_inference()  # a later loss may use it


def test_times_are_of_the_model_and_the_codec_only(student, cond, monkeypatch):
    """A step takes 1, a decode .25, and the viewer's 100 between chunks are not counted."""
    clock = [0.0]

    def spend(seconds, result=None):
        clock[0] += seconds
        return result

    class SlowCodec(CountingCodec):
        def decode_chunk(self, latents, state):
            return spend(0.25, super().decode_chunk(latents, state))

    monkeypatch.setattr(sampler, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    options = {
        "seeds": [1, 2],
        "num_frames": 21,
        "after_x0": lambda chunk, t, x0: spend(1, x0),
        **SIZE,
    }
    chunks = stream(student, SlowCodec(), cond, CONFIG, **options)
    times = [(chunk.denoise_s, chunk.decode_s, spend(100))[:2] for chunk in chunks]
    assert times == [(3, 0.25), (2, 0.25), (2, 0.25)]


def test_hooks_reach_the_loop(student, codec, cond):
    zero = lambda chunk, t, x: torch.zeros_like(x)
    (chunk,) = stream(
        student, codec, cond, CONFIG, seeds=[1, 2], num_frames=5, after_x0=zero, **SIZE
    )
    assert chunk.latents.eq(0).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"num_frames": 77},
            (
                "chunk_frames=3 does not divide 20 latent frames; use 18 or 21, i.e. num_frames=69"
                " or 81"
            ),
        ),
        (
            {"num_frames": 5},
            "chunk_frames=3 does not divide 2 latent frames; use 3, i.e. num_frames=9",
        ),
        ({"num_frames": 80}, r"num_frames=80 is not 1 \+ 4 k; use 77 or 81"),
        ({"height": 9}, "frames of 9 x 8 pixels, expected multiples of 2; use 8 x 8"),
        ({"width": 0}, "use 8 x 2"),
        ({"seeds": [1]}, "1 noise seeds for 2 prompts"),
    ],
)
def test_bad_sizes_are_refused_before_the_first_chunk(student, codec, cond, options, message):
    with pytest.raises(ValueError, match=message):
        stream(student, codec, cond, StreamConfig(), **{"seeds": [1, 2], **SIZE, **options})


# ---- a bidirectional teacher ---------------------------------------------------------------------


def gaussian_predict(std):
    """The exact velocity of N(cond, std^2), cond the mean of a sample's prompt."""

    def predict(x_t, t, cond):
        mean, t = cond.mean(dim=(1, 2)).reshape(-1, 1, 1, 1, 1), t.reshape(-1, 1, 1, 1, 1)
        variance = (1 - t) ** 2 * std**2 + t**2
        residual = x_t - (1 - t) * mean
        return velocity(mean + (1 - t) * std**2 / variance * residual, t / variance * residual)

    return predict


def test_teacher_sampling_converges_to_the_flow(cond):
    """The flow of a Gaussian takes eps to mean + std eps; Euler's error falls like 1 / n, guidance
    moves the mean.
    """
    uncond, scale, std = cond.flip(0), 3.0, 0.5
    model = GuidedModel(gaussian_predict(std), uncond, scale)
    noise = [
        KeyedNoise([1, 2]).draw(k, 0, (3, 2, 4, 4), torch.device("cpu"), torch.float32)
        for k in range(3)
    ]
    mean = (uncond + scale * (cond - uncond)).mean(dim=(1, 2)).reshape(-1, 1, 1, 1, 1)
    exact = mean + std * torch.cat(noise, dim=2)
    errors = []
    for num_steps in (50, 100, 200):
        config = StreamConfig(
            num_steps=num_steps,
            shift=1.0,
            chunk_frames=2,
            order="full_sequence",
            stepper="euler",
            commit="none",
        )
        latents = generate_latents(
            model, cond, config, seeds=[1, 2], latent_shape=SHAPE, num_chunks=3
        )
        errors.append((latents - exact).abs().max().item())
    assert errors[-1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1) and errors[1] / errors[
        2
    ] == pytest.approx(2, rel=0.1)


def test_guidance_of_one_runs_one_pass(cond):
    calls = []
    predict = lambda x_t, t, cond: calls.append((t.tolist(), cond)) or torch.zeros_like(x_t)
    config = StreamConfig(
        num_steps=2, shift=1.0, order="full_sequence", stepper="euler", commit="none"
    )
    sizes = {"seeds": [1, 2], "latent_shape": SHAPE, "num_chunks": 1}
    generate_latents(GuidedModel(predict), cond, config, **sizes)
    assert [t for t, _ in calls] == [[1.0, 1.0], [0.5, 0.5]]
    with pytest.raises(ValueError, match="guidance_scale=4.0 needs uncond"):
        GuidedModel(predict, guidance_scale=4.0)


def test_full_sequence_needs_a_length(student, cond):
    config = StreamConfig(order="full_sequence", commit="none")
    with pytest.raises(ValueError, match="give it a length"):
        stream_latents(student, cond, config, seeds=[1, 2], latent_shape=SHAPE)
