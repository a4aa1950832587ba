"""The suite measures all that it says, at tiny sizes; no time is asserted."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from streamvid.bench import report, suite
from streamvid.bench.cases import NARROW, PUBLISHED, names_in, student_case
from streamvid.bench.ceiling import best, matrix_ceiling
from streamvid.bench.counting import Traffic, count, forwards_per_chunk
from streamvid.bench.timing import in_turns, one_thread, percentile
from streamvid.cli import bench
from streamvid.rollout.schedule import StreamConfig
from streamvid.students.folder import TINY_STUDENT, load_student
from tests.bench.tiny import CPU, case_of

CEILING = {"MKL float32": 1e11, "oneDNN prepacked float32": 2e11, "bf16": 4e11}


@pytest.fixture(scope="module")
def student():
    return student_case(load_student(TINY_STUDENT), (64, 64))


def test_forwards_of_a_chunk():
    assert forwards_per_chunk(StreamConfig(num_steps=4)) == 5
    assert forwards_per_chunk(StreamConfig(num_steps=2, commit="reuse")) == 2
    assert forwards_per_chunk(StreamConfig(num_steps=1, first_steps=4)) == 2
    assert forwards_per_chunk(StreamConfig(step_table=((1.0, 0.5, 0.2), (1.0, 0.5), (1.0,)))) == 2


def test_traffic_and_operations_of_known_work():
    x, w = torch.zeros(8, 16), torch.zeros(16, 32)
    counted = count(lambda: x @ w)
    assert counted.flops == 2 * 8 * 16 * 32
    assert counted.bytes == 4 * (8 * 16 + 16 * 32 + 8 * 32)
    with Traffic() as traffic:
        x.t().reshape(16, 2, 4)[1:]  # a view of a view
    assert traffic.bytes == 0
    with Traffic() as traffic:
        x.add_(1)
    assert traffic.bytes == 2 * x.nbytes


def test_works_are_measured_in_turns():
    calls = []
    seconds = in_turns({name: lambda name=name: calls.append(name) for name in "abc"}, CPU, 6)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds) and len(set(rounds)) > 1
    assert {name: len(each) for name, each in seconds.items()} == {"a": 6, "b": 6, "c": 6}
    with pytest.raises(ValueError, match="rounds=0"):
        in_turns({}, CPU, 0)


def test_a_percentile_is_a_value():
    assert percentile([3.0, 1.0, 2.0], 0.95) == 3 and percentile(range(100), 0.95) == 94
    assert percentile([5.0], 0.5) == 5


def test_one_thread_and_back():
    before = torch.get_num_threads()
    with one_thread(CPU):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_the_ceiling_has_each_precision():
    ceiling = matrix_ceiling(CPU, size=32, rounds=2)
    assert {"MKL float32", "bf16"} <= set(ceiling) and min(ceiling.values()) > 0
    assert best(CEILING, torch.float32) == 2e11 and best(CEILING, torch.bfloat16) == 4e11


def test_the_prepacked_product_is_the_product():
    from streamvid.bench.ceiling import _cpu_products

    x, w = torch.randn(32, 32), torch.randn(32, 32)
    for name, work in _cpu_products(x, w).items():
        bound = 0.05 if name == "bf16" else 1e-5
        assert (work().float() - F.linear(x, w)).norm() / F.linear(x, w).norm() < bound


def test_pace_of_a_student_and_of_a_geometry(student):
    for case in (student.with_steps(1), case_of()):
        row = suite.pace(case, CEILING, 2)
        numbers = [value for key, value in row.items() if key]
        assert all(number > 0 for number in numbers), row
        share = row["GFLOP/s"] * 1e9 / 2e11
        assert row["of ceiling"] == pytest.approx(share)
        assert row["frames/s"] == pytest.approx(12000 / row["chunk ms"])
    assert row["forwards/frame"] == 3 / 12


def test_operations_are_those_of_all_forwards(student):
    """One step and its commit are two passes, four steps and theirs five, decoded once."""
    one, four = (suite.pace(student.with_steps(n), CEILING, 1)["GFLOP"] for n in (1, 4))
    plain = replace(student, size=None)
    one_pass = suite.pace(plain.with_steps(1), CEILING, 1)["GFLOP"] / 2
    assert four - one == pytest.approx(3 * one_pass, rel=0.02)


def test_age_is_streamed_or_set(student):
    rows = suite.aging(student, [1, 12])
    assert [row["age, chunks"] for row in rows] == [1, 12]
    assert {row["reached by"] for row in rows} == {"streamed"}
    assert rows[0]["time / first"] == rows[0]["memory / first"] == 1
    assert {row["reached by"] for row in suite.aging(case_of(), [5, 10_000])} == {"set"}


def test_a_stream_of_an_age_is_the_stream():
    """Set to the age that it has, a cache goes on as the stream that filled it."""
    case = case_of(window=(9, 3))
    cache = case.full_cache()
    expected = next(case.latents_over(cache.clone())).latents
    cache.load_state(cache.state(), cache.num_committed_frames)
    assert torch.equal(next(case.latents_over(cache)).latents, expected)
    old = case.full_cache(age=1000)
    assert old.num_committed_frames == 3000 and old.num_frames == case.full_cache().num_frames
    chunk = next(case.latents_over(old))
    assert chunk.index == 1000


def test_others_and_options_are_rows_beside_ours():
    case = case_of()
    names = ["diffusers", "self-forcing-style", "recompute"]
    rows = suite.against(case, names, 2)
    assert [row["what"] for row in rows] == ["ours", "ours, again", *names]
    for row in rows:
        assert row["time / ours"] == pytest.approx(row["chunk ms"] / rows[0]["chunk ms"])
    rows = suite.engine(case, 1, texts=["nonsense"])
    assert [row["what"] for row in rows] == ["ours", "ours, again", "nonsense"]
    assert rows[-1]["chunk ms"] == "-" and "nonsense" in rows[-1]["why"]
    text = report.text_of(CEILING, {"engine": rows})
    assert "- nonsense: engine option" in text and "oneDNN prepacked float32 200 GFLOP/s" in text
    assert "attention=auto" in suite.each_option()


def test_cases_by_name():
    assert names_in(None, cuda=False) == ["student", *NARROW]
    assert names_in(None, cuda=True) == ["student", *NARROW, *PUBLISHED]
    assert names_in("narrow bf16 21, student,student", cuda=False) == [
        "narrow bf16 21",
        "student",
    ]
    with pytest.raises(ValueError, match="--cases wide: expected some of student, narrow, 1.3b"):
        names_in("wide", cuda=False)


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "stream.json"
    argv = ["--cases", "student", "--steps", "1", "--ages", "1", "--repeats", "1"]
    assert bench.main(["--suite", "stream", *argv, "--out", str(out)]) == 0
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    assert written["pace"][0]["frames/s"] > 0 and written["ceiling"]["bf16"] > 0
    assert written["aging"][0]["age, chunks"] == 1 and not written["against"]
    assert report.TITLES["pace"] in printed and report.TITLES["against"] not in printed
    assert "| student, 1 step |" in out.with_suffix(".md").read_text()
