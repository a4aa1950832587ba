"""How a student obeys a new prompt in mid-stream, and what it keeps: the four ways to switch,
measured on the verifiable world. A Markdown table is written beside the JSON file.

    python -m streamvid.studies.switches --out benchmarks/switches.json

A pair of prompts differs in one thing (colour, shape, direction) or in all three and the size. A
stream of the first prompt is branched where its window is full, and each branch is switched in
another way. One branch is not switched: what it does is chance.

- *obeyed* in a chunk: the mean world score of what changed is at least 0.75 against the new prompt;
  the direction counts as an axis, because walls turn it around;
- *jump*: how far, in pixels, the body is in the first new frame from where it was going. No prompt
  mentions a position, so a switch should keep it;
- *floor*: distance between the colours of the floor before and after, in [0, 1] per channel;
- *kept*: mean score of colour, shape and size that did not change, over the chunks after.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from streamvid.command_line import Parser, run_tool, say
from streamvid.data.world import (
    COLOURS,
    DIRECTIONS,
    RADII,
    SHAPES,
    SIZE,
    WorldSpec,
    caption,
    direction_of,
    sample_spec,
)
from streamvid.evaluation.tracking import ParsedClip, TrackedBody, parse
from streamvid.evaluation.world_score import score_parsed
from streamvid.files import atomic_file
from streamvid.reports import environment
from streamvid.students.folder import TINY_STUDENT, choose_device, load_student
from streamvid.students.script import MODES
from streamvid.students.session import Session

KINDS = {
    "colour": ("colour",),
    "shape": ("shape",),
    "direction": ("direction",),
    "all": ("colour", "shape", "size", "direction"),
}
"""What changes between the two prompts of a pair."""
LOOKS = ("colour", "shape", "size")
NO_SWITCH = "none"
OBEYED = 0.75
STAYED = 4.0  # pixels; a fast body moves 2 per frame
FIRST_SEED = 6_000_000


@dataclass(frozen=True)
class Pair:
    """Two prompts of the world, and what the second changes."""

    kind: str
    before: str
    after: str
    seed: int


def make_pair(kind: str, seed: int) -> Pair:
    """The pair of a seed; the wording stays, one word of it or several change."""
    spec = sample_spec(seed, family="move")
    changed = spec
    for name in KINDS[kind]:
        changed = _changed(changed, name, seed)
    return Pair(kind, caption(spec, seed), caption(changed, seed), seed)


def _changed(spec: WorldSpec, name: str, seed: int) -> WorldSpec:
    """The scene with another colour, shape, size or axis of motion."""
    (body,) = spec.bodies
    if name == "size":
        (radius,) = set(RADII.values()) - {body.radius}
        return replace(spec, bodies=(replace(body, radius=radius),))
    if name in ("colour", "shape"):
        words = [word for word in (COLOURS, SHAPES)[name == "shape"] if word != getattr(body, name)]
        word = words[seed % len(words)]
        changed = replace(body, colour=word) if name == "colour" else replace(body, shape=word)
        return replace(spec, bodies=(changed,))
    axis = np.abs(DIRECTIONS[direction_of(body.vx, body.vy)])
    speed = float(np.hypot(body.vx, body.vy))
    others = [d for d in DIRECTIONS.values() if not np.allclose(np.abs(d), axis)]
    x, y = others[seed % len(others)]
    return replace(spec, bodies=(replace(body, vx=speed * x, vy=speed * y),))


def measure_switch(pair: Pair, before: Tensor, after: Sequence[Tensor]) -> dict[str, Any]:
    """What a switch did.

    Args:
        before: frames ``[T, 3, 64, 64]`` of the last chunk under the first prompt.
        after: frames of each chunk that followed.
    """
    estimates = [parse(frames) for frames in after]
    scores = [_scores(estimate, pair.after) for estimate in estimates]
    old = parse(before)
    same = [name for name in LOOKS if name not in KINDS[pair.kind]]
    kept = [score.get(name, 0.0) for score in scores for name in same]
    floors = old.floors.mean(axis=0), estimates[0].floors.mean(axis=0)
    return {
        "changed": [
            statistics.mean(score.get(name, 0.0) for name in KINDS[pair.kind]) for score in scores
        ],
        "jump": _jump(old, estimates[0]),
        "floor": float(np.abs(floors[1] - floors[0]).max()),
        "kept": statistics.mean(kept) if kept else None,
    }


def _scores(estimate: ParsedClip, prompt: str) -> dict[str, float]:
    """World scores of a chunk; the direction as an axis, from the chunk's second half."""
    scores = score_parsed(estimate, prompt).attributes()
    second_half = score_parsed(estimate, prompt, len(estimate.floors) // 2).windows[-1]
    direction = second_half.attributes().get("direction")
    return scores if direction is None else {**scores, "direction": direction}


def _main_body(estimate: ParsedClip) -> TrackedBody | None:
    return max(estimate.bodies, key=lambda body: body.present.sum(), default=None)


def _jump(old: ParsedClip, new: ParsedClip) -> float:
    """Pixels between where the body was going and where it is; the side of the frame if there is
    none.
    """
    bodies = [body for body in (_main_body(old), _main_body(new)) if body is not None]
    if len(bodies) < 2:
        return float(SIZE)
    tracks = [body.track[~np.isnan(body.track[:, 0])] for body in bodies]
    if len(tracks[0]) < 2 or not len(tracks[1]):
        return float(SIZE)
    going_to = 2 * tracks[0][-1] - tracks[0][-2]
    return float(np.linalg.norm(tracks[1][0] - going_to))


def run_pair(student: Any, pair: Pair, num_before: int, num_after: int) -> list[dict[str, Any]]:
    """The rows of a pair, one for each way to switch and one for none."""
    rows = []
    with Session(student, pair.before, seed=pair.seed, height=SIZE, width=SIZE) as session:
        before = [session.next_chunk() for _ in range(num_before)][-1].frames[0]
        for mode in (*MODES, NO_SWITCH):
            with session.branch() as branch:
                if mode != NO_SWITCH:
                    branch.switch_prompt(pair.after, mode)
                after = [branch.next_chunk().frames[0].cpu() for _ in range(num_after)]
            rows.append({**vars(pair), "mode": mode, **measure_switch(pair, before.cpu(), after)})
    return rows


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per mode and kind, and per mode over all kinds."""
    table = []
    for kind, mode in itertools.product(("every", *KINDS), (*MODES, NO_SWITCH)):
        chosen = [row for row in rows if row["mode"] == mode and kind in ("every", row["kind"])]
        if not chosen:
            continue
        firsts = [chunks_to_obey(row["changed"]) for row in chosen]
        num_after = len(chosen[0]["changed"])
        kept = [row["kept"] for row in chosen if row["kept"] is not None]
        table.append(
            {
                "kind": kind,
                "mode": mode,
                "pairs": len(chosen),
                "obeyed_by": [
                    statistics.mean(first is not None and first <= chunk for first in firsts)
                    for chunk in range(1, num_after + 1)
                ],
                # a pair that never obeys counts as one chunk more than was looked at
                "median_chunks": statistics.median(first or num_after + 1 for first in firsts),
                "last_score": statistics.mean(row["changed"][-1] for row in chosen),
                "median_jump": statistics.median(row["jump"] for row in chosen),
                "stayed": statistics.mean(row["jump"] <= STAYED for row in chosen),
                "floor": statistics.mean(row["floor"] for row in chosen),
                "kept": statistics.mean(kept) if kept else None,
            }
        )
    return table


def chunks_to_obey(scores: Sequence[float]) -> int | None:
    """The first chunk, counted from 1, that obeys; None if none does."""
    return next((chunk for chunk, score in enumerate(scores, 1) if score >= OBEYED), None)


def markdown(report: dict[str, Any]) -> str:
    """The report's table, in words that need no JSON."""
    num_after = len(report["table"][0]["obeyed_by"])
    heads = ["change", "way", "pairs", *(f"obeyed by chunk {k}" for k in range(1, num_after + 1))]
    heads += ["chunks (median)", "score at the end", "jump, px (median)", "position stayed"]
    heads += ["floor", "looks kept"]
    lines = ["# Prompt switches", "", __doc__.partition("\n\n")[2].partition("\n\n")[2].strip()]
    lines += ["", f"Student: {report['student']}. Settings: {report['settings']}.", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in report["table"]:
        cells = [row["kind"], row["mode"], str(row["pairs"])]
        cells += [f"{share:.2f}" for share in row["obeyed_by"]]
        cells += [f"{row['median_chunks']:g}", f"{row['last_score']:.2f}"]
        cells += [f"{row['median_jump']:.1f}", f"{row['stayed']:.2f}", f"{row['floor']:.3f}"]
        cells += ["-" if row["kept"] is None else f"{row['kept']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Command: `{report['environment']['command']}`", ""])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out", required=True, help="a .json file; the .md is written beside it")
    parser.add_argument("--student", help="a student folder; by default the shipped student")
    parser.add_argument("--pairs", type=int, default=6, help="pairs per kind of change (default 6)")
    parser.add_argument("--before", type=int, default=4, help="chunks before the switch")
    parser.add_argument("--after", type=int, default=5, help="chunks after the switch")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_tool(lambda: study(args))


def study(args: argparse.Namespace) -> None:
    for name in ("pairs", "before", "after"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}, expected at least 1")
    out = Path(args.out)
    if out.suffix != ".json":
        raise ValueError(f"--out {out}, expected a .json file")
    student = load_student(args.student or TINY_STUDENT, device=choose_device(args.device))
    pairs = [make_pair(kind, FIRST_SEED + number) for number in range(args.pairs) for kind in KINDS]
    rows = []
    for pair in tqdm(pairs, desc="pairs", unit="pair"):
        rows += run_pair(student, pair, args.before, args.after)
    command = shlex.join(["python", "-m", "streamvid.studies.switches", *sys.argv[1:]])
    report = {
        "student": args.student or "the shipped tiny student",
        "settings": f"{args.before} chunks before, {args.after} after",
        "table": summarise(rows),
        "rows": rows,
        "environment": {**environment(), "command": command},
    }
    with atomic_file(out) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    with atomic_file(out.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(report))
    say(f"wrote {out} and {out.with_suffix('.md')}: {len(pairs)} pairs")


if __name__ == "__main__":
    sys.exit(main())
