"""`streamvid sample --script` and `--start`: the clip is the live session's, frame by frame."""

import numpy as np
import pytest
import torch
from PIL import Image

from streamvid.cli import sample
from streamvid.students.folder import TINY_STUDENT, load_student
from streamvid.students.script import Change, Script
from streamvid.students.session import Session
from streamvid.video import read_video, to_uint8, write_video

OLD = "a large red circle moves to the right slowly"
NEW = "a large blue square moves down slowly"
SIZE = {"height": 32, "width": 48}


def run(capsys, *argv) -> tuple[int, str]:
    """The exit code and what went to stderr."""
    try:
        code = sample.main([str(part) for part in argv])
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, capsys.readouterr().err


@pytest.fixture(scope="module")
def student():
    return load_student(TINY_STUDENT)


@pytest.fixture(scope="module")
def recorded(student):
    """The bytes [T, H, W, 3] of each chunk of a steered session, and its script."""
    with Session(student, OLD, seed=5, steps=1, **SIZE) as session:
        chunks = [session.next_chunk().images]
        session.switch_prompt(NEW, mode="recache")
        session.set_steps(2)
        chunks.append(session.next_chunk().images)
        session.switch_prompt(OLD, mode="hard")
        session.set_seed(6)
        chunks += [session.next_chunk().images for _ in range(2)]
        return chunks, session.script


@pytest.fixture
def script(recorded, tmp_path):
    """The script's file."""
    path = tmp_path / "stream.yaml"
    recorded[1].save(path)
    return path


def pixels(path) -> np.ndarray:
    """The frames [T, H, W, 3] of a folder of PNGs, or a clip, as bytes."""
    return to_uint8(read_video(path)[0])


@pytest.mark.parametrize("suffix", [".yaml", ".jsonl"])
def test_the_clip_of_a_script_is_the_session_bit_for_bit(recorded, capsys, tmp_path, suffix):
    chunks, script = recorded
    script.save(tmp_path / f"stream{suffix}")
    out = tmp_path / "frames"
    assert run(capsys, "--script", tmp_path / f"stream{suffix}", "--out", out)[0] == 0
    assert [len(chunk) for chunk in chunks] == [9, 12, 9, 12]  # the hard switch begins anew
    assert np.array_equal(pixels(out), np.concatenate(chunks))


def test_it_can_end_earlier_and_begin_later(recorded, script, capsys, tmp_path):
    chunks, _ = recorded
    options = ("--script", script, "--first-chunk", 1, "--num-frames", 14)
    assert run(capsys, *options, "--out", tmp_path / "part")[0] == 0
    assert np.array_equal(pixels(tmp_path / "part"), np.concatenate(chunks[1:])[:14])
    assert run(capsys, "--script", script, "--num-frames", 999, "--out", tmp_path / "all")[0] == 0
    assert np.array_equal(pixels(tmp_path / "all"), np.concatenate(chunks))


def test_the_file_is_that_of_the_same_frames(recorded, script, capsys, tmp_path):
    """The script's clip has the very packets that a recorder of the session wrote."""
    frames = torch.from_numpy(np.concatenate(recorded[0])).permute(0, 3, 1, 2).float() / 255
    write_video(frames, tmp_path / "recorded.mp4", 12)
    assert run(capsys, "--script", script, "--fps", 12, "--out", tmp_path / "a.mp4")[0] == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "recorded.mp4").read_bytes()


def test_a_prompt_goes_on_from_a_clip(student, recorded, capsys, tmp_path):
    """And the script of such a stream asks for the same clip."""
    clip = tmp_path / "clip.gif"
    write_video(torch.rand(21, 3, 32, 48), clip, 16)
    start, _ = read_video(clip)
    with Session(student, OLD, seed=3, start=start, **SIZE) as session:
        assert session.index == 2
        expected = session.next_chunk().images
        session.script.save(tmp_path / "stream.yaml")
    options = ("--prompt", OLD, "--seed", 3, "--size", "32x48", "--num-frames", 12)
    assert run(capsys, *options, "--start", clip, "--out", tmp_path / "a")[0] == 0
    assert np.array_equal(pixels(tmp_path / "a"), expected)
    script = ("--script", tmp_path / "stream.yaml")
    assert run(capsys, *script, "--start", clip, "--out", tmp_path / "b")[0] == 0
    assert np.array_equal(pixels(tmp_path / "b"), expected)
    code, err = run(capsys, *script, "--out", tmp_path / "c")
    assert code == 2 and "give them with --start" in err
    write_video(torch.rand(21, 3, 32, 48), clip, 16)
    code, err = run(capsys, *script, "--start", clip, "--out", tmp_path / "c")
    assert code == 2 and "pass the same frames" in err and err.count("\n") == 1


def test_an_image_is_repeated_to_the_first_chunk(student, capsys, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    start = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    with Session(student, OLD, start=start.expand(9, -1, -1, -1), **SIZE) as session:
        expected = session.next_chunk().images
    plain = Script(OLD, **SIZE, num_chunks=2)  # of a hand, which knows no digest
    plain.save(tmp_path / "plain.yaml")
    options = ("--script", tmp_path / "plain.yaml", "--start", tmp_path / "image.png")
    assert run(capsys, *options, "--out", tmp_path / "a")[0] == 0
    assert np.array_equal(pixels(tmp_path / "a"), expected)
    Script(OLD, **SIZE, num_chunks=2, changes=(Change(0, seed=1),)).save(tmp_path / "plain.yaml")
    code, err = run(capsys, *options, "--out", tmp_path / "b")
    assert code == 2 and "a change at chunk 0" in err


GOOD = "prompt: a red circle\nheight: 32\nwidth: 48\n"


@pytest.mark.parametrize(
    "text, argv, message",
    [
        (GOOD + "num_chunks: 1\n", ("--prompt", OLD), "not allowed with argument"),
        (GOOD + "num_chunks: 1\n", ("--prompts", "p.txt"), "not allowed with argument"),
        (GOOD + "num_chunks: 1\n", ("--seed", 0), "--seed contradicts --script"),
        (GOOD + "num_chunks: 1\n", ("--steps", 4), "--steps contradicts --script"),
        (GOOD + "num_chunks: 1\n", ("--size", "64x64"), "--size contradicts --script"),
        (GOOD + "num_chunks: 1\n", ("--teacher", "t"), "--script is of students"),
        (GOOD + "num_chunks: 1\n", ("--guidance", 2), "--guidance is of teachers"),
        (GOOD + "num_chunks: 1\n", ("--schedule", "rolling"), "chunk after chunk"),
        (GOOD + "num_chunks: 1\n", ("--first-chunk", 1), "first_chunk=1 of a script of"),
        (GOOD + "num_chunks: 1\n", ("--first-chunk", -1), "--first-chunk -1"),
        (GOOD + "num_chunks: 1\n", ("--num-frames", 0), "at least 1 frame"),
        (GOOD + "num_chunks: 1\n", ("--start", "nowhere.png"), "nowhere.png"),
        (GOOD + "num_chunks: 1\n", ("--start", "small.png"), "frames are 8x8, the stream's 32x48"),
        (GOOD + "num_chunks: 1\n", ("--start", "stream.yaml"), "start stream.yaml"),
        (GOOD, (), "has no num_chunks"),
        (GOOD + "num_chunk: 1\n", (), "num_chunk"),
        (GOOD + "num_chunks: 0\n", (), "num_chunks=0"),
        (GOOD + "start: abc\nnum_chunks: 3\n", (), "began from frames"),
        ("prompt: [\n", (), "no YAML"),
        ("", (), "a mapping"),
        (GOOD.replace("32", "33") + "num_chunks: 1\n", (), "multiples of"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, capsys, monkeypatch, text, argv, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("small.png")
    (tmp_path / "stream.yaml").write_text(text)
    before = set(tmp_path.iterdir())
    code, err = run(capsys, "--script", "stream.yaml", "--out", "clip.mp4", *argv)
    assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert set(tmp_path.iterdir()) == before


def test_a_first_chunk_is_of_a_script(tmp_path, capsys):
    code, err = run(capsys, "--prompt", OLD, "--first-chunk", 1, "--out", tmp_path / "a.mp4")
    assert code == 2 and "--first-chunk 1: expected a chunk of a --script" in err
