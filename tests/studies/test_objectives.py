"""Every objective on the world: what a run is given, and what the report says."""

import json
from dataclasses import replace

import pytest

from streamvid.cli import objectives as command
from streamvid.studies import objectives as study


def job(tmp_path, name="sid", **options):
    options = {"seed": 0, "updates": 2, "num_prompts": 2} | options
    return study.Job(name, run_file=command.RUN_FILE, folder=tmp_path, **options)


@pytest.mark.parametrize("name", sorted(study.video_objectives()))
def test_every_objective_has_a_run(name, tmp_path):
    """Its own steps and stepper, as many steps as give the updates, data that it can learn from."""
    config = study.configure(job(tmp_path, name))
    kind = type(config.options)
    assert kind.name == name and config.stream.stepper == kind.sampler
    updates = [
        turn for step in range(config.train.max_steps) for turn in config.options.turns(step)
    ]
    assert updates.count("student") == 2
    assert (config.data.kind == "trajectories") == ("pairs" in config.options.needs)


def test_the_start_is_streamed_as_the_student_is():
    assert study.way_of(4, "renoise") == "4-renoise"
    assert study.way_of(2, "jump") == study.way_of(2, "euler") == "2-euler"


def test_the_report_counts_what_improves(tmp_path):
    """A gain within the spread of a score is none; a run that failed says why."""
    jobs = [job(tmp_path, name) for name in ("sid", "cd", "tdm", "sds")]
    longer = [replace(each, updates=7) for each in jobs[1:3]]
    outcome = {("sid", 2): 0.7, ("cd", 2): 0.605, ("sds", 2): 0.9, ("cd", 7): 0.62}
    outcome["tdm", 7] = 0.59
    for each in [*jobs, *longer]:
        result = {"objective": each.name, "seed": 0, "updates": each.updates}
        overall = outcome.get((each.name, each.updates))
        if overall is not None:
            result |= {"scores": {"shape": 0.5, "overall": overall}, "num_steps": 1}
            result |= {"stepper": "renoise", "seconds": 3.0, "forwards": {"student": 4.0}}
            result |= {"tflop": 0.1, "peak_bytes": 2**30, "networks": 2}
        else:
            result["error"] = "the loss is nan"
        study.write_result(each.result_file, result)
    start = {"1-renoise": {"overall": 0.6}}
    plane = {"sid": {"ring": 1.25}}
    text = study.write_report(tmp_path / "report.json", jobs, start, plane)
    assert "1 of 3 complete objectives improve the start" in text  # sid; sds is a baseline
    assert "+0.100" in text and "the loss is nan" in text and "1.2" in text
    assert "updates:" not in text
    text = study.write_report(tmp_path / "report.json", jobs, start, plane, longer)
    assert "1 of 3 complete objectives improve the start; the others were given 7 updates" in text
    assert "with which 2 do, all but tdm." in text and "\nWith 7 updates:\n\n|" in text
    content = json.loads((tmp_path / "report.json").read_text())
    assert [len(content[name]) for name in ("rows", "longer")] == [4, 2]


def test_the_plane_is_read_from_its_report(tmp_path):
    rows = [
        {"objective": "sid", "target": "ring", "seed": seed, "ratio": ratio}
        for seed, ratio in ((0, 1.0), (1, 2.0))
    ]
    (tmp_path / "toy2d.json").write_text(json.dumps({"rows": rows}))
    assert study.read_plane(tmp_path / "toy2d.json") == {"sid": {"ring": 1.5}}
    assert study.read_plane(tmp_path / "nothing.json") == {}


@pytest.mark.parametrize("options", [["--updates", "0"], ["--only", "sdi"], ["--out", "report.md"]])
def test_a_wrong_option_is_one_line(options, tmp_path, capsys):
    assert command.main([*options, "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_two_objectives_are_trained_and_compared(tmp_path, capsys):
    options = ["--only", "sid,cd", "--updates", "1", "--num-prompts", "1", "--jobs", "1"]
    assert command.main([*options, "--folder", str(tmp_path), "--out", f"{tmp_path}/r.json"]) == 0
    assert "| sid " in capsys.readouterr().out and (tmp_path / "r.md").is_file()
