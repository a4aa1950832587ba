"""Latent sets: what is encoded is what is served, and a batch is a function of its place."""

import pytest
import torch

from streamvid.data.latents import LatentClips, WorldSet, world_clips, write_latents
from streamvid.data.world import caption, render, sample_spec
from streamvid.seeding import key_to_seed, keyed_normal

NUM_CLIPS, FRAMES = 5, 7


def clips():
    """Clip i is full of i."""
    for i in range(NUM_CLIPS):
        yield torch.full((FRAMES, 3, 4, 4), float(i)), [f"clip {i} a", f"clip {i} b"]


def encode(frames):
    """Latents ``[B, 2, T, 1, 1]`` that tell their clip and their frame."""
    clip = frames[:, :, 0, 0, 0]
    return torch.stack([clip, torch.arange(FRAMES).expand_as(clip)], dim=1)[..., None, None]


def embed(prompts):
    return torch.stack([keyed_normal((3, 2), prompt) for prompt in prompts])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "deep" / "latents.safetensors"
    write_latents(path, clips(), NUM_CLIPS, encode, embed, batch_size=2)
    return path


def test_a_sample_has_the_latents_and_a_caption_of_one_clip(path):
    data = LatentClips(path, 0)
    batch = data.batch(0, "student", 0, range(60))
    assert len(data) == NUM_CLIPS and batch["latents"].shape == (60, 2, FRAMES, 1, 1)
    assert batch["latents"].dtype == batch["cond"].dtype == torch.float32
    for latents, cond, prompt in zip(batch["latents"], batch["cond"], batch["prompts"]):
        assert prompt.split()[1] == str(int(latents[0, 0])) and torch.equal(latents[1].flatten(), torch.arange(7.0))
        assert torch.equal(cond, embed([prompt])[0].half().float())
    assert len(set(batch["prompts"])) == 2 * NUM_CLIPS and batch["offset"].tolist() == [0] * 60


def test_a_sample_is_a_function_of_its_place(path):
    data = LatentClips(path, 0, latent_frames=3, window_stride=2)
    whole = data.batch(4, "student", 1, range(8))
    parts = [data.batch(4, "student", 1, indices) for indices in (range(3), range(3, 8))]
    for name in ("latents", "cond", "offset"):
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))
    assert whole["keys"] == parts[0]["keys"] + parts[1]["keys"] and len(set(whole["keys"])) == 8
    others = [LatentClips(path, 1, 3, 2).batch(4, "student", 1, range(8)), data.batch(5, "student", 1, range(8))]
    assert all(not set(whole["keys"]) & set(other["keys"]) for other in others)


@pytest.mark.parametrize("first_share", [0.0, 0.5, 1.0])
def test_cuts_begin_at_multiples_of_the_stride_and_at_the_beginning_as_often_as_asked(path, first_share):
    data = LatentClips(path, 0, latent_frames=3, window_stride=2, first_share=first_share)
    batch = data.batch(0, "student", 0, range(2000))
    starts = batch["latents"][:, 1, :, 0, 0]
    assert torch.equal(starts, batch["offset"][:, None] + torch.arange(3))
    assert set(batch["offset"].tolist()) == ({0} if first_share == 1 else {0, 2, 4})
    expected = first_share + (1 - first_share) / 3
    assert (batch["offset"] == 0).float().mean().item() == pytest.approx(expected, abs=0.05)


def test_clips_of_the_world_are_its_scenes_with_paraphrases():
    found = list(world_clips(WorldSet(num_clips=2, num_frames=5, paraphrases=3, first_seed=40, held_out=True)))
    for seed, (frames, captions) in zip((40, 41), found, strict=True):
        scene = sample_spec(seed, held_out=True)
        assert torch.equal(frames, render(scene, 5))
        assert captions == [caption(scene, key_to_seed("paraphrase", seed, k)) for k in range(3)]


def test_a_set_appears_only_when_it_is_complete(tmp_path):
    def broken():
        yield from clips()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_latents(tmp_path / "set.safetensors", broken(), NUM_CLIPS, encode, embed)
    assert not list(tmp_path.iterdir())


def test_a_missing_damaged_or_short_set_is_refused(path, tmp_path):
    with pytest.raises(ValueError, match="no latent set at"):
        LatentClips(tmp_path / "nothing", 0)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged .*make it again"):
        LatentClips(damaged, 0)
    with pytest.raises(ValueError, match="latent_frames=9, but the clips of .* have 7"):
        LatentClips(path, 0, latent_frames=9)
