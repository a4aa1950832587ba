"""A Wan teacher sampled through our rollout is diffusers' own pipeline, for every kind of the
family.
"""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image

from streamvid.codecs.load import open_codec
from streamvid.core.process import x0_from_v
from streamvid.rollout.loop import rollout
from streamvid.rollout.noise import INITIAL_EVENT, KeyedNoise
from streamvid.rollout.sampler import GuidedModel
from streamvid.rollout.schedule import full_sequence
from streamvid.seeding import keyed_normal
from streamvid.teachers.base import VideoCond, predict_guided
from streamvid.teachers.load import open_teacher
from streamvid.teachers.wan import WanTeacher

PROMPTS, NEGATIVE, SCALE = ["a red ball falls", "a cat"], "a ball", 3.0
NOISE, SHAPE = KeyedNoise([3, 4]), (4, 3, 4, 6)  # C, T, h, w
TEXT_KINDS, IMAGE_KINDS = ["2.1", "a14b", "ti2v"], ["2.1_image", "a14b_image", "ti2v_image"]


class Unshifted(FlowMatchEulerDiscreteScheduler):
    """Shifts once: diffusers' own shifts its grid twice when it gets a number of steps."""

    def set_timesteps(self, num_inference_steps, device=None):
        sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        super().set_timesteps(sigmas=sigmas, device=device)


def pipeline_of(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def from_pipeline(pipeline, prompts=PROMPTS, noise=NOISE, steps=6, **options):
    ratio = pipeline.vae.config.scale_factor_spatial
    return pipeline(
        prompt=prompts,
        negative_prompt=NEGATIVE,
        height=SHAPE[2] * ratio,
        width=SHAPE[3] * ratio,
        num_frames=1 + 4 * (SHAPE[1] - 1),
        num_inference_steps=steps,
        guidance_scale=SCALE,
        max_sequence_length=6,
        latents=noise.draw(0, INITIAL_EVENT, SHAPE, torch.device("cpu"), torch.float32),
        output_type="latent",
        **options,
    ).frames


@torch.no_grad()
def from_rollout(teacher, times, cond, with_image=lambda cond: cond, noise=NOISE):
    model = GuidedModel(
        lambda x, t, cond: teacher.predict(x, t, with_image(cond)), teacher.uncond[None], SCALE
    )
    results = rollout(
        model,
        cond,
        full_sequence(times, 1),
        noise,
        latent_shape=(4, *SHAPE[2:]),
        chunk_frames=SHAPE[1],
        commit="none",
        stepper="euler",
    )
    return torch.cat([result.latents for result in results], dim=2)


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_text_to_video_equals_the_pipeline(wan, kind):
    """Prompts, negative prompts, times, experts and guidance at once; from the folder that the
    pipeline wrote.
    """
    pipeline, teacher = pipeline_of(wan(kind)), open_teacher(wan(kind), negative_prompt=NEGATIVE)
    expected = from_pipeline(pipeline)
    times = tuple(pipeline.scheduler.sigmas[:-1].tolist())
    got = from_rollout(teacher, times, teacher.encode_prompt(PROMPTS))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert (got - NOISE.draw(0, INITIAL_EVENT, SHAPE, got.device, got.dtype)).abs().mean() > 0.1


def test_the_shift_of_the_folder_gives_the_pipelines_times(wan):
    pipeline, teacher = pipeline_of(wan("2.1")), open_teacher(wan("2.1"), negative_prompt=NEGATIVE)
    pipeline.scheduler = Unshifted.from_config(pipeline.scheduler.config)
    expected = from_pipeline(pipeline, steps=4)
    cond = teacher.encode_prompt(PROMPTS)
    torch.testing.assert_close(
        from_rollout(teacher, teacher.step_times(4), cond), expected, rtol=0, atol=1e-4
    )
    teacher.shift = 5.0
    assert (from_rollout(teacher, teacher.step_times(4), cond) - expected).abs().max() > 1e-3


# ---- Experts -------------------------------------------------------------------------------------


@pytest.fixture
def experts(wan):
    return open_teacher(wan("a14b"), negative_prompt=NEGATIVE)


X, T_OF = keyed_normal((3, *SHAPE), "x"), [0.9, 0.2, 0.875]


def test_each_sample_goes_to_the_expert_of_its_noise_level(experts, wan):
    """.875 itself is the first expert's, as in the pipeline; the batch keeps its order and its
    gradients.
    """
    t, cond, x = torch.tensor(T_OF), keyed_normal((3, 6, 8), "cond"), X.clone().requires_grad_()
    velocity = experts.predict(x, t, cond)
    for row, part in enumerate(("transformer", "transformer_2", "transformer")):
        expert = WanTransformer3DModel.from_pretrained(wan("a14b") / part)
        expected = expert(X[row : row + 1], 1000 * t[row : row + 1], cond[row : row + 1]).sample
        torch.testing.assert_close(velocity[row : row + 1], expected, rtol=1e-5, atol=1e-6)
    velocity.sum().backward()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()


def test_frames_of_different_levels_go_to_the_expert_of_the_noisiest(experts):
    """Clean context beside a noisy chunk does not call the low-noise expert."""
    t = torch.tensor([[0.0, 0.0, 0.95], [0.0, 0.2, 0.3]])
    both = experts.predict(X[:2], t, keyed_normal((2, 6, 8), "cond"))
    alone = WanTeacher(experts.transformer, None, 3.0).predict(
        X[:1], t[:1], keyed_normal((2, 6, 8), "cond")[:1]
    )
    torch.testing.assert_close(both[:1], alone, rtol=1e-5, atol=1e-6)
    low = WanTeacher(experts.transformer_2, None, 3.0).predict(
        X[1:2], t[1:], keyed_normal((2, 6, 8), "cond")[1:]
    )
    torch.testing.assert_close(both[1:], low, rtol=1e-5, atol=1e-6)


def test_offloading_keeps_one_expert_on_the_device(wan, experts):
    """The result is the same, and when an expert goes to the device the other one leaves it
    first.
    """
    teacher = open_teacher(wan("a14b"), load_text_encoder=False, offload=True)
    cond = keyed_normal((3, 6, 8), "cond")
    with torch.no_grad():
        expected = experts.predict(X, torch.tensor(T_OF), cond)
        torch.testing.assert_close(teacher.predict(X, torch.tensor(T_OF), cond), expected)
    with pytest.raises(ValueError, match="offload=True moves weights"):
        teacher.predict(X.clone().requires_grad_(), torch.tensor(T_OF), cond)
    moves = []
    for name in ("transformer", "transformer_2"):
        getattr(teacher, name).to = lambda device, name=name: moves.append((name, str(device)))
    teacher.to("cuda:0")
    assert moves == [] and str(teacher.device) == "cuda:0"
    teacher._bring(teacher.transformer_2, X)
    assert moves == [("transformer", "cpu"), ("transformer_2", "cuda:0")]


def test_experts_that_do_not_belong_together_are_refused(experts):
    other = WanTransformer3DModel(**{**experts.transformer.config, "text_dim": 12})
    with pytest.raises(ValueError, match="text_dim is 8 and 12"):
        WanTeacher(experts.transformer, None, 3.0, transformer_2=other, boundary_ratio=0.9)
    with pytest.raises(ValueError, match="belong together"):
        WanTeacher(experts.transformer, None, 3.0, transformer_2=experts.transformer_2)


# ---- First frames --------------------------------------------------------------------------------


def image_of(codec):
    size = (SHAPE[2] * codec.spatial_ratio, SHAPE[3] * codec.spatial_ratio)
    return (keyed_normal((3, *size), "image").sigmoid() * 255).round() / 255


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_image_to_video_equals_the_pipeline(wan, kind):
    """The mask, the latents of the image and of grey, CLIP, and the first frame's time, from one
    image file.
    """
    pipeline, codec = pipeline_of(wan(kind)), open_codec(wan(kind))
    teacher = open_teacher(wan(kind), negative_prompt=NEGATIVE)
    image, noise = image_of(codec), KeyedNoise([3])
    picture = Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    expected = from_pipeline(pipeline, PROMPTS[:1], noise, image=picture)
    cond = teacher.encode_prompt(PROMPTS[:1])
    known = teacher.encode_first_frame(image[None], cond, codec, SHAPE[1])
    times = tuple(pipeline.scheduler.sigmas[:-1].tolist())
    got = from_rollout(
        teacher,
        times,
        cond,
        lambda cond: VideoCond(cond, known.first_frame, known.image_embeds),
        noise,
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    other = teacher.encode_first_frame(1 - image[None], cond, codec, SHAPE[1])
    moved = teacher.predict(X[:1], torch.tensor([0.5]), other) - teacher.predict(
        X[:1], torch.tensor([0.5]), known
    )
    assert moved.abs().mean() > 1e-3


def test_a_known_frame_is_predicted_as_it_is(wan):
    """At every noise level, where frames differ in it too, and at t = 0 the velocity is finite."""
    teacher, known = open_teacher(wan("ti2v_image")), keyed_normal((2, 4, 1, 4, 6), "known")
    cond = VideoCond(keyed_normal((2, 6, 8), "cond"), known)
    for t in (torch.tensor([0.9, 0.3]), torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.2, 0.2]])):
        velocity = predict_guided(teacher, X[:2], t, cond, SCALE)
        torch.testing.assert_close(
            x0_from_v(X[:2], velocity, t)[:, :, :1], known, rtol=0, atol=1e-5
        )
    still = teacher.predict(X[:2], torch.zeros(2), cond)
    assert still.isfinite().all() and (still[:, :, 0] == 0).all()


def test_a_first_frame_reaches_both_experts_and_keeps_its_row(wan):
    teacher, t = open_teacher(wan("a14b_image")), torch.tensor([0.2, 0.95])
    cond = VideoCond(keyed_normal((2, 6, 8), "cond"), keyed_normal((2, *SHAPE), "known"))
    together = teacher.predict(X[:2], t, cond)
    for row in (0, 1):
        alone = teacher.predict(X[row : row + 1], t[row : row + 1], cond.rows(torch.tensor([row])))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind, first_frame, message",
    [
        ("2.1_image", None, "image-to-video model; give the first frame"),
        ("2.1", SHAPE, "text-to-video model and takes no first frame"),
        (
            "a14b_image",
            (4, 1, 4, 6),
            r"first_frame of the shape \(1, 4, 1, 4, 6\), expected \(1, 4, 3, 4, 6\)",
        ),
        ("ti2v_image", SHAPE, r"first_frame of the shape .*expected \(1, 4, 1, 4, 6\)"),
        ("2.1_image", SHAPE, "needs image_embeds"),
    ],
)
def test_a_first_frame_that_does_not_fit_is_one_clear_line(wan, kind, first_frame, message):
    teacher, cond = open_teacher(wan(kind), load_text_encoder=False), torch.zeros(1, 6, 8)
    if first_frame is not None:
        cond = VideoCond(cond, torch.zeros(1, *first_frame))
    with pytest.raises(ValueError, match=message):
        teacher.predict(X[:1], torch.tensor([0.5]), cond)


def test_transformers_of_other_conditions_are_refused():
    sizes = dict(
        num_attention_heads=2,
        attention_head_dim=12,
        ffn_dim=32,
        num_layers=1,
        text_dim=8,
        freq_dim=16,
    )
    with pytest.raises(ValueError, match="8 input and 4 output channels"):
        WanTeacher(WanTransformer3DModel(in_channels=8, out_channels=4, **sizes), None, 3.0)
    two_frames = dict(
        in_channels=12, out_channels=4, image_dim=6, added_kv_proj_dim=24, pos_embed_seq_len=10
    )
    with pytest.raises(ValueError, match="a first and a last frame"):
        WanTeacher(WanTransformer3DModel(**sizes, **two_frames), None, 3.0)
