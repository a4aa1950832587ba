"""The report of the suite ``stream``: tables for people, rows for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamvid import reports
from streamvid.printing import markdown_text

TITLES = {
    "pace": "Pace: a chunk over a full window, decoding included where there is a codec",
    "aging": "Age: a chunk of one step in a stream that has been going for long",
    "engine": "Engine options, in turns",
    "against": "Against other ways to stream, in turns, decoding left out",
}
"""By the key in the JSON."""


def ceiling_line(ceiling: dict[str, float]) -> str:
    """What the machine's matrix products reach."""
    parts = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in ceiling.items())
    return f"Matrix ceiling of this machine in this run: {parts}."


def text_of(ceiling: dict[str, float], tables: dict[str, Sequence[dict[str, Any]]]) -> str:
    """Markdown, readable as plain text too."""
    parts = [ceiling_line(ceiling)]
    for name, rows in tables.items():
        if rows:
            columns = list(rows[0])
            cells = [[_cell(row[column]) for column in columns] for row in rows]
            parts += [f"## {TITLES[name]}", reports.markdown([columns, *cells])]
            told = [f"{row['what']}: {row['why']}" for row in rows if "why" in row]
            parts += ["\n".join(f"- {markdown_text(line)}" for line in told)] if told else []
    return "\n\n".join(parts)


def write(
    path: str | Path, ceiling: dict[str, float], tables: dict[str, Sequence[dict[str, Any]]]
) -> str:
    """Write ``path`` (.json) and the ``.md`` beside it; returns the text."""
    text = text_of(ceiling, tables)
    content = {"ceiling": ceiling, **{name: list(rows) for name, rows in tables.items()}}
    reports.write_report(Path(path), text, content, reports.environment())
    return text


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else _whole(value)


def _whole(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)
