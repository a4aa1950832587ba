"""Model cards: what a student folder says of itself in its README.md, in the form that the Hugging
Face hub reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from streamvid.files import atomic_file
from streamvid.printing import markdown_text
from streamvid.rollout.schedule import StreamConfig

FRONT = (
    "---\nlibrary_name: diffusers\npipeline_tag: text-to-video\ntags:\n- streamvid\n- causal\n-"
    " distilled\n---\n"
)
SCORES = "\n## Scores\n"
"""The heading of the part that ``add_scores`` writes anew; it is the card's last."""


def model_card(name: str, facts: Mapping[str, str], stream: StreamConfig) -> str:
    """The text of a card. The licence is the user's to add.

    Args:
        name: the title.
        facts: such as objective, teacher, data, in order. All are texts, shown as they are and not
            as markup.
        stream: how the student is streamed.
    """
    lines = "".join(
        f"- {markdown_text(key)}: {markdown_text(value)}\n" for key, value in facts.items()
    )
    return (
        f"{FRONT}\n# {markdown_text(name)}\n\nA causal Wan student, made with"
        f" streamvid.\n\n{lines}- streamed with: {streamed(stream)}\n"
    )


def streamed(stream: StreamConfig) -> str:
    """A stream configuration in words."""
    frames = f"{stream.chunk_frames} latent frames"
    if stream.step_table:
        counts = "-".join(str(len(times)) for times in stream.step_table)
        steps = (
            f"{counts} steps in chunks of {frames}, times"
            f" {[list(times) for times in stream.step_table]}"
        )
    else:
        first = f" (the first chunk {stream.first_steps})" if stream.first_steps else ""
        steps = f"{stream.num_steps} steps a chunk of {frames}{first}, shift {stream.shift:g}"
    context = f", context at {stream.context_t:g}" if stream.context_t else ""
    commit = {"clean": "written clean", "reuse": "kept from the last step", "none": "none"}[
        stream.commit
    ]
    return (
        f"{steps}, window {stream.window_frames}, sink {stream.sink_frames}, context"
        f" {commit}{context}, order {stream.order}, stepper {stream.stepper}"
    )


def add_scores(folder: str | Path, scores: Mapping[str, float], about: Sequence[str] = ()) -> None:
    """Write scores into the card of a student folder, in place of those that it had.

    Args:
        folder: the student's.
        scores: by name.
        about: what they were measured on and with, a line each.

    Raises:
        ValueError: if the folder has no card.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no README.md to write scores into; expected a student folder"
        )
    text = path.read_text(encoding="utf-8").partition(SCORES)[0].rstrip("\n")
    table = "| " + " | ".join(map(markdown_text, scores)) + " |\n|" + "---|" * len(scores) + "\n"
    table += "| " + " | ".join(f"{value:.3f}" for value in scores.values()) + " |\n"
    notes = "".join(f"\n- {markdown_text(line)}" for line in about)
    with atomic_file(path) as temporary:
        temporary.write_text(f"{text}\n{SCORES}\n{table}{notes}\n", encoding="utf-8")
