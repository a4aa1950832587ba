"""A black box's clips become a latent set once, through the student's own codec."""

from functools import partial

import pytest
import torch

from streamvid.codecs.load import open_codec
from streamvid.codecs.text import PromptEncoder
from streamvid.data.clips import ClipFormat
from streamvid.data.latents import LatentClips
from streamvid.data.world import caption, render, sample_spec
from streamvid.students.folder import TINY_TEACHER
from streamvid.teachers.clip_folder import ClipFolder, ClipRenderer, encode_clips
from streamvid.video import write_video

FORM = ClipFormat(fps=16.0, num_frames=9, height=64, width=64)


@pytest.fixture(scope="module")
def parts():
    return open_codec(TINY_TEACHER), PromptEncoder.from_pretrained(TINY_TEACHER)


def true_clip(seed, num_frames=9):
    spec = sample_spec(seed)
    return render(spec, num_frames), caption(spec, 0)


@pytest.fixture
def folder(tmp_path):
    for seed in range(3):
        frames, text = true_clip(seed, 12)
        write_video(frames, tmp_path / f"{seed}.mp4", 16)
        (tmp_path / f"{seed}.txt").write_text(text)
    return tmp_path


def test_a_folder_becomes_a_latent_set(folder, tmp_path, parts):
    codec, prompts = parts
    teacher = ClipFolder(folder, FORM)
    assert len(teacher) == 3 and teacher.provides == {"clips"}
    encode_clips(tmp_path / "set.safetensors", teacher, codec, prompts.encode)
    source = LatentClips(tmp_path / "set.safetensors", seed=0)
    batch = source.batch(0, "student", 0, range(8))
    assert (
        batch["latents"].shape == (8, codec.latent_channels, 3, 8, 8) and not batch["offset"].any()
    )
    truth = {caption: codec.encode_frames(frames[None])[0] for frames, (caption,) in teacher}
    for latents, cond in zip(batch["latents"], batch["cond"]):
        gaps = {text: (latents - clip).abs().max() for text, clip in truth.items()}
        text = min(gaps, key=gaps.get)
        assert gaps[text] < 2e-2  # stored in half precision
        torch.testing.assert_close(cond, prompts.encode([text])[0], atol=1e-2, rtol=1e-2)


def test_anything_that_renders_is_a_teacher(tmp_path, parts):
    codec, prompts = parts
    seen = []

    def renderer(prompt, seed):
        seen.append((prompt, seed))
        return true_clip(seed % 100)[0]

    names = [true_clip(seed)[1] for seed in range(3)]
    encode_clips(
        tmp_path / "set.safetensors", ClipRenderer(renderer, names, seed=4), codec, prompts.encode
    )
    assert [prompt for prompt, _ in seen] == names and len({seed for _, seed in seen}) == 3
    again = [seed for _, seed in seen]
    seen.clear()
    list(ClipRenderer(renderer, names, seed=4))
    assert [seed for _, seed in seen] == again


def test_what_was_rendered_is_kept_for_its_own_prompt_only(tmp_path, parts):
    """A clip may have been paid for."""
    codec, prompts = parts
    names, rendered = [true_clip(seed)[1] for seed in range(4)], []

    def render(prompt, seed, until=2):
        if len(rendered) == until:
            raise KeyboardInterrupt
        rendered.append(prompt)
        return true_clip(0)[0]

    with pytest.raises(KeyboardInterrupt):
        encode_clips(
            tmp_path / "set.safetensors", ClipRenderer(render, names), codec, prompts.encode
        )
    again = [names[0], "another", *names[2:]]
    encode_clips(
        tmp_path / "set.safetensors",
        ClipRenderer(partial(render, until=9), again),
        codec,
        prompts.encode,
    )
    assert rendered == [*names[:2], *again[1:]]
    assert LatentClips(tmp_path / "set.safetensors", 0).captions == [[name] for name in again]


def test_clips_of_two_shapes_are_refused(parts):
    shapes = iter([9, 5])
    teacher = ClipRenderer(lambda prompt, seed: torch.zeros(next(shapes), 3, 64, 64), ["a", "b"])
    with pytest.raises(ValueError, match="rendered for 'b' has the shape"):
        list(teacher)


def test_a_length_that_the_codec_cannot_take_is_found_before_anything_is_decoded(
    folder, tmp_path, parts
):
    codec, prompts = parts
    teacher = ClipFolder(folder, ClipFormat(num_frames=10))
    with pytest.raises(ValueError, match="10 frames|frames"):
        encode_clips(tmp_path / "set.safetensors", teacher, codec, prompts.encode)
    assert not (tmp_path / "set.safetensors").exists()


def test_a_broken_clip_is_found_before_anything_is_encoded(folder, tmp_path, parts, monkeypatch):
    codec, prompts = parts
    monkeypatch.setattr(codec, "encode_frames", lambda frames: pytest.fail("encoded"))
    (folder / "2.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="2.mp4 can't be read"):
        encode_clips(tmp_path / "set.safetensors", ClipFolder(folder, FORM), codec, prompts.encode)
    assert not (tmp_path / "set.safetensors").exists()


def test_a_clip_that_is_damaged_inside_costs_no_other(folder, tmp_path, parts, monkeypatch):
    """What was encoded before it was thrown away."""
    codec, prompts = parts
    whole, encode, encoded = (folder / "1.mp4").read_bytes(), codec.encode_frames, []
    monkeypatch.setattr(
        codec, "encode_frames", lambda frames: encoded.append(len(frames)) or encode(frames)
    )
    write_video(torch.rand(40, 3, 64, 64), folder / "1.mp4", 16)
    content = bytearray((folder / "1.mp4").read_bytes())
    content[len(content) // 8 : len(content) // 4] = bytes(len(content) // 4 - len(content) // 8)
    (folder / "1.mp4").write_bytes(content)
    with pytest.raises(ValueError, match="1.mp4 can't be read as a video"):
        encode_clips(
            tmp_path / "set.safetensors",
            ClipFolder(folder, FORM),
            codec,
            prompts.encode,
            keep_in=tmp_path / "kept",
        )
    assert encoded == [1]
    (folder / "1.mp4").write_bytes(whole)
    (folder / "2.mp4").unlink()
    encode_clips(
        tmp_path / "other.safetensors",
        ClipFolder(folder, FORM),
        codec,
        prompts.encode,
        keep_in=tmp_path / "kept",
    )
    assert encoded == [1] * 2 and len(LatentClips(tmp_path / "other.safetensors", 0)) == 2
    assert not (tmp_path / "kept").exists()


def test_the_fingerprint_changes_with_clips_captions_and_format(folder):
    before = ClipFolder(folder, FORM).names()
    prints = [
        ClipFolder(folder, FORM).fingerprint(),
        ClipFolder(folder, ClipFormat(num_frames=5)).fingerprint(),
    ]
    (folder / "0.txt").write_text("another caption")
    prints.append(ClipFolder(folder, FORM).fingerprint())
    assert (
        ClipFolder(folder, FORM).names()[1:] == before[1:]
        and ClipFolder(folder, FORM).names()[0] != before[0]
    )
    write_video(true_clip(7, 14)[0], folder / "1.mp4", 16)
    prints.append(ClipFolder(folder, FORM).fingerprint())
    assert len(set(prints)) == 4 and ClipFolder(folder, FORM).fingerprint() == prints[-1]
