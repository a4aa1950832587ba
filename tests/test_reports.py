"""Reports hold the same for programs and for people, with the machine that figures are of."""

import json

import pytest

from streamvid.reports import environment, markdown, mean_and_spread, mean_cell, write_report


def test_means_are_of_what_all_rows_have():
    rows = [{"a": 1.0, "b": 2.0}, {"a": 4.0}]
    assert mean_and_spread(rows) == ({"a": 2.5}, {"a": 3.0})


def test_a_cell_shows_half_the_spread():
    assert mean_cell(0.6, 0.2) == "0.600 ±0.100"
    assert mean_cell(1.234, digits=2) == "1.23"


def test_columns_have_one_width_and_cells_are_no_markup():
    head, rule, row = markdown([["", "a|b"], ["name", "1"]]).splitlines()
    assert len(head) == len(rule) == len(row)
    assert r"a\|b" in head and set(rule) == set("|-")


def test_a_report_is_json_and_the_same_as_text(tmp_path):
    path = tmp_path / "report.json"
    write_report(path, "| table |", {"rows": [1]}, environment())
    written = json.loads(path.read_text())
    assert written["rows"] == [1] and written["environment"]["python"]
    text = path.with_suffix(".md").read_text()
    assert text.startswith("| table |\n\n- machine: ") and "- command: python " in text


def test_a_report_without_a_machine_is_what_it_is_given(tmp_path):
    path = tmp_path / "report.json"
    write_report(path, "text\n", [1, 2])
    assert json.loads(path.read_text()) == [1, 2]
    assert path.with_suffix(".md").read_text() == "text\n"


def test_a_report_that_can_not_be_written_leaves_none(tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(TypeError):
        write_report(path, "text", {"rows": object()}, {})
    assert not path.exists()
