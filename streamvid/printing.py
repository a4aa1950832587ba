"""Texts that others wrote, such as names of files, prompts and labels, as a terminal and a Markdown
page may show them.

A name may hold a line feed, which forges a line, an escape sequence, which moves the cursor or
worse, or HTML, which a page runs. What is read by programs (JSON, YAML) is escaped by their
writers.
"""

from __future__ import annotations

import re

LONGEST = 1000  # characters of an error line
_MARKS = re.compile(r"([\\`*\[\]<>|&])")


def printable(text: object) -> str:
    """A text in one line: characters that do not print, line feeds and escapes among them, as
    ``\\n``, ``\\x1b``, ``\\u2028``.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in str(text)
    )


def markdown_text(text: object) -> str:
    """A text as Markdown shows it literally, in a heading, a list or a cell of a table: no markup,
    no HTML, one line.
    """
    return _MARKS.sub(r"\\\1", printable(text))


def one_line(error: BaseException) -> str:
    """What an error says, its lines folded into one, and no more of it than can be read."""
    text = printable(" ".join(str(error).split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 3 :]}"
