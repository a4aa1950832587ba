"""What hostile cases start from: the classes of a real run in the smallest sizes, made once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

RUN = """
objective: dmd
train:
  name: run
  max_steps: 4
  batch_size: 1
  log_every: 1
  save_every: 2
  optimizers: {{student: {{lr: 1.0e-3}}, fake_score: {{lr: 1.0e-3}}}}
  ema: {{student: {{decay: 0.5}}}}
student: {{path: {parts}/start}}
teacher: {{path: {parts}/teacher}}
components: {parts}/teacher
options: {{student_start_step: 0, fake_updates_per_student: 1}}
rollout: {{num_chunks: 2}}
data: {{num_prompts: 2}}
latent_size: [2, 2]
stream: {{num_steps: 1, shift: 8.0, chunk_frames: 1, window_frames: 9, positions: window,
  max_trained_frames: 9}}
"""
FLOW = """
objective: flow_matching
train:
  name: flow
  max_steps: 2
  batch_size: 1
  log_every: 1
  save_every: 2
  optimizers: {{student: {{lr: 1.0e-3}}}}
student: {{path: {parts}/start}}
components: {parts}/teacher
options: {{mode: teacher_forcing, chunk_frames: 1, shift: 8.0}}
data: {{kind: latents, path: {parts}/latents.safetensors}}
stream: {{num_steps: 1, shift: 8.0, chunk_frames: 1, window_frames: 9, positions: window,
  max_trained_frames: 9}}
"""
SIZES = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=16,
    out_channels=16,
    text_dim=64,
    freq_dim=16,
    ffn_dim=32,
    num_layers=1,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
)


def make_parts(folder: Path) -> None:
    """teacher/, start/, student/ (complete), run.yaml, flow.yaml, latents.safetensors, done/ (a
    finished run), other/ (the same with another seed), prompts/ (a prompt cache), clips/ (two
    captioned clips).
    """
    import torch
    from diffusers import WanTransformer3DModel

    from streamvid.data.world import caption, render, sample_spec
    from streamvid.students.folder import TINY_STUDENT, TINY_TEACHER
    from streamvid.video import write_video

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    nothing = shutil.ignore_patterns("transformer")
    shutil.copytree(TINY_TEACHER, folder / "teacher", ignore=nothing)
    shutil.copytree(TINY_STUDENT, folder / "start", ignore=nothing)
    network = WanTransformer3DModel(**SIZES)
    for home in ("teacher", "start"):
        network.save_pretrained(folder / home / "transformer")
    (folder / "run.yaml").write_text(RUN.format(parts=folder))
    (folder / "flow.yaml").write_text(FLOW.format(parts=folder))
    (folder / "clips").mkdir()
    for seed, name in enumerate(("one", "two")):
        spec = sample_spec(seed)
        write_video(render(spec, 9), folder / "clips" / f"{name}.mp4", 16)
        (folder / "clips" / f"{name}.txt").write_text(caption(spec, 0))
    _make_latents(folder)
    _fill_prompt_cache(folder)
    _train(folder, "done")
    _train(folder, "other", "train.seed=1")
    shutil.copytree(folder / "done" / "student", folder / "student")


def _make_latents(folder: Path) -> None:
    """As a run makes them of the verifiable world."""
    world = [
        "data.kind=world",
        "data.world.num_clips=2",
        "data.world.num_frames=9",
        "data.world.paraphrases=1",
    ]
    _train(folder, "made", *world, file="flow.yaml", name_of_run="flow")
    shutil.rmtree(folder / "made")


def _fill_prompt_cache(folder: Path) -> None:
    """As a run fills it."""
    _train(folder, "made", "prompt_cache=prompts")
    shutil.rmtree(folder / "made")


def _train(
    folder: Path, name: str, *overrides: str, file: str = "run.yaml", name_of_run: str = "run"
) -> None:
    """A finished run of the working folder, whose folder is then `name`."""
    from streamvid.experiment.build import build_trainer
    from streamvid.experiment.config import load_run

    os.chdir(folder)
    build_trainer(load_run(folder / file, list(overrides)), progress=False).train()
    (folder / "runs" / name_of_run).rename(folder / name)
    shutil.rmtree(folder / "runs")
