"""Writing is atomic: whatever happens, what was complete before stays readable."""

import json

import pytest
import torch

from streamvid.files import atomic_file, atomic_folder, remove_leftovers
from streamvid.training import checkpoint
from streamvid.training.checkpoint import (
    Snapshot,
    list_checkpoints,
    random_state,
    read_checkpoint,
    read_counters,
    restore_random_state,
    restore_tensors,
    write_checkpoint,
)


def counters(step):
    return {"step": step, "samples": 8 * step, "seconds": 0.5}


def snapshot(value):
    return Snapshot(
        counters(value),
        {"net": {"w": torch.full((3, 2), float(value))}},
        [{"rank": 0}, {"rank": 1}],
    )


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
        path = write_checkpoint(tmp_path, step, snapshot(step), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-1000000", "step-10000000"]
    back = read_checkpoint(path, ["net"], rank=1)
    assert back.counters == counters(10_000_000) and back.ranks == [{"rank": 1}]
    assert torch.equal(back.tensors["net"]["w"], torch.full((3, 2), 1e7))


def test_a_crash_while_writing_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    """A process that is killed cleans up nothing: its leftovers are no checkpoints, and are removed
    later.
    """
    previous = write_checkpoint(tmp_path, 1, snapshot(1), keep=1)
    monkeypatch.setattr("streamvid.files._remove", lambda path: None)  # as if killed
    # the last file
    monkeypatch.setattr("streamvid.training.checkpoint.json.dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_checkpoint(tmp_path, 2, snapshot(2), keep=1)
    monkeypatch.undo()
    assert len(names(tmp_path)) == 2 and list_checkpoints(tmp_path) == [previous]
    assert read_checkpoint(previous, ["net"], 0).counters == counters(1)
    assert len(remove_leftovers(tmp_path)) == 1 and names(tmp_path) == ["step-0000001"]


@pytest.mark.parametrize("file", ["net.safetensors", "rank-0.pt", "trainer.json"])
@pytest.mark.parametrize("how", ["missing", "truncated", "empty"])
def test_damage_is_one_line_that_names_the_file(tmp_path, file, how):
    path = write_checkpoint(tmp_path, 1, snapshot(1), keep=1)
    content = (path / file).read_bytes()
    (
        (path / file).unlink()
        if how == "missing"
        else (path / file).write_bytes(content[: len(content) // 2])
    )
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
        (
            {"w": torch.zeros(3, 2, dtype=torch.bfloat16)},
            "w of net.safetensors is torch.float32, expected torch.bfloat16",
        ),
    ],
)
def test_tensors_of_another_network_are_refused(tmp_path, live, message):
    path = write_checkpoint(tmp_path, 1, snapshot(1), keep=1)
    with pytest.raises(ValueError, match=message):
        restore_tensors(live, read_checkpoint(path, ["net"], 0).tensors["net"], path, "net")


def test_damage_that_still_can_be_read_is_found_too(tmp_path):
    """A bit of a weight, of a process's state and of a counter; every one of them used to be
    resumed from.
    """
    for name, place in [("net.safetensors", -1), ("rank-0.pt", None), ("trainer.json", None)]:
        path = write_checkpoint(tmp_path, 1, snapshot(1), keep=1)
        content = bytearray((path / name).read_bytes())
        place = (
            content.index(b'"samples": 8') + 11
            if name == "trainer.json"
            else place or len(content) // 2
        )
        content[place] ^= 1
        (path / name).write_bytes(content)
        with pytest.raises(
            ValueError,
            match=f"{name} is not as it was written, by its checksum; delete that folder",
        ):
            read_checkpoint(path, ["net"], 0)


def test_what_is_to_be_deleted_and_what_is_resumed_then(tmp_path):
    first, second = (write_checkpoint(tmp_path, step, snapshot(step), keep=2) for step in (1, 2))
    for path, way in [
        (second, "to resume from step-0000001"),
        (first, "to start the run anew, there is none before it"),
    ]:
        (path / "trainer.json").write_text("{}")
        with pytest.raises(
            ValueError, match=f"checkpoint {path} is damaged: .*; delete that folder {way}"
        ):
            read_counters(path)


@pytest.mark.parametrize(
    "how",
    [
        {"step": 2},
        {"step": -1},
        {"step": None},
        {"samples": "8"},
        {"seconds": float("nan")},
        {"files": {}},
        {"files": None},
    ],
)
def test_counters_that_can_not_be_are_refused_even_with_a_checksum(tmp_path, how):
    path = write_checkpoint(tmp_path, 1, snapshot(1), keep=1)
    values = {**json.loads((path / "trainer.json").read_text()), **how}
    del values["checksum"]
    (path / "trainer.json").write_text(
        json.dumps({**values, "checksum": checkpoint._checksum_of(values)})
    )
    with pytest.raises(ValueError, match="step-0000001 is damaged: trainer.json "):
        read_checkpoint(path, ["net"], 0)


@pytest.mark.parametrize(
    "text",
    ["[]", "1", "null", '"step"', "{", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")],
)
def test_counters_of_another_form_are_one_line(tmp_path, text):
    path = write_checkpoint(tmp_path, 1, snapshot(1), keep=1)
    (path / "trainer.json").write_text(text)
    with pytest.raises(ValueError, match="step-0000001 is damaged: trainer.json ") as error:
        read_counters(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_not_resumed_from(tmp_path, number):
    bad = snapshot(1)
    bad.tensors["net"]["w"][1, 1] = number
    path = write_checkpoint(tmp_path, 1, bad, keep=1)
    live = {"w": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match="w of net.safetensors is not finite"):
        restore_tensors(live, read_checkpoint(path, ["net"], 0).tensors["net"], path, "net")
    assert torch.equal(live["w"], torch.zeros(3, 2))


def test_an_old_checkpoint_goes_at_once(tmp_path, monkeypatch):
    """Killed while it removes an old checkpoint, a run used to leave a gutted one that counted as
    complete.
    """
    write_checkpoint(tmp_path, 1, snapshot(1), keep=1)
    monkeypatch.setattr("streamvid.files.shutil.rmtree", lambda path: 1 / 0)  # as if killed
    with pytest.raises(ZeroDivisionError):
        write_checkpoint(tmp_path, 2, snapshot(2), keep=1)
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000002"]
    assert len(remove_leftovers(tmp_path)) == 1 and names(tmp_path) == ["step-0000002"]


def test_random_states_come_back_through_the_disk(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.standard_normal(), torch.rand(()).item()

    state = Snapshot(counters(1), {}, [random_state(torch.device("cpu"))])
    expected = draw()
    path = write_checkpoint(tmp_path, 1, state, keep=1)
    restore_random_state(read_checkpoint(path, [], 0).ranks[0], torch.device("cpu"))
    assert draw() == expected
