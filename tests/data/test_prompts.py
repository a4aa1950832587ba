"""Prompts are read strictly, and batches of them are a function of their place."""

import pytest
import torch

from streamvid.data.latents import WorldSet, world_clips
from streamvid.data.prompts import PromptBatches, read_prompts, world_prompts
from streamvid.data.world import read_caption


def test_a_file_has_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        "\ufeff# a comment\r\n  a cat \r\n\r\nein Bär # no comment\n   # one\n".encode()
    )
    assert read_prompts(path) == ["a cat", "ein Bär # no comment"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85"])
def test_a_line_ends_at_no_other_mark(tmp_path, mark):
    """``splitlines`` made two prompts of one at each of these."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"a cat{mark}and a dog\na ball\r\na bird\ra bee".encode())
    assert read_prompts(path) == [f"a cat{mark}and a dog", "a ball", "a bird", "a bee"]


def test_a_hashtag_is_a_prompt_and_a_comment_is_not(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("#sunset over the sea\n# a comment\n#\n#\tanother\n##\n# \n#1 of many cats\n")
    assert read_prompts(path) == ["#sunset over the sea", "##", "#1 of many cats"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no prompt file at .*one prompt a line"),
        (b"", "holds no prompt"),
        (b"# only\n\n", "holds no prompt"),
        (b"a cat\n\xff\xfe", "is not UTF-8 text .byte 6."),
        ("a cat\na ball\n".encode("utf-16"), "is not UTF-8 text .byte 0."),
        (
            "a cat\na ball\n".encode("utf-16-le"),
            "zero byte .character 1., it is UTF-16 or no text; save it as UTF-8",
        ),
        (
            "a cat\na ball\n".encode("utf-16-be"),
            "zero byte .character 0., it is UTF-16 or no text; save it as UTF-8",
        ),
        (b"a cat\na b\0ll\n", "zero byte .character 9."),
    ],
)
def test_a_bad_file_is_refused(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_of_the_world_are_the_captions_of_its_clips(held_out):
    clips = world_clips(WorldSet(num_clips=4, num_frames=1, first_seed=30, held_out=held_out))
    assert world_prompts(4, 30, held_out) == [captions[0] for _, captions in clips]
    assert all(read_caption(prompt).bodies for prompt in world_prompts(4, 30, held_out))


def test_held_out_prompts_are_others():
    seen, held = (
        {repr(read_caption(p)) for p in world_prompts(60, held_out=held_out)}
        for held_out in (False, True)
    )
    assert not seen & held
    with pytest.raises(ValueError, match="num=0"):
        world_prompts(0)


def source(seed=0):
    encode = lambda texts: (
        torch.tensor([float(text[1:]) for text in texts]).reshape(-1, 1, 1).expand(-1, 3, 2).half()
    )
    return PromptBatches(encode, [f"p{i}" for i in range(7)], seed)


def test_a_sample_is_a_function_of_its_place():
    whole = source().batch(4, "student", 0, range(8))
    parts = [source().batch(4, "student", 0, indices) for indices in (range(3), range(3, 8))]
    assert torch.equal(whole["cond"], torch.cat([part["cond"] for part in parts]))
    assert whole["keys"] == parts[0]["keys"] + parts[1]["keys"] and len(set(whole["keys"])) == 8
    assert whole["cond"].dtype == torch.float32
    assert whole["prompts"] == [f"p{int(c)}" for c in whole["cond"][:, 0, 0]]


def test_each_step_turn_repetition_and_seed_draws_anew():
    places = [(0, "student", 0), (1, "student", 0), (0, "fake_score", 0), (0, "student", 1)]
    drawn = [source().batch(*place, range(4))["keys"] for place in places]
    drawn += [source(1).batch(*places[0], range(4))["keys"]]
    assert len({key for keys in drawn for key in keys}) == 20


def test_every_prompt_comes():
    prompts = source().batch(0, "student", 0, range(200))["prompts"]
    assert len(set(prompts)) == 7


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="no prompts"):
        PromptBatches(lambda texts: torch.zeros(len(texts), 3, 4), [], 0)
