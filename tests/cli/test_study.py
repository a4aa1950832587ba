"""`streamvid study`: trains, keeps what is finished, goes on, reports."""

import json
from pathlib import Path

import pytest

from streamvid.cli import study

ROOT = Path(__file__).parents[2]
SMALL = """
prompts: 1
num_frames: 33
long_times: 1
long_prompts: 1
variants:
  start:
    student: {root}/streamvid/assets/start
    deploy: {{1 step: {{num_steps: 1}}}}
    curves: {{start: []}}
  dmd:
    run: {root}/configs/run/tiny_dmd.yaml
    overrides:
      [train.max_steps=1, train.batch_size=1, data.num_prompts=2, options.student_start_step=0]
    deploy: {{1 step: {{num_steps: 1, first_steps: none}}, 2 steps: {{num_steps: 2}}}}
    long: [1 step, 2 steps]
    judge: 4
    noise_seeds: 2
    curves: {{DMD: [1 step]}}
    minutes: 5
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.format(root=ROOT))
    return path


def arguments_of(path, tmp_path, *arguments):
    return ["--suite", str(path), "--jobs", "1", "--folder", str(tmp_path / "runs"), *arguments]


@pytest.mark.slow
def test_a_study_runs_goes_on_and_reports(small, tmp_path, capsys):
    assert study.main(arguments_of(small, tmp_path)) == 0
    printed = capsys.readouterr()
    assert (
        "3 runs to do, in about 0.1 h on 1 threads, 0.2 at most" in printed.err
        and "| dmd " in printed.out
    )
    report = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert [(row["variant"], row["label"]) for row in report["rows"]] == [
        ("teacher", "teacher, 50 steps"),
        ("teacher", "true clips"),
        ("start", "1 step"),
        ("dmd", "1 step"),
        ("dmd", "2 steps"),
    ]
    *_, one, two = report["rows"]
    assert (
        (one["nfe"], two["nfe"], one["commits"]) == (3, 6, 2)
        and one["steps"] == [1]
        and len(two["long"]) == 1
    )
    assert 0 <= two["judge"][0]["win_rate"] <= 1 and "win rate against true clips" in printed.out
    assert (tmp_path / "runs" / "report.png").read_bytes()[:4] == b"\x89PNG"

    assert study.main(arguments_of(small, tmp_path, "--redo", "start")) == 0
    assert "1 runs to do" in capsys.readouterr().err
    assert json.loads((tmp_path / "runs" / "report.json").read_text())["rows"] == report["rows"]


@pytest.mark.slow
def test_the_study_of_methods_is_wired(tmp_path, capsys):
    assert (
        study.main(
            [
                "--suite",
                "methods",
                "--quick",
                "--only",
                "diagonal_noised_context",
                "--jobs",
                "1",
                "--folder",
                str(tmp_path),
            ]
        )
        == 0
    )
    printed = capsys.readouterr()
    assert "2 runs to do" in printed.err and printed.out.count("| diagonal_noised_context") >= 4
    assert (
        json.loads((tmp_path / "quick" / "diagonal_noised_context-0.json").read_text())["steps"]
        == 2
    )


@pytest.mark.slow
def test_a_training_may_start_from_anothers_student(small, tmp_path, capsys):
    small.write_text(f"""{small.read_text()}
  more:
    run: {ROOT}/configs/run/tiny_dmd.yaml
    after: dmd
    overrides:
      [train.max_steps=1, train.batch_size=1, data.num_prompts=2, options.student_start_step=0]
""")
    assert study.main(arguments_of(small, tmp_path, "--only", "more")) == 0
    done = [
        line.split()[1].strip(":,")
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("[")
    ]
    assert done == ["teacher", "dmd", "more"]
    assert "dmd-0/student" in (tmp_path / "runs" / "runs" / "more-0" / "config.yaml").read_text()


@pytest.mark.slow
def test_two_at_once_have_processes_of_their_own(small, tmp_path, capsys):
    study.main([*arguments_of(small, tmp_path, "--only", "start"), "--jobs", "2"])
    assert (tmp_path / "runs" / "start-0.json").exists() and "[2/2]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--only", "sid"), "--only sid: expected some of start, dmd"),
        (("--redo", "sid"), "--redo sid: expected some of start, dmd"),
        (("--out", "report.md"), "the report is a .json file"),
        (("prompts=many",), "prompts"),
        (("max_seeds=0",), "max_seeds=0, expected at least 1"),
        (("variants.dmd.overrides=[options.num_chunk=3]",), "variants.dmd: "),
        (("variants.dmd.run=nowhere.yaml",), "does not exist"),
        (
            ("variants.dmd.after=start",),
            "variants.dmd.after='start', expected another variant that is trained",
        ),
        (("variants.start.run=x.yaml",), "variants.start: give either run"),
        (
            ("variants.dmd.curves={DMD: [3 steps]}",),
            "variants.dmd.curves.DMD has '3 steps', expected labels of deploy: 1 step, 2 steps",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(small, tmp_path, capsys, arguments, said):
    assert study.main(arguments_of(small, tmp_path, *arguments)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error
    assert not (tmp_path / "runs" / "teacher-0.json").exists()
