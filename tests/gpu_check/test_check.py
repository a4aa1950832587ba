"""The check of a GPU: no part can take another with it, and all of them run on a CPU at tiny
sizes.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from streamvid.cli import gpu_check
from streamvid.gpu_check import check
from streamvid.gpu_check.check import PARTS, Part, chosen, rows_of, run_parts
from streamvid.gpu_check.equality import compared
from streamvid.gpu_check.measure import Report, psnr

SPOILT = """
import os, time

def whole(report):
    report.attempt("three", lambda: 3)

def hang(report):
    report.attempt("before", lambda: 1)
    report.attempt("asleep", lambda: time.sleep(1000))

def crash(report):
    report.attempt("before", lambda: 2)
    report.attempt("gone", os.abort)

def wrong(report):
    report.attempt("divided", lambda: 1 / 0)
    report.attempt("after", lambda: 4)

def raised(report):
    raise RuntimeError("of no measurement")
"""


@pytest.mark.slow
def test_a_part_takes_no_other_with_it(tmp_path, monkeypatch):
    """What a hanging and a crashing part measured before is kept, and the parts behind them run."""
    (tmp_path / "spoilt_parts.py").write_text(SPOILT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ["whole", "hang", "crash", "wrong", "raised", "missing"]
    parts = [Part(name, f"spoilt_parts:{name}", 4 if name == "hang" else 60) for name in names]
    results = {
        result.part: result for result in run_parts(parts, tmp_path / "out.json", 10, tiny=True)
    }
    status = {name: result.status for name, result in results.items()}
    assert status == {
        "whole": "ok",
        "hang": "out of time",
        "crash": "failed",
        "wrong": "partly",
        "raised": "failed",
        "missing": "failed",
    }
    assert results["whole"].measurements == {"three": 3}
    assert (
        results["hang"].measurements == {"before": 1}
        and "out of time" in results["hang"].errors["asleep"]
    )
    assert results["crash"].measurements == {"before": 2} and "gone" in results["crash"].errors
    assert results["wrong"].measurements == {"after": 4}
    assert results["wrong"].errors == {"divided": "ZeroDivisionError: division by zero"}
    assert results["raised"].log[-1] == "RuntimeError: of no measurement"
    assert "missing" in results["missing"].log[-1]
    written = json.loads((tmp_path / "out.json").read_text())
    assert [each["status"] for each in written] == list(status.values())
    assert "ZeroDivisionError" in (tmp_path / "out.md").read_text()


def test_parts_that_find_no_time_are_skipped(tmp_path):
    results = run_parts(PARTS[:2], tmp_path / "out.json", minutes=0.01, tiny=True)
    assert [result.status for result in results] == ["skipped", "skipped"]
    assert len(json.loads((tmp_path / "out.json").read_text())) == 2


@pytest.mark.slow
def test_two_parts_at_tiny_sizes(tmp_path, capsys):
    out = tmp_path / "deep" / "gpu.json"
    assert gpu_check.main(["--tiny", "--parts", "memory,machine", "--out", str(out)]) == 0, (
        capsys.readouterr().out
    )
    machine, memory = json.loads(out.read_text())
    assert (machine["part"], memory["part"]) == ("machine", "memory"), "in our order"
    assert machine["measurements"]["matmul_bf16"]["tflops"] > 0
    assert memory["measurements"]["200_chunks"]["mib_after_20"] > 0
    assert "matmul_bf16.tflops" in capsys.readouterr().out


@pytest.mark.slow
def test_all_parts_at_tiny_sizes(tmp_path, capsys):
    assert (
        gpu_check.main(["--tiny", "--out", str(tmp_path / "gpu.json"), "--minutes", "10"]) == 0
    ), capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--parts", "machine,nothing"],
            "--parts nothing: there is no such part; expected some of machine, gradients",
        ),
        (["--out", "a.txt"], "--out a.txt: the report is a .json file"),
        (["--minutes", "0"], "--minutes 0 must be above 0"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message, capsys):
    assert gpu_check.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_list_names_every_part(capsys):
    assert gpu_check.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        part.name for part in PARTS
    ]


def test_every_part_is_a_function():
    for part in PARTS:
        module, _, function = part.target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert chosen(None) == PARTS


def test_a_report_is_on_the_disk_before_and_after_each_measurement(tmp_path):
    report, seen = Report(tmp_path / "r.json", tiny=True), []
    report.attempt("first", lambda: 0.123456789)
    report.attempt("second", lambda: seen.append(json.loads(report.file.read_text())))
    assert seen[0] == {"measurements": {"first": 0.123457}, "errors": {}, "running": "second"}
    assert report.attempt("bad", lambda: [][0]) is None
    assert json.loads(report.file.read_text())["errors"] == {
        "bad": "IndexError: list index out of range"
    }


def test_rows_are_named_by_the_way_to_them():
    assert rows_of({"a": {"b": 1, "c": [{"x": 2}]}, "d": [3]}) == [
        ("a.b", "1"),
        ("a.c.0", "x 2"),
        ("d", "[3]"),
    ]


def test_gradients_are_compared_with_their_sign_and_their_length():
    expected = {"u": torch.tensor([1.0, 2.0]), "v": torch.tensor([[3.0]])}
    facts = compared({"u": -2 * expected["u"], "v": -2 * expected["v"]}, expected)
    assert facts["cosine"] == pytest.approx(-1) and facts["norm_ratio"] == pytest.approx(2)
    with pytest.raises(ValueError, match="1 of 2 parameters have no gradient: v"):
        compared({**expected, "v": torch.zeros(0)}, expected)
    assert not compared({**expected, "v": torch.tensor([[float("nan")]])}, expected)["finite"]


def test_psnr_of_a_known_error():
    assert psnr(torch.full((4,), 0.1), torch.zeros(4)) == pytest.approx(20)


BLOCKED = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("decord", "imageio_ffmpeg"):
            raise ModuleNotFoundError(f"{name} is absent")

sys.meta_path.insert(0, Absent())
import streamvid
for module in pkgutil.walk_packages(streamvid.__path__, "streamvid."):
    importlib.import_module(module.name)
"""


def test_everything_imports_where_clips_cannot_be_read():
    """Machines without a network have neither decord nor imageio-ffmpeg."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, cwd=Path(check.ROOT)
    )
    assert done.returncode == 0, done.stderr[-500:]
