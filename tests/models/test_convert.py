"""Original Wan checkpoints: names, containers, geometry, LoRA."""

import json
from random import Random

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file

from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.convert import (
    HEAD_DIM,
    LowRank,
    bare_name,
    diffusers_name,
    geometry,
    merge_lora,
    open_original,
    original_name,
    original_state_dict,
    read_lora,
)

WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
WAN_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
WAN_5B = {
    "num_attention_heads": 24,
    "ffn_dim": 14336,
    "num_layers": 30,
    "in_channels": 48,
    "out_channels": 48,
}
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": HEAD_DIM,
    "ffn_dim": 96,
    "num_layers": 2,
    "text_dim": 24,
    "freq_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
}

LINEARS = (
    "self_attn.q self_attn.k self_attn.v self_attn.o cross_attn.q cross_attn.k cross_attn.v"
    " cross_attn.o ffn.0 ffn.2"
)
NORMS = "self_attn.norm_q self_attn.norm_k cross_attn.norm_q cross_attn.norm_k"
OUTSIDE = (
    "patch_embedding text_embedding.0 text_embedding.2 time_embedding.0 time_embedding.2"
    " time_projection.1 head.head"
)


def published_names(num_layers: int) -> set[str]:
    """The names in Wan2.1's own files, written down from them."""
    block = [
        f"{name}.{kind}" for name in [*LINEARS.split(), "norm3"] for kind in ("weight", "bias")
    ]
    block += [f"{name}.weight" for name in NORMS.split()] + ["modulation"]
    outside = [f"{name}.{kind}" for name in OUTSIDE.split() for kind in ("weight", "bias")] + [
        "head.modulation"
    ]
    return {*outside, *(f"blocks.{i}.{name}" for i in range(num_layers) for name in block)}


def on_meta(**config) -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel(**config)


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer3DModel:
    torch.manual_seed(0)
    model = CausalWanTransformer3DModel(**TINY).eval()
    # norms begin at 1 and biases at 0: swapped ones would not show
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def original(model) -> dict[str, torch.Tensor]:
    return original_state_dict(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}
    )


def assert_same_weights(one, other) -> None:
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, parameters",
    [
        (WAN_1_3B, 1_418_996_800),
        (WAN_14B, 14_288_491_584),
        (WAN_5B, 4_999_787_712),
    ],
)
def test_names_of_the_published_sizes_go_there_and_back(config, parameters):
    """Diffusers' own classes at the real sizes: names as published, back to themselves, geometry
    read from shapes alone.
    """
    tensors = on_meta(**config).state_dict()
    assert sum(tensor.numel() for tensor in tensors.values()) == parameters
    original = original_state_dict(tensors)
    assert original.keys() == published_names(config["num_layers"])
    assert [diffusers_name(name) for name in original] == list(tensors)
    found = geometry(tensors, "it")
    assert {name: found[name] for name in config} == config
    assert (found["text_dim"], found["freq_dim"], found["patch_size"]) == (4096, 256, (1, 2, 2))
    assert found["attention_head_dim"] == 128


def test_the_table_is_that_of_diffusers(original):
    """norm2 and norm3 change places; a table that forgets it gives other names."""
    theirs = convert_wan_transformer_to_diffusers(dict(original))
    ours = {diffusers_name(name): tensor for name, tensor in original.items()}
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.cross_attn.k_img.weight",
        "blocks.0.norm2.weight",
        "blocks.x.norm3.weight",
        "condition_embedder.time_proj.bias",
        "img_emb.proj.0.weight",
        "head",
        "",
    ],
)
def test_other_names_are_not_guessed(name):
    assert diffusers_name(name) is None


def test_names_that_diffusers_lacks_are_named():
    with pytest.raises(ValueError, match="attn3"):
        original_state_dict({"blocks.0.attn3.to_q.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    "wrapped",
    [
        "blocks.0.ffn.0.weight",
        "model.blocks.0.ffn.0.weight",
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.ffn.0.weight",
        "_fsdp_wrapped_module.model._fsdp_wrapped_module.blocks.0.ffn.0.weight",
        "_orig_mod.model.blocks.0._orig_mod.ffn.0.weight",
        "module.model.blocks.0.ffn.0.weight",
        "model.diffusion_model.blocks.0.ffn.0.weight",
    ],
)
def test_wrappings_come_off(wrapped):
    assert bare_name(wrapped) == "blocks.0.ffn.0.weight"


# ---- files ---------------------------------------------------------------------------------------


def prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def fsdp(tensors):
    """As FSDP1 with checkpointed blocks names them."""
    inner = "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module."
    return {
        "model._fsdp_wrapped_module." + name.replace("blocks.0.", inner): tensor
        for name, tensor in tensors.items()
    }


def other(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


CONTENTS = {
    "bare": lambda t: t,
    "model prefix": lambda t: prefixed(t, "model."),
    "generator": lambda t: {
        "generator": prefixed(t, "model."),
        "critic": prefixed(other(t), "model."),
        "step": 7,
    },
    "ema first": lambda t: {"generator": prefixed(other(t), "model."), "generator_ema": fsdp(t)},
    "fsdp in generator": lambda t: {"generator": fsdp(t)},
    "two deep": lambda t: {"state_dict": {"model": t}},
    "comfy": lambda t: prefixed(t, "model.diffusion_model."),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("content", CONTENTS)
def test_every_container_opens_to_the_same_weights(model, original, content, dtype, tmp_path):
    """To the bit, in the file's own precision, which is not changed on the way."""
    file = tmp_path / "student.pt"
    torch.save(
        CONTENTS[content]({name: tensor.to(dtype) for name, tensor in original.items()}), file
    )
    opened = open_original(file)
    assert {tensor.dtype for tensor in opened.state_dict().values()} == {dtype}
    assert opened.config.num_attention_heads == 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor.to(dtype)), name


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model.", "generator_ema.model."])
def test_safetensors_open_too(model, original, prefix, tmp_path):
    """A flat file has its containers in the names; the critic's tensors are not unknown ones."""
    tensors = prefixed(original, prefix)
    if prefix.startswith("generator_ema"):
        tensors |= prefixed(other(original), "generator.model.") | prefixed(
            other(original), "critic.model."
        )
    save_file(tensors, tmp_path / "student.safetensors")
    assert_same_weights(open_original(tmp_path / "student.safetensors"), model)


def test_the_old_format_of_torch_opens_too(model, original, tmp_path):
    """It cannot be memory-mapped; torch says so with an error."""
    torch.save({"generator": original}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_weights(open_original(tmp_path / "old.pth"), model)


def test_a_container_can_be_named(model, original, tmp_path):
    torch.save({"generator": original, "generator_ema": other(original)}, tmp_path / "student.pt")
    assert_same_weights(open_original(tmp_path / "student.pt", which="generator"), model)
    with pytest.raises(ValueError, match="has no student; it has generator, generator_ema"):
        open_original(tmp_path / "student.pt", which="student")
    torch.save(original, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="no containers"):
        open_original(tmp_path / "bare.pt", which="generator")


def shard(original, folder):
    """An original Wan folder in two files, its other models beside them."""
    folder.mkdir()
    names = sorted(original)
    parts = {
        "diffusion_pytorch_model-00001-of-00002.safetensors": names[::2],
        "diffusion_pytorch_model-00002-of-00002.safetensors": names[1::2],
    }
    for file, part in parts.items():
        save_file({name: original[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "Wan2.1_VAE.pth").write_bytes(b"of no interest")
    return index


def test_a_folder_of_shards_opens_by_its_name_or_its_index(model, original, tmp_path):
    index = shard(original, tmp_path / "wan")
    assert_same_weights(open_original(tmp_path / "wan"), model)
    assert_same_weights(open_original(index), model)


def test_a_missing_shard_is_named(original, tmp_path):
    index = shard(original, tmp_path / "wan")
    (tmp_path / "wan" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    for path in (index, index.parent):
        with pytest.raises(ValueError, match="names diffusion_pytorch_model-00002-of-00002"):
            open_original(path)


def test_a_folder_says_how_many_heads_there_are(original, tmp_path):
    """Wan's own config.json counts them; shapes can't."""
    (tmp_path / "wan").mkdir()
    save_file(original, tmp_path / "wan" / "diffusion_pytorch_model.safetensors")
    assert open_original(tmp_path / "wan").config.num_attention_heads == 2
    (tmp_path / "wan" / "config.json").write_text(json.dumps({"dim": 256, "num_heads": 8}))
    assert open_original(tmp_path / "wan").config.attention_head_dim == 32
    (tmp_path / "wan" / "config.json").write_text(json.dumps({"dim": 256, "num_heads": 0}))
    with pytest.raises(ValueError, match="num_heads=0"):
        open_original(tmp_path / "wan")


def test_what_opens_is_the_model_that_was_saved(model, original, tmp_path):
    """Velocities, not only weights, and those of diffusers' own class."""
    torch.save({"generator": prefixed(original, "model.")}, tmp_path / "student.pt")
    generator = torch.Generator().manual_seed(1)
    latents, cond = (
        torch.randn(1, 4, 3, 4, 4, generator=generator),
        torch.randn(1, 5, 24, generator=generator),
    )
    inputs = (latents, torch.tensor([500.0]), cond)
    theirs = WanTransformer3DModel(**TINY).eval()
    theirs.load_state_dict(model.state_dict())
    with torch.no_grad():
        opened = open_original(tmp_path / "student.pt")(*inputs).sample
        assert torch.equal(opened, model(*inputs).sample)
        torch.testing.assert_close(opened, theirs(*inputs).sample, rtol=1e-4, atol=1e-4)


# ---- what is wrong with a file -------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def refused(content, tmp_path, match):
    torch.save(content, tmp_path / "student.pt")
    with pytest.raises(ValueError, match=match) as error:
        open_original(tmp_path / "student.pt")
    assert "\n" not in str(error.value)


def test_code_is_not_run(original, tmp_path):
    refused(
        {"generator": original, "more": Code()},
        tmp_path,
        "holds code besides tensors, which is not run",
    )


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_one_line_whatever_torch_says_to_it(zipped, tmp_path):
    """Torch meets flipped bytes with an IndexError, an AssertionError, a BadZipFile, and others."""
    torch.save(
        {"generator": {"model.patch_embedding.weight": torch.zeros(8, 4, 1, 2, 2)}},
        tmp_path / "whole.pt",
        _use_new_zipfile_serialization=zipped,
    )
    whole, random = (tmp_path / "whole.pt").read_bytes(), Random(0)
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(4):
            content[random.randrange(len(content))] = random.randrange(256)
        (tmp_path / "damaged.pt").write_bytes(content)
        with pytest.raises(ValueError, match="damaged.pt") as error:
            open_original(tmp_path / "damaged.pt")
        assert "\n" not in str(error.value)


def test_other_contents_are_refused(original, tmp_path):
    refused([1, 2], tmp_path, "holds a list")
    refused({}, tmp_path, "got none")
    refused({"generator": {"a": 3}}, tmp_path, "expected named tensors, got a besides")
    refused({"critic": original}, tmp_path, "has critic, expected one of generator_ema, generator")
    refused(
        {"a.weight": torch.zeros(2)},
        tmp_path,
        "has no patch_embedding.weight; expected a checkpoint in Wan's original",
    )
    for name, content in {
        "text.pt": b"not a checkpoint",
        "empty.pt": b"",
        "text.safetensors": b"none either",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            open_original(tmp_path / name)
    with pytest.raises(ValueError, match="no file"):
        open_original(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="ends in .bin"):
        open_original(tmp_path / "student.bin")


def test_a_truncated_file_is_refused(original, tmp_path):
    torch.save(original, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="half.pt"):
        open_original(tmp_path / "half.pt")


def test_every_fault_is_named_and_counted(original, tmp_path):
    for name in ("q", "k", "v", "o"):
        del original[f"blocks.1.self_attn.{name}.bias"]
    original["blocks.1.self_attn.rubbish"] = torch.zeros(1)
    original["blocks.0.norm3.weight"] = torch.zeros(3)
    original["head.head.bias"] = original["head.head.bias"].to(torch.int8)
    refused(
        original,
        tmp_path,
        r"4 missing: blocks\.1\.self_attn\.\w\.bias, .* and 1 more; "
        r"1 unknown: blocks\.1\.self_attn\.rubbish; "
        r"1 of another shape: blocks\.0\.norm3\.weight \(3,\) instead of \(256,\); "
        r"1 no 16- or 32-bit floats: head\.head\.bias",
    )


def test_a_missing_block_and_a_doubled_name_are_named(original, tmp_path):
    gone = {name: tensor for name, tensor in original.items() if not name.startswith("blocks.0.")}
    refused(
        gone | {"blocks.0.modulation": original["blocks.0.modulation"]},
        tmp_path,
        "has no blocks.0.ffn.0.weight",
    )
    norms = {name for name in original if ".norm3." in name}
    refused(
        {name: original[name] for name in original.keys() - norms},
        tmp_path,
        "4 missing: blocks.0.norm3.weight",
    )
    later = {"blocks.3000000000.modulation": torch.zeros(1, 6, 256)}
    refused(original | later, tmp_path, "nothing of blocks.2 but has a later")
    refused(
        original | {"model.head.head.bias": original["head.head.bias"]},
        tmp_path,
        "has head.head.bias twice",
    )


def test_an_image_to_video_model_is_called_so(original, tmp_path):
    refused(
        original | {"img_emb.proj.0.weight": torch.zeros(4)},
        tmp_path,
        "img_emb.*it is an image-to-video model",
    )


@pytest.mark.parametrize("named", [True, False])
def test_weights_that_see_an_image_are_called_so_by_their_channels(original, tmp_path, named):
    """Wan 2.1's have layers for the image besides, Wan 2.2's only more channels."""
    original["patch_embedding.weight"] = torch.zeros(256, 36, 1, 2, 2)
    clip = {"img_emb.proj.0.weight": torch.zeros(4)} if named else {}
    refused(
        original | clip, tmp_path, "takes 36 channels and makes 4: it holds image-to-video weights"
    )


def test_the_layout_of_diffusers_opens_as_it_is(tmp_path):
    """The whole folder, its transformer/ and its file; heads of 32 and another eps, which only
    config.json tells.
    """
    torch.manual_seed(1)
    model = CausalWanTransformer3DModel(
        **{**TINY, "num_attention_heads": 8, "attention_head_dim": 32, "eps": 1e-3}
    )
    home = tmp_path / "wan" / "transformer"
    model.save_pretrained(home)
    for path in (home.parent, home, home / "diffusion_pytorch_model.safetensors"):
        opened = open_original(path)
        assert_same_weights(opened, model)
        assert (
            opened.config.num_attention_heads,
            opened.config.attention_head_dim,
            opened.config.eps,
        ) == (8, 32, 1e-3)


def test_what_is_wrong_in_the_layout_of_diffusers_is_named_as_there(model, tmp_path):
    home = tmp_path / "wan" / "transformer"
    model.save_pretrained(home)
    whole, file = model.state_dict(), home / "diffusion_pytorch_model.safetensors"
    part = {name: tensor for name, tensor in whole.items() if name != "blocks.1.norm2.weight"}
    save_file({**part, "condition_embedder.image_embedder.a": torch.zeros(1)}, file)
    with pytest.raises(
        ValueError,
        match=r"1 missing: blocks.1.norm2.weight; 1 unknown: .*it is an image-to-video model",
    ):
        open_original(home)
    save_file({**whole, "patch_embedding.weight": torch.zeros(256, 36, 1, 2, 2)}, file)
    with pytest.raises(ValueError, match="takes 36 channels"):
        open_original(home)
    save_file(whole, file)
    (home / "config.json").write_text(json.dumps({"attention_head_dim": 0}))
    with pytest.raises(ValueError, match="attention_head_dim=0"):
        open_original(home)
    (tmp_path / "wan" / "transformer_2").mkdir()
    with pytest.raises(ValueError, match="has two experts"):
        open_original(tmp_path / "wan")


# ---- LoRA ----------------------------------------------------------------------------------------


def updates(original, rank=4) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of every linear in the blocks."""
    generator = torch.Generator().manual_seed(2)
    names = [f"blocks.{i}.{name}" for i in range(2) for name in LINEARS.split()]
    shapes = {name: original[f"{name}.weight"].shape for name in names}
    return {
        name: (torch.randn(rank, i, generator=generator), torch.randn(o, rank, generator=generator))
        for name, (o, i) in shapes.items()
    }


def peft(pairs, adapter=""):
    a = {f"base_model.model.{name}.lora_A{adapter}.weight": pair[0] for name, pair in pairs.items()}
    return a | {
        f"base_model.model.{name}.lora_B{adapter}.weight": pair[1] for name, pair in pairs.items()
    }


def comfy(pairs, alpha):
    down = {f"diffusion_model.{name}.lora_down.weight": pair[0] for name, pair in pairs.items()}
    up = {f"diffusion_model.{name}.lora_up.weight": pair[1] for name, pair in pairs.items()}
    return down | up | {f"diffusion_model.{name}.alpha": torch.tensor(alpha) for name in pairs}


def in_diffusers_naming(pairs):
    return peft({f"transformer.{diffusers_name(name)}": pair for name, pair in pairs.items()})


LORAS = {
    "longlive": (lambda p: {"generator_lora": peft(p), "critic_lora": {"a": torch.zeros(1)}}, 1.0),
    "peft": (lambda p: peft(p, ".default"), 1.0),
    "comfy": (lambda p: comfy(p, 2.0), 0.5),
    "diffusers": (in_diffusers_naming, 1.0),
}


@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_is_merged(model, original, kind, tmp_path):
    """W + scale B A to 1e-6 in the linears of the blocks; everything else is as it was."""
    pairs, (wrap, scale) = updates(original), LORAS[kind]
    torch.save({"generator": original}, tmp_path / "base.pt")
    torch.save(wrap(pairs), tmp_path / "lora.pt")
    merged = open_original(tmp_path / "base.pt", lora=tmp_path / "lora.pt").state_dict()
    for name, tensor in merged.items():
        expected = model.state_dict()[name].double()
        if original_name(name).removesuffix(".weight") in pairs:
            a, b = pairs[original_name(name).removesuffix(".weight")]
            expected = expected + scale * b.double() @ a.double()
        scaled = (tensor.double() - expected).abs() / expected.abs().clamp(min=1)
        assert scaled.max() < 1e-6, name


def test_bf16_weights_are_rounded_once(original, tmp_path):
    """The update is added in float32: summed in bf16, most small ones would be lost."""
    name, weight = "blocks.0.ffn.net.0.proj.weight", original["blocks.0.ffn.0.weight"].bfloat16()
    update = LowRank(torch.randn(4, 256).bfloat16(), torch.randn(96, 4).bfloat16(), 0.25)
    merged = merge_lora({name: weight}, {"blocks.0.ffn.0": update}, "it")[name]
    assert torch.equal(
        merged, (weight.float() + 0.25 * update.up.float() @ update.down.float()).bfloat16()
    )


def test_pefts_configuration_gives_alpha(original, tmp_path):
    save_file(peft(updates(original)), tmp_path / "adapter_model.safetensors")
    assert {
        update.scale for update in read_lora(tmp_path / "adapter_model.safetensors").values()
    } == {1.0}
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"lora_alpha": 32, "r": 4}))
    assert {
        update.scale for update in read_lora(tmp_path / "adapter_model.safetensors").values()
    } == {8.0}
    config.write_text(json.dumps({"lora_alpha": 32, "r": 4, "use_rslora": True}))
    with pytest.raises(ValueError, match="use_rslora"):
        read_lora(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "change, match",
    [
        (
            lambda p: peft({"blocks.7.ffn.0": p["blocks.0.ffn.0"]}),
            "LoRA of another model: blocks.7.ffn.0 is not there",
        ),
        (
            lambda p: peft({"blocks.0.ffn.2": p["blocks.0.ffn.0"]}),
            r"model: blocks.0.ffn.2 \(96, 256\) instead of \(256, 96\)",
        ),
        (
            lambda p: peft(
                {"blocks.0.ffn.0": (p["blocks.0.ffn.0"][0][:2], p["blocks.0.ffn.0"][1])}
            ),
            "LoRA of another model",
        ),
        (
            lambda p: {k: v for k, v in peft(p).items() if "lora_B" not in k},
            "without their other half",
        ),
        (
            lambda p: (
                peft(p) | {"base_model.model.blocks.0.ffn.0.lora_magnitude_vector": torch.zeros(1)}
            ),
            "1 unknown",
        ),
        (lambda p: {"a": Code()}, "holds code"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(original, tmp_path, change, match):
    torch.save(original, tmp_path / "base.pt")
    torch.save(change(updates(original)), tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=match):
        open_original(tmp_path / "base.pt", lora=tmp_path / "lora.pt")
