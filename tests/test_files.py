"""What a killed process leaves behind goes, what a living one writes stays, and files are as
readable as the umask says.
"""

import errno
import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from streamvid.files import (
    LEFTOVER,
    atomic_file,
    atomic_folder,
    disk_full,
    remove_folder,
    remove_leftovers,
)

KILLED = """
import os, signal, sys
from streamvid.files import atomic_file, atomic_folder
from pathlib import Path
place = sys.argv[1]
with atomic_file(place + "/clip.mp4") as file, atomic_folder(place + "/pictures") as folder:
    file.write_text("half"), (folder / "a.png").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask():
    """Sets the umask of a group that works together, and puts the old one back."""
    old = os.umask(0o027)
    yield 0o027
    os.umask(old)


def test_the_next_writer_removes_what_a_killed_process_left(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path])
    assert len(names(tmp_path)) == 2 and all(LEFTOVER in name for name in names(tmp_path))
    with atomic_file(tmp_path / "other.txt") as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == ["other.txt"]


def test_what_living_processes_and_others_have_written_stays(tmp_path):
    """The name alone is no sign: a user's own file, another machine's, and one of a process that is
    still there.
    """
    with atomic_file(tmp_path / "a.txt") as mine:
        mine.write_text("a")
        prefix, _, end = mine.name.rpartition(f"_{os.getpid()}_")
    theirs = [
        "notes.tmp-1",
        ".notes.tmp-12345678.txt",
        f"{prefix}_{os.getppid()}_{end}",
        f"{prefix}_0_{end}",
    ]
    elsewhere = mine.name.replace(
        prefix, ".a.tmp-000000" if not prefix.endswith("000000") else ".a.tmp-111111"
    )
    theirs.append(elsewhere.replace(f"_{os.getpid()}_", "_4194304_"))
    folder = tmp_path / "shared"
    folder.mkdir()
    for name in theirs:
        (folder / name).write_text("theirs")
    with atomic_folder(folder / "b") as temporary:
        (temporary / "b.txt").write_text("b")
    assert names(folder) == sorted([*theirs, "b"])


def test_remove_leftovers_is_for_folders_of_one_writer(tmp_path):
    (tmp_path / ".step-0000001.tmp-12345678").mkdir()
    assert remove_leftovers(tmp_path) == [".step-0000001.tmp-12345678"] and names(tmp_path) == []


def test_a_folder_is_never_there_in_part_while_it_is_removed(tmp_path, monkeypatch):
    folder = tmp_path / "step-0000001"
    folder.mkdir()
    (folder / "a").write_text("a")
    seen = []
    monkeypatch.setattr(
        "streamvid.files.shutil.rmtree", lambda path: seen.extend([path.name, *names(tmp_path)])
    )
    remove_folder(folder)
    assert len(seen) == 2 and seen[0] == seen[1] and seen[0].startswith(".step-0000001.tmp-")


def test_saved_weights_are_as_readable_as_the_umask_says(tmp_path, umask):
    """safetensors writes files that only their owner can read."""
    with atomic_file(tmp_path / "a.safetensors") as temporary:
        save_file({"w": torch.zeros(1)}, temporary)
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "transformer").mkdir(mode=0o700)
        save_file({"w": torch.zeros(1)}, temporary / "transformer" / "b.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "folder" / "transformer" / "b.safetensors"]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o640, 0o640]
    assert stat.S_IMODE(files[1].parent.stat().st_mode) == 0o750


def test_a_long_name_can_be_written(tmp_path):
    with atomic_file(tmp_path / ("x" * 250 + ".txt")) as temporary:
        temporary.write_text("a")
    assert len(names(tmp_path)[0]) == 254


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk full"),
        (OSError(errno.EFBIG, "File too large"), "file too large"),
        (
            SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            ),
            "disk full",
        ),
        (OSError(errno.EACCES, "Permission denied"), None),
        (SafetensorError("Error while deserializing header: InvalidHeaderDeserialization"), None),
        (ValueError("28"), None),
    ],
)
def test_a_full_disk_is_told_from_other_errors(error, words):
    assert (disk_full(error) or "").startswith(words or "") and (disk_full(error) is None) == (
        words is None
    )


@pytest.mark.parametrize("place", [atomic_file, atomic_folder])
def test_a_full_disk_is_an_error_of_the_system_whoever_says_it(tmp_path, place):
    """safetensors says it as a text of an error of its own, which was a traceback wherever a set
    was written.
    """
    with pytest.raises(OSError, match="disk full") as caught:
        with place(tmp_path / "x"):
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
    with pytest.raises(SafetensorError, match="header"):
        with place(tmp_path / "x"):
            raise SafetensorError("invalid header")
