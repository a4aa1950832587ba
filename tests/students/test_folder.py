"""Student folders: what is saved is what is loaded, parts are borrowed as a pair, and damage is one
clear line.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.jump_embedding import add_jump_embedding
from streamvid.rollout.sampler import generate_latents
from streamvid.rollout.schedule import StreamConfig, build_schedule, cost_of
from streamvid.students.folder import (
    TINY_STUDENT,
    TINY_TEACHER,
    choose_device,
    deployed,
    load_student,
    load_transformer,
    save_student,
)

STREAM = StreamConfig(
    num_steps=2, shift=3.0, window_frames=6, positions="window", max_trained_frames=9
)
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def make_transformer(**changes):
    torch.manual_seed(0)
    sizes = {
        "num_attention_heads": 1,
        "attention_head_dim": 12,
        "ffn_dim": 16,
        "num_layers": 1,
        "text_dim": 64,
        "freq_dim": 8,
    }
    return CausalWanTransformer3DModel(**{**sizes, **changes})


@pytest.fixture
def folder(tmp_path):
    save_student(tmp_path / "student", make_transformer(), STREAM, card="# card\n")
    return tmp_path / "student"


def test_a_student_comes_back_as_it_was_saved(folder):
    student, made = load_student(folder), make_transformer()
    assert student.stream == STREAM and (folder / "README.md").read_text() == "# card\n"
    assert all(
        torch.equal(p, q)
        for p, q in zip(student.transformer.parameters(), made.parameters(), strict=True)
    )
    assert not student.transformer.training


def test_a_student_that_jumps_comes_back_and_streams_as_it_did(tmp_path):
    """Told where to land by its own stream_config.json; told otherwise it streams otherwise."""
    config = {"num_steps": 2, "chunk_frames": 1}
    made, stream = make_transformer(), StreamConfig(stepper="jump", **config)
    add_jump_embedding(made)
    torch.nn.init.normal_(made.condition_embedder.jump_embedder.linear_2.weight)
    save_student(tmp_path / "student", made, stream)
    student = load_student(tmp_path / "student")
    assert student.stream == stream and student.transformer.takes_target
    cond = student.prompts.encode(["a red ball"])
    options = {"seeds": [1], "latent_shape": (16, 4, 4), "num_chunks": 2}
    jumped = generate_latents(student.transformer, cond, student.stream, **options)
    assert torch.equal(jumped, generate_latents(made.eval(), cond, stream, **options))
    euler = StreamConfig(stepper="euler", **config)
    assert not torch.allclose(jumped, generate_latents(made, cond, euler, **options))


def test_half_precision_on_disk_runs_in_the_precision_asked_for(folder):
    weights = {name: weight.half() for name, weight in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    assert {p.dtype for p in load_transformer(folder).parameters()} == {torch.float32}
    assert load_transformer(folder, torch.bfloat16).patch_embedding.weight.dtype == torch.bfloat16


def test_with_components_a_folder_is_complete_in_itself(tmp_path):
    save_student(tmp_path / "whole", make_transformer(), STREAM, TINY_TEACHER)
    student = load_student(tmp_path / "whole", components=tmp_path / "nowhere")
    assert (
        student.prompts.encode(["a red ball"]).shape[-1] == 64
        and student.codec.latent_channels == 16
    )


def test_a_student_is_replaced_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    """An error while saving leaves the old student and nothing else."""
    before = (folder / WEIGHTS).read_bytes()
    monkeypatch.setattr(CausalWanTransformer3DModel, "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_student(folder, make_transformer(num_layers=2), STREAM)
    with pytest.raises(ValueError, match="has no folder vae/"):
        save_student(folder, make_transformer(), STREAM, components=tmp_path)
    assert (folder / WEIGHTS).read_bytes() == before and [
        path.name for path in tmp_path.iterdir()
    ] == ["student"]


def truncate(folder, part=WEIGHTS):
    content = (folder / part).read_bytes()
    (folder / part).write_bytes(content[: len(content) - 100])


def rewrite(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


DAMAGES = {
    "truncated": (truncate, "diffusion_pytorch_model.safetensors is truncated or damaged"),
    "header": (lambda f: (f / WEIGHTS).write_bytes(b"\x08"), "is truncated or damaged"),
    "shape": (
        lambda f: rewrite(f, lambda w: w.update({"proj_out.bias": torch.zeros(3)})),
        "proj_out.bias",
    ),
    "missing key": (
        lambda f: rewrite(f, lambda w: w.pop("proj_out.bias")),
        "proj_out.bias and 0 more",
    ),
    "unknown key": (
        lambda f: rewrite(f, lambda w: w.update({"extra": torch.zeros(3)})),
        "extra and 0 more",
    ),
    "weights": (lambda f: (f / WEIGHTS).unlink(), "has no .safetensors file"),
    "config": (lambda f: (f / "transformer/config.json").unlink(), "has no config.json"),
    "config text": (
        lambda f: (f / "transformer/config.json").write_text("{"),
        "config.json is no JSON",
    ),
    "stream": (lambda f: (f / "stream_config.json").unlink(), "has no stream_config.json"),
    "stream text": (lambda f: (f / "stream_config.json").write_text("{"), "stream_config.json: "),
    "stream key": (
        lambda f: (f / "stream_config.json").write_text('{"num_step": 1}'),
        "'num_steps'",
    ),
    "folder": (lambda f: shutil.rmtree(f), "no student folder"),
    "half a text encoder": (lambda f: (f / "tokenizer").mkdir(), "belong together"),
    "vae": (
        lambda f: (
            shutil.copytree(TINY_TEACHER / "vae", f / "vae"),
            truncate(f, "vae/diffusion_pytorch_model.safetensors"),
        ),
        "is truncated or damaged",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line_that_names_the_place(folder, capfd, name):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(ValueError) as caught:
        load_student(folder)
    assert (
        message in str(caught.value)
        and str(folder) in str(caught.value)
        and "\n" not in str(caught.value)
    )
    assert capfd.readouterr().err == ""  # diffusers has nothing to add


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text_dim": 32}, "embeddings of 32 numbers, .* makes 64"),
        ({"in_channels": 8}, "latents of 8 channels, .* has 16"),
    ],
)
def test_parts_that_do_not_fit_each_other(tmp_path, changes, message):
    save_student(tmp_path / "student", make_transformer(**changes), STREAM)
    with pytest.raises(ValueError, match=message):
        load_student(tmp_path / "student")


def test_components_that_are_not_there(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere has no folder text_encoder/"):
        load_student(folder, components=tmp_path / "nowhere")


def test_a_device_that_is_not_there_is_refused_by_name():
    assert choose_device("cpu").type == "cpu" and choose_device().type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="no device cuda:77 here"):
        choose_device("cuda:77")
    with pytest.raises(ValueError, match="no device warp here"):
        choose_device("warp")


def test_another_codec_of_the_same_latents_can_stand_in(tmp_path):
    own = load_student(TINY_STUDENT)
    (tmp_path / "vae").mkdir()
    for file in (TINY_TEACHER / "vae").iterdir():
        (tmp_path / "vae" / file.name).write_bytes(file.read_bytes())
    other = load_student(TINY_STUDENT, codec=tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(own.codec.parameters(), other.codec.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="no config.json"):
        load_student(TINY_STUDENT, codec=tmp_path / "nowhere")


# ---- What is asked for in place of a student's own configuration ---------------------------------


def test_asked_steps_win_over_a_step_table():
    """A table would win over the number: its three steps would be taken where one was asked for."""
    table = StreamConfig(step_table=((1.0, 0.9, 0.6), (1.0, 0.6)), chunk_frames=1)
    asked = deployed(table, steps=1)
    assert asked.step_table == () and asked.num_steps == 1
    assert cost_of(build_schedule(asked, 3), 1).nfe == 3
    assert deployed(table) == table and deployed(table, sink=0).step_table == table.step_table


def test_what_is_not_asked_for_stays(tmp_path):
    assert deployed(STREAM, steps=4, window=9, sink=1) == replace(
        STREAM, num_steps=4, window_frames=9, sink_frames=1
    )
    (tmp_path / "other.json").write_text(StreamConfig(num_steps=3).to_json())
    assert deployed(STREAM, str(tmp_path / "other.json"), sink=0) == StreamConfig(num_steps=3)
    with pytest.raises(ValueError, match="no schedule backwards: neither autoregressive"):
        deployed(STREAM, "backwards")
