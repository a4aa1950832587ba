"""From a run's configuration to a trainer: what `streamvid train` builds."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from streamvid.codecs.base import last_frame_as_image
from streamvid.codecs.load import open_codec
from streamvid.codecs.text import PromptEncoder
from streamvid.experiment.config import (
    DTYPES,
    Geometry,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    fetch_checkpoints,
)
from streamvid.experiment.data import build_source, ensure_same_latents
from streamvid.experiment.export import export
from streamvid.hub import resolve_checkpoint
from streamvid.metering import GIB
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.jump_embedding import add_jump_embedding
from streamvid.models.lora import LoraConfig, adapt, share_weights
from streamvid.settings.video import OF_TEACHER, VideoSetting
from streamvid.students.folder import load_transformer
from streamvid.teachers.base import ModelTeacher, Teacher, check_width
from streamvid.teachers.load import open_teacher
from streamvid.teachers.wan import load_wan_transformer
from streamvid.training.checks import check_same_run, check_trackers
from streamvid.training.launch import RunLock, check_launcher, is_first_process
from streamvid.training.trainer import Trainer

log = logging.getLogger(__name__)


def build_student(config: StudentConfig, seed: int = 0, jumps: bool = False) -> nn.Module:
    """The network to train, in float32; with adapters, frozen but for those, in the precision of
    ``lora.dtype``.

    Args:
        jumps: whether it is told where to land, see ``models.jump_embedding``.
    """
    network: Any
    if config.path is not None:
        load = load_transformer if config.kind == "causal" else load_wan_transformer
        network = load(config.path, DTYPES[config.lora.dtype])
        if jumps:
            add_jump_embedding(network)
        return adapt(network, config.lora, seed, "student") if config.lora.rank else network
    from diffusers import WanTransformer3DModel

    cls = CausalWanTransformer3DModel if config.kind == "causal" else WanTransformer3DModel
    sizes = {name: getattr(config.geometry, name) for name in Geometry.__dataclass_fields__}
    network = cls(
        **sizes, patch_size=(1, 2, 2), cross_attn_norm=True, qk_norm="rms_norm_across_heads"
    )
    nn.init.zeros_(network.proj_out.weight)
    if jumps:
        add_jump_embedding(network)
    return network


def encoding_device() -> torch.device:
    """Where this process's networks will be, before accelerate has said so."""
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in (
        "1",
        "true",
    ):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def text_device(components: str, device: torch.device) -> torch.device:
    """Where prompts are encoded: on the run's device if the text encoder fits there in float32,
    else on the CPU.
    """
    files = (Path(components) / "text_encoder").glob("*.safetensors")
    needed = 1.2 * 4 * sum(map(num_values, files))
    if device.type == "cpu" or needed < torch.cuda.mem_get_info(device)[0]:
        return device
    log.info(
        "the text encoder needs about %.0f GiB, more than is free on %s: it runs on the CPU",
        needed / GIB,
        device,
    )
    return torch.device("cpu")


def num_values(file: Path) -> int:
    """Numbers in a weight file, by its header."""
    with safe_open(file, "pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())


def needs_teacher(config: RunConfig) -> bool:
    """Whether the objective asks for more than the data."""
    return bool(config.options.needs & OF_TEACHER)


def build_method(
    config: RunConfig,
    student: Any,
    uncond: Tensor,
    teacher: Teacher | None = None,
    fake_score: nn.Module | None = None,
    as_image: Callable[[Tensor], Tensor] | None = None,
) -> VideoSetting:
    """The objective with the networks of a run.

    Args:
        student: a Wan transformer, see ``build_student``.
        uncond: the embedded negative prompt, ``[L, D]``.
        teacher: of objectives that need one.
        fake_score: None makes one of the teacher's weights.
        as_image: where clips from the middle of a stream are judged, see
            ``RolloutConfig.judges_cuts``.

    Raises:
        ValueError: if a part is missing or of no use.
    """
    objective = config.options
    if "pairs" in objective.needs and config.data.kind != "trajectories":
        raise ValueError(
            f"objective={config.objective} learns from pairs of noise and the teacher's clip; make"
            " them with tools/make_trajectories.py, and set data.kind=trajectories and"
            " data.path=FOLDER"
        )
    if "clips" in objective.needs and config.data.kind == "prompts":
        raise ValueError(
            f"objective={config.objective} learns from clips; set data.kind=clips and"
            " data.path=FOLDER"
        )
    if fake_score is not None and "fake_score" not in objective.networks():
        raise ValueError(
            f"objective={config.objective} has no fake score; leave fake_score.path out"
        )
    return VideoSetting(
        objective,
        student,
        config.stream,
        (int(student.config.in_channels), *config.latent_size),
        teacher=teacher,
        rollout=config.rollout,
        fake_score=fake_score,
        uncond=uncond,
        seed=config.train.seed,
        as_image=as_image,
    )


def share_teacher(config: RunConfig, student: nn.Module, teacher: ModelTeacher) -> None:
    """An adapted student of the teacher's own checkpoint stands on the teacher's weights, which are
    so held once.
    """
    if stands_on_teacher(config):
        share_weights(teacher.transformer, student)


def stands_on_teacher(config: RunConfig) -> bool:
    """Whether the student's frozen weights are the teacher's."""
    if (
        not config.student.lora.rank
        or config.student.lora.dtype != config.teacher.dtype
        or config.teacher.offload
    ):
        return False
    own, theirs = config.student.path, config.teacher.path
    if own is None:
        return False
    return own == theirs or Path(own).resolve() == resolve_checkpoint(theirs).resolve()


def build_fake_score(
    config: RunConfig,
    teacher: ModelTeacher | None,
    load: Callable[[str, torch.dtype], Any] = load_wan_transformer,
) -> nn.Module | None:
    """The transformer that `fake_score.path` names, or adapters on that or on the teacher's
    weights; None takes a copy of the teacher's.

    Args:
        load: opens a transformer in a precision.

    Raises:
        ValueError: if adapters would stand on weights that come and go.
    """
    own, lora = config.fake_score, config.student.lora
    rank = own.rank(lora)
    if not rank:
        return None if own.path is None else load(own.path, torch.float32)
    base: nn.Module | None
    if own.path is not None:
        base = load(own.path, DTYPES[config.teacher.dtype])
    elif config.teacher.offload:
        raise ValueError(
            "teacher.offload=true moves weights that the fake score needs; set"
            " fake_score.lora_rank=0"
        )
    else:
        base = None if teacher is None else teacher.transformer
    if "fake_score" not in config.options.networks():
        base = None
    if base is None and own.lora_rank:
        raise ValueError(
            f"objective={config.objective} has no fake score; leave fake_score.lora_rank out"
        )
    if base is None:
        return None
    # so that it counts as much as the student's
    alpha = lora.alpha and lora.alpha * rank / lora.rank
    return adapt(
        base,
        LoraConfig(rank=rank, alpha=alpha, targets=lora.targets),
        config.train.seed,
        "fake_score",
    )


def build_teacher(config: TeacherConfig, prompts: PromptEncoder) -> ModelTeacher:
    """The teacher without a text encoder of its own: that of the run serves both."""
    options = {"offload": True} if config.offload else {}  # of families with experts
    teacher = open_teacher(
        config.path, torch_dtype=DTYPES[config.dtype], load_text_encoder=False, **options
    )
    check_width(config.path, prompts, teacher.text_dim)
    teacher.uncond = prompts.encode([config.negative_prompt])[0]
    return teacher


def build_trainer(config: RunConfig, progress: bool = True) -> Trainer:
    """Everything that a run needs, ready for `.train()`, which ends by exporting the network that
    was trained.

    What can be refused at once is, before anything is loaded; from then on no other process can
    train this run.
    """
    lock = open_run(config)
    asked, config = config, fetch_checkpoints(config)
    device = encoding_device()
    prompts = PromptEncoder.from_pretrained(
        config.components,
        cache_dir=config.prompt_cache,
        device=text_device(config.components, device),
    )
    student = build_student(config.student, config.train.seed, "jumps" in config.options.needs)
    source = build_source(config, prompts, device)
    ensure_same_latents(config, source, student)
    teacher = build_teacher(config.teacher, prompts) if needs_teacher(config) else None
    if teacher is not None:
        share_teacher(config, student, teacher)
    fake_score = build_fake_score(config, teacher)
    codec = open_codec(config.components) if config.rollout.judges_cuts else None
    as_image = None if codec is None else partial(last_frame_as_image, codec)
    uncond = prompts.encode([config.teacher.negative_prompt])[0]
    method = build_method(config, student, uncond, teacher, fake_score, as_image)
    prompts.release()  # all prompts are encoded
    trainer = Trainer(
        config.train, method, source, None, resolved=asked, progress=progress, lock=lock
    )
    if teacher is not None:  # frozen: the trainer moves only what it trains
        teacher.to(trainer.accelerator.device)
    if codec is not None:
        codec.to(trainer.accelerator.device)
    trainer.save_fn = lambda run_dir: export(trainer, run_dir, config)
    return trainer


def check_run(config: RunConfig) -> Path:
    """The run folder, if this run may be in it and the launcher asks for nothing else. Writes
    nothing.

    Raises:
        ValueError: one line, if it holds another run, or the launcher asks for what the run does
            not.
    """
    run_dir = Path(config.train.output_dir) / config.train.name
    check_launcher(config.train.mixed_precision)
    check_trackers(config.train.trackers)
    check_same_run(run_dir / "config.yaml", config.train, config)
    return run_dir


def open_run(config: RunConfig) -> RunLock | None:
    """Make the run folder this launch's own; the main process holds the lock for all.

    Raises:
        ValueError: one line; see ``check_run``, and if there is no data to read.
    """
    run_dir, data = check_run(config), config.data
    if data.kind != "world" and data.path is not None and not Path(data.path).exists():
        raise ValueError(f"data.path={data.path} is not there, expected {data.kind} to read")
    return RunLock(run_dir) if is_first_process() else None
