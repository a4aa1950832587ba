"""Clips in files."""

import pytest
import torch

from streamvid import video
from streamvid.data.world import render, sample_spec
from streamvid.video import VideoWriter, contact_sheet, ensure_writable, read_video, write_video


@pytest.fixture(scope="module")
def frames():
    return render(sample_spec(3), 9)


@pytest.mark.parametrize(
    "name, tolerance", [("a.mp4", 0.04), ("a.webm", 0.06), ("a.gif", 0.02), ("folder", 0.003)]
)
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


def test_what_was_there_stays_when_a_new_clip_fails(tmp_path, frames):
    write_video(frames, tmp_path / "a.mp4", 16)
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", 16) as writer:
        writer.append(frames[:2])
        raise RuntimeError
    assert (tmp_path / "a.mp4").read_bytes() == before


def test_a_folder_that_holds_anything_else_is_never_replaced(tmp_path, frames):
    """`--out ~/work` once replaced the folder, with the user's files in it, by PNGs."""
    (tmp_path / "work").mkdir()
    for name in ("thesis.tex", "holiday.png"):
        (tmp_path / "work" / name).write_text("mine")
        for live in (False, True):
            with pytest.raises(ValueError, match=f"holds {name}"):
                VideoWriter(tmp_path / "work", 16, live)
        assert [path.name for path in (tmp_path / "work").iterdir()] == [name]
        (tmp_path / "work" / name).unlink()
    write_video(frames, tmp_path / "work", 16)
    write_video(frames[:3], tmp_path / "work", 16)  # its own PNGs it may replace
    assert len(read_video(tmp_path / "work")[0]) == 3


def test_a_live_folder_has_each_frame_at_once_and_keeps_them(tmp_path, frames):
    write_video(frames, tmp_path / "live", 16)
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "live", 16, live=True) as writer:
        for count, frame in enumerate(frames[:3].split(1), 1):
            writer.append(frame)
            assert len(list((tmp_path / "live").iterdir())) == count
        raise RuntimeError
    assert torch.equal(read_video(tmp_path / "live")[0], (frames[:3] * 255).round() / 255)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "folder"])
def test_no_frames_or_frames_of_two_sizes_are_errors(tmp_path, name):
    with pytest.raises(ValueError, match="no frames came"), VideoWriter(tmp_path / name, 16):
        pass
    with (
        pytest.raises(ValueError, match="frames of 8 x 8 after frames of 16 x 16"),
        VideoWriter(tmp_path / name, 16) as writer,
    ):
        writer.append(torch.rand(2, 3, 16, 16))
        writer.append(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match="fps=0"):
        VideoWriter(tmp_path / name, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_slash_at_the_end_means_a_folder(tmp_path, frames):
    write_video(frames, f"{tmp_path}/v1.2/", 16)
    assert len(read_video(tmp_path / "v1.2")[0]) == len(frames)


@pytest.mark.parametrize("size", [(64, 64), (720, 1280)])
@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_colours_are_those_that_a_player_shows(tmp_path, size, suffix):
    """Untagged BT.601 at 720 lines showed red (220, 30, 30) as (235, 47, 27); the reader follows
    the players' rule.
    """
    red = torch.tensor([220, 30, 30]) / 255
    write_video(red.reshape(1, 3, 1, 1).expand(2, 3, *size), tmp_path / f"a.{suffix}", 16)
    again, fps = read_video(tmp_path / f"a.{suffix}")
    assert fps == pytest.approx(16, rel=0.02)
    torch.testing.assert_close(again.mean((0, 2, 3)), red, atol=3 / 255, rtol=0)


def test_an_odd_size_is_refused_not_resized(tmp_path):
    with pytest.raises(ValueError, match="even size, got 7 x 8"):
        write_video(torch.rand(2, 3, 8, 7), tmp_path / "a.mp4", 16)


def test_paths_that_cannot_be_written_are_refused_beforehand(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in [
        (tmp_path / "a.avi", "unknown suffix '.avi'; use one of .mp4"),
        (tmp_path / "file" / "a.mp4", "not a directory"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "a.mp4" / "..", "name a new folder"),
        ("/proc/a.mp4", "cannot write /proc/a.mp4"),
        ("/proc/frames", "cannot write /proc/frames"),
    ]:
        with pytest.raises(ValueError, match=message):
            ensure_writable(path)


def test_a_file_that_is_no_video_is_refused(tmp_path):
    (tmp_path / "pngs").mkdir()
    for name in ("a.mp4", "a.gif", "empty.mp4", "pngs/000000.png"):
        (tmp_path / name).write_text("" if "empty" in name else "no video")
    for name in ("a.mp4", "a.gif", "empty.mp4", "missing.mp4", "pngs", "."):
        with pytest.raises(ValueError) as caught:
            read_video(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_contact_sheet_has_a_row_a_clip_beside_its_label(tmp_path, frames):
    """Frames are enlarged by repeating pixels, and a long label does not run into them."""
    contact_sheet(
        [("prompt", [("a", frames), ("a rather long label", frames)])],
        tmp_path / "sheet.png",
        columns=3,
    )
    sheet, _ = read_video(tmp_path)
    _, _, height, width = sheet.shape
    margin = width - 3 * 130
    assert height == 18 + 2 * 132 and margin > 60
    first = sheet[0, :, 18 : 18 + 128, margin : margin + 128]
    assert torch.equal(first[:, ::2, ::2], (frames[0] * 255).round() / 255)


def test_a_file_that_lost_frames_is_an_error_and_is_not_there(tmp_path, monkeypatch):
    """ffmpeg does not say that its disk was full: a broken file of 1,024 bytes was called
    written.
    """
    frames = torch.rand(5, 3, 16, 16)
    for suffix in (".mp4", ".webm"):
        write_video(frames, tmp_path / f"whole{suffix}", 16)
        assert video.count_frames(tmp_path / f"whole{suffix}") == 5
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:200])
    assert video.count_frames(tmp_path / "cut.mp4") == 0
    monkeypatch.setattr(video, "count_frames", lambda path: 3)
    with pytest.raises(OSError, match="3 of 5 frames arrived"):
        write_video(frames, tmp_path / "lost.mp4", 16)
    assert not (tmp_path / "lost.mp4").exists() and len(list(tmp_path.iterdir())) == 3
