"""A sample of the hostile cases; all of them as `slow`, which is `python -m tests.reliability`."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.reliability.cases import all_cases
from tests.reliability.runner import NotHeld, Outcome, refused, worked

ROOT = Path(__file__).parents[2]


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_sample_holds():
    run(
        "--every",
        "40",
        *(
            word
            for area in ("YAML", "overrides", "folders", "weight files")
            for word in ("--only", area)
        ),
    )


@pytest.mark.slow
def test_all_hold():
    run()


def test_names_of_cases_are_unique_and_there_are_six_hundred():
    names = Counter((case.area, case.name) for case in all_cases())
    assert len(names) >= 600 and set(names.values()) == {1}


GOOD = Outcome(2, "", "warning: x\nerror: size=7, expected 8\n")


@pytest.mark.parametrize(
    "outcome, said",
    [
        (GOOD, ""),
        (Outcome(0, "wrote x", ""), "expected a refusal"),
        (Outcome(1, "", GOOD.err), "expected a refusal, got exit 1"),
        (Outcome(-9, "", GOOD.err, "over 2500 MB of memory"), "over 2500 MB"),
        (Outcome(2, "", "Traceback (most recent call last):\nerror: x\n"), "a traceback"),
        (Outcome(2, "", "error: \x1b[31mred\n"), "escape"),
        (Outcome(2, "\x1b[31m", GOOD.err), "escape"),
        (Outcome(2, "", "error: a\nerror: b\n"), "got 2"),
        (Outcome(2, "", "error: a\nand more\n"), "the last"),
        (Outcome(2, "", ""), "got 0"),
        (Outcome(2, "", "error: " + "x" * 2000), "2007 characters"),
    ],
)
def test_what_a_refusal_is(outcome, said):
    if not said:
        return refused(outcome, "size=7")
    with pytest.raises(NotHeld, match=said):
        refused(outcome)


def test_a_refusal_has_its_words_and_work_its_files(tmp_path):
    with pytest.raises(NotHeld, match="expected 'size=9'"):
        refused(GOOD, "size=9")
    with pytest.raises(NotHeld, match="clip.gif was not written"):
        worked(Outcome(0, "", ""), tmp_path / "clip.gif")
