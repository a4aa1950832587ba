"""`streamvid evaluate` and `streamvid quickstart`: the whole report, small."""

import json
import shutil

import pytest

from streamvid.cli import evaluate, quickstart
from streamvid.students.folder import TINY_START, load_student


def test_a_report_has_a_row_a_model_and_a_picture(tmp_path, capsys):
    out, folder = tmp_path / "report.json", tmp_path / "start"
    shutil.copytree(TINY_START, folder)
    argv = [
        "--student",
        str(folder),
        "--card",
        "--teacher-steps",
        "2",
        "--num-prompts",
        "2",
        "--seeds",
        "0,1",
        "--num-frames",
        "21",
    ]
    assert evaluate.main([*argv, "--long", "2", "--num-long-prompts", "1", "--out", str(out)]) == 0
    teacher, start = json.loads(out.read_text())["rows"]
    assert (teacher["nfe"], teacher["latent_frames"], teacher["commits"]) == (2 * 2, 2 * 2 * 6, 0)
    assert (start["nfe"], start["commits"], start["latent_frames"]) == (8, 1, 8 * 3 + 3)
    assert start["work_ratio"] == pytest.approx(24 / 27) and 0 <= start["scores"]["overall"] <= 1
    report = json.loads(out.read_text())
    assert (
        report["truth"]["scores"]["overall"] > 0.9
        and start["seeds"] == 2
        and "nfe" not in report["truth"]
    )
    assert start["score_ratio"] == pytest.approx(
        start["scores"]["overall"] / teacher["scores"]["overall"]
    )
    assert (
        start["clip_speedup"] == pytest.approx(teacher["clip_s"] / start["clip_s"])
        and start["decode_s"] > 0
    )
    (long,) = report["long"]  # twice 20 frames after the first chunk of 9, in chunks of 12
    assert long["num_frames"] == 9 + 48 and [long["first"], long["last"]] == [
        long["windows"][k]["overall"] for k in (0, -1)
    ]
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.json",
        "report.md",
        "report.png",
        "start",
    }
    card = (folder / "README.md").read_text()
    assert f"{start['scores']['overall']:.3f}" in card and "2 noise seeds" in card
    assert out.with_suffix(".png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "| teacher, 2 steps" in printed and "by window of 20 frames" in printed


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--out", "report.txt"], ".json"),
        (["--out", "report.json", "--num-prompts", "0"], "at least 1"),
        (["--out", "report.json", "--prompts", "9"], "--prompts is called --num-prompts N now"),
        (["--out", "report.json", "--seeds", "0,x"], "expected seeds such as 0,1,2 or 0-9"),
        (["--out", "report.json", "--student", "nowhere"], "no student folder"),
        (["--out", "report.json", "--teacher", "nowhere"], "no teacher folder"),
        (["--out", "report.json", "--teacher-steps", "4,many"], "expected numbers such as 1,2,4"),
        (["--out", "report.json", "--teacher-steps", "4,"], "expected numbers such as 1,2,4"),
        (["--out", "report.json", "--label", "a"], "give each of the 0 --student one of its own"),
        (
            [
                "--out",
                "report.json",
                "--student",
                "a",
                "--student",
                "b",
                "--label",
                "x",
                "--label",
                "x",
            ],
            "one of its own",
        ),
        (["--out", "report.json", "--num-frames", "34"], "use 33 or 37"),
        (["--out", "report.json", "--num-frames", "17", "--teacher-steps", ""], "chunk_frames=3"),
        (["--out", "report.json", "--suite", "other"], "invalid choice"),
        (["--out", "/proc/report.json"], "cannot write /proc/report.json"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, capsys, monkeypatch, argv, message):
    """And nothing is written."""
    monkeypatch.chdir(tmp_path)
    try:
        code = evaluate.main(argv)
    except SystemExit as stop:  # argparse
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_quickstart_writes_what_it_promises(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "TEACHER_STEPS", 2)
    assert (
        quickstart.main(["--minutes", "0.02", "--num-prompts", "2", "--output-dir", str(tmp_path)])
        == 0
    )
    made = {path.name for path in (tmp_path / "quickstart").iterdir()}
    assert {
        "student",
        "clip_0.mp4",
        "clip_1.mp4",
        "contact_sheet.png",
        "report.json",
        "report.md",
    } <= made
    assert load_student(tmp_path / "quickstart" / "student").stream.num_steps == 4
    assert "student before" in capsys.readouterr().out
