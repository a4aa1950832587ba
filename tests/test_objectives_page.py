"""The page docs/objectives.md does what it says: its code runs, in the plane and on video."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from streamvid.objectives.base import Objective, Step
from streamvid.students.folder import load_student

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "objectives.md"


@pytest.fixture
def blocks():
    """The page's code: the objective, the plane, video."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


@pytest.fixture
def page(blocks):
    """What the first block defines."""
    names = {"__name__": "page"}
    exec(blocks[0], names)
    return names


def test_the_objective_takes_twelve_lines(blocks):
    definition = blocks[0][blocks[0].index("@dataclass") :]
    assert len([line for line in definition.splitlines() if line.strip()]) <= 12


def test_it_learns_in_the_plane(blocks, page, capsys):
    """From the start's one step, hundreds of floors away, to a few."""
    exec(blocks[1], page)
    ratio = page["measure"](page["points"], page["target"], page["effort"])["ratio"]
    assert "ratio" in capsys.readouterr().out
    start = lambda x, t, s, cond: page["start"](x, t, t, cond)
    generator = torch.Generator().manual_seed(0)
    before = page["sample"](start, page["prompts"], 1, "renoise", generator)
    assert ratio < page["measure"](before, page["target"], page["effort"])["ratio"] / 20


def test_it_trains_the_video_student(blocks, page, monkeypatch, tmp_path):
    """Two steps of the tiny world, and a student that can be loaded."""
    small = [
        "train.name=timed_sid",
        f"train.output_dir={tmp_path}",
        "train.max_steps=2",
        "train.batch_size=1",
        "options.student_start_step=0",
        "rollout.num_chunks=1",
        "data.num_prompts=4",
    ]
    monkeypatch.chdir(ROOT)
    code = blocks[2].replace('["train.name=timed_sid"]', repr(small))
    assert code != blocks[2]
    exec(code, page)
    assert load_student(tmp_path / "timed_sid" / "student") is not None


def test_its_tables_name_what_there_is():
    """Each call of the page is one of a step, each need one that the base class tells of."""
    text = PAGE.read_text()
    calls = set(re.findall(r"step\.(\w+)", text))
    assert len(calls) > 15 and calls <= set(dir(Step)) | set(Step.__annotations__)
    table = text.split("| `needs` |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    told = inspect.getsource(Objective).split("needs: ")[1].split("num_steps")[0]
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == set(re.findall(r'"(\w+)"', told))
