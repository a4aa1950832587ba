"""What a run's batches are made of is what the run asks for."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamvid.codecs.text import PromptEncoder
from streamvid.data.trajectories import write_trajectories
from streamvid.data.world import caption, render, sample_spec
from streamvid.experiment import data as run_data
from streamvid.experiment.build import text_device
from streamvid.experiment.config import load_run
from streamvid.experiment.data import build_source
from streamvid.students.folder import TINY_TEACHER
from streamvid.video import write_video

RECIPE = Path(__file__).parents[2] / "configs" / "run" / "tiny_sft.yaml"


@pytest.fixture(scope="module")
def prompts():
    return PromptEncoder.from_pretrained(TINY_TEACHER)


def source(prompts, path, *overrides):
    world = [
        "data.world.num_clips=2",
        "data.world.num_frames=5",
        f"data.path={path}",
        f"data.cache_dir={Path(path).parent}",
    ]
    return build_source(load_run(RECIPE, [*world, *overrides]), prompts)


@pytest.fixture
def changed_codec(tmp_path):
    """The tiny teacher's folder with other weights in its codec, as old and as large as before."""
    folder = shutil.copytree(TINY_TEACHER, tmp_path / "components")
    (file,) = (folder / "vae").glob("*.safetensors")
    state, tensors = file.stat(), load_file(file)
    save_file(
        {name: tensor * 1.5 for name, tensor in tensors.items()}, file, metadata={"format": "pt"}
    )
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    return folder


def test_a_set_of_another_world_or_codec_is_refused(tmp_path, prompts, changed_codec):
    """Sets of other clips, lengths and codecs were served without a word."""
    path = tmp_path / "set.safetensors"
    made = source(prompts, path)
    assert source(prompts, path).fingerprint == made.fingerprint and len(made) == 2
    for override, said in [
        ("data.world.num_clips=3", "num_clips was 2, now 3"),
        ("data.world.num_frames=9", "num_frames was 5, now 9"),
        ("data.world.first_seed=7", "first_seed was 200000, now 7"),
        ("data.world.held_out=true", "held_out was False, now True"),
        ("data.world.paraphrases=1", "paraphrases was 2, now 1"),
        (f"components={changed_codec}", "codec was"),
    ]:
        with pytest.raises(
            ValueError, match=f"set.safetensors is another set: {said}.*delete or rename it"
        ):
            source(prompts, path, override)
    assert len(source(prompts, path, "data.kind=latents", "data.world.num_clips=3")) == 2
    with pytest.raises(ValueError, match="codec was"):
        source(prompts, path, "data.kind=latents", f"components={changed_codec}")


def test_a_copied_checkpoint_is_the_same(tmp_path, prompts):
    path = tmp_path / "set.safetensors"
    source(prompts, path)
    copy = shutil.copytree(TINY_TEACHER, tmp_path / "copy", copy_function=shutil.copyfile)
    assert len(source(prompts, path, f"components={copy}")) == 2


def test_a_set_that_does_not_say_what_it_is_can_be_read_as_latents_only(tmp_path, prompts):
    path = tmp_path / "set.safetensors"
    source(prompts, path)
    save_file(load_file(path), path, metadata={"captions": '[["a", "b"], ["a", "b"]]'})
    with pytest.raises(ValueError, match="does not say what it was made of; .*data.kind=latents"):
        source(prompts, path)
    assert len(source(prompts, path, "data.kind=latents")) == 2


def test_embeddings_of_another_width_are_refused(tmp_path, prompts):
    path = tmp_path / "set.safetensors"
    tensors = {"latents": torch.zeros(1, 16, 2, 8, 8), "embeddings": torch.zeros(1, 1, 4, 7)}
    save_file(tensors, path, metadata={"captions": '[["a"]]'})
    with pytest.raises(
        ValueError, match="embeddings of 7 numbers a token, the text encoder of .* gives 64"
    ):
        source(prompts, path, "data.kind=latents")


def test_latents_of_another_number_of_channels_are_refused(tmp_path, prompts):
    save_file(
        {"latents": torch.zeros(1, 4, 2, 8, 8), "embeddings": torch.zeros(1, 1, 4, 64)},
        tmp_path / "set.safetensors",
        metadata={"captions": '[["a"]]'},
    )
    config = load_run(RECIPE, ["data.kind=latents", f"data.path={tmp_path / 'set.safetensors'}"])
    student = SimpleNamespace(config=SimpleNamespace(out_channels=16))
    with pytest.raises(
        ValueError, match="set.safetensors has latents of 4 channels, the student takes 16"
    ):
        run_data.ensure_same_latents(config, build_source(config, prompts), student)


def test_trajectories_of_another_text_encoder_are_refused(tmp_path, prompts):
    def write(folder, **settings):
        write_trajectories(
            folder,
            ["a ball"],
            (1.0, 0.0),
            prompts.encode,
            lambda cond, seeds: torch.zeros(1, 2, 16, 2, 8, 8),
            settings,
        )
        return build_source(
            load_run(RECIPE, ["data.kind=trajectories", f"data.path={folder}"]), prompts
        )

    assert len(write(tmp_path / "old")) == 1
    with pytest.raises(ValueError, match="is another set: text_encoder was other, now"):
        write(tmp_path / "new", text_encoder="other")


def test_a_folder_of_clips_is_encoded_once_for_each_codec(
    tmp_path, prompts, changed_codec, monkeypatch
):
    for seed in range(2):
        write_video(render(sample_spec(seed), 8), tmp_path / "clips" / f"{seed}.mp4", 16)
        (tmp_path / "clips" / f"{seed}.txt").write_text(caption(sample_spec(seed)))
    form = ["data.kind=clips", "data.clips.num_frames=5", "data.clips.fps=16"]
    first = source(prompts, tmp_path / "clips", *form)
    other = source(prompts, tmp_path / "clips", *form, f"components={changed_codec}")
    assert (
        not torch.equal(first.latents, other.latents)
        and len(list((tmp_path / "clips").rglob("*.safetensors"))) == 2
    )
    monkeypatch.setattr(run_data, "open_codec", lambda *args: pytest.fail("encoded again"))
    assert torch.equal(source(prompts, tmp_path / "clips", *form).latents, first.latents)
    monkeypatch.undo()
    os.utime(tmp_path / "clips" / "0.mp4", (1, 1))
    touched = source(prompts, tmp_path / "clips", *form)
    assert (
        len(list((tmp_path / "clips").rglob("*.safetensors"))) == 3
        and touched.fingerprint == first.fingerprint
    )


def test_each_process_begins_with_other_prompts_if_they_share_a_cache(
    tmp_path, prompts, monkeypatch
):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\n")
    orders = {}
    for rank, cache in ((0, "c"), (1, "c"), (1, None)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(
            prompts, "prepare", lambda texts: orders.setdefault((rank, cache), texts)
        )
        overrides = ["data.kind=prompts", f"data.path={tmp_path / 'prompts.txt'}"]
        overrides += [f"prompt_cache={tmp_path / cache}"] if cache else []
        assert build_source(load_run(RECIPE, overrides), prompts).prompts == ["a", "b", "c", "d"]
    assert orders == {
        (0, "c"): ["a", "b", "c", "d"],
        (1, "c"): ["c", "d", "a", "b"],
        (1, None): ["a", "b", "c", "d"],
    }


def test_an_edited_prompts_file_changes_the_fingerprint(tmp_path, prompts):
    file, prints = tmp_path / "prompts.txt", []
    for text in ("a\nb\n", "a\n\nb\n", "a\nc\n"):
        file.write_text(text)
        prints.append(
            build_source(
                load_run(RECIPE, ["data.kind=prompts", f"data.path={file}"]), prompts
            ).fingerprint
        )
    assert prints[0] == prints[1] != prints[2]


def test_a_text_encoder_that_does_not_fit_beside_the_run_stays_on_the_cpu(monkeypatch):
    cuda, cpu = torch.device("cuda", 1), torch.device("cpu")
    encoder = PromptEncoder.from_pretrained(TINY_TEACHER).text_encoder
    size = 4 * sum(parameter.numel() for parameter in encoder.parameters())
    for free, expected in ((size, cpu), (2 * size, cuda)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
        assert text_device(str(TINY_TEACHER), cuda) == expected
    assert text_device(str(TINY_TEACHER), cpu) == cpu
