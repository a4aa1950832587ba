"""What is said of the package outside of it agrees with the package."""

from pathlib import Path

import pytest
import yaml

import streamvid
from streamvid.cli.__main__ import COMMANDS

ROOT = Path(streamvid.__file__).parents[1]


def test_the_version_is_the_same_wherever_it_is_told():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == streamvid.__version__
    assert f"## [{streamvid.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_named_in_the_changelog(name):
    assert name in (ROOT / "CHANGELOG.md").read_text()
