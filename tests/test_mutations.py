"""The table of planted errors fits the package; that tests notice them all is a run of its own."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.mutations import MUTANTS, ROOT, Mutant, check_row


def test_every_row_fits_the_files():
    """Those of ``tests/objectives/mutants.py`` too."""
    for mutant in MUTANTS:
        check_row(mutant)
    names = Counter(mutant.name for mutant in MUTANTS)
    assert max(names.values()) == 1, names.most_common(1)


@pytest.mark.parametrize(
    "change, message",
    [
        (("streamvid/none.py", "a", "b", ()), "there is no streamvid/none.py"),
        (("streamvid/seeding.py", "no such text", "b", ()), "occurs 0 times"),
        (("streamvid/seeding.py", ">> 1", ">> 2", ("tests/none.py::test",)), "no tests/none.py"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=f"wrong: .*{message}"):
        check_row(Mutant("wrong", *change))


PLANTING = """
import sys
from tests import mutations
tests = ("tests/test_seeding.py",)
mutations.MUTANTS = [mutations.Mutant(*row, tests) for row in {rows}]
sys.exit(mutations.main([]))
"""
SEEN = ("seen", "streamvid/seeding.py", ">> 1", ">> 2")
UNSEEN = ("in a comment", "streamvid/seeding.py", "A 63-bit seed", "A seed")
NO_MODULE = ("no module", "streamvid/seeding.py", "import hashlib", "import hashlib_none")
NO_NAME = ("no name", "streamvid/seeding.py", ">> 1", ">> one")


def run(*arguments):
    """In a process of its own, which has not imported the package yet."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_an_error_that_no_test_notices_ends_with_another_status():
    done = run("-c", PLANTING.format(rows=[SEEN, UNSEEN]))
    verdicts = [line.split()[0] for line in done.stdout.splitlines()]
    assert (done.returncode, verdicts) == (1, ["killed", "survived", "1"]), done.stderr
    assert done.stdout.splitlines()[-1] == "1 killed, 1 survived"
    assert "tests/test_seeding.py::test_" in done.stdout.splitlines()[0]


@pytest.mark.slow
def test_a_row_that_breaks_the_code_is_not_killed():
    done = run("-c", PLANTING.format(rows=[NO_MODULE, NO_NAME]))
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "2 broken"
    assert "no module:\n" in done.stderr and "hashlib_none" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    "STREAMVID_MUTATIONS" not in os.environ,
    reason="takes half an hour: `python -m tests.mutations`, or set STREAMVID_MUTATIONS=1",
)
def test_every_error_is_noticed():
    done = run("-m", "tests.mutations")
    assert done.returncode == 0, done.stdout + done.stderr
