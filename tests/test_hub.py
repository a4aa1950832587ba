"""A name on the hub is taken wherever a folder is; the hub is a fake that gives links into blobs,
as its cache has them.
"""

import shutil

import huggingface_hub
import pytest
import torch

from streamvid.cli import bench, evaluate, sample, trajectories
from streamvid.codecs.load import open_codec
from streamvid.students.folder import TINY_STUDENT, TINY_TEACHER, load_student, save_student
from streamvid.students.pipeline import StreamVidPipeline
from streamvid.teachers.wan import WanTeacher

STUDENT, TEACHER = "someone/student", "someone/teacher"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The names and patterns that were asked for; only these two are on the hub."""
    names = []
    folders = {
        name: cached(tmp_path / name.replace("/", "--"), source)
        for name, source in {STUDENT: TINY_STUDENT, TEACHER: TINY_TEACHER}.items()
    }

    def snapshot_download(name, allow_patterns):
        names.append((name, allow_patterns))
        return str(folders[name])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return names


def cached(home, source):
    """A folder as in the hub's cache: snapshots/REVISION/FILE links to blobs/HASH."""
    (home / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in source.rglob("*") if file.is_file())):
        link = home / "snapshots" / "abc" / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(shutil.copy(file, home / "blobs" / str(number)))
    return home / "snapshots" / "abc"


def test_a_student_its_components_and_its_codec(asked):
    student = load_student(STUDENT, components=TEACHER, codec=TEACHER)
    assert [name for name, _ in asked] == [
        STUDENT,
        TEACHER,
        TEACHER,
    ] and student.codec.latent_channels == 16
    # 28 GB of Wan 14B
    assert "transformer/*.safetensors" not in asked[1][1] and "*/*.safetensors" not in asked[1][1]
    assert "vae/*.safetensors" in asked[2][1] and "text_encoder/*.safetensors" not in asked[2][1]


def test_a_codec_a_teacher_and_a_pipeline(asked):
    assert open_codec(TEACHER).latent_channels == 16
    assert WanTeacher.from_pretrained(TEACHER).shift == 8.0
    assert (
        StreamVidPipeline.from_pretrained(
            STUDENT, components=TEACHER, codec=TEACHER
        ).vae.latent_channels
        == 16
    )


def test_components_are_copied_as_files(asked, tmp_path):
    save_student(
        tmp_path / "whole",
        load_student(TINY_STUDENT).transformer,
        load_student(TINY_STUDENT).stream,
        TEACHER,
    )
    copies = [
        file
        for part in ("vae", "text_encoder", "tokenizer")
        for file in (tmp_path / "whole" / part).iterdir()
    ]
    assert copies and not any(file.is_symlink() for file in copies)


def test_a_link_out_of_the_components_is_not_published(tmp_path):
    """It was copied into the export as the file that it points to."""
    student, secret = load_student(TINY_STUDENT), tmp_path / "secret.json"
    secret.write_text("{}")
    shutil.copytree(TINY_TEACHER, tmp_path / "components")
    (tmp_path / "components" / "vae" / "more.json").symlink_to(secret)
    with pytest.raises(ValueError, match="more.json is a link out of its folder"):
        save_student(
            tmp_path / "whole", student.transformer, student.stream, tmp_path / "components"
        )
    assert not (tmp_path / "whole").exists()
    (tmp_path / "components" / "vae" / "more.json").unlink()
    (tmp_path / "components" / "vae").rename(tmp_path / "vae")
    (tmp_path / "components" / "vae").symlink_to(tmp_path / "vae")  # the folder itself may be one
    save_student(tmp_path / "whole", student.transformer, student.stream, tmp_path / "components")


@pytest.mark.parametrize(
    "options",
    [
        ("--student", STUDENT, "--components", TEACHER),
        ("--codec", TEACHER),
        ("--teacher", TEACHER, "--steps", "1"),
    ],
)
def test_sample(asked, monkeypatch, options):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    argv = [
        "--prompt",
        "a red circle moves up",
        "--num-frames",
        "9",
        "--size",
        "16x16",
        "--out",
        "clip.gif",
    ]
    assert sample.main([*argv, *options]) == 0 and asked


def test_evaluate_bench_and_trajectories(asked, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    few = ["--num-prompts", "1", "--num-frames", "9", "--teacher-steps", "1"]
    argv = ["--student", STUDENT, "--components", TEACHER, "--teacher", TEACHER]
    assert evaluate.main([*argv, *few, "--out", "report.json"]) == 0
    assert (
        bench.main(
            [
                "--suite",
                "stream",
                *argv[:4],
                "--cases",
                "student",
                "--ages",
                "1",
                "--repeats",
                "1",
                "--out",
                "bench.json",
            ]
        )
        == 0
    )
    few = ["--num-clips", "1", "--steps", "2", "--student-steps", "1", "--latent-frames", "1"]
    assert trajectories.main(["--teacher", TEACHER, *few, "--out", "set"]) == 0
    assert {name for name, _ in asked} == {STUDENT, TEACHER}


def test_offline_it_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for options in (
        ["--student", STUDENT],
        ["--components", STUDENT],
        ["--codec", STUDENT],
        ["--teacher", STUDENT],
    ):
        assert sample.main(["--prompt", "a cat", "--out", str(tmp_path / "a.gif"), *options]) == 2
        error = capsys.readouterr().err
        assert (
            error.startswith(f"error: no folder {STUDENT} here, and it cannot be fetched")
            and error.count("\n") == 1
        )


def test_a_file_of_a_codec_is_never_looked_up(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ValueError, match="no file models/taew2_1.pth"):
        open_codec("models/taew2_1.pth", torch.device("cpu"))
