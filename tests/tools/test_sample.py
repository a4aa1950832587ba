"""tools/sample.py as a user calls it: clips from the shipped student, and one line for each mistake."""

import json
import shutil

import pytest
import sample
import torch
from safetensors.torch import load_file, save_file

from streamvid.serving.student import TINY_STUDENT
from streamvid.video import read_video


def run(capsys, *argv) -> tuple[int, str]:
    """The exit code and what went to stderr."""
    code = sample.main([str(part) for part in argv])
    return code, capsys.readouterr().err


@pytest.fixture
def student(tmp_path):
    """A copy of the shipped student to damage."""
    return shutil.copytree(TINY_STUDENT, tmp_path / "student")


PROMPT = ("--prompt", "a small red circle moves up quickly", "--num-frames", 9)


def test_the_shipped_student_makes_a_clip(tmp_path, capsys):
    code, _ = run(capsys, *PROMPT[:2], "--num-frames", 21, "--out", tmp_path / "clip.mp4")
    assert code == 0 and read_video(tmp_path / "clip.mp4")[0].shape == (21, 3, 64, 64)


def test_several_prompts_make_a_folder_of_clips_that_do_not_depend_on_each_other(tmp_path, capsys):
    """Prompt i has seed + i: the second clip alone, with its seed, has the same pixels."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moves up\na blue square moves down\n")
    assert run(capsys, "--prompts", prompts, "--num-frames", 9, "--out", tmp_path / "clips")[0] == 0
    assert run(capsys, "--prompt", "a blue square moves down", "--seed", 1, "--num-frames", 9, "--out", tmp_path / "b.mp4")[0] == 0
    a, b = read_video(tmp_path / "clips" / "001.mp4")[0], read_video(tmp_path / "b.mp4")[0]
    assert torch.equal(a, b)


def test_a_teacher_can_be_sampled(tmp_path, capsys):
    from streamvid.serving.student import TINY_TEACHER

    code, _ = run(capsys, "--teacher", TINY_TEACHER, "--steps", 2, *PROMPT, "--out", tmp_path / "clip.gif")
    assert code == 0 and read_video(tmp_path / "clip.gif")[0].shape == (9, 3, 64, 64)


@pytest.mark.parametrize("argv, message", [
    (("--out", "clip.avi"), "unknown suffix '.avi'"),
    (("--out", "/proc/clip.mp4"), "cannot write"),
    (("--out", "clip.mp4", "--num-frames", 34), "use 33 or 37"),
    (("--out", "clip.mp4", "--num-frames", 17), "chunk_frames=3"),
    (("--out", "clip.mp4", "--num-frames", 0), "at least 1 frame"),
    (("--out", "clip.mp4", "--student", "nowhere"), "no student folder"),
    (("--out", "clip.mp4", "--schedule", "nowhere.json"), "no schedule nowhere.json"),
    (("--out", "clip.mp4", "--size", 60, 64), "multiples of 8"),
])
def test_mistakes_end_with_one_line(tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, err = run(capsys, *PROMPT, *argv)
    assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content, message", [(None, "prompts.txt"), (b"\n\n", "prompts.txt"), (b"\xff\xfe\xfa", "UTF-8")])
def test_prompt_files_that_cannot_be_read(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    code, err = run(capsys, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "clips")
    assert code == 2 and message in err and err.count("\n") == 1


def test_an_unknown_key_in_a_schedule_names_the_nearest(tmp_path, capsys):
    (tmp_path / "s.json").write_text(json.dumps({"num_step": 2}))
    code, err = run(capsys, *PROMPT, "--schedule", tmp_path / "s.json", "--out", tmp_path / "clip.mp4")
    assert code == 2 and "num_steps" in err


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def truncate(student):
    content = (student / WEIGHTS).read_bytes()
    (student / WEIGHTS).write_bytes(content[: len(content) // 2])


def wrong_shape(student):
    weights = load_file(student / WEIGHTS)
    weights["proj_out.bias"] = weights["proj_out.bias"][:-1].clone()
    save_file(weights, student / WEIGHTS)


def missing_key(student):
    weights = load_file(student / WEIGHTS)
    del weights["proj_out.bias"]
    save_file(weights, student / WEIGHTS)


@pytest.mark.parametrize("damage", [
    truncate, wrong_shape, missing_key,
    lambda s: (s / WEIGHTS).unlink(), lambda s: (s / "transformer" / "config.json").unlink(),
    lambda s: (s / "stream_config.json").unlink(), lambda s: (s / "stream_config.json").write_text("{"),
], ids=["truncated", "shape", "key", "weights", "config", "stream", "json"])
def test_a_damaged_student_ends_with_one_line(student, tmp_path, capsys, damage):
    damage(student)
    code, err = run(capsys, *PROMPT, "--student", student, "--out", tmp_path / "clip.mp4")
    line = [text for text in err.splitlines() if text.startswith("error: ")]
    assert code == 2 and len(line) == 1 and "student" in line[0] and "Traceback" not in err
    assert not (tmp_path / "clip.mp4").exists()
