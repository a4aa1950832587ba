"""The configuration of a run, and how it is read.

A run names its objective (see `streamvid/objectives`), the objective's options, how samples are
rolled out in training, the networks, the data and the trainer's settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from streamvid.config import build_config, read_config
from streamvid.data.clips import ClipFormat
from streamvid.data.latents import WorldSet
from streamvid.hub import resolve_checkpoint
from streamvid.models.lora import LoraConfig
from streamvid.objectives import find_objective
from streamvid.objectives.base import Objective
from streamvid.rollout.schedule import StreamConfig
from streamvid.settings.rollouts import RolloutConfig
from streamvid.shipped import ASSETS, TINY_TEACHER
from streamvid.training.config import TrainConfig

MOST_SIDE = 1024  # of a latent frame; 8K of a codec that divides by 8
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
SHIPPED = "streamvid/assets/"


def show_path(path: str | Path) -> str:
    """A path as a card or a run file may show it: shipped folders without the place of the
    installation.
    """
    path = Path(path).absolute()
    return f"{SHIPPED}{path.relative_to(ASSETS)}" if path.is_relative_to(ASSETS) else path.name


def locate_path(path: str) -> str:
    """Undoes `show_path`: a shipped folder is found from any working folder, unless that has one of
    this name.
    """
    here = Path(path).exists() or not path.startswith(SHIPPED)
    return path if here else str(ASSETS / path.removeprefix(SHIPPED))


@dataclass
class Geometry:
    """Sizes of a network that starts from random weights; the names are diffusers'
    WanTransformer3DModel's.
    """

    num_layers: int = 6
    num_attention_heads: int = 4
    attention_head_dim: int = 48
    ffn_dim: int = 768
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 64
    freq_dim: int = 64

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            most = 1000 if name == "num_layers" else 100_000
            if not 1 <= size <= most:
                raise ValueError(f"student.geometry.{name}={size}, expected 1 to {most:,}")


@dataclass
class StudentConfig:
    """The network that is trained."""

    path: str | None = None
    """A folder with transformer/ to start from; null: random weights of `geometry`."""
    geometry: Geometry = field(default_factory=Geometry)
    kind: Literal["causal", "bidirectional"] = "causal"
    """causal: a student that streams; bidirectional: a teacher."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """With a rank above 0, only adapters on the frozen weights are trained."""

    def __post_init__(self) -> None:
        if self.lora.rank and self.path is None:
            raise ValueError(
                f"student.lora.rank={self.lora.rank} adapts trained weights; name them with"
                " student.path"
            )


@dataclass
class TeacherConfig:
    """The teacher, loaded for objectives that ask for its score."""

    path: str = show_path(TINY_TEACHER)
    """A folder, or a name on the hub; `components` has the same text encoder."""
    negative_prompt: str = ""
    dtype: Literal["float32", "bf16"] = "float32"
    """Precision of its frozen weights."""
    offload: bool = False
    """Keep the idle one of two experts on the CPU."""


@dataclass
class FakeScoreConfig:
    """The network that follows the student's clips, of objectives that have one."""

    path: str | None = None
    """A folder or hub name whose transformer it starts from; null copies the teacher's."""
    lora_rank: int | None = None
    """Rank of adapters on those weights; null takes student.lora.rank, 0 trains all weights."""

    def __post_init__(self) -> None:
        if self.lora_rank is not None and self.lora_rank < 0:
            raise ValueError(
                f"fake_score.lora_rank={self.lora_rank}, expected at least 0, or null for the"
                " student's"
            )

    def rank(self, student: LoraConfig) -> int:
        """The rank of the fake score's adapters; 0 is none."""
        return student.rank if self.lora_rank is None else self.lora_rank


@dataclass
class DataConfig:
    """What the batches come from."""

    kind: Literal["world", "clips", "latents", "trajectories", "prompts"] = "prompts"
    """world: clips of the verifiable world, rendered and encoded into `path` if that is not there
    yet; clips: captioned clips in the folder `path`, a black-box teacher's, encoded into
    `cache_dir`; latents: the latent set `path`; trajectories: the teacher's, of
    streamvid trajectories; prompts only."""
    path: str | None = None
    """A file of the kind; with `prompts`, a text file with a prompt per line, null for captions of
    the world."""
    world: WorldSet = field(default_factory=WorldSet)
    clips: ClipFormat = field(default_factory=ClipFormat)
    cache_dir: str = ".cache"
    """Where encoded clips of a folder are kept; changed clips, captions, sizes or codecs are
    encoded anew."""
    num_prompts: int = 1000
    """Captions of the world to take, with kind `prompts` and no path."""
    latent_frames: int | None = None
    """Frames to cut from each clip; null: the whole clip."""
    window_stride: int | None = None
    """Cuts start at multiples of it; null: at the clip's beginning only."""
    first_share: float = 0.5
    """Share of the cuts that start at the beginning all the same."""

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise ValueError(f"data.num_prompts={self.num_prompts}, expected at least 1")


@dataclass
class RunConfig:
    """A run; `load_run` gives the field `options` the class of the objective."""

    train: TrainConfig
    objective: str = "dmd"
    """Of `streamvid.objectives`."""
    options: Objective = field(default_factory=Objective)
    """The objective with its options."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How the student's samples are made in training."""
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    fake_score: FakeScoreConfig = field(default_factory=FakeScoreConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    components: str = show_path(TINY_TEACHER)
    """The folder of text_encoder/, tokenizer/ and vae/."""
    prompt_cache: str | None = None
    """A folder for prompt embeddings; null keeps them in memory, for small encoders."""
    latent_size: tuple[int, int] = (8, 8)
    """Height and width of a latent frame, for objectives that roll out."""

    def __post_init__(self) -> None:
        if not all(1 <= side <= MOST_SIDE for side in self.latent_size):
            raise ValueError(
                f"latent_size={list(self.latent_size)}, expected a height and a width of 1 to"
                f" {MOST_SIDE}"
            )
        ranks = {
            "student": self.student.lora.rank,
            "fake_score": self.fake_score.rank(self.student.lora),
        }
        for name, optimizer in self.train.optimizers.items():
            if ranks.get(name) and optimizer.kind == "muon":
                raise ValueError(
                    f"optimizers.{name}.kind=muon is for whole matrices, but {name} has adapters;"
                    " set adamw"
                )


MOVED = {
    "method": "objective",
    "options.motion": "options.motion_feature",
    **{
        f"options.{name}": f"rollout.{name}"
        for name in RolloutConfig.__dataclass_fields__
        if name != "group_size"
    },
}
"""Keys of earlier versions, and what they are now."""


def load_run(path: str | Path | None, overrides: list[str]) -> RunConfig:
    """Read a run file and `key=value` overrides; the objective itself checks `options`.

    Raises:
        ValueError: one line for a missing file, an unknown key, a wrong type or an unknown
            objective.
    """
    values = read_config(path, overrides)
    _check_moved(values)
    kind = find_objective(str(values.get("objective", RunConfig.objective)))
    whole = make_dataclass(
        "RunConfig", [("options", kind, field(default_factory=kind))], bases=(RunConfig,)
    )
    whole.__module__ = __name__
    config: RunConfig = build_config(whole, values)
    _check_kind(config)
    return config


def _check_moved(values: dict[str, Any]) -> None:
    """A ValueError for a key that has another name now."""
    options = values.get("options") or {}
    given = [*values, *(f"options.{name}" for name in options if isinstance(options, dict))]
    for key in given:
        if key in MOVED:
            raise ValueError(f"{key} is {MOVED[key]} now; rename it in the run file")


def _check_kind(config: RunConfig) -> None:
    """A bidirectional network is trained on whole clips only; it has no cache to stream with."""
    if config.student.kind == "causal" or not config.options.is_causal:
        return
    mode = vars(config.options).get("mode")
    asked = f"objective={config.objective}" + (f" with options.mode={mode}" if mode else "")
    raise ValueError(
        f"student.kind=bidirectional is a teacher, but {asked} trains a causal student; leave kind"
        " at causal, or take objective=flow_matching options.mode=bidirectional"
    )


def locate_shipped(config: RunConfig) -> RunConfig:
    """The same run, with the places of the folders that ship with the package."""
    student, fake_score = config.student, config.fake_score
    if student.path is not None:
        student = replace(student, path=locate_path(student.path))
    if fake_score.path is not None:
        fake_score = replace(fake_score, path=locate_path(fake_score.path))
    return replace(
        config,
        student=student,
        teacher=replace(config.teacher, path=locate_path(config.teacher.path)),
        fake_score=fake_score,
        components=locate_path(config.components),
    )


def fetch_checkpoints(config: RunConfig) -> RunConfig:
    """The same run, with folders where it names checkpoints on the hub or what ships with the
    package.
    """
    config = locate_shipped(config)
    student, fake_score = config.student, config.fake_score
    if student.path is not None:
        student = replace(student, path=str(resolve_checkpoint(student.path)))
    if fake_score.path is not None:
        fake_score = replace(fake_score, path=str(resolve_checkpoint(fake_score.path)))
    return replace(
        config,
        student=student,
        fake_score=fake_score,
        components=str(resolve_checkpoint(config.components)),
    )
