"""CogVideoX behind our interface: its border conversion is exact, and its sampler is our Euler
loop.
"""

import copy
import json
import math
import shutil

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

from streamvid.core.inject import dmd_gradient
from streamvid.core.process import add_noise, x0_from_v
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.lora import LoraConfig, adapt
from streamvid.objectives import find_objective
from streamvid.objectives.dmd import compare
from streamvid.rollout.loop import rollout
from streamvid.rollout.noise import INITIAL_EVENT, KeyedNoise
from streamvid.rollout.sampler import GuidedModel
from streamvid.rollout.schedule import StreamConfig, full_sequence
from streamvid.seeding import keyed_normal
from streamvid.settings.video import RolloutConfig, VideoSetting
from streamvid.teachers.base import VideoCond
from streamvid.teachers.cogvideox import CogVideoXTeacher
from streamvid.teachers.load import open_teacher

KINDS = ["2b", "5b", "1.5"]
PROMPTS, NEGATIVE, SCALE = ["a red ball falls", "a cat"], "a ball", 3.0
SHAPE, NOISE = (4, 2, 6, 8), KeyedNoise([3, 4])  # C, T, h, w
X0, EPS = (keyed_normal((2, *SHAPE), name) for name in ("x0", "eps"))


def pipeline_of(folder):
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def native(clip):
    """Between our order of axes and that of diffusers' CogVideoX."""
    return clip.transpose(1, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 1, 250, 700, 998, 999])
def test_the_data_prediction_is_that_of_diffusers(cogvideox, kind, step):
    """The same noise level in both processes: x0 and eps are the same, the states differ by a
    factor.
    """
    pipeline, teacher = pipeline_of(cogvideox(kind)), open_teacher(cogvideox(kind))
    scheduler, cond = pipeline.scheduler, teacher.encode_prompt(PROMPTS)
    steps = torch.tensor([step, step])
    noised = scheduler.add_noise(native(X0).double(), native(EPS).double(), steps)
    rotary = None
    if kind != "2b":
        ratio = pipeline.vae_scale_factor_spatial
        rotary = pipeline._prepare_rotary_positional_embeddings(
            SHAPE[2] * ratio, SHAPE[3] * ratio, SHAPE[1], "cpu"
        )
    with torch.no_grad():
        out = pipeline.transformer(
            noised.float(), cond, steps, image_rotary_emb=rotary, return_dict=False
        )[0]
    scheduler.set_timesteps(1000)
    expected = scheduler.step(out.double(), step, noised).pred_original_sample

    alpha, sigma = (
        scheduler.alphas_cumprod[step] ** 0.5,
        (1 - scheduler.alphas_cumprod[step]) ** 0.5,
    )
    t = (sigma / (alpha + sigma)).double().repeat(2)
    x_t = add_noise(X0.double(), EPS.double(), t)
    with torch.no_grad():
        velocity = teacher.predict(x_t, t, cond)
    torch.testing.assert_close(x0_from_v(x_t, velocity, t), native(expected), rtol=0, atol=1e-5)
    with torch.no_grad():
        single = teacher.predict(x_t.float(), t.float(), cond)  # as the loop calls it
    torch.testing.assert_close(
        x0_from_v(x_t.float(), single, t.float()), native(expected).float(), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_our_loop_is_the_pipelines_deterministic_ddim(cogvideox, kind):
    pipeline, teacher = (
        pipeline_of(cogvideox(kind)),
        open_teacher(cogvideox(kind), negative_prompt=NEGATIVE),
    )
    start = NOISE.draw(0, INITIAL_EVENT, SHAPE, torch.device("cpu"), torch.float32)
    expected = pipeline(
        prompt=PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        height=SHAPE[2] * 8,
        width=SHAPE[3] * 8,
        num_frames=5,
        num_inference_steps=5,
        guidance_scale=SCALE,
        latents=native(start),
        output_type="latent",
        max_sequence_length=6,
    ).frames
    model, cond = (
        GuidedModel(teacher.predict, teacher.uncond[None], SCALE),
        teacher.encode_prompt(PROMPTS),
    )
    with torch.no_grad():
        results = rollout(
            model,
            cond,
            full_sequence(teacher.step_times(5), 1),
            NOISE,
            latent_shape=(4, *SHAPE[2:]),
            chunk_frames=SHAPE[1],
            commit="none",
            stepper="euler",
        )
        got = next(iter(results)).latents
    torch.testing.assert_close(got, native(expected), rtol=0, atol=1e-4)
    assert (got - start).abs().mean() > 0.1


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_every_kind_of_prediction_is_converted(cogvideox, prediction_type):
    """Of a network that knows the answer, the data prediction is the data."""
    scheduler = CogVideoXDDIMScheduler(prediction_type=prediction_type)

    class Oracle(torch.nn.Module):
        """Says what the scheduler's own formulas say of X0 and EPS."""

        config = open_teacher(cogvideox("2b"), load_text_encoder=False).transformer.config
        proj_out = torch.nn.Linear(1, 1, dtype=torch.float64)

        def forward(self, hidden_states, encoder_hidden_states, timestep, **options):
            step = timestep.round().long()
            answers = {"epsilon": EPS, "sample": X0, "v_prediction": None}
            answer = answers[prediction_type]
            if answer is None:
                return (scheduler.get_velocity(native(X0).double(), native(EPS).double(), step),)
            return (native(answer).double(),)

    teacher = CogVideoXTeacher(Oracle(), None, scheduler)
    alpha_bar = scheduler.alphas_cumprod[[400, 900]].double()
    t = (1 - alpha_bar).sqrt() / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())
    x_t = add_noise(X0.double(), EPS.double(), t)
    torch.testing.assert_close(
        x0_from_v(x_t, teacher.predict(x_t, t, torch.zeros(2, 6, 8)), t), X0.double()
    )


def test_the_published_schedules_begin_in_noise_and_are_close_to_their_shift(cogvideox):
    """A signal of 0 at the last step once made the clock's times NaN."""
    for kind in ("2b", "5b"):
        teacher = open_teacher(cogvideox(kind), load_text_encoder=False)
        times = teacher.step_times(50)
        assert (
            times[0] == 1
            and all(later < earlier for earlier, later in zip(times, times[1:]))
            and times[-1] > 0
        )
        middle = teacher.step_times(2)[1]
        assert abs(teacher.shift / (1 + teacher.shift) - middle) < 2e-3
        velocity = teacher.predict(X0, torch.ones(2), torch.zeros(2, 6, 8))
        assert velocity.isfinite().all()


def test_a_teacher_is_frozen_and_lets_gradients_through(cogvideox):
    teacher, x = open_teacher(cogvideox("5b")), X0.clone().requires_grad_()
    assert not any(p.requires_grad for p in teacher.transformer.parameters())
    teacher.predict(x, torch.tensor([0.5, 0.9]), teacher.encode_prompt(PROMPTS)).sum().backward()
    assert x.grad.abs().sum() > 0


def test_half_precision_stays_close(cogvideox):
    low = open_teacher(cogvideox("5b"), torch_dtype=torch.bfloat16)
    full, t, cond = (
        open_teacher(cogvideox("5b")),
        torch.tensor([0.5, 0.9]),
        low.encode_prompt(PROMPTS),
    )
    assert (
        low.transformer.dtype == torch.bfloat16 and low.predict(X0, t, cond).dtype == torch.float32
    )
    torch.testing.assert_close(
        low.predict(X0, t, cond), full.predict(X0, t, cond), rtol=0.1, atol=0.05
    )


# ---- As a teacher of a student -------------------------------------------------------------------


def setting_of(folder, name="dmd", fake_knows_steps=False):
    torch.manual_seed(0)
    student = CausalWanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    teacher = open_teacher(folder)
    objective = find_objective(name)(guidance_scale=1.0)
    rollout = RolloutConfig(num_chunks=1, fake_knows_steps=fake_knows_steps)
    stream = StreamConfig(num_steps=2, chunk_frames=2)
    setting = VideoSetting(objective, student, stream, (4, 6, 8), teacher, rollout)
    return setting, {"cond": teacher.encode_prompt(PROMPTS), "keys": [3, 4]}


def turn_of(setting, batch, turn, step):
    """Gradients as the trainer makes them."""
    for name, network in setting.networks().items():
        network.requires_grad_(name == turn)
        network.zero_grad(set_to_none=True)
    loss, numbers = setting.loss(turn, batch, step)
    loss.backward()
    grads = [p.grad for p in setting.networks()[turn].parameters() if p.grad is not None]
    assert (
        grads
        and all(grad.isfinite().all() for grad in grads)
        and all(map(math.isfinite, numbers.values()))
    )
    return grads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_teaches_a_student_by_distribution_matching(cogvideox, kind, checkpointing):
    """The fake score was called as a Wan transformer, which ended in an AssertionError of
    diffusers.

    A copy of the teacher leaves the student where it is; once it follows the student's clips there
    is a gradient, which at the clip is that of the two data predictions.
    """
    setting, batch = setting_of(cogvideox(kind))
    fake_score = setting.networks()["fake_score"]
    if checkpointing:
        fake_score.enable_gradient_checkpointing()
    assert all((grad == 0).all() for grad in turn_of(setting, batch, "student", 0))
    optimizer = torch.optim.Adam(fake_score.parameters(), 1e-2)
    for step in range(2):
        turn_of(setting, batch, "fake_score", step)
        optimizer.step()
    assert any(grad.any() for grad in turn_of(setting, batch, "student", 2))
    loss, _ = setting.loss("student", batch, 2)
    step = setting.step_of("student", batch, 2)
    x = step.sample().x.detach()
    x_t, t, fake, real = compare(step, x)
    for network, x0 in ((fake_score, fake), (setting.teacher, real)):
        velocity = network.predict(x_t, t, batch["cond"])
        torch.testing.assert_close(x0, x0_from_v(x_t, velocity, t))
    expected = 0.5 * dmd_gradient(x, fake, real).square().mean()
    torch.testing.assert_close(loss.detach(), expected)


def test_its_trainable_copy_is_a_score_in_float32_with_the_same_names(cogvideox):
    teacher = open_teacher(cogvideox("5b"), torch_dtype=torch.bfloat16)
    score, t, cond = (
        teacher.trainable_copy(),
        torch.tensor([0.5, 0.9]),
        teacher.encode_prompt(PROMPTS),
    )
    for (name, own), (theirs, frozen) in zip(
        score.named_parameters(), teacher.transformer.named_parameters(), strict=True
    ):
        assert (
            name == theirs
            and own.dtype == torch.float32
            and own.requires_grad
            and not frozen.requires_grad
        )
    assert score.training and score._supports_gradient_checkpointing
    torch.testing.assert_close(
        score.predict(X0, t, cond), teacher.predict(X0, t, cond), rtol=0.1, atol=0.05
    )
    again = copy.deepcopy(score)
    assert torch.equal(again.predict(X0, t, cond), score.predict(X0, t, cond))


def test_what_reads_inside_a_wan_transformer_refuses_this_one(cogvideox):
    teacher = open_teacher(cogvideox("2b"))
    with pytest.raises(ValueError, match="asd reads the blocks of a Wan transformer"):
        setting_of(cogvideox("2b"), "asd")
    with pytest.raises(ValueError, match="labels are added to a Wan transformer's time embedding"):
        setting_of(cogvideox("2b"), fake_knows_steps=True)
    with pytest.raises(ValueError, match="adapters here are of Wan transformers"):
        adapt(teacher.transformer, LoraConfig(rank=2, targets=("to_q",)))


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, x, t, cond, message",
    [
        ("2b", X0, torch.ones(2, 2), torch.zeros(2, 6, 8), "one time for all frames"),
        ("2b", X0, torch.ones(2), VideoCond(torch.zeros(2, 6, 8), X0), "takes no first frame"),
        (
            "1.5",
            X0[:, :, :1],
            torch.ones(2),
            torch.zeros(2, 6, 8),
            r"expected multiples of \(2, 2, 2\)",
        ),
        (
            "2b",
            X0[..., :3],
            torch.ones(2),
            torch.zeros(2, 6, 8),
            r"expected multiples of \(1, 2, 2\)",
        ),
        (
            "1.5",
            torch.zeros(1, 4, 2, 12, 8),
            torch.ones(1),
            torch.zeros(1, 6, 8),
            "was trained on at most",
        ),
    ],
)
def test_what_it_cannot_predict_is_one_clear_line(cogvideox, kind, x, t, cond, message):
    with pytest.raises(ValueError, match=message):
        open_teacher(cogvideox(kind), load_text_encoder=False).predict(x, t, cond)


def reconfigure(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def image_model(folder):
    config = CogVideoXTransformer3DModel.load_config(folder / "transformer")
    CogVideoXTransformer3DModel.from_config({**config, "in_channels": 8}).save_pretrained(
        folder / "transformer"
    )


DAMAGE = {
    "no scheduler/scheduler_config.json": lambda f: shutil.rmtree(f / "scheduler"),
    "is of UniPCMultistepScheduler": lambda f: reconfigure(
        f / "scheduler/scheduler_config.json", _class_name="UniPCMultistepScheduler"
    ),
    "does not fit CogVideoXDDIMScheduler": lambda f: reconfigure(
        f / "scheduler/scheduler_config.json", beta_schedule="mystery"
    ),
    "prediction_type flow": lambda f: reconfigure(
        f / "scheduler/scheduler_config.json", prediction_type="flow"
    ),
    "8 input and 4 output channels": image_model,
    "prompts of 5 tokens, the transformer has places for 6": lambda f: reconfigure(
        f / "tokenizer/tokenizer_config.json", model_max_length=5
    ),
    "is truncated": (
        lambda f: next((f / "transformer").glob("*.safetensors")).write_bytes(b"1234567890")
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_folder_is_one_clear_line(cogvideox, tmp_path, message):
    folder = shutil.copytree(cogvideox("2b"), tmp_path / "teacher")
    DAMAGE[message](folder)
    with pytest.raises(ValueError, match=message) as caught:
        open_teacher(folder)
    assert "\n" not in str(caught.value)
