"""Reports: rows of scores and costs as JSON, as a Markdown table and as text for the terminal."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamvid.evaluation.runs import Cost
from streamvid.files import atomic_file

SHOWN = ("overall", "colour", "shape", "size", "number", "direction", "speed", "physics", "permanence", "order")


def environment() -> dict[str, Any]:
    """The machine and the versions that figures were measured with, and the command."""
    import diffusers
    import torch

    import streamvid

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "machine": f"{platform.machine()}, {device}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "streamvid": streamvid.__version__,
        "command": " ".join(["python", *sys.argv]),
    }


def mean_and_spread(rows: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean over seeds of each score, and the distance of its greatest from its least."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    spread = {name: max(row[name] for row in rows) - min(row[name] for row in rows) for name in names}
    return means, spread


def result_row(label: str, rows: Sequence[dict[str, float]], cost: Cost | None, reference: Cost | None = None) -> dict[str, Any]:
    """One line of a report; ``reference`` is the cost that speed-ups and work are compared with."""
    means, spread = mean_and_spread(rows)
    row: dict[str, Any] = {"label": label, "scores": means, "spread": spread, "seeds": len(rows)}
    if cost is not None:
        row |= {
            "nfe": cost.nfe, "commits": cost.commits, "latent_frames": cost.latent_frames,
            "denoise_s": cost.denoise_s, "decode_s": cost.decode_s, "clip_s": cost.clip_s,
            "first_frame_ms": 1000 * cost.first_frame_s,
        }
    if cost is not None and reference is not None:
        row |= {
            "denoise_speedup": reference.denoise_s / cost.denoise_s,
            "clip_speedup": reference.clip_s / cost.clip_s,
            "work_ratio": reference.latent_frames / cost.latent_frames,
        }
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, readable as plain text too."""
    names = [name for name in SHOWN if any(name in row["scores"] for row in rows)]
    columns = ["", *names, "forwards", "work", "s/clip", "first frame", "speed-up"]
    lines = [columns] + [_cells(row, names) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def _cells(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    cells = [row["label"]]
    for name in names:
        cell = f"{row['scores'][name]:.3f}" if name in row["scores"] else "-"
        many = row["seeds"] > 1 and name == "overall"
        cells.append(f"{cell} ±{row['spread'][name] / 2:.3f}" if many else cell)
    if "nfe" not in row:
        return cells + ["-"] * 5
    commits = f" + {row['commits']}" if row["commits"] else ""
    speedup = f"{row['clip_speedup']:.1f}x" if "clip_speedup" in row else "-"
    return cells + [
        f"{row['nfe']}{commits}", str(row["latent_frames"]), f"{row['clip_s']:.2f}", f"{row['first_frame_ms']:.0f} ms",
        speedup,
    ]


def write_report(path: str | Path, rows: Sequence[dict[str, Any]], **more: Any) -> None:
    """Write ``path`` (JSON) and the same as Markdown beside it."""
    path, about = Path(path), environment()
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps({"environment": about, "rows": list(rows), **more}, indent=1) + "\n")
    notes = "".join(f"\n{key}: {value}" for key, value in about.items())
    extra = "".join(f"\n\n{title}:\n\n{text}" for title, text in more.items() if isinstance(text, str))
    with atomic_file(path.with_suffix(".md")) as temporary:
        temporary.write_text(f"{table(rows)}{extra}\n{notes}\n")
