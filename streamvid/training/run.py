"""From a run file to a trainer: what `tools/train.py` builds.

A run names its method (a file of `streamvid/methods`), the method's options, the networks, the data and the
trainer's settings. A method gets the parts that its constructor names: `student`, `teacher`, `stream`,
`uncond`, `latent_shape`, `seed`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import streamvid.methods
from streamvid.codecs.load import open_codec
from streamvid.codecs.text import PromptEncoder
from streamvid.config import build_config, read_config
from streamvid.data.clips import ClipFormat
from streamvid.data.latents import LatentClips, WorldSet, world_clips, write_latents
from streamvid.data.prompts import PromptBatches, read_prompts, world_prompts
from streamvid.data.trajectories import Trajectories
from streamvid.files import atomic_file
from streamvid.methods.base import BatchSource, Method
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.lora import LoraConfig, adapt, is_adapted, save_adapter, share_weights
from streamvid.rollout.schedule import StreamConfig
from streamvid.seeding import key_to_seed
from streamvid.serving.card import model_card
from streamvid.serving.student import ASSETS, COMPONENTS, TINY_TEACHER, load_transformer, save_student, save_teacher
from streamvid.teachers.base import Teacher, check_needs, check_width
from streamvid.teachers.clip_folder import ClipFolder, encode_clips
from streamvid.teachers.load import open_teacher, resolve_checkpoint
from streamvid.teachers.wan import load_wan_transformer
from streamvid.training.checks import check_same_run, check_trackers
from streamvid.training.launch import RunLock, check_launcher, is_first_process
from streamvid.training.trainer import TrainConfig, Trainer

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
SHIPPED = "streamvid/assets/"
EXPORTED_FILE = "exported.json"  # of a run folder: the step that its export is of


def shown(path: str | Path) -> str:
    """A path as a card or a run file may show it: shipped folders without the place of the installation."""
    path = Path(path).absolute()
    return f"{SHIPPED}{path.relative_to(ASSETS)}" if path.is_relative_to(ASSETS) else path.name


def located(path: str) -> str:
    """Undoes `shown`: a shipped folder is found from any working folder, if that has none of this name."""
    here = Path(path).exists() or not path.startswith(SHIPPED)
    return path if here else str(ASSETS / path.removeprefix(SHIPPED))


@dataclass
class Geometry:
    """Sizes of a network that starts from random weights; the names are diffusers' WanTransformer3DModel's."""

    num_layers: int = 6
    num_attention_heads: int = 4
    attention_head_dim: int = 48
    ffn_dim: int = 768
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 64
    freq_dim: int = 64


@dataclass
class StudentConfig:
    """The network that is trained."""

    path: str | None = None  # a folder with transformer/ to start from; null: random weights of `geometry`
    geometry: Geometry = field(default_factory=Geometry)
    kind: Literal["causal", "bidirectional"] = "causal"  # bidirectional: a teacher
    lora: LoraConfig = field(default_factory=LoraConfig)  # with a rank, adapters on frozen weights are all that is trained

    def __post_init__(self) -> None:
        if self.lora.rank and self.path is None:
            raise ValueError(f"student.lora.rank={self.lora.rank} adapts trained weights; name them with student.path")


@dataclass
class TeacherConfig:
    """The teacher, loaded by methods that ask for its score."""

    path: str = shown(TINY_TEACHER)  # a folder, or a name on the hub; `components` has the same text encoder
    negative_prompt: str = ""
    dtype: Literal["float32", "bf16"] = "float32"  # of its weights, which are frozen
    offload: bool = False  # of two experts by noise level, keep the idle one on the CPU


@dataclass
class FakeScoreConfig:
    """The network that follows the student's clips, of methods that have one."""

    path: str | None = None  # a folder or hub name whose transformer it starts from; null: a copy of the teacher's
    lora_rank: int | None = None  # of adapters on those weights; null: as student.lora.rank; 0: all of it is trained

    def __post_init__(self) -> None:
        if self.lora_rank is not None and self.lora_rank < 0:
            raise ValueError(f"fake_score.lora_rank={self.lora_rank}, expected at least 0, or null for the student's")

    def rank(self, student: LoraConfig) -> int:
        """Of its adapters; 0 is none."""
        return student.rank if self.lora_rank is None else self.lora_rank


@dataclass
class DataConfig:
    """What the batches come from."""

    kind: Literal["world", "clips", "latents", "trajectories", "prompts"] = "prompts"
    """world: clips of the verifiable world, rendered and encoded into `path` if that is not there yet;
    clips: captioned clips in the folder `path`, a black-box teacher's, encoded into `cache_dir`;
    latents: the latent set `path`; trajectories: the teacher's, of tools/make_trajectories.py; prompts only."""
    path: str | None = None
    """A file of the kind; with `prompts`, a text file with a prompt a line, null for captions of the world."""
    world: WorldSet = field(default_factory=WorldSet)
    clips: ClipFormat = field(default_factory=ClipFormat)
    cache_dir: str = ".cache"
    """Where encoded clips of a folder are kept; changed clips, captions, sizes or codecs are encoded anew."""
    num_prompts: int = 1000
    """Captions of the world to take, with kind `prompts` and no path."""
    latent_frames: int | None = None
    """Frames to cut from each clip; null: the whole clip."""
    window_stride: int | None = None
    """Cuts start at multiples of it; null: at the clip's beginning only."""
    first_share: float = 0.5
    """Share of the cuts that start at the beginning all the same."""


@dataclass
class RunConfig:
    """A run but for the options of its method, which `load_run` adds as the field `options`."""

    train: TrainConfig
    method: str = "dmd"
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    fake_score: FakeScoreConfig = field(default_factory=FakeScoreConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    components: str = shown(TINY_TEACHER)  # the folder whose text_encoder/, tokenizer/ and vae/ are used
    prompt_cache: str | None = None  # a folder for prompt embeddings; null keeps them in memory, for small encoders
    latent_size: tuple[int, int] = (8, 8)  # height and width of a latent frame, for methods that roll out

    def __post_init__(self) -> None:
        ranks = {"student": self.student.lora.rank, "fake_score": self.fake_score.rank(self.student.lora)}
        for name, optimizer in self.train.optimizers.items():
            if ranks.get(name) and optimizer.kind == "muon":
                raise ValueError(f"optimizers.{name}.kind=muon is for whole matrices, but {name} has adapters; set adamw")


def method_names() -> list[str]:
    """The methods that exist: every file of streamvid/methods but what they share."""
    return sorted(m.name for m in pkgutil.iter_modules(streamvid.methods.__path__) if m.name not in ("base", "matching"))


def load_run(path: str | Path | None, overrides: list[str]) -> RunConfig:
    """Read a run file and `key=value` overrides; the method's own `Config` checks `options`.

    Raises:
        ValueError: one line for a missing file, an unknown key, a wrong type or an unknown method.
    """
    values = read_config(path, overrides)
    name = str(values.get("method", RunConfig.method))
    if name not in method_names():
        raise ValueError(f"method={name} is not one of {', '.join(method_names())}")
    module = importlib.import_module(f"streamvid.methods.{name}")
    whole = make_dataclass(
        "RunConfig", [("options", module.Config, field(default_factory=module.Config))], bases=(RunConfig,)
    )
    whole.__module__ = __name__
    return build_config(whole, values)


def build_student(config: StudentConfig, seed: int = 0) -> nn.Module:
    """The network to train, in float32; with adapters, frozen but for those, in the precision of ``lora.dtype``."""
    if config.path is not None:
        load = load_transformer if config.kind == "causal" else load_wan_transformer
        network = load(config.path, DTYPES[config.lora.dtype])
        return adapt(network, config.lora, seed, "student") if config.lora.rank else network
    from diffusers import WanTransformer3DModel

    cls = CausalWanTransformer3DModel if config.kind == "causal" else WanTransformer3DModel
    sizes = {name: getattr(config.geometry, name) for name in Geometry.__dataclass_fields__}
    network = cls(**sizes, patch_size=(1, 2, 2), cross_attn_norm=True, qk_norm="rms_norm_across_heads")
    nn.init.zeros_(network.proj_out.weight)
    return network


def build_source(config: RunConfig, prompts: PromptEncoder) -> BatchSource:
    """The batches of a run."""
    data, seed = config.data, config.train.seed
    if data.kind == "prompts":
        texts = read_prompts(data.path) if data.path else world_prompts(data.num_prompts)
        prompts.prepare(texts)
        return PromptBatches(prompts.encode, texts, seed)
    if data.path is None:
        raise ValueError(f"data.kind={data.kind} needs data.path, the file to read or to make")
    if data.kind == "trajectories":
        return Trajectories(data.path, seed)
    if data.kind == "world" and not Path(data.path).exists():
        codec = open_codec(config.components)
        clips = world_clips(data.world)
        write_latents(data.path, clips, data.world.num_clips, codec.encode_frames, prompts.encode)
    path = encoded_folder(config, prompts) if data.kind == "clips" else data.path
    return LatentClips(path, seed, data.latent_frames, data.window_stride, data.first_share)


def encoded_folder(config: RunConfig, prompts: PromptEncoder) -> Path:
    """The latent set of a folder of clips, made if it is not there; its name tells clips and codec apart from others."""
    data, home = config.data, Path(config.components)
    teacher = ClipFolder(data.path, data.clips)
    files = [file for part in COMPONENTS for file in sorted((home / part).rglob("*")) if file.is_file()]
    codec_key = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = f"{teacher.folder.resolve().name}-{key_to_seed(teacher.fingerprint(), *codec_key):016x}.safetensors"
    path = Path(data.cache_dir) / "clips" / name
    if not path.exists():
        encode_clips(path, teacher, open_codec(config.components), prompts.encode)
    return path


def method_class(config: RunConfig) -> Any:
    """The class of ``streamvid/methods/NAME.py``."""
    return importlib.import_module(f"streamvid.methods.{config.method}").Method


def needs_teacher(config: RunConfig) -> bool:
    """Whether the method asks for more than the data; a black box gives no more than that."""
    return bool(method_class(config).needs - {"clips"})


def build_method(
    config: RunConfig, student: nn.Module, uncond: Tensor, teacher: Teacher | None = None, fake_score: nn.Module | None = None
) -> Method:
    """The method with the parts that its constructor names.

    Args:
        uncond: the embedded negative prompt, ``[L, D]``.
        teacher: of methods that need one.
        fake_score: None leaves it to the method.

    Raises:
        ValueError: if a part is missing or of no use.
    """
    cls = method_class(config)
    wanted = inspect.signature(cls.__init__).parameters
    if "clips" in cls.needs and config.data.kind not in ("world", "clips", "latents"):
        raise ValueError(f"method={config.method} learns from a teacher's clips; set data.kind=clips and data.path=FOLDER")
    if fake_score is not None and "fake_score" not in wanted:
        raise ValueError(f"method={config.method} has no fake score; leave fake_score.path out")
    parts: dict[str, Any] = {
        "student": student,
        "stream": config.stream,
        "uncond": uncond,
        "latent_shape": (int(student.config.in_channels), *config.latent_size),
        "seed": config.train.seed,
        "fake_score": fake_score,
    }
    if teacher is not None:
        check_needs(cls, teacher)
        parts["teacher"] = teacher
    return cls(config.options, **{name: part for name, part in parts.items() if name in wanted})


def share_teacher(config: RunConfig, student: nn.Module, teacher: Teacher) -> None:
    """An adapted student of the teacher's own checkpoint stands on the teacher's weights, which are so held once."""
    if stands_on_teacher(config):
        share_weights(teacher.transformer, student)


def stands_on_teacher(config: RunConfig) -> bool:
    """Whether the student's frozen weights are the teacher's."""
    if not config.student.lora.rank or config.student.lora.dtype != config.teacher.dtype or config.teacher.offload:
        return False
    own, theirs = config.student.path, config.teacher.path
    return own == theirs or Path(own).resolve() == resolve_checkpoint(theirs).resolve()


def build_fake_score(
    config: RunConfig, teacher: Teacher | None, load: Callable[[str, torch.dtype], nn.Module] = load_wan_transformer
) -> nn.Module | None:
    """The transformer that `fake_score.path` names, or adapters on that or on the teacher's weights; None leaves it to the
    method, which copies the teacher's.

    Args:
        load: opens a transformer in a precision.

    Raises:
        ValueError: if adapters would stand on weights that come and go.
    """
    own, lora = config.fake_score, config.student.lora
    rank = own.rank(lora)
    if not rank:
        return None if own.path is None else load(own.path, torch.float32)
    if own.path is not None:
        base = load(own.path, DTYPES[config.teacher.dtype])
    elif config.teacher.offload:
        raise ValueError("teacher.offload=true moves weights that the fake score needs; set fake_score.lora_rank=0")
    else:
        base = getattr(teacher, "transformer", None)
    if base is None and own.lora_rank:
        raise ValueError(f"method={config.method} has no fake score; leave fake_score.lora_rank out")
    if base is None:
        return None
    alpha = lora.alpha and lora.alpha * rank / lora.rank  # so that it counts as much as the student's
    return adapt(base, LoraConfig(rank=rank, alpha=alpha, targets=lora.targets), config.train.seed, "fake_score")


def build_teacher(config: TeacherConfig, prompts: PromptEncoder) -> Teacher:
    """The teacher without a text encoder of its own: that of the run serves both."""
    options = {"offload": True} if config.offload else {}  # of families with experts
    teacher = open_teacher(config.path, torch_dtype=DTYPES[config.dtype], load_text_encoder=False, **options)
    check_width(config.path, prompts, teacher.text_dim)
    teacher.uncond = prompts.encode([config.negative_prompt])[0]
    return teacher


def build_trainer(config: RunConfig, progress: bool = True) -> Trainer:
    """Everything that a run needs, ready for `.train()`, which ends by exporting the network that was trained.

    What can be refused at once is, before anything is loaded; from then on no other process can train this run.
    """
    lock = open_run(config)
    asked, config = config, fetched(config)
    prompts = PromptEncoder.from_pretrained(config.components, cache_dir=config.prompt_cache)
    student = build_student(config.student, config.train.seed)
    source = build_source(config, prompts)
    teacher = build_teacher(config.teacher, prompts) if needs_teacher(config) else None
    if teacher is not None:
        share_teacher(config, student, teacher)
    fake_score = build_fake_score(config, teacher)
    method = build_method(config, student, prompts.encode([config.teacher.negative_prompt])[0], teacher, fake_score)
    prompts.release()  # all prompts are encoded
    trainer = Trainer(config.train, method, source, None, resolved=asked, progress=progress, lock=lock)
    if "teacher" in vars(method):  # frozen: the trainer moves only what it trains
        method.teacher.to(trainer.accelerator.device)
    trainer.save_fn = lambda run_dir: export(trainer, run_dir, config)
    return trainer


def check_run(config: RunConfig) -> Path:
    """The run folder, if this run may be in it and the launcher asks for nothing else. Writes nothing.

    Raises:
        ValueError: one line, if it holds another run, or the launcher asks for what the run does not.
    """
    run_dir = Path(config.train.output_dir) / config.train.name
    check_launcher(config.train.mixed_precision)
    check_trackers(config.train.trackers)
    check_same_run(run_dir / "config.yaml", config.train, config)
    return run_dir


def open_run(config: RunConfig) -> RunLock | None:
    """Make the run folder this launch's own; the main process holds the lock for all."""
    run_dir = check_run(config)
    return RunLock(run_dir) if is_first_process() else None


def with_shipped(config: RunConfig) -> RunConfig:
    """The same run, with the places of the folders that ship with the package."""
    student, fake_score = (
        part if part.path is None else replace(part, path=located(part.path)) for part in (config.student, config.fake_score)
    )
    teacher = replace(config.teacher, path=located(config.teacher.path))
    return replace(config, student=student, teacher=teacher, fake_score=fake_score, components=located(config.components))


def fetched(config: RunConfig) -> RunConfig:
    """The same run, with folders where it names checkpoints on the hub or what ships with the package."""
    config = with_shipped(config)
    student, fake_score = (
        part if part.path is None else replace(part, path=str(resolve_checkpoint(part.path)))
        for part in (config.student, config.fake_score)
    )
    return replace(
        config, student=student, fake_score=fake_score, components=str(resolve_checkpoint(config.components))
    )


def export(trainer: Trainer, run_dir: Path, config: RunConfig) -> Path:
    """Write `run_dir/student`, with the averaged weights where there are any. Every process calls it, the main one writes.

    A causal student is complete in itself and can be streamed from there; of a teacher only transformer/ is written.
    Adapters are merged into transformer/, and lie beside it in lora/. An export of this step that is there already stays
    as it is, with the scores that it was given since.

    Raises:
        ValueError: one line, if a weight is not finite; nothing is written then.
    """
    learner, target = trainer.learners["student"], run_dir / "student"
    if exported_step(run_dir) == trainer.step and (target / "transformer" / "config.json").is_file():
        return target
    weights = trainer.ema_weights("student") if learner.ema is not None else nullcontext()
    with weights:
        network = trainer.whole("student")
        if not trainer.is_main:
            return target
        if config.student.kind == "causal":
            save_student(target, network, config.stream, config.components, card_of(trainer, config))
        else:
            save_teacher(target, network)
        if is_adapted(network):
            save_adapter(network, target / "lora")
    with atomic_file(run_dir / EXPORTED_FILE) as temporary:
        temporary.write_text(json.dumps({"step": trainer.step}) + "\n")
    return target


def exported_step(run_dir: Path) -> int | None:
    """The step that the export of a run folder is of; None if there is none, or nothing says so."""
    try:
        return json.loads((run_dir / EXPORTED_FILE).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def card_of(trainer: Trainer, config: RunConfig) -> str:
    """The model card of an exported student."""
    facts = {
        "method": f"{config.method}, {trainer.step} steps of batch {config.train.batch_size}, seed {config.train.seed}",
        "started from": shown(config.student.path) if config.student.path else "random weights",
        "teacher": shown(config.teacher.path),
        "data": config.data.kind + (f" ({Path(config.data.path).name})" if config.data.path else ""),
    }
    guidance = getattr(config.options, "guidance_scale", None)
    if guidance is not None:
        facts["guidance of the teacher"] = f"{guidance:g}"
    return model_card(config.train.name, facts, config.stream)
