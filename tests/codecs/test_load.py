"""Opening a codec: the class by its configuration, and whatever is wrong as one line that names the
file.
"""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamvid.codecs.load import codec_class, open_codec
from streamvid.codecs.taehv import AutoencoderTAEHV
from streamvid.codecs.tiny_vae import AutoencoderTinyVideo
from streamvid.codecs.wan_vae import StreamingAutoencoderKLWan
from streamvid.weights import check_weights, read_tensors

WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
TINY = {
    "tiny": lambda: AutoencoderTinyVideo(latent_channels=4, widths=(16, 8, 8)),
    "wan": lambda: StreamingAutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1),
    "taehv": lambda: AutoencoderTAEHV(has_encoder=False),
}


@pytest.fixture
def folder(tmp_path):
    TINY["wan"]().save_pretrained(tmp_path / "vae")
    return tmp_path


@pytest.mark.parametrize("name", TINY)
def test_every_codec_opens_by_its_configuration_and_is_frozen(tmp_path, name, capfd):
    made = TINY[name]()
    made.save_pretrained(tmp_path / "vae")
    codec = open_codec(tmp_path, "cpu")
    assert (
        type(codec)
        is type(made)
        is codec_class(json.loads((tmp_path / "vae/config.json").read_text())["_class_name"])
    )
    assert not codec.training and not any(p.requires_grad for p in codec.parameters())
    latents = torch.randn(1, codec.latent_channels, 2, 2, 2)
    assert codec.decode_latents(latents).shape == (
        1,
        5,
        3,
        2 * codec.spatial_ratio,
        2 * codec.spatial_ratio,
    )
    assert capfd.readouterr().err == ""


def test_half_precision_on_disk_opens_in_float32(folder):
    save_file(
        {name: weight.half() for name, weight in load_file(folder / WEIGHTS).items()},
        folder / WEIGHTS,
    )
    assert {p.dtype for p in open_codec(folder).parameters()} == {torch.float32}


def rewrite(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def truncate(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - 100])


def add_index(folder):
    """The index of two shards, of which the second was not copied."""
    shards = {
        "a": "diffusion_pytorch_model.safetensors",
        "b": "diffusion_pytorch_model-00002-of-00002.safetensors",
    }
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": shards}))


DAMAGES = {
    "truncated": (
        lambda f: truncate(f / WEIGHTS),
        "diffusion_pytorch_model.safetensors is truncated or damaged",
    ),
    "weights": (lambda f: (f / WEIGHTS).unlink(), "has no .safetensors file"),
    "shard": (
        add_index,
        "names diffusion_pytorch_model-00002-of-00002.safetensors, which is not there (1 of 2",
    ),
    "shape": (
        lambda f: rewrite(f, lambda w: w.update({"decoder.conv_out.bias": torch.zeros(5)})),
        "decoder.conv_out.bias",
    ),
    "missing": (
        lambda f: rewrite(f, lambda w: w.pop("decoder.conv_out.bias")),
        "decoder.conv_out.bias and 0 more",
    ),
    "unknown": (
        lambda f: rewrite(f, lambda w: w.update({"extra": torch.zeros(1)})),
        "extra and 0 more",
    ),
    "config": (lambda f: (f / "vae/config.json").unlink(), "has no config.json"),
    "config text": (
        lambda f: (f / "vae/config.json").write_text("{"),
        "vae/config.json is no JSON",
    ),
    "config list": (
        lambda f: (f / "vae/config.json").write_text("[]"),
        "holds a list, expected a JSON object",
    ),
    "class": (
        lambda f: (f / "vae/config.json").write_text('{"_class_name": "AutoencoderKLMochi"}'),
        "is a AutoencoderKLMochi; expected one of AutoencoderTinyVideo, AutoencoderKLWan",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line_that_names_the_place(folder, capfd, name):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(ValueError) as caught:
        open_codec(folder)
    assert (
        message in str(caught.value)
        and str(folder) in str(caught.value)
        and "\n" not in str(caught.value)
    )
    assert capfd.readouterr().err == ""


class Runs:
    """Unpickled, it would write a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_code_in_a_torch_file_is_not_run(tmp_path):
    torch.save({"decoder.1.weight": Runs(tmp_path / "ran")}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Runs(tmp_path / "ran"), protocol=2))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(ValueError, match=f"{name} .*which is not run") as caught:
            open_codec(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    file = tmp_path / f"taew2_1{suffix}"
    tensors = {"decoder.1.weight": torch.zeros(100)}
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    truncate(file)
    with pytest.raises(ValueError, match="is truncated or damaged|is damaged") as caught:
        read_tensors(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match="no file .*taew2_1.safetensors"):
        open_codec(tmp_path / "taew2_1.safetensors")
    with pytest.raises(ValueError, match="ends in .gguf; expected one of .safetensors"):
        read_tensors(tmp_path / "taew2_1.gguf")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "nested.pt")
    with pytest.raises(ValueError, match="no plain table of named tensors"):
        read_tensors(tmp_path / "nested.pt")


def test_weights_that_are_all_there_pass(folder):
    check_weights(folder / "vae")
