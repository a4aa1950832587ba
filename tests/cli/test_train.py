"""`streamvid train`: refused at once or not at all, the same run from any place, and stopped
without a traceback.
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import streamvid
from streamvid.cli import train as tool
from streamvid.experiment import build
from streamvid.experiment import export as export_module
from streamvid.students.folder import load_student

ROOT = Path(streamvid.__file__).parents[1]
CONFIG = ROOT / "configs" / "run" / "tiny_dmd.yaml"
SMALL = [
    "train.max_steps=2",
    "train.batch_size=1",
    "train.log_every=1",
    "data.num_prompts=2",
    "options.student_start_step=0",
    "options.fake_updates_per_student=1",
    "options.num_chunks=1",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that has ended, and what it was started with; in a working folder that is
    not the repository.
    """
    folder = tmp_path_factory.mktemp("work")
    arguments = ["--config", str(CONFIG), "train.output_dir=runs", *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, arguments


@pytest.fixture
def nothing_loads(monkeypatch):
    """Loading is an error: what is refused must be refused before it."""
    for name in ("build_student", "build_source", "build_teacher"):
        monkeypatch.setattr(build, name, lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(build.PromptEncoder, "from_pretrained", lambda *args, **kwargs: 1 / 0)


def test_shipped_networks_are_found_from_any_working_folder(finished):
    folder, _ = finished
    student = folder / "runs" / "tiny_dmd" / "student"
    assert load_student(student).stream.chunk_frames == 3
    saved = (folder / "runs" / "tiny_dmd" / "config.yaml").read_text()
    # what is saved can move
    assert "components: streamvid/assets/teacher\n" in saved and str(ROOT) not in saved


def test_a_finished_run_started_again_leaves_its_export_alone(finished, monkeypatch, capsys):
    """Scores that evaluate.py wrote into the card, and the user's own files, used to be gone."""
    folder, arguments = finished
    monkeypatch.chdir(folder)
    student = folder / "runs" / "tiny_dmd" / "student"
    (student / "thesis.txt").write_text("mine")
    card = student / "README.md"
    card.write_text(card.read_text() + "\n## Scores\n\n| overall |\n")
    weights = (student / "transformer" / "diffusion_pytorch_model.safetensors").stat()
    assert tool.main(arguments) == 0
    assert (student / "thesis.txt").read_text() == "mine" and "| overall |" in card.read_text()
    assert (
        student / "transformer" / "diffusion_pytorch_model.safetensors"
    ).stat().st_ino == weights.st_ino

    # a longer run exports anew, and keeps what is not its own
    assert tool.main([*arguments, "train.max_steps=3"]) == 0
    assert (student / "thesis.txt").read_text() == "mine" and "| overall |" not in card.read_text()
    assert "3 steps of batch 1" in card.read_text() and load_student(student)

    marker = folder / "runs" / "tiny_dmd" / "exported.json"
    # other weights of this step
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "checkpoint": "00000000"}))
    card.write_text("old")
    assert (
        tool.main([*arguments, "train.max_steps=3"]) == 0
        and "3 steps of batch 1" in card.read_text()
    )

    (student / "transformer" / "config.json").unlink()  # no longer an export
    assert tool.main([*arguments, "train.max_steps=3"]) == 0 and load_student(student)


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "options.guidance_scale=3",
            (
                "error: runs/tiny_dmd holds a run with another configuration:"
                " options.guidance_scale was 2.0"
            ),
        ),
        ("train.seed=-1", "error: seed=-1 must be from 0 to 2147483647"),
        (
            "train.optimizers.studnet.lr=1",
            "error: optimizers.studnet is for no network of the objective; did you mean",
        ),
        (
            "train.ema.discriminator.decay=0.9",
            "error: ema.discriminator is for no network of the objective",
        ),
        (
            "train.optimizers.student.kind=adamm",
            "error: train.optimizers.student.kind: expected one of",
        ),
        (
            "train.optimizers.student.lr=1e400",
            "error: train.optimizers.student.lr: expected float, got float inf",
        ),
        ("train.name=<b>", "error: name='<b>' must be one folder name"),
        ("train.trackers=[wanbd]", "error: tracker 'wanbd' is unknown"),
        ("data.num_prompts=-1", "error: data.num_prompts=-1, expected at least 1"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_can_be_refused_at_once_is(
    finished, monkeypatch, capsys, nothing_loads, override, message, dry
):
    folder, arguments = finished
    monkeypatch.chdir(folder)
    name = [] if override.startswith("options") else ["train.name=other"]
    assert tool.main([*arguments, *name, *dry, override]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message) and captured.err.count("\n") == 1 and captured.out == ""
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["tiny_dmd"]


@pytest.mark.parametrize("kind", ["prompts", "clips", "latents", "trajectories"])
def test_data_that_is_not_there_is_refused_before_anything_is_loaded(
    finished, monkeypatch, capsys, nothing_loads, kind
):
    folder, arguments = finished
    monkeypatch.chdir(folder)
    assert (
        tool.main([*arguments, "train.name=other", f"data.kind={kind}", "data.path=nowhere"]) == 2
    )
    assert (
        capsys.readouterr().err
        == f"error: data.path=nowhere is not there, expected {kind} to read\n"
    )
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["tiny_dmd"]


def test_a_second_process_is_refused_before_it_loads(finished, monkeypatch, capsys, nothing_loads):
    folder, arguments = finished
    monkeypatch.chdir(folder)
    lock = build.RunLock(Path("runs/tiny_dmd"))
    try:
        assert tool.main([*arguments, "train.max_steps=3"]) == 2
    finally:
        lock.release()
    assert f"this run is being trained by process {os.getpid()} on" in capsys.readouterr().err


def test_a_folder_that_can_not_be_written_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, capsys, nothing_loads
):
    def read_only(path, *args):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("streamvid.training.launch.os.open", read_only)
    assert tool.main(["--config", str(CONFIG), f"train.output_dir={tmp_path}/runs"]) == 2
    assert capsys.readouterr().err.startswith("error: [Errno 30] Read-only file system: ")


@pytest.mark.parametrize("where", ["load", "export"])
def test_ctrl_c_outside_of_the_loop_is_no_traceback(tmp_path, monkeypatch, capsys, where):
    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    if where == "load":
        monkeypatch.setattr(build, "build_student", pressed)
    else:
        monkeypatch.setattr(export_module, "save_student", pressed)
    arguments = ["--config", str(CONFIG), f"train.output_dir={tmp_path}", *SMALL]
    assert tool.main(arguments) == 130
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("error: stopped; the same command starts anew, or resumes")
    )
    monkeypatch.undo()
    assert tool.main(arguments) == 0 and load_student(tmp_path / "tiny_dmd" / "student")


def test_an_export_that_is_not_finite_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    """It used to be written as a success, and streamed black clips."""
    save = export_module.save_student

    def spoiled(path, network, *rest):
        with torch.no_grad():
            network.scale_shift_table[0, 0] = float("nan")
        save(path, network, *rest)

    monkeypatch.setattr(export_module, "save_student", spoiled)
    assert tool.main(["--config", str(CONFIG), f"train.output_dir={tmp_path}", *SMALL]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.splitlines()[-1]
        == "error: scale_shift_table of the transformer is not finite (NaN or infinite); nothing"
        " was saved"
    )
    assert (
        not (tmp_path / "tiny_dmd" / "student").exists()
        and not (tmp_path / "tiny_dmd" / "exported.json").exists()
    )


def test_a_dry_run_says_what_room_is_needed_and_writes_nothing(tmp_path, monkeypatch, capsys):
    """At a number of steps that stands for no limit it ends as fast as at another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("streamvid.experiment.estimate.SAMPLED_STEPS", 2)
    assert (
        tool.main(["--config", str(CONFIG), "--dry-run", *SMALL, "train.max_steps=1000000000"]) == 0
    )
    assert "on disk: 0.3" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
