"""Cards say what a student is, and hold one set of scores."""

import pytest
import yaml

from streamvid.rollout.schedule import StreamConfig
from streamvid.students.card import add_scores, model_card, streamed

STREAM = StreamConfig(num_steps=2, first_steps=4, shift=8.0, window_frames=9)


def test_a_card_has_front_matter_that_the_hub_reads_and_the_facts():
    text = model_card("mine", {"method": "dmd, 5 steps", "teacher": "Wan"}, STREAM)
    _, front, body = text.split("---\n")
    assert yaml.safe_load(front)["library_name"] == "diffusers"
    assert (
        "# mine" in body
        and "- method: dmd, 5 steps\n- teacher: Wan\n" in body
        and "2 steps a chunk" in body
    )


@pytest.mark.parametrize(
    "stream, said",
    [
        (STREAM, "(the first chunk 4)"),
        (
            StreamConfig(step_table=((1.0, 0.9, 0.5), (1.0, 0.5)), commit="reuse"),
            "3-2 steps in chunks of 3",
        ),
        (StreamConfig(context_t=0.1), "context at 0.1"),
        (StreamConfig(stepper="jump"), "stepper jump"),
    ],
)
def test_streaming_is_told_in_words(stream, said):
    assert said in streamed(stream)


def test_scores_replace_those_that_were_there(tmp_path):
    (tmp_path / "README.md").write_text(model_card("mine", {}, STREAM))
    for overall in (0.5, 0.75):
        add_scores(tmp_path, {"overall": overall, "speed": 1.0}, ["200 prompts"])
    text = (tmp_path / "README.md").read_text()
    assert (
        text.count("## Scores") == 1
        and "| 0.750 | 1.000 |" in text
        and "0.500" not in text
        and "- 200 prompts" in text
    )
    assert text.startswith(model_card("mine", {}, STREAM).rstrip())


def test_names_bring_no_markup_into_a_card(tmp_path):
    """A run named <img ...> was run by the page, and a line feed in a name added a licence."""
    name = "<img src=x>\n---\nlicense: mit\n## Scores\n"
    (tmp_path / "README.md").write_text(
        model_card(name, {"data": "a\n- b", "<b>": "[c](d)"}, STREAM)
    )
    add_scores(tmp_path, {"overall|x": 1.0}, ["<b>200</b>"])
    text = (tmp_path / "README.md").read_text()
    assert (
        text.count("\n---\n") == 1
        and text.count("\n## Scores\n") == 1
        and "license: mit\n" not in text
    )
    assert (
        not any(f" {mark}" in text for mark in ("<img", "<b>", "[c]")) and "| overall\\|x |" in text
    )
    body = text.split("\n---\n")[1]
    assert [line[:4] for line in body.splitlines() if line.startswith("- ")] == [
        "- da",
        "- \\<",
        "- st",
        "- \\<",
    ]


def test_a_folder_without_a_card_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no README.md"):
        add_scores(tmp_path, {"overall": 1.0})
