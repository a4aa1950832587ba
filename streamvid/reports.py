"""Reports: tables, the machine that figures were measured on, and files that hold both.

A report is a `.json` for programs and a `.md` of the same for people beside it.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamvid.command_line import invocation
from streamvid.files import atomic_file
from streamvid.printing import markdown_text


def write_report(path: Path, text: str, content: Any, about: dict[str, Any] | None = None) -> None:
    """Write ``path`` (.json) and ``text`` as the ``.md`` beside it.

    Args:
        content: what the JSON holds.
        about: of ``environment``; under the key "environment" of ``content``, which is then a
            dictionary, and as a list at the end of the text. None leaves it out.
    """
    if about is not None:
        content = {"environment": about, **content}
        notes = "".join(f"\n- {key}: {markdown_text(value)}" for key, value in about.items())
        text = f"{text}\n{notes}\n"
    with atomic_file(path.with_suffix(".md")) as temporary:
        temporary.write_text(text)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """The machine and the versions that figures were measured with, and the command."""
    import diffusers
    import torch

    import streamvid

    return {
        "machine": machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "streamvid": streamvid.__version__,
        "command": invocation(),
    }


def machine() -> str:
    """The processor's kind, and the GPU or the number of CPU threads."""
    import torch

    threads = torch.get_num_threads()
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{_cpu_name()}, threads: {threads}"
    )
    return f"{platform.machine()}, {device}"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else "CPU"


def mean_and_spread(rows: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """The mean of each number that all rows have, and the distance of its greatest from its
    least.
    """
    names = [name for name in rows[0] if all(name in row for row in rows)]
    columns = {name: [row[name] for row in rows] for name in names}
    means = {name: statistics.mean(values) for name, values in columns.items()}
    spread = {name: max(values) - min(values) for name, values in columns.items()}
    return means, spread


def mean_cell(mean: float, spread: float | None = None, digits: int = 3) -> str:
    """A mean and half its spread, such as ``0.812 ±0.014``; None is a spread that is not known."""
    if spread is None:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ±{spread / 2:.{digits}f}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the first one the head, with columns of one width; cells are texts, not
    markup.
    """
    lines = [[markdown_text(cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    ]
    return "\n".join(
        [text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]]
    )
