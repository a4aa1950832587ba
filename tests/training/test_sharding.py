"""Sharded networks: two processes that divide all roles train as one that holds them, and write the
same files.

All runs of two processes are in one launch, which takes most of the time of this file.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import streamvid
from streamvid.students.folder import TINY_TEACHER
from streamvid.training.checkpoint import list_checkpoints
from streamvid.training.metrics import read_metrics
from streamvid.training.sharding import check_shardable, find_networks
from tests.training.sharded_run import afd, dmd

SCRIPT = Path(__file__).with_name("sharded_run.py")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(streamvid.__file__).parents[1]),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint of two blocks."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=24,
        ffn_dim=96,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=32,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    nothing = shutil.ignore_patterns("transformer")
    folder = shutil.copytree(
        TINY_TEACHER, tmp_path_factory.mktemp("wan") / "teacher", ignore=nothing
    )
    network.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def two(teacher, tmp_path_factory):
    """The folder of the runs of two processes."""
    if torch.cuda.is_available():
        pytest.skip("accelerate takes CUDA processes")
    folder = tmp_path_factory.mktemp("two")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(folder), str(teacher)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def state_of(run_dir):
    """All tensors of the last checkpoint, by name, and the counters."""
    folder = list_checkpoints(run_dir / "checkpoints")[-1]
    tensors = {
        f"{file.stem}/{key}": t
        for file in folder.glob("*.safetensors")
        for key, t in load_file(file).items()
    }
    return tensors, json.loads((folder / "trainer.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("build", [dmd, afd])
def test_sharded_equals_unsharded(two, teacher, tmp_path, build):
    """Losses, gradient norms, weights, moments, averages and the old policy, with accumulation and
    checkpointing.
    """
    one = build(tmp_path, teacher, build.__name__, 1)
    before = {
        name: {k: p.clone() for k, p in learner.parameters.items()}
        for name, learner in one.learners.items()
    }
    one.train()
    lines, expected = (
        read_metrics(folder / build.__name__ / "metrics.jsonl") for folder in (two, tmp_path)
    )
    for got, line in zip(lines, expected, strict=True):
        assert got.keys() == line.keys()
        # others are no means over samples
        for key in (key for key in line if key.endswith(("loss", "grad_norm", "lr"))):
            assert got[key] == pytest.approx(line[key], abs=1e-5, rel=1e-5), (line["step"], key)
    assert any(
        line["student/grad_norm"] > 0.05 for line in expected if "student/grad_norm" in line
    ), "none was clipped"
    (got, counters), (expected, _) = (
        state_of(two / build.__name__),
        state_of(tmp_path / build.__name__),
    )
    assert counters["num_processes"] == 2 and got.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(
            got[key], expected[key], rtol=0, atol=1e-5, msg=lambda text: f"{key}: {text}"
        )
    for name, parameters in before.items():
        moved = max((got[f"{name}/{key}"] - p).abs().max().item() for key, p in parameters.items())
        assert moved > 1e-4, name


@pytest.mark.slow
def test_resume_equals_not_having_stopped(two):
    """Bitwise, from a checkpoint of whole tensors."""
    (got, counters), (expected, others) = state_of(two / "parts"), state_of(two / "dmd")
    assert got.keys() == expected.keys() and counters["updates"] == others["updates"]
    for key in expected:
        assert torch.equal(got[key], expected[key]), key


@pytest.mark.slow
def test_the_export_is_whole(two, teacher):
    """The averaged weights, in an ordinary folder."""
    exported = two / "dmd" / "student" / "transformer"
    weights, (state, _) = (
        load_file(exported / "diffusion_pytorch_model.safetensors"),
        state_of(two / "dmd"),
    )
    average = {
        key.removeprefix("student.ema/"): t
        for key, t in state.items()
        if key.startswith("student.ema/")
    }
    assert weights.keys() == average.keys()
    assert all(torch.equal(weights[key], average[key]) for key in weights)
    sizes, source = (
        json.loads((folder / "config.json").read_text())
        for folder in (exported, teacher / "transformer")
    )
    assert {key: sizes[key] for key in source if key[0] != "_"} == {
        key: source[key] for key in source if key[0] != "_"
    }


@pytest.mark.slow
def test_another_number_of_processes_is_refused(two, teacher):
    with pytest.raises(ValueError, match="was trained with 2 processes, not 1"):
        dmd(two, teacher, "dmd", 2, "train.shard=full", "train.gradient_checkpointing=true").train()


def test_one_process_keeps_its_networks_whole(teacher, tmp_path):
    trainer = dmd(tmp_path, teacher, "alone", 1, "train.shard=full")
    assert not trainer.sharded and all(
        type(p) is nn.Parameter for p in trainer.method.student.parameters()
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.compile=true", "compile=true would compile"),
        ("train.optimizers.student.kind=muon", "optimizers.student.kind=muon needs whole"),
        (
            "train.optimizers.student.kind=adamw8bit",
            "optimizers.student.kind=adamw8bit needs whole",
        ),
    ],
)
def test_what_can_not_be_divided_is_refused(teacher, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        dmd(tmp_path, teacher, "x", 1, "train.shard=full", override)


def test_shared_weights_and_experts_that_are_put_away_are_refused():
    """Both would divide a tensor twice, or move one that is divided."""
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    two.weight = one.weight
    method = SimpleNamespace(
        networks=lambda: {"student": one}, frozen=lambda: {"reference": two, "itself": one}
    )
    assert list(find_networks(method)) == ["student", "reference"]  # each once
    with pytest.raises(ValueError, match="as student and reference do"):
        check_shardable(method, {"student": "adamw"}, "no", False)
    method = SimpleNamespace(teacher=SimpleNamespace(offload=True), networks=dict)
    with pytest.raises(ValueError, match="set teacher.offload=false"):
        check_shardable(method, {}, "no", False)
    with pytest.raises(ValueError, match="mixed_precision=fp16 needs; set bf16"):
        check_shardable(method, {}, "fp16", False)


def test_adapters_are_refused(teacher, tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(
        ValueError,
        match="weights that networks share, as the adapters of student do; set lora.rank=0",
    ):
        dmd(tmp_path, teacher, "x", 1, "train.shard=full", "student.lora.rank=2")


@pytest.mark.parametrize("sharded", [False, True])
def test_casts_of_sharded_weights_are_not_kept(sharded):
    """autocast's cache would hold each block whole until the loss is computed."""
    run = """
import sys, torch
from types import SimpleNamespace
from accelerate import Accelerator
from streamvid.training.trainer import Trainer
trainer = SimpleNamespace(
    accelerator=Accelerator(cpu=True, mixed_precision="bf16"), sharded=sys.argv[1] == "True"
)
with Trainer._autocast(trainer):
    assert torch.is_autocast_enabled("cpu")
    print(torch.is_autocast_cache_enabled())
"""
    done = subprocess.run(
        [sys.executable, "-c", run, str(sharded)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(not sharded)], done.stderr
