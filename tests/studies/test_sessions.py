"""Measuring sessions in a batch."""

from __future__ import annotations

import json

import pytest

from streamvid.studies.sessions import main, median_ratio


def test_a_ratio_above_one_is_for_the_batch():
    assert median_ratio({"alone": [4.0, 9.0, 2.0], "batch": [2.0, 3.0, 2.0]}) == 2.0


def test_a_study_says_what_was_measured(tmp_path):
    out = tmp_path / "sessions.json"
    assert main(["--out", str(out), "--sessions", "1,2", "--rounds", "1", "--size", "16x16"]) == 0
    table = json.loads(out.read_text())["table"]
    assert [row["sessions"] for row in table] == [1, 2]
    for row in table:
        seconds, rates = row["seconds"], row["frames_per_second"]
        assert rates["batch"] == pytest.approx(12 * row["sessions"] / seconds["batch"][0])
        assert row["difference"] < 1e-4
    page = out.with_suffix(".md").read_text()
    assert page.count("\n| ") == 3 and "one after another" in page


def test_a_report_has_a_name_of_its_kind(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "sessions.md")]) == 2
    assert "expected a .json file" in capsys.readouterr().err
