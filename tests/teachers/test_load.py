"""One call opens a teacher of any family, by folder or by its name on the hub."""

import json
import shutil

import huggingface_hub
import pytest
import torch

from streamvid.codecs.text import PromptEncoder
from streamvid.experiment.build import build_teacher
from streamvid.experiment.config import TeacherConfig
from streamvid.hub import resolve_checkpoint
from streamvid.students.folder import TINY_TEACHER
from streamvid.teachers.cogvideox import CogVideoXTeacher
from streamvid.teachers.load import open_teacher
from streamvid.teachers.wan import WanTeacher


def test_the_family_is_that_of_the_transformer(wan, cogvideox):
    assert isinstance(open_teacher(TINY_TEACHER), WanTeacher)
    assert open_teacher(wan("a14b"), load_text_encoder=False).boundary_ratio == 0.875
    assert (
        open_teacher(wan("ti2v")).first_frame_by == "frame"
        and open_teacher(wan("2.1")).first_frame_by is None
    )
    assert isinstance(open_teacher(str(cogvideox("2b"))), CogVideoXTeacher)


def test_a_folder_of_another_family_is_named(wan_folder):
    file = wan_folder / "transformer" / "config.json"
    file.write_text(json.dumps({"_class_name": "HunyuanVideoTransformer3DModel"}))
    with pytest.raises(
        ValueError, match="is a HunyuanVideoTransformer3DModel, with scores here are Wan"
    ) as caught:
        open_teacher(wan_folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no teacher folder at .*nothing"):
        open_teacher(wan_folder / "nothing")


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_a_text_encoder_of_another_checkpoint_is_named(request, tmp_path, family):
    folder = shutil.copytree(
        request.getfixturevalue(family)({"wan": "2.1", "cogvideox": "2b"}[family]), tmp_path / "x"
    )
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
        shutil.copytree(TINY_TEACHER / part, folder / part)
    with pytest.raises(ValueError, match="embeddings of 64 numbers, the transformer takes 8"):
        open_teacher(folder)


def test_a_name_on_the_hub_is_fetched_without_pickles_and_code(wan, monkeypatch):
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(wan("2.1"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert isinstance(open_teacher("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"), WanTeacher)
    assert asked["name"] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert not any(
        pattern.endswith(suffix)
        for pattern in asked["patterns"]
        for suffix in (".bin", ".py", ".pt", "*")
    )


def test_a_name_on_the_hub_offline_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match="no folder Wan-AI/Nothing here, and it cannot be fetched from the hub"
    ) as caught:
        open_teacher("Wan-AI/Nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere", "/a/b", "./a/b", "a/b/c", "../a"])
def test_a_path_is_never_looked_up_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert str(resolve_checkpoint(path)) == path.removeprefix("./")


def test_a_folder_comes_before_the_hub(wan, tmp_path, monkeypatch):
    shutil.copytree(wan("2.1"), tmp_path / "Wan-AI" / "Wan2.1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert isinstance(open_teacher("Wan-AI/Wan2.1"), WanTeacher)


def test_an_option_that_a_family_lacks_is_named(cogvideox):
    with pytest.raises(ValueError, match="CogVideoXTeacher has no option offload"):
        open_teacher(cogvideox("2b"), offload=True)


# ---- In a run ------------------------------------------------------------------------------------


def teacher_of_a_run(folder, components, **settings):
    return build_teacher(
        TeacherConfig(path=str(folder), **settings), PromptEncoder.from_pretrained(components)
    )


def test_a_run_encodes_for_its_teacher(wan):
    """One text encoder serves both, and the teacher's uncond is what it would have made itself."""
    teacher = teacher_of_a_run(
        wan("a14b"), wan("a14b"), negative_prompt="a red cat", dtype="bf16", offload=True
    )
    own = open_teacher(wan("a14b"), negative_prompt="a red cat")
    assert (
        torch.equal(teacher.uncond, own.uncond)
        and teacher.prompt_encoder is None
        and teacher.offload
    )
    assert teacher.transformer_2.proj_out.weight.dtype == torch.bfloat16


def test_a_run_whose_components_are_another_checkpoints_says_so(wan):
    with pytest.raises(ValueError, match="embeddings of 64 numbers, the transformer takes 8"):
        teacher_of_a_run(wan("2.1"), TINY_TEACHER)
