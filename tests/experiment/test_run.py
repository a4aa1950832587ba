"""Run files: all that ship can be read, and the whole road from random weights to a streamed clip
is wired.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from streamvid.codecs.load import open_codec
from streamvid.experiment.build import build_trainer
from streamvid.experiment.config import load_run
from streamvid.objectives import all_objectives
from streamvid.rollout.sampler import generate
from streamvid.students.folder import load_student
from streamvid.teachers.load import open_teacher

ROOT = Path(__file__).parents[2]
RUNS = sorted((ROOT / "configs" / "run").glob("*.yaml"))
SMALL = ["num_layers=1", "num_attention_heads=1", "attention_head_dim=24", "ffn_dim=32"]
QUICK = ["train.max_steps=2", "train.batch_size=2", "train.log_every=1"]


@pytest.mark.parametrize("path", RUNS, ids=[path.stem for path in RUNS])
def test_every_shipped_run_file_can_be_read(path):
    config = load_run(path, [])
    assert config.objective in all_objectives() and config.train.optimizers


@pytest.mark.parametrize(
    "override, message",
    [
        ("objective=dnd", "objective=dnd is unknown, did you mean"),
        ("options.guidance=3", "guidance_scale"),
        ("train.max_steps=many", "max_steps"),
        ("stream.num_steps=0", "num_steps"),
        ("student.kind=casual", "causal"),
        ("student.kind=bidirectional", "is a teacher, but objective=dmd trains a causal student"),
        ("student.path=", "student.path: expected str or null, got an empty text"),
        ("train.output_dir=", "train.output_dir: expected str, got an empty text"),
        ("train.output_dir=null", "train.output_dir: expected str, got null"),
        ("train.name=null", "train.name: expected str, got null"),
        ("train.name=a\x1b[31mb", "must be one folder name"),
        ("train.batch_size=1e12", "at most 65,536"),
        ("latent_size=[0,0]", "latent_size=.0, 0., expected a height and a width of 1 to 1024"),
        ("latent_size=[-8,8]", "latent_size=.-8, 8."),
        ("student.lora.rank=1e9", "lora.rank=1000000000, expected at most 20,000"),
        ("student.geometry.num_layers=1e9", "expected 1 to 1,000"),
        ("stream.num_steps=1e9", "num_steps=1000000000, expected at most 1,000"),
        ("rollout.num_chunks=1e9", "num_chunks=1000000000 must be at most 10,000"),
    ],
)
def test_mistakes_name_the_key_and_what_was_expected(override, message):
    with pytest.raises(ValueError, match=message):
        load_run(ROOT / "configs" / "run" / "tiny_dmd.yaml", [override])


def train(name, folder, *overrides):
    overrides = [f"train.name={name}", f"train.output_dir={folder}", *QUICK, *overrides]
    return build_trainer(
        load_run(ROOT / "configs" / "run" / f"{name}.yaml", overrides), progress=False
    ).train()


def test_teacher_start_student_and_clip(tmp_path):
    """flow_matching makes a teacher, teacher forcing a start from it, DMD a student; what is
    exported streams.
    """
    world = [
        "data.world.num_clips=4",
        f"data.path={tmp_path / 'world.safetensors'}",
        "train.compile=false",
    ]
    run_dir = train(
        "tiny_teacher",
        tmp_path,
        *world,
        "data.world.num_frames=9",
        *(f"student.geometry.{s}" for s in SMALL),
    )
    teacher = run_dir / "student"
    opened = open_teacher(teacher)
    # options.shift of the run
    assert opened.latent_channels == 16 and opened.shift == 8.0 and opened.uncond is not None
    assert json.loads((teacher / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    assert open_codec(teacher).latent_channels == 16

    long = [
        "data.world.num_clips=2",
        f"data.path={tmp_path / 'long.safetensors'}",
        "data.world.num_frames=57",
    ]
    start = train("tiny_start", tmp_path, *long, f"student.path={teacher}") / "student"
    folder = (
        train(
            "tiny_dmd",
            tmp_path,
            f"student.path={start}",
            f"teacher.path={teacher}",
            "data.num_prompts=4",
            "options.fake_updates_per_student=1",
            "options.student_start_step=0",
        )
        / "student"
    )

    before, after = load_student(start), load_student(folder)
    moved = [
        not torch.equal(p, q)
        for p, q in zip(before.transformer.parameters(), after.transformer.parameters())
    ]
    assert sum(moved) > len(moved) / 2
    with torch.no_grad():
        clip = generate(
            after.transformer,
            after.codec,
            after.prompts.encode(["a red ball"]),
            after.stream,
            seeds=[0],
            height=64,
            width=64,
            num_frames=21,
        )
    assert (
        clip.shape == (1, 21, 3, 64, 64) and "objective: dmd" in (folder / "README.md").read_text()
    )


def test_a_bidirectional_network_is_not_trained_chunk_by_chunk():
    with pytest.raises(
        ValueError,
        match="objective=flow_matching with options.mode=teacher_forcing trains a causal student",
    ):
        load_run(ROOT / "configs" / "run" / "tiny_teacher.yaml", ["options.mode=teacher_forcing"])
    assert (
        load_run(
            ROOT / "configs" / "run" / "tiny_teacher.yaml", ["teacher.negative_prompt="]
        ).teacher.negative_prompt
        == ""
    )


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    """tools/train.py ends with exit code 2 and no traceback."""
    argv = [sys.executable, "tools/train.py", "--config", "configs/run/tiny_dmd.yaml", "train.lr=1"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: unknown key 'train.lr'")
        and done.stderr.count("\n") == 1
    )
