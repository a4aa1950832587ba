"""Finished jobs are kept, found again and, if damaged, named."""

import pytest

from streamvid.studies.jobs import read_result, result_file, write_result


def test_a_result_is_read_as_it_was_written(tmp_path):
    file = result_file(tmp_path / "new", "dmd", "ring", 3)
    assert file.name == "dmd-ring-3.json"
    write_result(file, {"ratio": 1.5, "points": [[0.1, 0.2]]})
    assert read_result(file) == {"ratio": 1.5, "points": [[0.1, 0.2]]}


def test_a_damaged_result_is_named(tmp_path):
    file = result_file(tmp_path, "dmd", 0)
    file.write_text('{"ratio": 1.')
    with pytest.raises(ValueError, match="dmd-0.json is damaged .* delete it and run again"):
        read_result(file)
