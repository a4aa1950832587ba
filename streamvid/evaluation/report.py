"""What an evaluation found: rows of scores and costs, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamvid import reports
from streamvid.evaluation.runs import ClipCost
from streamvid.evaluation.world_score import FIDELITY

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
    "fidelity",
    *FIDELITY,
)


def result_row(
    label: str,
    rows: Sequence[dict[str, float]],
    cost: ClipCost | None,
    reference: ClipCost | None = None,
    reference_overall: float | None = None,
) -> dict[str, Any]:
    """One line of a report.

    Args:
        rows: mean scores, one dictionary per seed.
        cost: None where nothing was run, for true clips.
        reference: the cost that speed-ups and work are compared with.
        reference_overall: the overall score that this one is compared with.
    """
    means, spread = reports.mean_and_spread(rows)
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
    """Overall scores and fidelity of ``runs.score_long`` as a Markdown table."""
    unit = f"by window of {rows[0]['window']} frames"
    head = ["", "frames", "prompts", "first", "last", "least"]
    lines = [[*head, f"overall {unit}", f"fidelity {unit}"]]
    for row in rows:
        numbers = [f"{row[name]:.3f}" for name in ("first", "last", "least")]
        courses = [
            " ".join(f"{window[name]:.3f}" if name in window else "-" for window in row["windows"])
            for name in ("overall", "fidelity")
        ]
        label = [row["label"], str(row["num_frames"]), str(row["prompts"])]
        lines.append([*label, *numbers, *courses])
    return reports.markdown(lines)


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
    return reports.markdown([columns] + [_cells(row, names, compared) for row in rows])


def _cells(row: dict[str, Any], names: Sequence[str], compared: bool) -> list[str]:
    cells = [row["label"]]
    for name in names:
        if name not in row["scores"]:
            cells.append("-")
            continue
        has_spread = row["seeds"] > 1 and name == "overall"
        spread = row["spread"][name] if has_spread else None
        cells.append(reports.mean_cell(row["scores"][name], spread))
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


def write_report(
    path: str | Path,
    rows: Sequence[dict[str, Any]],
    truth: dict[str, Any] | None = None,
    long: Sequence[dict[str, Any]] = (),
) -> None:
    """Write ``path`` (JSON) and the same as Markdown beside it.

    Args:
        rows: of ``result_row``, one per model.
        truth: of ``result_row``, of true clips.
        long: of ``runs.score_long``.
    """
    tables = [table([truth, *rows] if truth else rows)]
    if long:
        tables.append(window_table(long))
    content = {"truth": truth, "rows": list(rows), "long": list(long)}
    reports.write_report(Path(path), "\n\n".join(tables), content, reports.environment())


def write_bench(path: str | Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write measurements, one dictionary per row, as JSON and as Markdown beside it.

    Returns:
        The Markdown table.
    """
    cells = [
        [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        for row in rows
    ]
    text = reports.markdown([list(rows[0]), *cells])
    reports.write_report(Path(path), text, {"rows": list(rows)}, reports.environment())
    return text
