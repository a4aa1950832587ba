"""The table of planted errors fits the package; that tests notice them all is `slow`."""

import subprocess
import sys
from collections import Counter

import pytest

from tests.mutations import MUTANTS, ROOT, Mutant, check_row


def test_every_row_fits_the_files():
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


SURVIVOR = """
import sys
from tests import mutations
file, tests = "streamvid/seeding.py", ("tests/test_seeding.py",)
mutations.MUTANTS = [
    mutations.Mutant("seen", file, ">> 1", ">> 2", tests),
    mutations.Mutant("in a comment", file, "A 63-bit seed", "A seed", tests),
]
sys.exit(mutations.main([]))
"""


def run(*arguments):
    """In a process of its own, which has not imported the package yet."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_an_error_that_no_test_notices_ends_with_another_status():
    done = run("-c", SURVIVOR)
    verdicts = [line.split()[0] for line in done.stdout.splitlines()]
    assert (done.returncode, verdicts) == (1, ["killed", "survived", "1"]), done.stderr


@pytest.mark.slow
def test_every_error_is_noticed():
    done = run("-m", "tests.mutations")
    assert done.returncode == 0, done.stdout + done.stderr
