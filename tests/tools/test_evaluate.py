"""tools/evaluate.py and tools/quickstart.py: the whole report, small."""

import json

import evaluate
import pytest
import quickstart

from streamvid.serving.student import TINY_START, load_student


def test_a_report_has_a_row_a_model_and_a_picture(tmp_path, capsys):
    out = tmp_path / "report.json"
    argv = ["--student", str(TINY_START), "--teacher-steps", "2", "--prompts", "2", "--seeds", "2", "--num-frames", "21"]
    assert evaluate.main([*argv, "--long", "2", "--long-prompts", "1", "--out", str(out)]) == 0
    teacher, start = json.loads(out.read_text())["rows"]
    assert (teacher["nfe"], teacher["latent_frames"], teacher["commits"]) == (2 * 2, 2 * 2 * 6, 0)
    assert (start["nfe"], start["commits"], start["latent_frames"]) == (8, 1, 8 * 3 + 3)
    assert start["work_ratio"] == pytest.approx(24 / 27) and 0 <= start["scores"]["overall"] <= 1
    assert out.with_suffix(".png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "| teacher, 2 steps" in printed and "by window of 20 frames" in printed


@pytest.mark.parametrize("argv, message", [
    (["--out", "report.txt"], ".json"),
    (["--out", "report.json", "--prompts", "0"], "at least 1"),
    (["--out", "report.json", "--student", "nowhere"], "no student folder"),
])
def test_mistakes_end_with_one_line(capsys, argv, message):
    assert evaluate.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_the_quickstart_writes_what_it_promises(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "TEACHER_STEPS", 2)
    assert quickstart.main(["--minutes", "0.02", "--prompts", "2", "--output-dir", str(tmp_path)]) == 0
    made = {path.name for path in (tmp_path / "quickstart").iterdir()}
    assert {"student", "clip_0.mp4", "clip_1.mp4", "contact_sheet.png", "report.json", "report.md"} <= made
    assert load_student(tmp_path / "quickstart" / "student").stream.num_steps == 4
    assert "student before" in capsys.readouterr().out
