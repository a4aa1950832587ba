"""The recipes for published checkpoints: each trains in two processes on a tiny Wan folder, and
what comes out streams.

Changed are the sizes and the places; the student is updated from the first step on, so that two
steps show it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from streamvid.cli import sample, trajectories
from streamvid.config import read_config
from streamvid.experiment.config import load_run
from streamvid.students.folder import load_student
from streamvid.video import VideoWriter

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "run"
NAMES = sorted(path.stem for path in RECIPES.glob("wan*.yaml"))
LAUNCH = [
    str(Path(sys.executable).with_name("accelerate")),
    "launch",
    "--cpu",
    "--num_processes",
    "2",
]
ONCE = ["train.optimizers.student.accumulate=1", "train.max_steps=2", "latent_size=[4, 4]"]
PROMPTS = "a red ball falls\na cat\n"
OWN = {  # beyond the places
    "wan1.3b_asd": ["options.layers=[0, 1]"],
    "wan1.3b_afd": ["options.student_start_step=0", "data.clips.height=32", "data.clips.width=32"],
}


@pytest.fixture(scope="module")
def places(wan, tmp_path_factory):
    """The tiny Wan folder, prompts, clips and trajectories."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "prompts.txt").write_text(PROMPTS)
    (folder / "clips").mkdir()
    for index, prompt in enumerate(PROMPTS.splitlines()):
        with VideoWriter(str(folder / "clips" / f"{index}.mp4"), 16) as writer:
            writer.append(torch.rand(81, 3, 32, 32))
        (folder / "clips" / f"{index}.txt").write_text(prompt)
    command = [
        "--teacher",
        str(wan("2.1")),
        "--prompts",
        str(folder / "prompts.txt"),
        "--num-clips",
        "2",
        "--latent-frames",
        "21",
    ]
    command += [
        "--latent-size",
        "4x4",
        "--steps",
        "4",
        "--student-shift",
        "5",
        "--out",
        str(folder / "ode"),
    ]
    assert trajectories.main(command) == 0
    return folder


def settings_of(name, places, wan):
    """What has to be changed in a recipe to run it on the tiny folder."""
    recipe, here = read_config(RECIPES / f"{name}.yaml", []), str(wan("2.1"))
    paths = {"prompts": "prompts.txt", "clips": "clips", "trajectories": "ode"}
    changed = [
        *ONCE,
        f"student.path={here}",
        f"components={here}",
        f"data.path={places / paths[recipe['data']['kind']]}",
    ]
    changed += [
        f"prompt_cache={places / 'cache'}",
        f"data.cache_dir={places / 'cache'}",
        f"train.output_dir={places / 'runs'}",
    ]
    changed += [f"teacher.path={here}"] if "teacher" in recipe else []
    changed += [f"fake_score.path={here}"] if "fake_score" in recipe else []
    if "fake_score" in recipe["train"]["optimizers"]:
        changed += [
            "train.optimizers.fake_score.accumulate=1",
            "options.fake_updates_per_student=1",
        ]
    if "discriminator" in recipe["train"]["optimizers"]:
        changed += ["train.optimizers.discriminator.accumulate=1"]
    return [*changed, *OWN.get(name, [])]


def test_there_is_a_recipe_for_each_objective_on_video():
    objectives = {read_config(RECIPES / f"{name}.yaml", [])["objective"] for name in NAMES}
    assert objectives == {"trajectory", "dmd", "asd", "diagonal", "afd"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_in_two_processes(name, places, wan, tmp_path, capsys):
    """Two steps in bf16 with checkpointing, joined; the export opens with diffusers, its weights
    have moved, and it streams.
    """
    command = [*LAUNCH, str(ROOT / "tools" / "train.py"), "--config", str(RECIPES / f"{name}.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    settings = settings_of(name, places, wan)
    done = subprocess.run([*command, *settings], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    run = places / "runs" / name
    assert (
        json.loads((run / "checkpoints" / "step-0000002" / "trainer.json").read_text())[
            "num_processes"
        ]
        == 2
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["student/grad_norm"] > 0
    before = WanTransformer3DModel.from_pretrained(wan("2.1"), subfolder="transformer").state_dict()
    after = WanTransformer3DModel.from_pretrained(
        run / "student", subfolder="transformer"
    ).state_dict()
    assert any(not torch.equal(after[key].float(), value) for key, value in before.items())
    assert (
        load_student(run / "student").stream == load_run(RECIPES / f"{name}.yaml", settings).stream
    )
    frames = str(1 + 4 * (2 * load_student(run / "student").stream.chunk_frames - 1))
    out = tmp_path / "clip.mp4"
    asked = [
        "--student",
        str(run / "student"),
        "--prompt",
        "a red ball",
        "--size",
        "32x32",
        "--num-frames",
        frames,
    ]
    assert sample.main([*asked, "--out", str(out)]) == 0, capsys.readouterr().err
    assert out.stat().st_size > 0
