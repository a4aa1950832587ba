"""LoRA files in the forms that are published: each adds what it says, or is refused by name;
nothing is dropped in silence.
"""

import pytest
import torch
from safetensors.torch import save_file

from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.convert import merge_lora, original_name, read_lora
from streamvid.models.lora import LORA_FILE, LoraConfig, adapt, save_adapter
from streamvid.seeding import keyed_normal
from streamvid.students.folder import TINY_TEACHER, open_codec
from streamvid.students.pipeline import StreamVidPipeline

MODULES = [
    "blocks.0.attn1.to_q",
    "blocks.1.attn1.to_out.0",
    "blocks.0.attn2.to_k",
    "blocks.0.ffn.net.0.proj",
    "blocks.1.ffn.net.2",
]
OUTSIDE = ["condition_embedder.time_proj", "condition_embedder.text_embedder.linear_1", "proj_out"]
RANK = 3


@pytest.fixture(scope="module")
def codec():
    """Of a pipeline, which needs peft for adapters."""
    pytest.importorskip("peft")
    return open_codec(TINY_TEACHER)


@pytest.fixture
def student():
    torch.manual_seed(0)
    return CausalWanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        ffn_dim=40,
        num_layers=2,
        freq_dim=8,
        text_dim=64,
    )


def noise(*key_and_shape):
    key, *shape = key_and_shape
    return 0.1 * keyed_normal(tuple(shape), "lora", key)


def pairs(student, modules, rank=RANK):
    """(A, B) of each module."""
    made = {}
    for index, module in enumerate(modules):
        outputs, inputs = student.get_submodule(module).weight.shape
        own = rank + index if rank != RANK else rank
        made[module] = (noise(f"{module}.A", own, inputs), noise(f"{module}.B", outputs, own))
    return made


def low_rank(name, a="lora_A", b="lora_B", alpha=None, bias=None, modules=MODULES, rank=RANK):
    """A file with names by ``name`` of the module, and what it adds: alpha / R B A, and the bias as
    much.
    """

    def form(student):
        tensors, sums = {}, {}
        for module, (down, up) in pairs(student, modules, rank).items():
            scale = 1.0 if alpha is None else alpha / len(down)
            tensors |= {f"{name(module)}.{a}.weight": down, f"{name(module)}.{b}.weight": up}
            sums[f"{module}.weight"] = scale * up.double() @ down.double()
            if alpha is not None:
                tensors[f"{name(module)}.alpha"] = torch.tensor(float(alpha))
            if bias is not None:
                values = noise(f"{module}.bias", len(up))
                tensors[f"{name(module)}.{bias}"] = values
                sums[f"{module}.bias"] = (scale if bias == f"{b}.bias" else 1.0) * values.double()
        return tensors, sums

    return form


def with_differences(form, differences, size=0.1):
    """And differences of whole parameters: {name in the file: parameter}."""

    def both(student):
        tensors, sums = form(student)
        for name, parameter in differences.items():
            values = size * keyed_normal(
                tuple(student.get_parameter(parameter).shape), "difference", name
            )
            tensors[name] = values
            sums[parameter] = sums.get(parameter, 0) + values.double()
        return tensors, sums

    return both


def original(module):
    return original_name(f"{module}.weight").removesuffix(".weight")


comfy = lambda module: f"diffusion_model.{original(module)}"
peft = lambda module: f"base_model.model.{original(module)}"
diffusers = lambda module: f"transformer.{module}"
kohya = lambda module: "lora_unet_" + original(module).replace(".", "_")
kohya_diffusers = lambda module: "lora_unet_" + module.replace(".", "_")
DOWN = dict(a="lora_down", b="lora_up")
NORMS = {
    "diffusion_model.blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
    "diffusion_model.blocks.1.norm3.diff": "blocks.1.norm2.weight",
    "diffusion_model.blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
}
MODULATIONS = {
    "diffusion_model.blocks.0.diff_m": "blocks.0.scale_shift_table",
    "diffusion_model.head.diff_m": "scale_shift_table",
}
HEAD = {
    "diffusion_model.head.head.diff": "proj_out.weight",
    "diffusion_model.head.head.diff_b": "proj_out.bias",
}

FORMS = {
    "peft, Wan's names": low_rank(peft),
    "peft, Wan's names, named adapter": low_rank(peft, "lora_A.default", "lora_B.default"),
    "Wan's names alone": low_rank(original),
    "diffusers": low_rank(diffusers),
    "diffusers, alpha": low_rank(diffusers, alpha=6),
    "diffusers, bias": low_rank(diffusers, bias="lora_B.bias"),
    "diffusers, bias and alpha": low_rank(diffusers, alpha=6, bias="lora_B.bias"),
    "diffusers, ranks of their own": low_rank(diffusers, alpha=2, rank=2),
    "diffusion_model, lora_A": low_rank(comfy),
    "diffusion_model, lora_A, alpha": low_rank(comfy, alpha=1),
    "diffusion_model, lora_down": low_rank(comfy, **DOWN),
    "diffusion_model, lora_down, alpha": low_rank(
        comfy, **DOWN, alpha=8, modules=MODULES + OUTSIDE
    ),
    "musubi": low_rank(kohya, **DOWN, alpha=1),
    "kohya without alpha": low_rank(kohya, **DOWN, modules=MODULES + OUTSIDE),
    "kohya, diffusers' names": low_rank(kohya_diffusers, **DOWN, alpha=2),
    "lightx2v, biases": low_rank(comfy, **DOWN, bias="diff_b", modules=MODULES + OUTSIDE),
    "lightx2v, a bias alone": with_differences(
        low_rank(comfy, **DOWN),
        {"diffusion_model.time_projection.1.diff_b": "condition_embedder.time_proj.bias"},
    ),
    "lightx2v, norms of 0": with_differences(low_rank(comfy, **DOWN, alpha=2), NORMS, size=0.0),
}
ONLY_MERGED = {
    "lightx2v, norms": with_differences(low_rank(comfy, **DOWN, alpha=2), NORMS),
    "lightx2v, modulations": with_differences(low_rank(comfy, **DOWN), MODULATIONS),
    "lightx2v, the head as a whole": with_differences(low_rank(comfy, **DOWN, bias="diff_b"), HEAD),
    "all differences": with_differences(lambda student: ({}, {}), {**NORMS, **MODULATIONS, **HEAD}),
    "a pair and a difference of one weight": with_differences(
        low_rank(comfy, **DOWN, alpha=2),
        {"diffusion_model.blocks.0.self_attn.q.diff": "blocks.0.attn1.to_q.weight"},
    ),
}


def assert_added(got, before, sums):
    for name, tensor in before.items():
        torch.testing.assert_close(
            got[name].double(), tensor.double() + sums.get(name, 0), rtol=0, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("kind", [*FORMS, *ONLY_MERGED])
def test_a_file_is_merged_as_it_says(student, tmp_path, kind):
    """W + alpha / R B A, in the right weights, and nothing else moves."""
    tensors, sums = {**FORMS, **ONLY_MERGED}[kind](student)
    save_file(tensors, tmp_path / "lora.safetensors")
    before = student.state_dict()
    assert_added(merge_lora(before, read_lora(tmp_path / "lora.safetensors"), "it"), before, sums)


@pytest.mark.parametrize("kind", FORMS)
def test_the_pipeline_loads_the_same(student, codec, tmp_path, kind):
    tensors, sums = FORMS[kind](student)
    save_file(tensors, tmp_path / "lora.safetensors")
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    pipe = StreamVidPipeline(student, codec)
    pipe.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="own")
    layers = {
        name.split(".lora_")[0] for name, _ in student.named_parameters() if ".lora_A." in name
    }
    assert len(layers) == len(
        {name.rpartition(".")[0] for name, value in sums.items() if value.any()}
    )
    with torch.no_grad():
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert_added(student.state_dict(), before, sums)


@pytest.mark.parametrize("kind", ONLY_MERGED)
def test_what_an_adapter_cannot_hold_is_refused_by_name(student, codec, kind):
    tensors, _ = ONLY_MERGED[kind](student)
    pipe = StreamVidPipeline(student, codec)
    with pytest.raises(
        ValueError,
        match=r"differences of \d weights? that an adapter cannot hold, such as \S+; merge it",
    ) as caught:
        pipe.load_lora_weights(tensors)
    assert "\n" not in str(caught.value) and not getattr(student, "peft_config", {})


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_model.blocks.0.self_attn.q.dora_scale",
        "base_model.model.blocks.0.self_attn.q.lora_magnitude_vector",
        "lora_unet_blocks_0_self_attn_q.hada_w1_a",
        "lora_unet_blocks_0_mystery.lora_down.weight",
        "diffusion_model.blocks.0.self_attn.q.lora_A.bias",
    ],
)
def test_a_name_of_no_update_is_refused(student, codec, tmp_path, name):
    """DoRA, LoHa and the like: merged without them the weights would be others."""
    tensors, _ = low_rank(comfy)(student)
    tensors[name] = torch.ones(2)
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="unknown|without their other half"):
        read_lora(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="unknown|without their other half"):
        StreamVidPipeline(student, codec).load_lora_weights(tensors)


def test_an_alpha_in_a_files_header_counts_in_both(student, codec, tmp_path):
    """save_adapter and diffusers write it there; merging read R in its place."""
    network = adapt(student, LoraConfig(rank=2, alpha=8.0), 0)
    for index, parameter in enumerate(network.parameters()):
        parameter.data = noise(index, *parameter.shape)
    save_adapter(network, tmp_path)
    updates = read_lora(tmp_path / LORA_FILE)
    assert {update.scale for update in updates.values()} == {4.0} and len(updates) == 20
    merged = merge_lora(student.state_dict(), updates, "it")
    pipe = StreamVidPipeline(student, codec)
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert_added(student.state_dict(), merged, {})
