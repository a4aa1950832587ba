"""Files of weights that claim what they don't hold: one line that names the file, and no memory
taken.
"""

import json
import os
import shutil

import pytest
import torch

from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.students.folder import TINY_START, load_transformer
from streamvid.weights import check_weights, load_strictly, read_json, read_pickled

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A transformer's, with an index."""
    copy = shutil.copytree(TINY_START / "transformer", tmp_path / "transformer")
    (copy / INDEX).write_text(
        json.dumps({"weight_map": {"proj_out.bias": "diffusion_pytorch_model.safetensors"}})
    )
    return copy


def refused(match, call, *args):
    with pytest.raises(ValueError, match=match) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "weight_map",
    [["a"], {"a": {}}, {"a": ["b"]}, {"a": 5}, "a", {"a": "../../b.safetensors"}, None],
)
def test_an_index_of_anything_but_files_is_refused(folder, weight_map):
    check_weights(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused("index.json: weight_map is no table", check_weights, folder)


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("eps", "x", "eps is 'x', expected float, such as 1e-06"),
        ("eps", float("inf"), "eps is 'inf'"),
        ("eps", float("nan"), "eps is 'nan'"),
        ("eps", True, "eps is 'True'"),
        ("num_layers", "2", "num_layers is '2', expected int"),
        ("num_layers", -1, "num_layers is -1, expected 0 to"),
        ("ffn_dim", 10**12, "expected 0 to 1,000,000"),
        ("patch_size", 2, "patch_size is '2'"),
        ("cross_attn_norm", 1, "cross_attn"),
    ],
)
def test_a_configuration_of_other_kinds_is_refused(folder, name, value, match):
    """A text for eps went through loading, and was a traceback in the first forward."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    refused(match, load_transformer, folder.parent)


def test_a_pipe_is_not_waited_for(folder):
    file = next(folder.glob("*.safetensors"))
    file.unlink()
    os.mkfifo(file)
    refused("is no regular file", load_strictly, CausalWanTransformer3DModel, folder)


def test_json_that_is_too_deep_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    refused("nested too deeply|is no JSON", read_json, tmp_path / "a.json")


def test_a_tensor_that_claims_more_than_its_file_holds_is_refused(tmp_path):
    """A few bytes with stride 0 became 1.5 TB when they were copied."""
    torch.save({"model": {"a": torch.zeros(1).expand(400_000_000_000)}}, tmp_path / "a.pt")
    refused(
        r"a.pt: a tensor \(400000000000,\) claims more numbers", read_pickled, tmp_path / "a.pt"
    )


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: {"b": (x,)}])
def test_containers_within_themselves_are_refused(tmp_path, wrap):
    table = {"w": torch.zeros(2)}
    table["a"] = wrap(table)
    torch.save(table, tmp_path / "a.pt")
    refused("within themselves", read_pickled, tmp_path / "a.pt")


def test_tensors_that_share_their_numbers_are_fine(tmp_path):
    whole, part = torch.arange(6.0), {"x": torch.ones(2)}
    torch.save({"a": whole, "b": whole[2:].view(2, 2).T, "c": part, "d": [part]}, tmp_path / "a.pt")
    assert torch.equal(read_pickled(tmp_path / "a.pt")["b"], torch.tensor([[2.0, 4.0], [3.0, 5.0]]))
