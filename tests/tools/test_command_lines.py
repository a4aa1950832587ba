"""Mistakes on the command lines of tools without a file here: one line, before the work, and
nothing written.
"""

import bench
import evaluate
import make_tiny_codec
import make_tiny_text
import make_trajectories
import pytest

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
        ((*LOSSES, "--size", "0", "1", "8", "8"), "--size 0 1 8 8: expected sides of at least 1"),
        ((*LOSSES, "--size", "4", "1", "-8", "8"), "expected sides of at least 1"),
        ((*LOSSES, "--size", "99999", "99999", "99999", "1"), "at most 1,000,000,000 numbers"),
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
    ],
)
def test_bench(capsys, tmp_path, monkeypatch, argv, message):
    refused(bench, capsys, tmp_path, monkeypatch, argv, message)


def test_bench_takes_the_best_device_by_the_name_that_other_tools_know(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert bench.main([*LOSSES, "--size", "4", "3", "4", "4", "--device", "auto"]) == 0


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--out", "set", "--device", "cuda:77"), "there is no device cuda:77 here"),
        (
            ("--out", "set", "--latent-size", "7", "7"),
            "--latent-size 7 7, expected multiples of 2 and 2",
        ),
        (("--out", "set", "--latent-size", "0", "8"), "--latent-size 0 8, expected"),
        (("--out", "file"), "--out file is a file"),
        (("--out", "file/set"), "cannot write"),
        (("--out", "/proc/set"), "cannot write"),
        (("--out", "set", "--teacher", ""), "--teacher is an empty text"),
    ],
)
def test_make_trajectories(capsys, tmp_path, monkeypatch, argv, message):
    refused(make_trajectories, capsys, tmp_path, monkeypatch, ("--num", "1", *argv), message)


@pytest.mark.parametrize("tool", [make_tiny_codec, make_tiny_text])
@pytest.mark.parametrize(
    "argv, message",
    [
        (("--out", "/proc/x"), "cannot write"),
        (("--out", "file"), "cannot write"),
        (("--out", ""), "--out is an empty text"),
    ],
)
def test_what_is_trained_has_a_place_first(tool, capsys, tmp_path, monkeypatch, argv, message):
    """It trained for ten minutes, and failed then."""
    refused(tool, capsys, tmp_path, monkeypatch, argv, message)


@pytest.mark.parametrize(
    "tool, argv",
    [
        (evaluate, ("--prompts", "1", "--out", "r.json")),
        (bench, LOSSES),
        (make_trajectories, ("--num", "1", "--out", "set")),
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
    assert evaluate.main([*argv, "--prompts", "1", "--num-frames", "9", "--out", "r.json"]) == 0
    text, shown = (tmp_path / "r.md").read_text(), capsys.readouterr()
    assert "a\\|b\\\\n\\<img\\>\\\\x1b\\[31m" in text and "\x1b[31m" not in shown.out + shown.err
