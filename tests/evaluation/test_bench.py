"""Benchmarks count bytes exactly where the answer is known, and write a report."""

import json

import pytest
import torch

from streamvid.evaluation import bench_suites
from streamvid.evaluation.bench import measure, peak_bytes

CPU = torch.device("cpu")
MEGA = 4 * 2**18  # bytes of 2^18 floats


def test_peak_bytes_of_known_work():
    x = torch.zeros(2**18)

    def two_at_once():
        a = x + 1
        return a + 1

    def one_after_the_other():
        a = x + 1
        del a
        return x + 2

    assert peak_bytes(two_at_once, CPU) == 2 * MEGA
    assert peak_bytes(one_after_the_other, CPU) == MEGA
    assert peak_bytes(lambda: x.view(2, -1)[0], CPU) == 0  # a view is no new memory
    assert peak_bytes(lambda: x.add_(1), CPU) == 0


def test_peak_bytes_see_what_autograd_keeps():
    x = torch.zeros(2**18, requires_grad=True)
    assert peak_bytes(lambda: x.exp().exp().exp(), CPU) >= 3 * MEGA
    with torch.no_grad():
        assert peak_bytes(lambda: x.exp().exp().exp(), CPU) == 2 * MEGA


def test_measuring_needs_a_repeat():
    assert measure({"nothing": lambda: None}, CPU, 1)["nothing"].peak_bytes == 0
    with pytest.raises(ValueError, match="repeats=0"):
        measure({}, CPU, 0)


def test_every_term_of_the_loss_core_is_measured():
    rows = bench_suites.losses((2, 4, 3, 4, 4), CPU, 1)
    by_name = {row[""]: row for row in rows}
    assert by_name["mse"]["time / MSE"] == 1 and by_name["mse"]["peak / MSE"] == 1
    assert len(rows) >= 30 and all(row["ms"] > 0 and row["peak MiB"] > 0 for row in rows)


def test_a_stream_is_measured(tmp_path):
    from streamvid.evaluation.report import write_bench
    from streamvid.students.folder import TINY_STUDENT, load_student

    rows = bench_suites.streams(load_student(TINY_STUDENT), [1, 4], 33, (64, 64), CPU, 1)
    assert [row[""] for row in rows] == ["1 steps a chunk", "4 steps a chunk"]
    assert all(row["frames/s"] > 0 and row["cache MiB"] > 0 for row in rows)
    text = write_bench(tmp_path / "stream.json", rows)
    assert "frames/s" in text and json.loads((tmp_path / "stream.json").read_text())["rows"] == rows


def test_one_chunk_is_no_stream():
    from streamvid.students.folder import TINY_STUDENT, load_student

    with pytest.raises(ValueError, match="--num-frames 129"):
        bench_suites.streams(load_student(TINY_STUDENT), [1], 9, (64, 64), CPU, 1)
