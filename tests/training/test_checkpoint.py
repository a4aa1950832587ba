"""Writing is atomic: whatever happens, what was complete before stays readable."""

import pytest
import torch

from streamvid.files import atomic_file, atomic_folder, remove_leftovers
from streamvid.training.checkpoint import (
    Snapshot,
    list_checkpoints,
    random_state,
    read_checkpoint,
    restore_random_state,
    restore_tensors,
    write_checkpoint,
)


def snapshot(value):
    return Snapshot({"step": value}, {"net": {"w": torch.full((3, 2), float(value))}}, [{"rank": 0}, {"rank": 1}])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    for text in ("one", "two"):
        with atomic_file(path) as temporary:
            temporary.write_text(text)
            assert temporary.suffix == ".txt" and (not path.exists() or path.read_text() == "one")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "two" and names(path.parent) == ["a.txt"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder"
    for text in ("one", "two"):
        with atomic_folder(path) as temporary:
            (temporary / text).write_text(text)
    with pytest.raises(RuntimeError), atomic_folder(path) as temporary:
        (temporary / "three").write_text("half")
        raise RuntimeError
    assert names(path) == ["two"] and names(tmp_path) == ["folder"]


def test_checkpoints_come_back_and_old_ones_go(tmp_path):
    for step in (5, 10, 1_000_000, 10_000_000):
        path = write_checkpoint(tmp_path, step, snapshot(step % 7), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-1000000", "step-10000000"]
    back = read_checkpoint(path, ["net"], rank=1)
    assert back.counters == {"step": 10_000_000 % 7} and back.ranks == [{"rank": 1}]
    assert torch.equal(back.tensors["net"]["w"], torch.full((3, 2), float(10_000_000 % 7)))


def test_a_crash_while_writing_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    """A process that is killed cleans up nothing: its leftovers are no checkpoints, and are removed later."""
    previous = write_checkpoint(tmp_path, 1, snapshot(1), keep=1)
    monkeypatch.setattr("streamvid.files._remove", lambda path: None)  # as if killed
    monkeypatch.setattr("streamvid.training.checkpoint.json.dumps", lambda *a, **k: 1 / 0)  # the last file
    with pytest.raises(ZeroDivisionError):
        write_checkpoint(tmp_path, 2, snapshot(2), keep=1)
    monkeypatch.undo()
    assert len(names(tmp_path)) == 2 and list_checkpoints(tmp_path) == [previous]
    assert read_checkpoint(previous, ["net"], 0).counters == {"step": 1}
    assert len(remove_leftovers(tmp_path)) == 1 and names(tmp_path) == ["step-0000001"]


@pytest.mark.parametrize("file", ["net.safetensors", "rank-0.pt", "trainer.json"])
@pytest.mark.parametrize("how", ["missing", "truncated", "empty"])
def test_damage_is_one_line_that_names_the_file(tmp_path, file, how):
    path = write_checkpoint(tmp_path, 1, snapshot(1), keep=1)
    content = (path / file).read_bytes()
    (path / file).unlink() if how == "missing" else (path / file).write_bytes(content[: len(content) // 2])
    if how == "empty":
        (path / file).write_bytes(b"")
    with pytest.raises(ValueError, match=f"step-0000001 is damaged: {file} ") as error:
        read_checkpoint(path, ["net"], 0)
    assert "\n" not in str(error.value) and "delete that folder" in str(error.value)


@pytest.mark.parametrize(
    "live, message",
    [
        ({"w": torch.zeros(2, 3)}, r"w of net.safetensors has shape \(3, 2\), expected \(2, 3\)"),
        ({"w": torch.zeros(3, 2), "b": torch.zeros(1)}, "net.safetensors lacks b"),
        ({}, "net.safetensors has the unknown w"),
    ],
)
def test_tensors_of_another_network_are_refused(tmp_path, live, message):
    path = write_checkpoint(tmp_path, 1, snapshot(1), keep=1)
    with pytest.raises(ValueError, match=message):
        restore_tensors(live, read_checkpoint(path, ["net"], 0).tensors["net"], path, "net")


def test_random_states_come_back_through_the_disk(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.standard_normal(), torch.rand(()).item()

    state = Snapshot({}, {}, [random_state(torch.device("cpu"))])
    expected = draw()
    path = write_checkpoint(tmp_path, 1, state, keep=1)
    restore_random_state(read_checkpoint(path, [], 0).ranks[0], torch.device("cpu"))
    assert draw() == expected
