"""Clips in files."""

import pytest
import torch

from streamvid.data.world import render, sample_spec
from streamvid.video import VideoWriter, contact_sheet, ensure_writable, read_video, write_video


@pytest.fixture(scope="module")
def frames():
    return render(sample_spec(3), 9)


@pytest.mark.parametrize("name, tolerance", [("a.mp4", 0.04), ("a.webm", 0.06), ("a.gif", 0.2), ("folder", 0.003)])
def test_what_is_written_can_be_read(tmp_path, frames, name, tolerance):
    """Same number of frames and size; lossy formats stay close (root mean square)."""
    write_video(frames, tmp_path / name, 16)
    again, fps = read_video(tmp_path / name)
    assert again.shape == frames.shape
    assert (again - frames).square().mean().sqrt() < tolerance
    assert name == "folder" or fps == pytest.approx(16, rel=0.05)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_frames_may_come_in_parts(tmp_path, frames):
    write_video(frames, tmp_path / "whole", 16)
    with VideoWriter(tmp_path / "parts", 16) as writer:
        for part in frames.split(4):
            writer.append(part)
    assert torch.equal(read_video(tmp_path / "whole")[0], read_video(tmp_path / "parts")[0])


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "folder"])
def test_an_error_leaves_nothing_half_written(tmp_path, frames, name):
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / name, 16) as writer:
        writer.append(frames)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_odd_size_is_refused_not_resized(tmp_path):
    with pytest.raises(ValueError, match="even size, got 7 x 8"):
        write_video(torch.rand(2, 3, 8, 7), tmp_path / "a.mp4", 16)


def test_paths_that_cannot_be_written_are_refused_beforehand(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in [
        (tmp_path / "a.avi", "unknown suffix '.avi'; use one of .mp4"),
        (tmp_path / "file" / "a.mp4", "is not a folder"),
        (tmp_path / "file", "is a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            ensure_writable(path)


def test_a_file_that_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    for path in (tmp_path / "a.mp4", tmp_path / "missing.mp4", tmp_path):
        with pytest.raises(ValueError):
            read_video(path)


def test_contact_sheet_has_a_row_a_clip(tmp_path, frames):
    contact_sheet([("prompt", [("a", frames), ("b", frames)])], tmp_path / "sheet.png", columns=3)
    sheet, _ = read_video(tmp_path)
    assert sheet.shape == (1, 3, 18 + 2 * 132, 130 + 3 * 130)
