"""Reports: rows of scores and costs as JSON, as a Markdown table and as text for the terminal."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamvid.command_line import invocation
from streamvid.evaluation.runs import Cost
from streamvid.files import atomic_file
from streamvid.printing import markdown_text

SHOWN = (
    "overall",
    "colour",
    "shape",
    "size",
    "number",
    "direction",
    "speed",
    "physics",
    "permanence",
    "order",
)


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
    """Mean over seeds of each score, and the distance of its greatest from its least."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    spread = {
        name: max(row[name] for row in rows) - min(row[name] for row in rows) for name in names
    }
    return means, spread


def result_row(
    label: str,
    rows: Sequence[dict[str, float]],
    cost: Cost | None,
    reference: Cost | None = None,
    reference_overall: float | None = None,
) -> dict[str, Any]:
    """One line of a report.

    Args:
        rows: mean scores, one dictionary a seed.
        cost: None where nothing was run, for true clips.
        reference: the cost that speed-ups and work are compared with.
        reference_overall: the overall score that this one is compared with.
    """
    means, spread = mean_and_spread(rows)
    row: dict[str, Any] = {"label": label, "scores": means, "spread": spread, "seeds": len(rows)}
    if reference_overall:
        row["score_ratio"] = means["overall"] / reference_overall
    if cost is not None:
        row |= {
            "nfe": cost.nfe,
            "commits": cost.commits,
            "latent_frames": cost.latent_frames,
            "denoise_s": cost.denoise_s,
            "decode_s": cost.decode_s,
            "clip_s": cost.clip_s,
            "first_frame_ms": 1000 * cost.first_frame_s,
        }
    if cost is not None and reference is not None:
        row |= {
            "denoise_speedup": reference.denoise_s / cost.denoise_s,
            "clip_speedup": reference.clip_s / cost.clip_s,
            "work_ratio": reference.latent_frames / cost.latent_frames,
        }
    return row


def window_table(rows: Sequence[dict[str, Any]]) -> str:
    """Overall scores of ``runs.score_long`` as a Markdown table."""
    lines = [
        [
            "",
            "frames",
            "prompts",
            "first",
            "last",
            "least",
            f"overall by window of {rows[0]['window']} frames",
        ]
    ]
    for row in rows:
        each = " ".join(f"{window['overall']:.3f}" for window in row["windows"])
        numbers = [f"{row[name]:.3f}" for name in ("first", "last", "least")]
        lines.append([row["label"], str(row["num_frames"]), str(row["prompts"]), *numbers, each])
    return markdown(lines)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, readable as plain text too."""
    names = [name for name in SHOWN if any(name in row["scores"] for row in rows)]
    compared = any("score_ratio" in row for row in rows)
    columns = [
        "",
        *names,
        *(["of teacher"] if compared else []),
        "forwards",
        "work",
        "s/clip",
        "first frame",
        "speed-up",
    ]
    return markdown([columns] + [_cells(row, names, compared) for row in rows])


def _cells(row: dict[str, Any], names: Sequence[str], compared: bool) -> list[str]:
    cells = [row["label"]]
    for name in names:
        cell = f"{row['scores'][name]:.3f}" if name in row["scores"] else "-"
        many = row["seeds"] > 1 and name == "overall"
        cells.append(f"{cell} ±{row['spread'][name] / 2:.3f}" if many else cell)
    if compared:
        cells.append(f"{100 * row['score_ratio']:.0f}%" if "score_ratio" in row else "-")
    if "nfe" not in row:
        return cells + ["-"] * 5
    commits = f" + {row['commits']}" if row["commits"] else ""
    speedup = f"{row['clip_speedup']:.1f}x" if "clip_speedup" in row else "-"
    return cells + [
        f"{row['nfe']}{commits}",
        str(row["latent_frames"]),
        f"{row['clip_s']:.2f}",
        f"{row['first_frame_ms']:.0f} ms",
        speedup,
    ]


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


def write_report(
    path: str | Path,
    rows: Sequence[dict[str, Any]],
    truth: dict[str, Any] | None = None,
    long: Sequence[dict[str, Any]] = (),
) -> None:
    """Write ``path`` (JSON) and the same as Markdown beside it.

    Args:
        rows: of ``result_row``, one a model.
        truth: of ``result_row``, of true clips.
        long: of ``runs.score_long``.
    """
    path, about = Path(path), environment()
    content = {"environment": about, "truth": truth, "rows": list(rows), "long": list(long)}
    notes = "".join(f"\n- {key}: {markdown_text(value)}" for key, value in about.items())
    windows = f"\n\n{window_table(long)}" if long else ""
    with atomic_file(path.with_suffix(".md")) as temporary:
        temporary.write_text(f"{table([truth, *rows] if truth else rows)}{windows}\n{notes}\n")
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def write_bench(path: str | Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write measurements, one dictionary a row, as JSON and as Markdown beside it; returns the
    Markdown table.
    """
    path, about = Path(path), environment()
    cells = [
        [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        for row in rows
    ]
    text = markdown([list(rows[0]), *cells])
    notes = "".join(f"\n- {key}: {markdown_text(value)}" for key, value in about.items())
    with atomic_file(path.with_suffix(".md")) as temporary:
        temporary.write_text(f"{text}\n{notes}\n")
    with atomic_file(path) as temporary:
        temporary.write_text(
            json.dumps({"environment": about, "rows": list(rows)}, indent=1) + "\n"
        )
    return text
