"""A study trains, keeps, goes on and reports; its numbers are means over seeds of what runs have
left.
"""

import json
from pathlib import Path

import pytest
import torch

from streamvid.studies import study as st
from streamvid.studies.jobs import write_result
from streamvid.studies.report import (
    crossed_table,
    long_table,
    read_results,
    restore_results,
    score_table,
    summary,
    write_report,
)
from streamvid.studies.study import (
    StudyConfig,
    Variant,
    all_jobs,
    appearance,
    find_unfinished,
    jobs_of,
    load_study,
    tail_means,
)

ROOT = Path(__file__).parents[2]


def test_the_shipped_studies_can_be_read():
    for path in sorted((ROOT / "configs" / "study").glob("*.yaml")):
        assert load_study(path).variants


def test_the_first_seeds_of_all_come_before_the_second_of_any():
    study = StudyConfig(
        {"a": Variant(run="x", seeds=2), "b": Variant(run="y"), "c": Variant(run="z", seeds=3)}
    )
    order = [(job.name, job.seed) for job in jobs_of(study, Path("."), Path("."))]
    assert order == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1), ("c", 2)]
    one = StudyConfig(study.variants, max_seeds=1)
    assert [job.seed for job in jobs_of(one, Path("."), Path("."))] == [0, 0, 0]


def results_of(overalls):
    """Two seeds of a variant, and the teacher."""
    row = lambda label, overall: {
        "label": label,
        "scores": {"overall": overall},
        "nfe": 3,
        "commits": 2,
        "work": 15,
    }
    base = {"steps": 10, "train_s": 5.0, "metrics": {}}
    yield {"variant": "teacher", "seed": 0, **base, "rows": [row("teacher, 50 steps", 0.8)]}
    for seed, overall in enumerate(overalls):
        yield {"variant": "a", "seed": seed, **base, "rows": [row("1 step", overall)]}


def test_rows_are_means_over_seeds_with_their_spread_and_relative_to_the_teacher():
    teacher, own = summary(list(results_of([0.5, 0.7])))
    assert own["scores"]["overall"] == pytest.approx(0.6) and own["spread"][
        "overall"
    ] == pytest.approx(0.2)
    assert own["of_teacher"] == pytest.approx(0.75) and own["seeds"] == [0, 1]
    assert (
        "0.600 ±0.100" in score_table([own])
        and "75.0%" in score_table([own])
        and "3 + 2" in score_table([own])
    )


def test_the_report_names_what_is_missing_and_a_damaged_result(tmp_path):
    study = StudyConfig({"a": Variant(run="x", seeds=3, curves={"a": ()})})
    jobs = all_jobs(study, tmp_path, tmp_path)
    for result in results_of([0.5, 0.7]):
        write_result(tmp_path / f"{result['variant']}-{result['seed']}.json", result)
    assert "Not finished: a-2." in write_report(tmp_path / "report.json", study, jobs)
    (tmp_path / "a-1.json").write_text("{")
    with pytest.raises(ValueError, match="a-1.json is damaged"):
        read_results(jobs)


def test_a_report_alone_is_enough_to_go_on(tmp_path):
    """A study's results were only in its folder: on another machine every run was done again."""
    study = StudyConfig(
        {"a": Variant(run="x", seeds=2), "b": Variant(run="y", after="a"), "old": Variant(run="z")}
    )
    here, there, report = tmp_path / "here", tmp_path / "there", tmp_path / "report.json"
    mean = {
        "variant": "old",
        "label": "1 step",
        "seeds": [0, 1, 2],
        "scores": {"overall": 0.9},
        "spread": {"overall": 0.1},
    }
    write_result(report, {"kept": [{**mean, "of_teacher": None, "long": [], "judge": []}]})
    made = {(result["variant"], result["seed"]): result for result in results_of([0.5, 0.7])}
    for job in all_jobs(study, tmp_path, here):
        if (job.name, job.seed) in made:
            write_result(job.result_file, {**made[job.name, job.seed], "recipe": job.recipe})
    first = write_report(report, study, all_jobs(study, tmp_path, here))
    assert "Not finished: b-0." in first and "0.900 ±0.050" in first

    jobs = all_jobs(study, tmp_path, there)
    assert not there.exists() and restore_results(report, jobs) == {"old"}
    assert write_report(report, study, jobs) == first
    names = lambda jobs: [(job.name, job.seed) for job in jobs]
    # a's result is there, its student is not
    assert names(find_unfinished(jobs, jobs, {"old"})) == [("a", 0), ("b", 0)]
    (there / "runs" / "a-0" / "student").mkdir(parents=True)
    assert names(find_unfinished(jobs, jobs, {"old"})) == [("b", 0)] and ("old", 0) in names(
        find_unfinished(jobs, jobs)
    )
    assert names(find_unfinished(jobs[:1], jobs)) == []

    write_result(
        there / "old-0.json",
        {"variant": "old", "seed": 0, "steps": 1, "train_s": 1.0, "metrics": {}, "rows": []},
    )
    write_report(report, study, jobs)
    assert json.loads(report.read_text())["kept"] == []  # it has results of its own again


def test_results_of_other_settings_are_not_taken_for_these(tmp_path):
    job = lambda **of: jobs_of(StudyConfig({"a": Variant(run="x", **of)}), tmp_path, tmp_path)[0]
    write_result(job().result_file, {"variant": "a", "seed": 0, "recipe": job().recipe})
    assert len(read_results([job(seeds=3, noise_seeds=1)])) == 1
    with pytest.raises(
        ValueError,
        match=(
            r"a was run with overrides=\[\], the study now says \['options.beta=1'\]; give the"
            r" variant a"
        ),
    ):
        read_results([job(overrides=("options.beta=1",))])
    with pytest.raises(ValueError, match="do it again with --redo a"):  # before anything is run
        restore_results(tmp_path / "report.json", [job(overrides=("options.beta=1",))])


def test_drift_is_the_last_window_over_the_first():
    clips = torch.full((1, 8, 3, 2, 2), 0.5)
    clips[:, 4:] *= 0.5
    clips[:, 4:, :, 0] = 0.75
    looks = appearance(clips, 4)
    assert (
        looks["brightness"] == pytest.approx([0.5, 0.5])
        and looks["contrast"][0] == 0
        and looks["contrast"][1] > 0.2
    )
    table = long_table(
        [
            {
                "variant": "a",
                "label": "b",
                "long": [{"brightness": [0.5, 0.25], "contrast": [0.1, 0.2]}],
            }
        ]
    )
    assert "0.500" in table and "2.000" in table


def test_variants_streamed_in_each_others_ways_are_a_matrix():
    long = lambda last: [{"overall": [0.9, last], "brightness": [0.5, 0.5], "contrast": [0.1, 0.2]}]
    rows = [
        {"variant": v, "label": label, "long": long(last)}
        for v, label, last in [
            ("a", "x", 0.8),
            ("a", "y", 0.3),
            ("b", "y", 0.7),
            ("b", "x", 0.4),
            ("c", "z", 0.1),
            ("d", "x", 0.6),
        ]
    ]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in crossed_table(rows).splitlines()
    ]
    assert table[0][1:] == ["x", "y"] and [line[0] for line in table[2:]] == ["a", "b", "d"]
    assert table[2][1:] == ["0.900 to 0.800, contrast x 2.000", "0.900 to 0.300, contrast x 2.000"]
    assert table[3][1].startswith("0.900 to 0.400") and table[4][2] == "-"
    assert crossed_table(rows[:2]) == "" and crossed_table(rows[4:]) == ""


def test_a_trainings_numbers_are_means_over_its_last_part():
    lines = [
        {"step": s, "seconds": 1.0, "loss": float(s), **({"gap_1": 2.0} if s == 7 else {})}
        for s in range(8)
    ]
    assert tail_means(lines) == {"loss": 6.5, "gap_1": 2.0}


def test_a_failed_training_is_reported_and_leaves_no_result(tmp_path, monkeypatch):
    study = StudyConfig({"a": Variant(student="nowhere")})
    (job,) = jobs_of(study, tmp_path, tmp_path)
    assert "error: no student folder" in st.run_job(job) and not job.result_file.exists()
