"""Mistakes on command lines without a file here: one line, before the work, and
nothing written.
"""

import pytest

from streamvid.cli import bench, evaluate, trajectories
from streamvid.students.folder import TINY_TEACHER

LOSSES = ("--suite", "losses", "--out", "b.json", "--repeats", "1")


def refused(tool, capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    try:
        code = tool.main(list(argv))
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (
        tmp_path / "file"
    ).read_text() == "mine"


@pytest.mark.parametrize(
    "argv, message",
    [
        ((*LOSSES, "--latent-shape", "0x1x8x8"), "0x1x8x8, expected CxTxHxW with sides"),
        ((*LOSSES, "--latent-shape", "4x1x-8x8"), "with sides of at least 1"),
        ((*LOSSES, "--size", "16", "21", "60", "104"), "argument --size: 16, expected HxW"),
        ((*LOSSES, "--frame-size", "64", "64"), "--frame-size is called --size HxW now"),
        ((*LOSSES, "--dtype", "bfloat16"), "choose from 'float32', 'bf16'"),
        ((*LOSSES, "--latent-shape", "99999x99999x99999x1"), "at most 1,000,000,000 numbers"),
        ((*LOSSES, "--device", "gpu"), "there is no device gpu here"),
        ((*LOSSES, "--device", "meta"), "there is no device meta here"),
        (("--suite", "stream", "--out", "b.json", "--student", ""), "--student is an empty text"),
        (
            ("--suite", "stream", "--out", "b.json", "--steps", "9" * 5000),
            "expected numbers such as 1,2,4",
        ),
        (
            ("--suite", "stream", "--out", "b.json", "--steps", "100000000"),
            "num_steps=100000000, expected at most 1,000",
        ),
        (
            ("--suite", "stream", "--out", "b.json", "--cases", "wide"),
            "--cases wide: expected some of student, narrow, 1.3b",
        ),
        (
            ("--suite", "stream", "--out", "b.json", "--against", "fast"),
            "--against fast: expected some of diffusers, self-forcing-style, recompute",
        ),
        (("--suite", "stream", "--out", "b.json", "--ages", "0"), "expected numbers such as 1,2,4"),
        (
            ("--suite", "stream", "--out", "b.json", "--num-frames", "9"),
            "--num-frames is called --repeats",
        ),
    ],
)
def test_bench(capsys, tmp_path, monkeypatch, argv, message):
    refused(bench, capsys, tmp_path, monkeypatch, argv, message)


def test_bench_takes_the_best_device_by_the_name_that_other_tools_know(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert bench.main([*LOSSES, "--latent-shape", "4x3x4x4", "--device", "auto"]) == 0


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--out", "set", "--device", "cuda:77"), "there is no device cuda:77 here"),
        (
            ("--out", "set", "--latent-size", "7x7"),
            "--latent-size 7x7, expected multiples of 2 and 2",
        ),
        (("--out", "set", "--latent-size", "0x8"), "argument --latent-size: 0x8, expected"),
        (("--out", "set", "--num", "1"), "--num is called --num-clips N now"),
        (("--out", "file"), "--out file is a file"),
        (("--out", "file/set"), "cannot write"),
        (("--out", "/proc/set"), "cannot write"),
        (("--out", "set", "--teacher", ""), "--teacher is an empty text"),
    ],
)
def test_trajectories(capsys, tmp_path, monkeypatch, argv, message):
    refused(trajectories, capsys, tmp_path, monkeypatch, ("--num-clips", "1", *argv), message)


@pytest.mark.parametrize(
    "tool, argv",
    [
        (evaluate, ("--num-prompts", "1", "--out", "r.json")),
        (bench, LOSSES),
        (trajectories, ("--num-clips", "1", "--out", "set")),
    ],
)
def test_ctrl_c_is_one_line(tool, argv, capsys, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("streamvid.students.folder.choose_device", interrupt)
    assert tool.main(list(argv)) == 130 and list(tmp_path.iterdir()) == []
    assert (error := capsys.readouterr().err).startswith("error: interrupted") and error.count(
        "\n"
    ) == 1


def test_a_label_of_another_kind_stays_one_line_of_the_report(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [
        "--student",
        str(TINY_TEACHER.parent / "student"),
        "--label",
        "a|b\n<img>\x1b[31m",
        "--teacher-steps",
        "",
    ]
    assert evaluate.main([*argv, "--num-prompts", "1", "--num-frames", "9", "--out", "r.json"]) == 0
    text, shown = (tmp_path / "r.md").read_text(), capsys.readouterr()
    assert "a\\|b\\\\n\\<img\\>\\\\x1b\\[31m" in text and "\x1b[31m" not in shown.out + shown.err
