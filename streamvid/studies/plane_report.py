"""The laboratory's results: a file a run, one table, one picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from streamvid import reports
from streamvid.objectives.base import Preset
from streamvid.settings.targets import TARGETS

BAR = 2.0  # a complete objective reaches this multiple of the floor on two of the three targets
LOST = 1000.0  # times the floor: more is no distribution any more
PANEL = 132  # pixels
SPAN = 3.2  # of the plane, from the middle of a panel to its edge


def table(
    results: Sequence[dict[str, Any]], presets: dict[str, Preset], notes: dict[str, str]
) -> str:
    """A Markdown row a preset: ratio to the floor on each target (mean over seeds, and half the
    spread), and what it costs.
    """
    names = list(dict.fromkeys(result["preset"] for result in results))
    lines = [
        [
            "preset",
            "paper",
            "steps",
            *TARGETS,
            "modes of 8",
            "from 3 of 8",
            "networks",
            "updates",
            "s a run",
            "within 2x",
            "note",
        ]
    ]
    for name in names:
        own = [result for result in results if result["preset"] == name]
        ratios = {target: [r["ratio"] for r in own if r["target"] == target] for target in TARGETS}
        modes = [
            [r["modes"] for r in own if r["target"] == target] for target in ("ring", "narrow")
        ]
        reached = sum(statistics.mean(values) <= BAR for values in ratios.values() if values)
        preset = presets.get(name)
        note = notes.get(name) or (preset.note if preset else "")
        role = f"{preset.role}. " if preset and preset.role != "complete" else ""
        lines.append(
            [
                name,
                preset.paper if preset else "-",
                str(own[0]["steps"]),
                *(_mean_and_half_spread(values) for values in ratios.values()),
                *(" ".join(map(str, each)) or "-" for each in modes),
                str(own[0]["networks"]),
                str(own[0]["updates"]),
                f"{statistics.mean(r['seconds'] for r in own):.0f}",
                f"{reached} of {sum(map(bool, ratios.values()))}",
                role + note,
            ]
        )
    return reports.markdown(lines)


def _mean_and_half_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = statistics.mean(values)
    if mean > LOST:
        return "diverges"
    spread = max(values) - min(values) if len(values) > 1 else None
    return reports.mean_cell(mean, spread, digits=2)


def write_report(
    path: Path,
    results: Sequence[dict[str, Any]],
    presets: dict[str, Preset],
    notes: dict[str, str] | None = None,
) -> str:
    """Write ``path`` (.json), and the table (.md) and the picture (.png) beside it; returns the
    table.
    """
    text = table(results, presets, notes or {})
    head = (
        "Energy distance to the guided teacher's points over its sampling floor, at 1,024 points a"
        " set (median of 9 sets; 1 is as near as two sets of the teacher's own). The start is the"
        " network that every run begins with; it is sampled with Euler steps. Modes are those of"
        " the ring, and of the ring for a start that has seen three of them, a number a seed;"
        " seconds are a core's. On the prompts, guided scores that are compared settle elsewhere"
        " than the guided flow that is measured against; the flow maps follow it.\n\n"
    )
    rows = [{key: value for key, value in result.items() if key != "points"} for result in results]
    reports.write_report(path, head + text, {"rows": rows}, reports.environment())
    picture(results).save(path.with_suffix(".png"))
    return text


# ---- the picture --------------------------------------------------------------------------------------


def picture(results: Sequence[dict[str, Any]], per_row: int = 10) -> Image.Image:
    """A panel a preset: its points of each target, side by side, over the teacher's components in
    grey.
    """
    names = list(dict.fromkeys(result["preset"] for result in results))
    shown = [
        [r for t in TARGETS for r in results if r["preset"] == name and r["target"] == t][:3]
        for name in names
    ]
    panels = [_panel(name, _first_seeds(rows)) for name, rows in zip(names, shown)]
    width, height = panels[0].size
    per_row = min(per_row // 2, len(panels))
    sheet = Image.new("RGB", (width * per_row, height * -(-len(panels) // per_row)), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (width * (index % per_row), height * (index // per_row)))
    return sheet


def _first_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({row["target"]: row for row in reversed(rows)}.values())


def _panel(name: str, rows: Sequence[dict[str, Any]]) -> Image.Image:
    panel = Image.new("RGB", (PANEL * len(TARGETS) + 8, PANEL + 16), "white")
    draw = ImageDraw.Draw(panel)
    draw.text((4, 2), name, fill="black")
    for column, target in enumerate(TARGETS):
        own = [row for row in rows if row["target"] == target]
        _points(draw, column * PANEL, TARGETS[target](), own[0]["points"] if own else [])
        if own:
            draw.text(
                (column * PANEL + 4, PANEL + 2), f"{own[0]['ratio']:.1f}x", fill=(120, 120, 120)
            )
    return panel


def _points(
    draw: ImageDraw.ImageDraw, left: int, target: Any, points: Sequence[Sequence[float]]
) -> None:
    place = lambda p: (
        left + (p[0] / SPAN + 1) * PANEL / 2,
        16 + (1 - p[1] / SPAN) * PANEL / 2,
    )
    radius = 2 * target.width / SPAN * PANEL / 2
    for x, y in map(place, target.means.tolist()):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(225, 225, 225))
    for x, y in map(place, torch.tensor(points).tolist() if points else []):
        if left < x < left + PANEL and 16 < y < 16 + PANEL:
            draw.point([(x, y), (x + 1, y)], fill=(200, 30, 60))
