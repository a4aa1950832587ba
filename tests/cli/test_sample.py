"""`streamvid sample` as a user calls it: clips from the shipped student, and one line for each
mistake.
"""

import itertools
import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamvid.cli import sample
from streamvid.students import clips as export
from streamvid.students.folder import TINY_STUDENT, TINY_TEACHER, deployed, load_student
from streamvid.video import read_video


def run(capsys, *argv) -> tuple[int, str]:
    """The exit code and what went to stderr."""
    try:
        code = sample.main([str(part) for part in argv])
    except SystemExit as stop:  # argparse
        code = stop.code
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
    assert (
        run(
            capsys,
            "--prompt",
            "a blue square moves down",
            "--seed",
            1,
            "--num-frames",
            9,
            "--out",
            tmp_path / "b.mp4",
        )[0]
        == 0
    )
    a, b = read_video(tmp_path / "clips" / "001.mp4")[0], read_video(tmp_path / "b.mp4")[0]
    assert torch.equal(a, b)


def test_a_teacher_can_be_sampled(tmp_path, capsys):
    code, _ = run(
        capsys, "--teacher", TINY_TEACHER, "--steps", 2, *PROMPT, "--out", tmp_path / "clip.gif"
    )
    assert code == 0 and read_video(tmp_path / "clip.gif")[0].shape == (9, 3, 64, 64)


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--out", "clip.avi"), "unknown suffix '.avi'"),
        (("--out", "/proc/clip.mp4"), "cannot write"),
        (("--out", "clip.mp4", "--num-frames", 34), "use 33 or 37"),
        (("--out", "clip.mp4", "--num-frames", 17), "chunk_frames=3"),
        (("--out", "clip.mp4", "--num-frames", 0), "at least 1 frame"),
        (("--out", "clip.mp4", "--student", "nowhere"), "no student folder"),
        (("--out", "clip.mp4", "--schedule", "nowhere.json"), "no schedule nowhere.json"),
        (("--out", "clip.mp4", "--size", "60x64"), "multiples of 16"),
        (("--out", "clip.mp4", "--size", 64, 64), "argument --size: 64, expected HxW"),
        (("--out", "clip.mp4", "--schedule", "zigzag"), "neither autoregressive nor rolling nor"),
        (("--out", "clip.mp4", "--steps", 0), "num_steps=0"),
        (
            ("--out", "clip.mp4", "--schedule", "rolling"),
            "with the sink 12, but the student was trained on 9; use --steps 3 or fewer",
        ),
        (("--out", "clip.mp4", "--schedule", "rolling", "--sink", 8), "use autoregressive"),
        (
            ("--out", "clip.mp4", "--schedule", "rolling", "--steps", 3, "--window", 6),
            "cannot hold 0 sink frames and the 9",
        ),
        (("--out", "clip.mp4", "--steps", 10**9), "num_steps=1000000000, expected at most 1,000"),
        (("--out", "clip.mp4", "--fps", "1e-300"), "--fps 1e-300: expected 0.01 to 1000"),
        (("--out", "clip.mp4", "--fps", "inf"), "--fps inf, expected a finite number"),
        (("--out", "clip.mp4", "--seed", 2**70), "at most 63 bits"),
        (("--out", "clip.mp4", "--device", "meta"), "there is no device meta here"),
        (("--out", "clip.mp4", "--device", "mps"), "there is no device mps here"),
        (("--out", "clip.mp4", "--window", 2), "window_frames=2 cannot hold"),
        (("--out", "clip.mp4", "--guidance", 2), "--guidance is of teachers"),
        (("--out", "clip.mp4", "--teacher", TINY_TEACHER, "--sink", 1), "--sink is of students"),
        (("--out", "clip.mp4", "--teacher", "nowhere"), "no teacher folder"),
        (
            ("--out", "clip.mp4", "--teacher", TINY_TEACHER, "--num-frames", 0, "--stream"),
            "at least 1 frame",
        ),
        (("--out", "clip.mp4", "--components", "nowhere"), "nowhere has no folder text_encoder/"),
        (("--out", "clip.mp4", "--fps", 0), "--fps 0"),
        (("--out", "clip.mp4", "--num-frames", "many"), "invalid int value"),
        (("--out", "clip.mp4", "--prompt", " "), "--prompt is an empty text"),
        ((), "required: --out"),
        (("--out", "clip.mp4", "--student", ""), "--student is an empty text"),
        (("--out", "clip.mp4", "--teacher", ""), "--teacher is an empty text"),
        (("--out", "clip.mp4", "--codec", ""), "--codec is an empty text"),
        (("--out", "clip.mp4", "--engine", "prepackd"), "engine option 'prepackd'; expected"),
        (
            (
                "--out",
                "",
            ),
            "--out is an empty text",
        ),
        (("--out", "a\nerror: all is lost\x1b[31m.avi"), "unknown suffix"),
        (("--out", "clip.mp4", "--size", "1000000x1000000"), "at most 33,177,600 pixels"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, err = run(capsys, *PROMPT, *argv)
    assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content, message",
    [(None, "prompts.txt"), (b"\n\n", "prompts.txt"), (b"\xff\xfe\xfa", "UTF-8")],
)
def test_prompt_files_that_cannot_be_read(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    code, err = run(capsys, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "clips")
    assert code == 2 and message in err and err.count("\n") == 1


def test_several_prompts_do_not_go_into_one_file(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle moves up\na blue square moves down\n")
    code, err = run(capsys, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "clip.mp4")
    assert code == 2 and "one file for 2 prompts" in err and err.count("\n") == 1
    argv = (
        "--prompts",
        tmp_path / "prompts.txt",
        "--num-frames",
        9,
        "--out",
        tmp_path / "clips" / "a{}.gif",
    )
    assert run(capsys, *argv)[0] == 0
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == ["a000.gif", "a001.gif"]


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("mine")
    code, err = run(capsys, *PROMPT, "--out", tmp_path / "work")
    assert (
        code == 2
        and "holds thesis.tex" in err
        and (tmp_path / "work" / "thesis.tex").read_text() == "mine"
    )


def interrupt_after(monkeypatch, num_chunks):
    real = export.stream

    def interrupted(*args, **options):
        for index, chunk in enumerate(real(*args, **options)):
            if index == num_chunks:
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(export, "stream", interrupted)


@pytest.mark.parametrize("name", ["frames", "clip.mp4"])
def test_an_endless_stream_is_kept_on_ctrl_c(tmp_path, capsys, monkeypatch, name):
    """Ctrl-C, its only end, once threw away all that had been streamed."""
    interrupt_after(monkeypatch, 5)
    argv = (
        "--prompt",
        "a red circle moves up",
        "--num-frames",
        0,
        "--stream",
        "--out",
        tmp_path / name,
    )
    assert sample.main([str(part) for part in argv]) == 0
    frames = 9 + 4 * 12  # past the 33 frames that the student was trained on
    assert read_video(tmp_path / name)[0].shape == (frames, 3, 64, 64)
    assert f"{frames} frames in" in capsys.readouterr().out


def test_ctrl_c_drops_a_clip_that_is_not_a_stream(tmp_path, capsys, monkeypatch):
    interrupt_after(monkeypatch, 1)
    code, err = run(capsys, *PROMPT[:2], "--out", tmp_path / "clip.mp4")
    assert (
        code == 130
        and err.splitlines()[-1].startswith("error: interrupted")
        and list(tmp_path.iterdir()) == []
    )


def test_a_rolling_order_widens_the_window_that_it_needs(tmp_path, capsys):
    """Three errors pointed at each other, and --steps was not allowed."""
    argv = [
        *PROMPT[:2],
        "--num-frames",
        33,
        "--schedule",
        "rolling",
        "--out",
        tmp_path / "clip.gif",
    ]
    assert sample.main([str(part) for part in (*argv, "--steps", 3)]) == 0
    # 3 chunks of 3 steps, one step apart
    assert "5 forwards + 2 commits" in capsys.readouterr().out
    assert sample.main([str(part) for part in (*argv, "--steps", 2, "--window", 6)]) == 0
    student = load_student(TINY_STUDENT).stream
    narrow = replace(student, window_frames=3, first_steps=4)
    assert (
        deployed(narrow, "rolling", steps=2).window_frames == 6
        and deployed(narrow, "rolling", steps=2).first_steps is None
    )
    assert (
        deployed(
            replace(narrow, positions="absolute", window_frames=None), "rolling", steps=9
        ).window_frames
        is None
    )


def test_a_file_of_one_prompt_writes_what_one_of_two_does(tmp_path, capsys):
    """It wrote a folder of PNGs, in the way of the clips of the next file."""
    (tmp_path / "one.txt").write_text("a red circle moves up\n")
    for out, made in (
        ("clips/", "clips/000.mp4"),
        ("clips", "clips/000.mp4"),
        ("a.gif", "a.gif"),
        ("b{}.gif", "b000.gif"),
    ):
        assert (
            run(
                capsys,
                "--prompts",
                tmp_path / "one.txt",
                "--num-frames",
                9,
                "--out",
                f"{tmp_path}/{out}",
            )[0]
            == 0
        )
        assert (tmp_path / made).is_file()


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif"])
def test_sigterm_leaves_no_half_clip(tmp_path, capsys, monkeypatch, name):
    """It left a hidden file, since nothing was unwound."""

    def terminate(*args, **options):
        yield from itertools.islice(real(*args, **options), 1)
        os.kill(os.getpid(), signal.SIGTERM)
        yield from real(*args, **options)

    real = export.stream
    monkeypatch.setattr(export, "stream", terminate)
    code, err = run(capsys, *PROMPT[:2], "--out", tmp_path / name)
    assert (
        code == 143
        and err.splitlines()[-1].startswith("error: interrupted")
        and list(tmp_path.iterdir()) == []
    )


def test_what_the_command_line_overrides_counts_together(tmp_path, capsys):
    """A rolling order of 2 steps needs a window of 6: order, steps and window are checked as one
    configuration.
    """
    (tmp_path / "s.json").write_text(
        json.dumps({"num_steps": 2, "commit": "clean", "window_frames": 6})
    )
    argv = [*PROMPT[:2], "--num-frames", 21, "--out", tmp_path / "clip.gif"]
    assert sample.main([str(part) for part in (*argv, "--schedule", tmp_path / "s.json")]) == 0
    # 2 chunks of 2 steps; the last is not committed
    assert "4 forwards + 1 commits" in capsys.readouterr().out
    assert (
        sample.main([str(part) for part in (*argv, "--steps", 1, "--window", 6, "--sink", 3)]) == 0
    )
    assert "2 forwards + 1 commits" in capsys.readouterr().out


def test_an_unknown_key_in_a_schedule_names_the_nearest(tmp_path, capsys):
    (tmp_path / "s.json").write_text(json.dumps({"num_step": 2}))
    code, err = run(
        capsys, *PROMPT, "--schedule", tmp_path / "s.json", "--out", tmp_path / "clip.mp4"
    )
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


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        wrong_shape,
        missing_key,
        lambda s: (s / WEIGHTS).unlink(),
        lambda s: (s / "transformer" / "config.json").unlink(),
        lambda s: (s / "stream_config.json").unlink(),
        lambda s: (s / "stream_config.json").write_text("{"),
    ],
    ids=["truncated", "shape", "key", "weights", "config", "stream", "json"],
)
def test_a_damaged_student_ends_with_one_line(student, tmp_path, capsys, damage):
    damage(student)
    code, err = run(capsys, *PROMPT, "--student", student, "--out", tmp_path / "clip.mp4")
    assert code == 2 and err.startswith("error: ") and "student" in err and err.count("\n") == 1
    assert not (tmp_path / "clip.mp4").exists()


@pytest.mark.parametrize(
    "file, name, part",
    [
        (WEIGHTS, "proj_out.bias", "the transformer gave"),
        ("vae/diffusion_pytorch_model.safetensors", "DECODER", "the codec's"),
        (
            "text_encoder/model.safetensors",
            "encoder.block.0.layer.0.SelfAttention.k.weight",
            "the text encoder gave",
        ),
    ],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_make_no_clip(student, tmp_path, capsys, file, name, part, bad):
    """They made a black clip, with exit code 0."""
    for own in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(TINY_TEACHER / own, student / own, dirs_exist_ok=True)
    weights = load_file(student / file)
    # clamped to white
    name = sorted(key for key in weights if "decoder" in key)[-1] if name == "DECODER" else name
    weights[name].view(-1)[:] = bad
    save_file(weights, student / file, {"format": "pt"})
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "000000.png").write_text("of the clip before")
    for out in ("clip.mp4", "frames"):
        code, err = run(capsys, *PROMPT, "--student", student, "--stream", "--out", tmp_path / out)
        assert (
            code == 2
            and part in err
            and "not finite" in err
            and err.startswith("error: ")
            and err.count("\n") == 1
        )
    left = sorted(path.name for path in tmp_path.rglob("*") if not path.is_relative_to(student))
    assert (
        left == ["000000.png", "frames"]
        and (tmp_path / "frames" / "000000.png").read_text() == "of the clip before"
    )
