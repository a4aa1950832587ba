"""The Wan teacher is diffusers' transformer, and a bad folder is one clear line."""

import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from streamvid.seeding import keyed_normal
from streamvid.teachers.wan import WanTeacher, read_shift

X, COND = keyed_normal((2, 4, 3, 4, 6), "x"), keyed_normal((2, 5, 8), "cond")


@pytest.fixture(scope="module")
def teacher(pristine_folder):
    return WanTeacher.from_pretrained(pristine_folder)


def reference(folder):
    return WanTransformer3DModel.from_pretrained(
        folder / "transformer", torch_dtype=torch.float32
    ).eval()


def test_a_prediction_is_that_of_diffusers_at_a_thousand_times_the_time(teacher, pristine_folder):
    t = torch.tensor([0.9375, 0.3])
    with torch.no_grad():
        expected = reference(pristine_folder)(X, 1000 * t, COND, return_dict=False)[0]
    assert torch.equal(teacher.predict(X, t, COND), expected)


def test_a_time_a_frame_reaches_the_tokens_of_that_frame(teacher):
    t = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.2, 0.2]])
    mixed, uniform = teacher.predict(X, t, COND), teacher.predict(X, torch.tensor([0.9, 0.2]), COND)
    torch.testing.assert_close(mixed[1], uniform[1], rtol=1e-5, atol=1e-6)
    same = teacher.predict(X, torch.tensor([[0.9] * 3, [0.2] * 3]), COND)
    torch.testing.assert_close(same, uniform, rtol=1e-5, atol=1e-6)
    last_changed = teacher.predict(X, torch.tensor([[0.9, 0.9, 0.1], [0.2] * 3]), COND)
    moved = (last_changed - same)[0].abs().mean((0, 2, 3))
    assert moved[2] > 2 * moved[0]


def test_half_precision_on_disk_runs_in_float32_unless_asked_otherwise(teacher, pristine_folder):
    assert load_file(weights(pristine_folder))["proj_out.weight"].dtype == torch.float16
    assert {p.dtype for p in teacher.transformer.parameters()} == {torch.float32}
    low = WanTeacher.from_pretrained(
        pristine_folder, torch_dtype=torch.bfloat16, load_text_encoder=False
    )
    assert low.transformer.proj_out.weight.dtype == torch.bfloat16
    t = torch.tensor([0.5, 0.5])
    torch.testing.assert_close(
        low.predict(X, t, COND).float(), teacher.predict(X, t, COND), rtol=0.1, atol=0.05
    )


def test_a_teacher_is_frozen_but_lets_gradients_through(teacher):
    assert not teacher.transformer.training and not any(
        p.requires_grad for p in teacher.transformer.parameters()
    )
    x = X.clone().requires_grad_()
    teacher.predict(x, torch.tensor([0.5, 0.5]), COND).sum().backward()
    assert x.grad.abs().sum() > 0


def test_the_negative_prompt_is_the_empty_one_by_default(teacher, pristine_folder):
    assert teacher.uncond.shape == (6, 8) and torch.equal(
        teacher.uncond, teacher.encode_prompt([""])[0]
    )
    other = WanTeacher.from_pretrained(pristine_folder, negative_prompt="a red cat")
    assert torch.equal(other.uncond, teacher.encode_prompt(["a red cat"])[0])
    assert not torch.equal(other.uncond, teacher.uncond)


def test_a_teacher_without_its_text_encoder_says_so(pristine_folder, tmp_path):
    folder = shutil.copytree(
        pristine_folder, tmp_path / "teacher", ignore=shutil.ignore_patterns("text_encoder")
    )
    teacher = WanTeacher.from_pretrained(folder, load_text_encoder=False)
    assert teacher.uncond is None and teacher.shift == 3.0 and teacher.latent_channels == 4
    with pytest.raises(ValueError, match="load_text_encoder=True"):
        teacher.encode_prompt(["a cat"])


@pytest.mark.parametrize(
    "config, shift",
    [({"flow_shift": 8.0}, 8), ({"shift": 5}, 5), ({"flow_shift": 3, "shift": 1}, 3)],
)
def test_the_shift_is_the_schedulers(wan_folder, config, shift):
    (wan_folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert read_shift(wan_folder) == shift


PUBLISHED = {  # sizes in config.json, parameters, how the first frame is taken
    "Wan2.1-T2V-1.3B": (
        dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
        1_418_996_800,
        None,
    ),
    "Wan2.1-T2V-14B": ({}, 14_288_491_584, None),
    "Wan2.2-TI2V-5B": (
        dict(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
        4_999_787_712,
        "frame",
    ),
    "Wan2.1-I2V-14B": (
        dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
        16_394_878_784,
        "channels",
    ),
    "Wan2.2-I2V-A14B": (dict(in_channels=36), 14_288_901_184, "channels"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_are_known_by_their_sizes(name):
    """On the meta device, where 14B parameters cost nothing."""
    sizes, parameters, taken = PUBLISHED[name]
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**sizes)
    assert sum(p.numel() for p in transformer.parameters()) == parameters
    teacher = WanTeacher(transformer, None, 5.0, expand_timesteps=name == "Wan2.2-TI2V-5B")
    assert teacher.first_frame_by == taken and teacher.latent_channels == (
        48 if "5B" in name else 16
    )
    assert teacher.text_dim == 4096


# ---- Damage --------------------------------------------------------------------------------------


def weights(folder):
    return next((folder / "transformer").glob("*.safetensors"))


def truncate(folder):
    data = weights(folder).read_bytes()
    weights(folder).write_bytes(data[: len(data) // 2])


def rewrite(folder, change):
    tensors = load_file(weights(folder))
    change(tensors)
    save_file(tensors, weights(folder), metadata={"format": "pt"})


def reconfigure(folder, part, **values):
    file = folder / part
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def index(folder, **values):
    (folder / "model_index.json").write_text(json.dumps(values))


def shard(folder, transformer=None):
    """The weights in several files, as those of the large models come."""
    transformer = transformer or reference(folder)
    weights(folder).unlink()
    transformer.save_pretrained(folder / "transformer", max_shard_size="10KB")
    return sorted((folder / "transformer").glob("*.safetensors"))


DAMAGE = {
    "no scheduler/scheduler_config.json": lambda f: shutil.rmtree(f / "scheduler"),
    "neither a positive flow_shift": (
        lambda f: (f / "scheduler/scheduler_config.json").write_text("{}")
    ),
    "is no JSON": lambda f: (f / "scheduler/scheduler_config.json").write_text("{"),
    "no transformer/config.json": lambda f: shutil.rmtree(f / "transformer"),
    "of another family: its transformer is a LTXVideoTransformer3DModel": lambda f: reconfigure(
        f, "transformer/config.json", _class_name="LTXVideoTransformer3DModel"
    ),
    "no .safetensors file": lambda f: weights(f).unlink(),
    "is truncated or damaged": truncate,
    "index.json names diffusion_pytorch_model-00002-of": lambda f: shard(f)[1].unlink(),
    "00002-of-.* is truncated": lambda f: shard(f)[1].write_bytes(b"1234567890"),
    "cannot load .*shape": lambda f: reconfigure(f, "transformer/config.json", ffn_dim=48),
    "cannot load .*blocks.2": lambda f: reconfigure(f, "transformer/config.json", num_layers=3),
    "cannot load .*blocks.1": lambda f: reconfigure(f, "transformer/config.json", num_layers=1),
    "proj_out.bias and 0 more": lambda f: rewrite(f, lambda t: t.pop("proj_out.bias")),
    "no folder text_encoder": lambda f: shutil.rmtree(f / "text_encoder"),
    "no folder tokenizer": lambda f: shutil.rmtree(f / "tokenizer"),
    "transformer_2 has no config.json": lambda f: index(f, boundary_ratio=0.875),
    "no boundary_ratio in model_index.json": lambda f: shutil.copytree(
        f / "transformer", f / "transformer_2"
    ),
    "boundary_ratio 875, expected a noise level": lambda f: index(f, boundary_ratio=875),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_folder_is_one_clear_line(wan_folder, message):
    DAMAGE[message](wan_folder)
    with pytest.raises(ValueError, match=message) as caught:
        WanTeacher.from_pretrained(wan_folder)
    assert "\n" not in str(caught.value) and str(wan_folder) in str(caught.value)


def test_a_text_encoder_of_another_size_is_refused(wan_folder):
    sizes = json.loads((wan_folder / "transformer/config.json").read_text())
    wider = WanTransformer3DModel.from_config({**sizes, "text_dim": 12})
    wider.save_pretrained(wan_folder / "transformer")
    with pytest.raises(ValueError, match="embeddings of 8 numbers, the transformer takes 12"):
        WanTeacher.from_pretrained(wan_folder)


def test_a_checkpoint_in_several_files_is_the_same_model(wan_folder, teacher):
    assert len(shard(wan_folder, teacher.transformer)) > 2
    opened = WanTeacher.from_pretrained(wan_folder)
    t = torch.tensor([0.9, 0.3])
    assert torch.equal(opened.predict(X, t, COND), teacher.predict(X, t, COND))


def test_a_folder_that_is_not_there_is_not_looked_up_on_the_internet(tmp_path):
    with pytest.raises(ValueError, match="no teacher folder at .*expected a checkpoint"):
        WanTeacher.from_pretrained(tmp_path / "Wan-AI")
