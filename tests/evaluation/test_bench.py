"""Benchmarks measure every term and streams, and write a report."""

import json

import pytest
import torch

from streamvid.evaluation import bench_suites

CPU = torch.device("cpu")


def test_every_term_of_the_loss_core_is_measured():
    rows = bench_suites.losses((2, 4, 3, 4, 4), CPU, 1)
    by_name = {row[""]: row for row in rows}
    assert by_name["mse"]["time / MSE"] == 1 and by_name["mse"]["peak / MSE"] == 1
    assert len(rows) >= 30 and all(row["ms"] > 0 and row["peak MiB"] > 0 for row in rows)


def test_a_stream_is_measured(tmp_path):
    from streamvid.evaluation.report import write_bench
    from streamvid.students.folder import TINY_STUDENT, load_student

    rows = bench_suites.streams(load_student(TINY_STUDENT), [1, 4], 33, (64, 64), CPU, 1)
    assert [row[""] for row in rows] == ["1 steps per chunk", "4 steps per chunk"]
    assert all(row["frames/s"] > 0 and row["cache MiB"] > 0 for row in rows)
    text = write_bench(tmp_path / "stream.json", rows)
    assert "frames/s" in text and json.loads((tmp_path / "stream.json").read_text())["rows"] == rows


def test_one_chunk_is_no_stream():
    from streamvid.students.folder import TINY_STUDENT, load_student

    with pytest.raises(ValueError, match="--num-frames 129"):
        bench_suites.streams(load_student(TINY_STUDENT), [1], 9, (64, 64), CPU, 1)
