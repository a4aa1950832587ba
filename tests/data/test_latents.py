"""Latent sets: what is encoded is what is served, and a batch is a function of its place."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamvid.data.latents import (
    LatentClips,
    WorldSet,
    clips_at_once,
    ensure_made_of,
    world_clips,
    write_latents,
)
from streamvid.data.world import caption, render, sample_spec
from streamvid.seeding import key_to_seed, keyed_normal

NUM_CLIPS, FRAMES = 5, 7


def clips(num=NUM_CLIPS):
    """Clip i is full of i."""
    return [
        (torch.full((FRAMES, 3, 4, 4), float(i)), [f"clip {i} a", f"clip {i} b"])
        for i in range(num)
    ]


def encode(frames):
    """Latents ``[B, 2, T, 1, 1]`` that tell their clip and their frame."""
    clip = frames[:, :, 0, 0, 0]
    return torch.stack([clip, torch.arange(FRAMES).expand_as(clip)], dim=1)[..., None, None]


def embed(prompts):
    return torch.stack([keyed_normal((3, 2), prompt) for prompt in prompts])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "deep" / "latents.safetensors"
    write_latents(path, clips(), encode, embed, {"codec": "a", "num_frames": 7}, at_once=2)
    return path


def test_a_sample_has_the_latents_and_a_caption_of_one_clip(path):
    data = LatentClips(path, 0)
    batch = data.batch(0, "student", 0, range(60))
    assert len(data) == NUM_CLIPS and batch["latents"].shape == (60, 2, FRAMES, 1, 1)
    assert batch["latents"].dtype == batch["cond"].dtype == torch.float32
    for latents, cond, prompt in zip(batch["latents"], batch["cond"], batch["prompts"]):
        assert prompt.split()[1] == str(int(latents[0, 0])) and torch.equal(
            latents[1].flatten(), torch.arange(7.0)
        )
        assert torch.equal(cond, embed([prompt])[0].half().float())
    assert len(set(batch["prompts"])) == 2 * NUM_CLIPS and batch["offset"].tolist() == [0] * 60


def test_a_sample_is_a_function_of_its_place(path):
    data = LatentClips(path, 0, latent_frames=3, window_stride=2)
    whole = data.batch(4, "student", 1, range(8))
    parts = [data.batch(4, "student", 1, indices) for indices in (range(3), range(3, 8))]
    for name in ("latents", "cond", "offset"):
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))
    assert whole["keys"] == parts[0]["keys"] + parts[1]["keys"] and len(set(whole["keys"])) == 8
    others = [
        LatentClips(path, 1, 3, 2).batch(4, "student", 1, range(8)),
        data.batch(5, "student", 1, range(8)),
    ]
    assert all(not set(whole["keys"]) & set(other["keys"]) for other in others)


@pytest.mark.parametrize("first_share", [0.0, 0.5, 1.0])
def test_cuts_begin_at_multiples_of_the_stride_and_at_the_beginning_as_often_as_asked(
    path, first_share
):
    data = LatentClips(path, 0, latent_frames=3, window_stride=2, first_share=first_share)
    batch = data.batch(0, "student", 0, range(2000))
    starts = batch["latents"][:, 1, :, 0, 0]
    assert torch.equal(starts, batch["offset"][:, None] + torch.arange(3))
    assert set(batch["offset"].tolist()) == ({0} if first_share == 1 else {0, 2, 4})
    expected = first_share + (1 - first_share) / 3
    assert (batch["offset"] == 0).float().mean().item() == pytest.approx(expected, abs=0.05)


def test_clips_of_the_world_are_its_scenes_with_paraphrases():
    found = list(
        world_clips(
            WorldSet(num_clips=2, num_frames=5, paraphrases=3, first_seed=40, held_out=True)
        )
    )
    for seed, (frames, captions) in zip((40, 41), found, strict=True):
        scene = sample_spec(seed, held_out=True)
        assert torch.equal(frames, render(scene, 5))
        assert captions == [caption(scene, key_to_seed("paraphrase", seed, k)) for k in range(3)]


class Encoder:
    """Counts clips; breaks down at one of them until it is mended."""

    def __init__(self, breaks_at=None):
        self.seen, self.breaks_at = [], breaks_at

    def __call__(self, frames):
        numbers = frames[:, 0, 0, 0, 0].int().tolist()
        if self.breaks_at in numbers:
            raise KeyboardInterrupt
        self.seen += numbers
        return encode(frames)


def test_an_interrupted_set_is_not_there_and_goes_on_where_it_stopped(path, tmp_path):
    """One damaged clip in the middle threw away all that was encoded before it."""
    target, encoder = tmp_path / "set.safetensors", Encoder(breaks_at=3)
    settings = {"codec": "a", "num_frames": 7}
    with pytest.raises(KeyboardInterrupt):
        write_latents(target, clips(), encoder, embed, settings, at_once=1)
    assert encoder.seen == [0, 1, 2] and not target.exists()
    rest = Encoder()
    write_latents(target, clips(), rest, embed, settings, at_once=1)
    assert rest.seen == [3, 4] and [file.name for file in tmp_path.iterdir()] == ["set.safetensors"]
    made, whole = load_file(target), load_file(path)
    assert made.keys() == whole.keys() and all(
        torch.equal(made[name], whole[name]) for name in made
    )


def test_parts_of_other_settings_are_not_taken(tmp_path):
    target, first, second = tmp_path / "set.safetensors", Encoder(breaks_at=3), Encoder()
    with pytest.raises(KeyboardInterrupt):
        write_latents(target, clips(), first, embed, {"codec": "a"})
    write_latents(target, clips(), second, embed, {"codec": "b"})
    assert second.seen == [0, 1, 2, 3, 4] and [file.name for file in tmp_path.iterdir()] == [
        "set.safetensors"
    ]


@pytest.mark.parametrize(
    "shares", [((0, 2), (1, 2)), ((0, 1), (0, 1), (0, 1))], ids=["two ranks", "three by chance"]
)
def test_processes_divide_the_work_and_all_get_the_set(tmp_path, monkeypatch, shares):
    """Every process of a run encoded all clips."""
    monkeypatch.setattr("streamvid.data.parts.WAIT_S", 0.01)
    monkeypatch.setattr("streamvid.data.latents.WAIT_S", 0.01)
    target, encoder, embedded = tmp_path / "set.safetensors", Encoder(), []

    def work(share):
        write_latents(
            target,
            clips(12),
            encoder,
            lambda texts: embedded.append(texts) or embed(texts),
            {},
            1,
            share,
        )
        return target.exists()

    with ThreadPoolExecutor(len(shares)) as pool:
        assert all(pool.map(work, shares))
    assert sorted(encoder.seen) == list(range(12)) and len(embedded) == 12
    data = LatentClips(target, 0)
    assert [int(clip[0, 0, 0, 0]) for clip in data.latents] == list(range(12))
    assert data.captions == [texts for _, texts in clips(12)]


def test_ranks_begin_at_different_clips(tmp_path):
    encoder = Encoder()
    write_latents(tmp_path / "set.safetensors", clips(6), encoder, embed, share=(1, 2))
    assert encoder.seen == [3, 4, 5, 0, 1, 2]


def test_the_codec_is_done_before_the_text_encoder_begins(tmp_path):
    """The two are large and need not be in memory together."""
    events = []
    write_latents(
        tmp_path / "set.safetensors",
        clips(),
        lambda frames: events.append("codec") or encode(frames),
        lambda texts: events.append("text") or embed(texts),
        at_once=2,
    )
    assert events == ["codec"] * 3 + ["text"] * 5


def test_small_clips_are_encoded_together_and_large_ones_alone():
    assert [
        clips_at_once(*size) for size in ((33, 64, 64), (97, 64, 64), (81, 480, 832), (1, 8, 8))
    ] == [16, 10, 1, 16]


def test_clips_of_two_shapes_or_wild_latents_are_not_written(tmp_path):
    other = [*clips(), (torch.zeros(FRAMES + 1, 3, 4, 4), ["a", "b"])]
    with pytest.raises(ValueError, match=r"clips 4 to 5 have the shapes .* expected one for all"):
        write_latents(tmp_path / "set.safetensors", other, encode, embed, at_once=2)
    with pytest.raises(ValueError, match="latents of clips 0 to 4 are not finite"):
        write_latents(
            tmp_path / "b.safetensors",
            clips(),
            lambda frames: encode(frames) * 1e6,
            embed,
            at_once=5,
        )


def test_a_set_is_known_by_what_it_was_made_of(path):
    """A set of 33 frames served a run of 97, and one of another codec a run that it had nothing to
    do with.
    """
    settings = LatentClips(path, 0).settings
    assert settings == {"codec": "a", "num_frames": 7}
    ensure_made_of(path, settings, {"num_frames": 7, "codec": "a"})
    with pytest.raises(
        ValueError, match="is another set: num_frames was 7, now 97; delete or rename it"
    ):
        ensure_made_of(path, settings, {"codec": "a", "num_frames": 97})
    with pytest.raises(ValueError, match="codec was a, now b"):
        write_latents(path, clips(), encode, embed, {"codec": "b", "num_frames": 7})
    with pytest.raises(ValueError, match="does not say what it was made of"):
        ensure_made_of(path, {}, settings)
    ensure_made_of(path, {}, settings, only_known=True)
    assert LatentClips(path, 0).fingerprint == LatentClips(path, 1).fingerprint


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"latents": torch.zeros(5, 2, 7, 1, 1, dtype=torch.int8)},
            "latents are torch.int8, expected float16",
        ),
        ({"latents": torch.full((5, 2, 7, 1, 1), float("nan"))}, "latents are not all finite"),
        ({"embeddings": torch.full((5, 2, 3, 2), float("inf"))}, "embeddings are not all finite"),
        ({"latents": torch.zeros(0, 2, 7, 1, 1)}, "at least one clip"),
        ({"latents": torch.zeros(5, 2, 7)}, "expected 5 axes"),
        ({"embeddings": torch.zeros(4, 2, 3, 2)}, "5 latents, 4 embeddings and 5 captions"),
        ({"captions": [["a", "b"]] * 4}, "5 latents, 5 embeddings and 4 captions"),
        ({"captions": [["a"]] * 5}, "a clip has captions .*, expected 2 texts"),
        ({"captions": [[1, 2]] * 5}, "expected 2 texts"),
    ],
)
def test_a_set_that_holds_something_else_is_one_line(tmp_path, change, said):
    tensors = {"latents": torch.zeros(5, 2, 7, 1, 1), "embeddings": torch.zeros(5, 2, 3, 2)}
    captions = change.pop("captions", [["a", "b"]] * 5)
    save_file(
        tensors | change, tmp_path / "set.safetensors", metadata={"captions": json.dumps(captions)}
    )
    with pytest.raises(ValueError, match=f"is damaged .*{said}") as caught:
        LatentClips(tmp_path / "set.safetensors", 0)
    assert "\n" not in str(caught.value)


def test_a_missing_damaged_or_short_set_is_refused(path, tmp_path):
    with pytest.raises(ValueError, match="no latent set at"):
        LatentClips(tmp_path / "nothing", 0)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged .*make it again"):
        LatentClips(damaged, 0)
    with pytest.raises(ValueError, match="latent_frames=9, but the clips of .* have 7"):
        LatentClips(path, 0, latent_frames=9)
