"""Clips of any container, rate and size come out at the times and in the shape that are asked
for.
"""

import csv
import json
import os
from functools import partial

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from streamvid.data import clips
from streamvid.data.clips import ClipFormat, check_clip, fit_size, read_captions, read_clip
from streamvid.frames import Frame
from streamvid.video import write_video

FORM = ClipFormat(fps=8.0, num_frames=5, height=16, width=16)


def ramp(num, height=32, width=32):
    """Frames whose grey tells their number: frame k has k / 20."""
    return (torch.arange(num) / 20).reshape(-1, 1, 1, 1).expand(num, 3, height, width).contiguous()


def numbers(frames):
    """The frames' numbers, read back."""
    return [round(20 * frame.mean().item()) for frame in frames]


# ---- Frames --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fps, expected",
    [(8, [0, 1, 2, 3, 4]), (16, [0, 2, 4, 6, 8]), (24, [0, 3, 6, 9, 12]), (4, [0, 0, 1, 1, 2])],
)
@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_a_clip_is_read_at_the_times_that_are_asked_for(tmp_path, fps, expected, suffix):
    if suffix == "gif" and fps == 24:
        pytest.skip("a GIF counts hundredths of a second")
    path = tmp_path / f"clip.{suffix}"
    write_video(ramp(14), path, fps)
    frames = read_clip(path, FORM)
    assert frames.shape == (5, 3, 16, 16) and 0 <= frames.min() and frames.max() <= 1
    found = numbers(frames)
    assert found == expected or (
        suffix == "gif" and np.abs(np.subtract(found, expected)).max() <= 1
    )


def test_irregular_frames_are_taken_by_their_times(tmp_path, monkeypatch):
    """The frame that begins nearest to each time; the earlier one of two."""
    for shift in (0, 10):
        starts = enumerate([0.0, 0.05, 0.3, 0.35, 0.6, 1.0])
        frames = [
            Frame(shift + t, partial(np.full, (16, 16, 3), k * 10, np.uint8)) for k, t in starts
        ]
        monkeypatch.setattr(clips, "clip_frames", lambda path: (frame for frame in frames))
        found = read_clip("x", ClipFormat(fps=4.0, num_frames=4, height=16, width=16))
        assert (found.mean((1, 2, 3)) * 25.5).round().tolist() == [0, 2, 4, 4]
        found = read_clip("x", ClipFormat(fps=5.0, num_frames=6, height=16, width=16))
        assert (found.mean((1, 2, 3)) * 25.5).round().tolist() == [0, 2, 3, 4, 4, 5]


@pytest.mark.parametrize("size, rows", [((32, 64), slice(16, 48)), ((32, 32), slice(0, 32))])
def test_the_largest_centred_part_is_kept(size, rows):
    frames = torch.zeros(1, 3, *size)
    frames[..., rows] = 1  # the middle columns
    assert (fit_size(frames, 16, 16) > 0.99).all()
    tall = fit_size(frames.transpose(2, 3), 16, 16)
    assert tall.shape == (1, 3, 16, 16) and (tall > 0.99).all()


def test_frames_of_the_right_size_are_not_touched():
    frames = torch.rand(2, 3, 16, 24)
    assert torch.equal(fit_size(frames, 16, 24), frames)


def test_a_clip_that_ends_too_early_is_named_with_both_lengths(tmp_path):
    path = tmp_path / "short.mp4"
    write_video(ramp(4), path, 16)
    for call in (read_clip, check_clip):
        with pytest.raises(
            ValueError,
            match=r"short.mp4 is too short: 0.25 s, where 5 frames at 8 a second take 0.62 s",
        ):
            call(path, FORM)


def test_what_is_no_video_is_named(tmp_path):
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"this is no video" * 100)
    with pytest.raises(ValueError, match="broken.mp4 can't be read as a video"):
        read_clip(path, FORM)
    with pytest.raises(ValueError, match="no clip at"):
        read_clip(tmp_path / "nowhere.mp4", FORM)


def test_a_clip_with_transparency_is_read(tmp_path):
    path = tmp_path / "rgba.gif"
    images = [
        np.dstack([np.full((8, 8, 3), 20 * k, np.uint8), np.full((8, 8), 255, np.uint8)])
        for k in range(6)
    ]
    imageio.mimsave(path, images, duration=125)
    assert read_clip(path, FORM).shape == (5, 3, 16, 16)


@pytest.mark.parametrize("wrong", [{"fps": 0.0}, {"num_frames": 0}, {"width": 0}])
def test_a_wrong_format_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ClipFormat(**wrong)


# ---- Captions ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("a.mp4", "inner/b.WEBM", ".hidden.mp4"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_captions_stand_beside_the_clips(folder):
    (folder / "a.txt").write_text("  a red\n circle ", encoding="utf-8-sig")
    (folder / "inner" / "b.txt").write_text("ein grüner Kreis", encoding="utf-8")
    assert read_captions(folder) == [
        (folder / "a.mp4", "a red circle"),
        (folder / "inner" / "b.WEBM", "ein grüner Kreis"),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_captions_stand_in_a_table(folder, kind):
    rows = [
        {"file_name": "inner/b.WEBM", "text": 'a "square", blue'},
        {"file_name": "a.mp4", "text": "a circle"},
    ]
    text = "\n".join(map(json.dumps, rows)) + "\n"
    if kind == "csv":
        text = 'file_name,text\ninner/b.WEBM,"a ""square"", blue"\na.mp4,a circle\n'
    (folder / f"metadata.{kind}").write_text(text)
    assert read_captions(folder) == [
        (folder / "a.mp4", "a circle"),
        (folder / "inner" / "b.WEBM", 'a "square", blue'),
    ]


@pytest.mark.parametrize("strange", ["\u2028", "\x85", "\u2029"])
def test_a_line_ends_where_json_ends_it(folder, strange):
    """Valid captions with a Unicode line separator were refused: "line 1 is no JSON"."""
    rows = [
        {"file_name": "a.mp4", "text": f"a{strange}b"},
        {"file_name": "inner/b.WEBM", "text": "c"},
    ]
    (folder / "metadata.jsonl").write_text(
        "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    assert [caption for _, caption in read_captions(folder)] == ["a b", "c"]


def test_a_caption_in_csv_may_be_long(folder):
    """Python's limit of 131,072 characters gave a traceback."""
    (folder / "metadata.csv").write_text(f"file_name,text\na.mp4,{'word ' * 40000}\n")
    assert read_captions(folder)[0][1] == ("word " * 40000).strip()
    assert csv.field_size_limit() == 131072


@pytest.mark.parametrize("name", ["../a.mp4", "inner/../../a.mp4", "/etc/a.mp4"])
def test_a_clip_outside_of_the_folder_is_refused(folder, name):
    (folder.parent / "a.mp4").write_bytes(b"")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(
        ValueError, match=f"entry 1 names {name}, which is outside of the folder; move"
    ):
        read_captions(folder)


@pytest.mark.parametrize("name", ["c.wmv", "c.ts", "c.m2ts", "c.webp", "c.mpg"])
def test_every_kind_of_clip_is_taken(folder, name):
    """.wmv, .ts and .webp beside captions were left out in silence."""
    # what other tools write beside a clip is no clip
    for file in (folder / name, folder / "c.json"):
        file.write_bytes(b"")
    for text in ("a.txt", "c.txt", "inner/b.txt"):
        (folder / text).write_text("x")
    assert folder / name in [path for path, _ in read_captions(folder)]


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        os.mkfifo,
        lambda path: path.symlink_to("nowhere.mp4"),
        lambda path: path.symlink_to(path.name),
    ],
)
def test_what_is_named_like_a_clip_and_is_none_is_not_left_out_in_silence(folder, make):
    for name in ("a.txt", "inner/b.txt", "one.txt"):
        (folder / name).write_text("x")
    make(folder / "one.mp4")
    with pytest.raises(ValueError, match="one.mp4 is named like a clip but is no file"):
        read_captions(folder)


def test_a_caption_of_what_is_no_clip_is_named(folder):
    for name in ("a.txt", "inner/b.txt", "c.txt", "c.rm", "README.txt"):
        (folder / name).write_text("x")
    with pytest.raises(ValueError, match="c.rm has a caption, but is of no kind that is read"):
        read_captions(folder)


@pytest.mark.parametrize(
    "files, said",
    [
        ({}, "a.mp4 has no caption; write it to a.txt beside it"),
        ({"a.txt": b" \n", "inner/b.txt": b"x"}, "the caption of .*a.mp4 is empty"),
        ({"a.txt": b"\xff\xfe\x00", "inner/b.txt": b"x"}, "a.txt is not UTF-8 text"),
        (
            {"metadata.jsonl": b'{"file_name": "a.mp4"}'},
            "entry 1 has file_name; expected the texts file_name and text",
        ),
        ({"metadata.jsonl": b'{"file_name": "a.mp4", "text": "x"}\n{'}, "line 2 is no JSON"),
        (
            {"metadata.jsonl": b'{"file_name": "c.mp4", "text": "x"}'},
            "entry 1 names c.mp4, which is not there",
        ),
        ({"metadata.csv": b"name,text\na.mp4,x\n"}, "entry 1 has name, text; expected"),
        ({"metadata.csv": b"file_name,text\n"}, "holds no clip"),
        ({"metadata.jsonl": b"[" * 100000}, "line 1 is no JSON: maximum recursion"),
        ({"metadata.csv": b"file_name,text\na.mp4,x\na.mp4\n"}, "entry 2 has"),
    ],
)
def test_captions_that_are_wrong_are_named(folder, files, said):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_captions(folder)


def test_a_folder_without_clips_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no clip"):
        read_captions(tmp_path)
    with pytest.raises(ValueError, match="no folder of clips"):
        read_captions(tmp_path / "nowhere")
