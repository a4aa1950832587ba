"""A study's results as a table, as JSON and as a picture."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from streamvid import reports
from streamvid.files import atomic_file
from streamvid.printing import markdown_text
from streamvid.studies.jobs import read_result, write_result
from streamvid.studies.study import TEACHER, TRUTH, Job, StudyConfig

SHOWN = ("overall", "physics", "speed", "direction", "colour", "shape", "permanence")


def read_results(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The results that are there, in the study's order.

    Raises:
        ValueError: if a file is damaged, or was made with other settings than its job has now.
    """
    results = []
    for job in jobs:
        if job.result_file.exists():
            results.append(read_result(job.result_file))
            _ensure_recipe(job, results[-1])
    return results


def _ensure_recipe(job: Job, result: dict[str, Any]) -> None:
    made = result.get("recipe", job.recipe)
    for name, value in job.recipe.items():
        if made.get(name) != value:
            raise ValueError(
                f"{job.result_file}: {job.name} was run with {name}={made.get(name)!r}, the study"
                f" now says {value!r}; give the variant a new name, or do it again with --redo"
                f" {job.name}"
            )


def restore_results(report: Path, jobs: Sequence[Job], redo: Set[str] = frozenset()) -> set[str]:
    """Results that an earlier report holds, as files for the jobs that have none; so a study goes
    on on another machine.

    Args:
        redo: variants that are not restored.

    Returns:
        The variants of which the report keeps means over seeds alone; they count as done.

    Raises:
        ValueError: as ``read_results``, so that a result of other settings is found before the
            first run, not after it.
    """
    former = read_result(report) if report.exists() else {}
    held = {(result["variant"], result["seed"]): result for result in former.get("results", [])}
    for job in jobs:
        if not job.result_file.exists() and (job.name, job.seed) in held and job.name not in redo:
            write_result(job.result_file, held[job.name, job.seed])
    read_results(jobs)
    return {row["variant"] for row in former.get("kept", [])} - redo


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per variant and way of streaming: mean and greatest distance between seeds of each
    score.
    """
    keys = list(dict.fromkeys((r["variant"], row["label"]) for r in results for row in r["rows"]))
    teacher = next(
        (row["scores"]["overall"] for r in results if r["variant"] == TEACHER for row in r["rows"]),
        None,
    )
    rows = []
    for variant, label in keys:
        own = [
            (r, row)
            for r in results
            if r["variant"] == variant
            for row in r["rows"]
            if row["label"] == label
        ]
        scores = [row["scores"] for _, row in own]
        means, spread = reports.mean_and_spread(scores)
        first = own[0][1]
        rows.append(
            {
                "variant": variant,
                "label": label,
                "seeds": [r["seed"] for r, _ in own],
                "scores": means,
                "spread": spread,
                "of_teacher": (
                    statistics.mean(each["overall"] for each in scores) / teacher
                    if teacher
                    else None
                ),
                "steps": [r["steps"] for r, _ in own],
                "train_s": statistics.mean(r["train_s"] for r, _ in own),
                **{name: first[name] for name in ("nfe", "commits", "work") if name in first},
                "long": [row["long"] for _, row in own if "long" in row],
                "judge": [row["judge"] for _, row in own if "judge" in row],
            }
        )
    return rows


def sort_rows(rows: Sequence[dict[str, Any]], study: StudyConfig) -> list[dict[str, Any]]:
    """Rows in the order of the study file, the teacher first."""
    order = {name: index for index, name in enumerate([TEACHER, *study.variants])}
    return sorted(rows, key=lambda row: order.get(row["variant"], len(order)))


def score_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: scores, forwards and seeds of each row."""
    lines = [["trained as", "streamed as", "seeds", *SHOWN, "of teacher", "forwards", "work"]]
    for row in rows:
        cells = [_cell(row, name) for name in SHOWN]
        ratio = "-" if row["of_teacher"] is None else f"{100 * row['of_teacher']:.1f}%"
        forwards = (
            "-"
            if "nfe" not in row
            else f"{row['nfe']}" + (f" + {row['commits']}" if row["commits"] else "")
        )
        lines.append(
            [
                row["variant"],
                row["label"],
                str(len(row["seeds"])),
                *cells,
                ratio,
                forwards,
                str(row.get("work", "-")),
            ]
        )
    return reports.markdown(lines)


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row["scores"]:
        return "-"
    spread = row["spread"][name] if len(row["seeds"]) > 1 else None
    return reports.mean_cell(row["scores"][name], spread)


def _ends(runs: Sequence[dict[str, list[float]]], name: str) -> tuple[float, float]:
    """A number in the first and in the last window of long streams, means over seeds."""
    first, last = (statistics.mean(run[name][at] for run in runs) for at in (0, -1))
    return first, last


def _change(runs: Sequence[dict[str, list[float]]], name: str) -> str:
    first, last = _ends(runs, name)
    return f"{last / first:.3f}"


def long_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: first and last window of long streams, and how brightness and contrast changed
    between them.
    """
    lines = [
        [
            "trained as",
            "streamed as",
            "overall, first window",
            "last",
            "brightness, last / first",
            "contrast, last / first",
        ]
    ]
    for row in rows:
        runs = row["long"]
        if runs:
            overall = (
                [f"{value:.3f}" for value in _ends(runs, "overall")]
                if "overall" in runs[0]
                else ["-", "-"]
            )
            lines.append(
                [
                    row["variant"],
                    row["label"],
                    *overall,
                    _change(runs, "brightness"),
                    _change(runs, "contrast"),
                ]
            )
    return reports.markdown(lines) if len(lines) > 1 else ""


def crossed_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: long streams of variants that are streamed in each other's ways: first and last
    window, change of contrast.
    """
    long = {
        (row["variant"], row["label"]): row["long"]
        for row in rows
        if row["long"] and "overall" in row["long"][0]
    }
    labels = [label for label, num in Counter(label for _, label in long).items() if num > 1]
    lines = [["long streams: trained as", *labels]]
    for variant in dict.fromkeys(variant for variant, label in long if label in labels):
        cells = []
        for label in labels:
            runs = long.get((variant, label), [])
            cells.append(
                "{:.3f} to {:.3f}, ".format(*_ends(runs, "overall"))
                + f"contrast x {_change(runs, 'contrast')}"
                if runs
                else "-"
            )
        lines.append([variant, *cells])
    return reports.markdown(lines) if len(labels) > 1 else ""


def judge_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: how often a judge that no training has seen takes a student's clip for the true one
    of its prompt.
    """
    lines = [["trained as", "streamed as", "seeds", "win rate against true clips", "logit gap"]]
    for row in rows:
        if row["judge"]:
            means = [
                f"{statistics.mean(each[name] for each in row['judge']):.3f}"
                for name in ("win_rate", "gap")
            ]
            lines.append([row["variant"], row["label"], str(len(row["judge"])), *means])
    return reports.markdown(lines) if len(lines) > 1 else ""


def metric_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: what the trainings logged of their discriminators, over their last quarter."""
    names = ("gap", "win_rate", "/r", "flow", "clipped")
    wanted = lambda key: (
        any(part in key for part in names) and "fake_real_gap" not in key and "real_gap" not in key
    )
    lines = [["training", "seed", "numbers of the last quarter"]]
    for result in results:
        shown = [f"{key} {value:.3g}" for key, value in result["metrics"].items() if wanted(key)]
        if shown:
            lines.append([result["variant"], str(result["seed"]), ", ".join(shown)])
    return reports.markdown(lines) if len(lines) > 1 else ""


def write_report(path: Path, study: StudyConfig, jobs: Sequence[Job]) -> str:
    """Write ``path`` (.json), the tables (.md) and the picture (.png) beside it; returns the
    tables.

    The .json holds all results, from which ``restore_results`` goes on, and what an earlier report
    at ``path`` kept as means over seeds (``kept``), unless these variants have results again.
    """
    results, about = read_results(jobs), reports.environment()
    again = {result["variant"] for result in results}
    former = read_result(path) if path.exists() else {}
    kept = [row for row in former.get("kept", []) if row["variant"] not in again]
    about["machine"] = "; ".join(
        dict.fromkeys(each.get("machine", about["machine"]) for each in [*results, *kept])
    )
    rows = sort_rows([*summary(results), *kept], study)
    held = {row["variant"] for row in kept}
    missing = [
        f"{job.name}-{job.seed}"
        for job in jobs
        if not job.result_file.exists() and job.name not in held
    ]
    head = f"{study.about.strip()}\n\n" if study.about else ""
    head += (
        f"Scores on {study.prompts} held-out prompts, the same seeds of the noise for all; ± is"
        " half the distance between the greatest and the least of the training seeds, or of the"
        " noise's where nothing was trained. Forwards are denoising passes + passes that write"
        " context.\n"
    )
    if missing:
        head += f"\nNot finished: {markdown_text(', '.join(missing))}.\n"
    tables = [
        score_table(rows),
        long_table(rows),
        crossed_table(rows),
        judge_table(rows),
        metric_table(results),
    ]
    text = "\n\n".join([head.rstrip("\n"), *filter(None, tables)])
    content = {"missing": missing, "rows": rows, "kept": kept, "results": results}
    reports.write_report(path, text, content, about)
    draw(path.with_suffix(".png"), study, rows)
    return text


def draw(path: Path, study: StudyConfig, rows: Sequence[dict[str, Any]]) -> None:
    """World score against forwards per clip: a curve per objective, the teacher as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), dpi=120)
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for row in rows:
        lines = study.variants[row["variant"]].curves if row["variant"] in study.variants else {}
        for name, labels in lines.items():
            if not labels or row["label"] in labels:
                point = (
                    row["nfe"] + row["commits"],
                    row["scores"]["overall"],
                    row["spread"]["overall"] / 2,
                )
                curves.setdefault(name, []).append(point)
    for name, points in curves.items():
        x, y, spread = zip(*sorted(points))
        axes.errorbar(
            x, y, yerr=spread, marker="o", markersize=4, capsize=2, linewidth=1.2, label=name
        )
    for row in rows:
        if row["variant"] == TEACHER:
            style = ":" if row["label"] == TRUTH else "--"
            axes.axhline(
                row["scores"]["overall"],
                color="grey",
                linestyle=style,
                linewidth=1,
                label=row["label"],
            )
    axes.set_xlabel("student forwards per clip, commits included")
    axes.set_ylabel("world score, overall")
    # beside the picture, not over its points
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
