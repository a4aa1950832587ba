"""What others wrote is shown, and does nothing."""

import pytest

from streamvid.printing import markdown_text, one_line, printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("clip_1 ü 漢.mp4", "clip_1 ü 漢.mp4"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\nerror: all is lost", r"a\nerror: all is lost"),
        ("a\u2028b\x85c\u202ed", r"a\u2028b\x85c\u202ed"),
        ("\udcff.mp4", r"\udcff.mp4"),  # a name that is no UTF-8
    ],
)
def test_characters_that_do_something_are_shown_as_their_codes(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    "text, shown",
    [
        ("tiny_dmd-1.2", "tiny_dmd-1.2"),
        ("<img src=x onerror=alert(1)>", r"\<img src=x onerror=alert(1)\>"),
        ("x\n---\nlicense: mit", r"x\\n---\\nlicense: mit"),
        ("a|b [c](d) `e` *f* &lt;", r"a\|b \[c\](d) \`e\` \*f\* \&lt;"),
    ],
)
def test_markdown_shows_a_text_and_no_markup(text, shown):
    assert markdown_text(text) == shown.replace(r"\\n", "\\\\n")


def test_an_error_of_several_lines_is_folded():
    assert one_line(ValueError("no\n  clip \x1b[2J")) == r"no clip \x1b[2J"


def test_an_error_of_any_length_can_be_read():
    text = one_line(ValueError("unknown key " + "x" * 100_000 + "; the nearest is 'lr'"))
    assert (
        len(text) < 1000
        and text.startswith("unknown key x")
        and text.endswith("the nearest is 'lr'")
    )
