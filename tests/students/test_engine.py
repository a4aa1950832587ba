"""Engine options: what is read from a text, and what a prepared student computes."""

from __future__ import annotations

import pytest

from streamvid.students.engine import EngineOptions, engine_options


def test_a_text_names_options():
    """What ``names`` writes, ``engine_options`` reads."""
    options = EngineOptions(attention="auto", prepacked=True, compile=True)
    assert engine_options(",".join(options.names)) == options
    assert engine_options(" ") == EngineOptions()


@pytest.mark.parametrize("text", ["prepackd", "attention", "compile=yes"])
def test_what_is_no_option_is_refused(text):
    with pytest.raises(ValueError, match=r"^engine option '.*; (expected|write)"):
        engine_options(text)
