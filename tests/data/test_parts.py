"""A job's parts are made once, by whoever is free; checkpoints are told by their content."""

import shutil

import pytest

from streamvid.data import parts
from streamvid.data.parts import checkpoint_key, claimed, make_all_parts, make_parts


def paths_in(folder):
    return [folder / f"{number}.safetensors" for number in range(4)]


def test_parts_that_are_there_or_claimed_are_left_out(tmp_path):
    paths, made = paths_in(tmp_path), []
    paths[1].write_text("there")
    with claimed(paths[2]) as own:
        assert own
        make_parts(paths, made.append, first=3)
    assert made == [3, 0] and sorted(path.name for path in tmp_path.iterdir()) == ["1.safetensors"]


def test_a_claim_ends_with_its_holder(tmp_path):
    path = tmp_path / "deep" / "part"
    with pytest.raises(KeyboardInterrupt), claimed(path) as own:
        assert own
        raise KeyboardInterrupt
    (path.parent / ".part.lock").write_text("")  # as a kill leaves it
    with claimed(path) as own:
        assert own
        with claimed(path) as other:
            assert not other
    assert not list(path.parent.iterdir())


def test_a_part_whose_maker_gave_up_is_made_here(tmp_path, monkeypatch):
    paths, made = paths_in(tmp_path), []
    others = claimed(paths[2])
    others.__enter__()
    # it ends while we wait
    monkeypatch.setattr(parts.time, "sleep", lambda seconds: others.__exit__(None, None, None))
    make_all_parts(paths, lambda number: (made.append(number), paths[number].write_text("")))
    assert made == [0, 1, 3, 2]


def test_nothing_is_made_when_the_job_is_over(tmp_path):
    make_all_parts(paths_in(tmp_path), lambda number: pytest.fail("made"), is_over=lambda: True)


@pytest.mark.parametrize("place", [0, 5, 9, 14, 19])
@pytest.mark.parametrize("max_blocks", [3, 10], ids=["sampled", "whole"])
def test_a_checkpoints_key_is_its_content(tmp_path, monkeypatch, place, max_blocks):
    monkeypatch.setattr(parts, "BLOCK_BYTES", 2)
    monkeypatch.setattr(parts, "MAX_BLOCKS", max_blocks)
    file = tmp_path / "a" / "vae" / "weights"
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(20))
    (tmp_path / "a" / "notes").write_text("no part of it")
    key = checkpoint_key(tmp_path / "a", "vae", "vae_2")
    shutil.copytree(tmp_path / "a" / "vae", tmp_path / "b" / "vae", copy_function=shutil.copyfile)
    assert checkpoint_key(tmp_path / "b", "vae") == key
    content = bytearray(20)
    content[place] = 1
    file.write_bytes(content)
    read = max_blocks == 10 or place in (0, 1, 9, 10, 18, 19)
    assert (checkpoint_key(tmp_path / "a", "vae") != key) == read
    file.write_bytes(bytes(21))
    assert checkpoint_key(tmp_path / "a", "vae") != key
