"""From a run file to a trainer: what `tools/train.py` builds.

A run names its method (a file of `streamvid/methods`), the method's options, the networks, the data
and the trainer's settings. A method gets the parts that its constructor names: `student`,
`teacher`, `stream`, `uncond`, `latent_shape`, `as_image`, `seed`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import math
import os
import pkgutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

import streamvid.methods
from streamvid.codecs.base import last_frame_as_image
from streamvid.codecs.load import open_codec
from streamvid.codecs.text import PromptEncoder
from streamvid.config import build_config, read_config
from streamvid.data.clips import ClipFormat
from streamvid.data.latents import LatentClips, WorldClips, WorldSet, ensure_made_of, write_latents
from streamvid.data.parts import checkpoint_key
from streamvid.data.prompts import PromptBatches, read_prompts, world_prompts
from streamvid.data.trajectories import Trajectories
from streamvid.files import atomic_file
from streamvid.hub import resolve_checkpoint
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.lora import LoraConfig, adapt, is_adapted, save_adapter, share_weights
from streamvid.rollout.schedule import StreamConfig
from streamvid.seeding import key_to_seed
from streamvid.students.card import model_card
from streamvid.students.folder import (
    ASSETS,
    TINY_TEACHER,
    load_transformer,
    save_student,
    save_teacher,
)
from streamvid.teachers.base import Teacher, check_needs, check_width
from streamvid.teachers.clip_folder import ClipFolder, encode_clips
from streamvid.teachers.load import open_teacher
from streamvid.teachers.wan import load_wan_transformer
from streamvid.training.checkpoint import COUNTERS_FILE, checksum
from streamvid.training.checks import check_same_run, check_trackers
from streamvid.training.launch import RunLock, check_launcher, is_first_process, launched_processes
from streamvid.training.method import BatchSource, Method
from streamvid.training.trainer import TrainConfig, Trainer

log = logging.getLogger(__name__)
MOST_SIDE = 1024  # of a latent frame; 8K of a codec that divides by 8
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
SHIPPED = "streamvid/assets/"
EXPORTED_FILE = "exported.json"  # of a run folder: the checkpoint that its export is of


def shown(path: str | Path) -> str:
    """A path as a card or a run file may show it: shipped folders without the place of the
    installation.
    """
    path = Path(path).absolute()
    return f"{SHIPPED}{path.relative_to(ASSETS)}" if path.is_relative_to(ASSETS) else path.name


def located(path: str) -> str:
    """Undoes `shown`: a shipped folder is found from any working folder, if that has none of this
    name.
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

    # a folder with transformer/ to start from; null: random weights of `geometry`
    path: str | None = None
    geometry: Geometry = field(default_factory=Geometry)
    kind: Literal["causal", "bidirectional"] = "causal"  # bidirectional: a teacher
    # with a rank, adapters on frozen weights are all that is trained
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if self.lora.rank and self.path is None:
            raise ValueError(
                f"student.lora.rank={self.lora.rank} adapts trained weights; name them with"
                " student.path"
            )


@dataclass
class TeacherConfig:
    """The teacher, loaded by methods that ask for its score."""

    # a folder, or a name on the hub; `components` has the same text encoder
    path: str = shown(TINY_TEACHER)
    negative_prompt: str = ""
    dtype: Literal["float32", "bf16"] = "float32"  # of its weights, which are frozen
    offload: bool = False  # of two experts by noise level, keep the idle one on the CPU


@dataclass
class FakeScoreConfig:
    """The network that follows the student's clips, of methods that have one."""

    # a folder or hub name whose transformer it starts from; null: a copy of the teacher's
    path: str | None = None
    # of adapters on those weights; null: as student.lora.rank; 0: all of it is trained
    lora_rank: int | None = None

    def __post_init__(self) -> None:
        if self.lora_rank is not None and self.lora_rank < 0:
            raise ValueError(
                f"fake_score.lora_rank={self.lora_rank}, expected at least 0, or null for the"
                " student's"
            )

    def rank(self, student: LoraConfig) -> int:
        """Of its adapters; 0 is none."""
        return student.rank if self.lora_rank is None else self.lora_rank


@dataclass
class DataConfig:
    """What the batches come from."""

    kind: Literal["world", "clips", "latents", "trajectories", "prompts"] = "prompts"
    """world: clips of the verifiable world, rendered and encoded into `path` if that is not there
    yet; clips: captioned clips in the folder `path`, a black-box teacher's, encoded into
    `cache_dir`; latents: the latent set `path`; trajectories: the teacher's, of
    tools/make_trajectories.py; prompts only."""
    path: str | None = None
    """A file of the kind; with `prompts`, a text file with a prompt a line, null for captions of
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
    """A run but for the options of its method, which `load_run` adds as the field `options`."""

    train: TrainConfig
    method: str = "dmd"
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    fake_score: FakeScoreConfig = field(default_factory=FakeScoreConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    # the folder whose text_encoder/, tokenizer/ and vae/ are used
    components: str = shown(TINY_TEACHER)
    # a folder for prompt embeddings; null keeps them in memory, for small encoders
    prompt_cache: str | None = None
    # height and width of a latent frame, for methods that roll out
    latent_size: tuple[int, int] = (8, 8)

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


def method_names() -> list[str]:
    """The methods that exist: every file of streamvid/methods but what they share."""
    return sorted(
        m.name
        for m in pkgutil.iter_modules(streamvid.methods.__path__)
        if m.name not in ("base", "matching")
    )


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
        "RunConfig",
        [("options", module.Config, field(default_factory=module.Config))],
        bases=(RunConfig,),
    )
    whole.__module__ = __name__
    config = build_config(whole, values)
    _check_kind(config)
    return config


def _check_kind(config: RunConfig) -> None:
    """A bidirectional network is trained on whole clips only; it has no cache to stream with."""
    if config.student.kind == "causal":
        return
    streams = "stream" in inspect.signature(method_class(config).__init__).parameters
    mode = getattr(config.options, "mode", "bidirectional")
    if streams or mode != "bidirectional":
        asked = f"method={config.method}" + ("" if streams else f" with options.mode={mode}")
        raise ValueError(
            f"student.kind=bidirectional is a teacher, but {asked} trains a causal student; leave"
            " kind at causal, or take method=flow_matching options.mode=bidirectional"
        )


def build_student(config: StudentConfig, seed: int = 0) -> nn.Module:
    """The network to train, in float32; with adapters, frozen but for those, in the precision of
    ``lora.dtype``.
    """
    if config.path is not None:
        load = load_transformer if config.kind == "causal" else load_wan_transformer
        network = load(config.path, DTYPES[config.lora.dtype])
        return adapt(network, config.lora, seed, "student") if config.lora.rank else network
    from diffusers import WanTransformer3DModel

    cls = CausalWanTransformer3DModel if config.kind == "causal" else WanTransformer3DModel
    sizes = {name: getattr(config.geometry, name) for name in Geometry.__dataclass_fields__}
    network = cls(
        **sizes, patch_size=(1, 2, 2), cross_attn_norm=True, qk_norm="rms_norm_across_heads"
    )
    nn.init.zeros_(network.proj_out.weight)
    return network


def build_source(
    config: RunConfig, prompts: PromptEncoder, device: torch.device | str = "cpu"
) -> BatchSource:
    """The batches of a run.

    What they need is made if it is not there, by all processes of the run together.

    Args:
        device: that clips are encoded on.

    Raises:
        ValueError: if the data is not there, damaged, or made of something else than the run asks
            for.
    """
    data, seed = config.data, config.train.seed
    if data.kind == "prompts":
        texts = read_prompts(data.path) if data.path else world_prompts(data.num_prompts)
        index, processes = own_share()
        # others' are read from the cache
        first = index * len(texts) // processes if config.prompt_cache else 0
        prompts.prepare(texts[first:] + texts[:first])
        return PromptBatches(prompts.encode, texts, seed)
    if data.path is None:
        raise ValueError(f"data.kind={data.kind} needs data.path, the file to read or to make")
    made_by = {"text_encoder": checkpoint_key(config.components, "text_encoder", "tokenizer")}
    if data.kind == "trajectories":
        source = Trajectories(data.path, seed)
        ensure_made_of(data.path, source.settings, made_by, only_known=True)
    else:
        made_by |= {"codec": checkpoint_key(config.components, "vae")}
        source = latent_clips(config, prompts, device, made_by)
    if source.text_dim != prompts.embedding_dim:
        raise ValueError(
            f"{data.path} has embeddings of {source.text_dim} numbers a token, the text encoder of"
            f" {config.components} gives {prompts.embedding_dim}; make it again, or set components"
            " to the folder that it was made with"
        )
    return source


def latent_clips(
    config: RunConfig, prompts: PromptEncoder, device: torch.device | str, made_by: dict[str, str]
) -> LatentClips:
    """A latent set; of the world or of a folder it is made if it is not there.

    Args:
        made_by: keys of the codec and the text encoder.
    """
    data = config.data
    path, of = Path(data.path), made_by
    if data.kind == "world":
        of = {**asdict(data.world), **made_by}
        if not path.exists():
            clips = WorldClips(data.world)
            codec = open_codec(config.components, device)
            write_latents(
                path,
                clips,
                codec.encode_frames,
                prompts.encode,
                of,
                clips.at_once,
                own_share(),
                device,
            )
    if data.kind == "clips":
        path = encoded_folder(config, prompts, device, made_by)
    source = LatentClips(
        path, config.train.seed, data.latent_frames, data.window_stride, data.first_share
    )
    ensure_made_of(path, source.settings, of, only_known=data.kind != "world")
    return source


def ensure_same_latents(config: RunConfig, source: BatchSource, student: nn.Module) -> None:
    """A ValueError if a set's latents are not those of the student's codec."""
    made, taken = getattr(source, "latent_channels", None), student.config.out_channels
    if made is not None and made != taken:
        raise ValueError(
            f"{config.data.path} has latents of {made} channels, the student takes {taken}; make it"
            " with its codec"
        )


def encoded_folder(
    config: RunConfig, prompts: PromptEncoder, device: torch.device | str, made_by: dict[str, str]
) -> Path:
    """The latent set of a folder of clips, made if it is not there; its name tells clips and codec
    apart from others.
    """
    data = config.data
    teacher, home = ClipFolder(data.path, data.clips), Path(data.cache_dir) / "clips"
    name = teacher.folder.resolve().name
    path = home / f"{name}-{key_to_seed(teacher.fingerprint(), *made_by.values()):016x}.safetensors"
    if not path.exists():
        encode_clips(
            path,
            teacher,
            open_codec(config.components, device),
            prompts.encode,
            share=own_share(),
            device=device,
            settings={"clips": f"{teacher.fingerprint():016x}", **made_by},
            keep_in=home / f".{name}.parts-{key_to_seed(*made_by.values()):016x}",
        )
    return path


def own_share() -> tuple[int, int]:
    """The number of this process, and how many there are, also before they know each other."""
    return int(os.environ.get("RANK", 0)), launched_processes()


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
    needed = (
        1.2 * 4 * sum(map(num_values, (Path(components) / "text_encoder").glob("*.safetensors")))
    )
    if device.type == "cpu" or needed < torch.cuda.mem_get_info(device)[0]:
        return device
    log.info(
        "the text encoder needs about %.0f GiB, more than is free on %s: it runs on the CPU",
        needed / 2**30,
        device,
    )
    return torch.device("cpu")


def num_values(file: Path) -> int:
    """Numbers in a weight file, by its header."""
    with safe_open(file, "pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())


def method_class(config: RunConfig) -> Any:
    """The class of ``streamvid/methods/NAME.py``."""
    return importlib.import_module(f"streamvid.methods.{config.method}").Method


def needs_teacher(config: RunConfig) -> bool:
    """Whether the method asks for more than the data; a black box gives no more than that."""
    return bool(method_class(config).needs - {"clips"})


def judges_cuts(config: RunConfig) -> bool:
    """Whether the method judges clips that are cut from the middle of a longer stream."""
    return (getattr(config.options, "rollout_chunks", None) or 0) > getattr(
        config.options, "num_chunks", 0
    )


def build_method(
    config: RunConfig,
    student: nn.Module,
    uncond: Tensor,
    teacher: Teacher | None = None,
    fake_score: nn.Module | None = None,
    as_image: Callable[[Tensor], Tensor] | None = None,
) -> Method:
    """The method with the parts that its constructor names.

    Args:
        uncond: the embedded negative prompt, ``[L, D]``.
        teacher: of methods that need one.
        fake_score: None leaves it to the method.
        as_image: for methods that judge clips from the middle of a stream, see ``judges_cuts``.

    Raises:
        ValueError: if a part is missing or of no use.
    """
    cls = method_class(config)
    wanted = inspect.signature(cls.__init__).parameters
    if "clips" in cls.needs and config.data.kind not in ("world", "clips", "latents"):
        raise ValueError(
            f"method={config.method} learns from a teacher's clips; set data.kind=clips and"
            " data.path=FOLDER"
        )
    if fake_score is not None and "fake_score" not in wanted:
        raise ValueError(f"method={config.method} has no fake score; leave fake_score.path out")
    parts: dict[str, Any] = {
        "student": student,
        "stream": config.stream,
        "uncond": uncond,
        "latent_shape": (int(student.config.in_channels), *config.latent_size),
        "seed": config.train.seed,
        "fake_score": fake_score,
        "as_image": as_image,
    }
    if teacher is not None:
        check_needs(cls, teacher)
        parts["teacher"] = teacher
    return cls(config.options, **{name: part for name, part in parts.items() if name in wanted})


def share_teacher(config: RunConfig, student: nn.Module, teacher: Teacher) -> None:
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
    return own == theirs or Path(own).resolve() == resolve_checkpoint(theirs).resolve()


def build_fake_score(
    config: RunConfig,
    teacher: Teacher | None,
    load: Callable[[str, torch.dtype], nn.Module] = load_wan_transformer,
) -> nn.Module | None:
    """The transformer that `fake_score.path` names, or adapters on that or on the teacher's
    weights; None leaves it to the method, which copies the teacher's.

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
        raise ValueError(
            "teacher.offload=true moves weights that the fake score needs; set"
            " fake_score.lora_rank=0"
        )
    else:
        base = getattr(teacher, "transformer", None)
    if base is None and own.lora_rank:
        raise ValueError(
            f"method={config.method} has no fake score; leave fake_score.lora_rank out"
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


def build_teacher(config: TeacherConfig, prompts: PromptEncoder) -> Teacher:
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
    asked, config = config, fetched(config)
    device = encoding_device()
    prompts = PromptEncoder.from_pretrained(
        config.components,
        cache_dir=config.prompt_cache,
        device=text_device(config.components, device),
    )
    student = build_student(config.student, config.train.seed)
    source = build_source(config, prompts, device)
    ensure_same_latents(config, source, student)
    teacher = build_teacher(config.teacher, prompts) if needs_teacher(config) else None
    if teacher is not None:
        share_teacher(config, student, teacher)
    fake_score = build_fake_score(config, teacher)
    codec = open_codec(config.components) if judges_cuts(config) else None
    as_image = None if codec is None else partial(last_frame_as_image, codec)
    uncond = prompts.encode([config.teacher.negative_prompt])[0]
    method = build_method(config, student, uncond, teacher, fake_score, as_image)
    prompts.release()  # all prompts are encoded
    trainer = Trainer(
        config.train, method, source, None, resolved=asked, progress=progress, lock=lock
    )
    if "teacher" in vars(method):  # frozen: the trainer moves only what it trains
        method.teacher.to(trainer.accelerator.device)
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


def with_shipped(config: RunConfig) -> RunConfig:
    """The same run, with the places of the folders that ship with the package."""
    student, fake_score = (
        part if part.path is None else replace(part, path=located(part.path))
        for part in (config.student, config.fake_score)
    )
    teacher = replace(config.teacher, path=located(config.teacher.path))
    return replace(
        config,
        student=student,
        teacher=teacher,
        fake_score=fake_score,
        components=located(config.components),
    )


def fetched(config: RunConfig) -> RunConfig:
    """The same run, with folders where it names checkpoints on the hub or what ships with the
    package.
    """
    config = with_shipped(config)
    student, fake_score = (
        part if part.path is None else replace(part, path=str(resolve_checkpoint(part.path)))
        for part in (config.student, config.fake_score)
    )
    return replace(
        config,
        student=student,
        fake_score=fake_score,
        components=str(resolve_checkpoint(config.components)),
    )


def export(trainer: Trainer, run_dir: Path, config: RunConfig) -> Path:
    """Write `run_dir/student`, with the averaged weights where there are any. Every process calls
    it, the main one writes.

    A causal student is complete in itself and can be streamed from there, a teacher sampled and
    distilled. Adapters are merged into transformer/, and lie beside it in lora/. An export of this
    checkpoint that is there already stays as it is, with the scores that it was given since.

    Raises:
        ValueError: one line, if a weight is not finite; nothing is written then.
    """
    learner, target = trainer.learners["student"], run_dir / "student"
    origin = origin_of(trainer)
    if exported_from(run_dir) == origin and (target / "transformer" / "config.json").is_file():
        return target
    weights = trainer.ema_weights("student") if learner.ema is not None else nullcontext()
    with weights:
        network = trainer.whole("student")
        if not trainer.is_main:
            return target
        if config.student.kind == "causal":
            save_student(
                target, network, config.stream, config.components, card_of(trainer, config)
            )
        else:
            save_teacher(
                target,
                network,
                getattr(config.options, "shift", config.stream.shift),
                config.components,
            )
        if is_adapted(network):
            save_adapter(network, target / "lora")
    with atomic_file(run_dir / EXPORTED_FILE) as temporary:
        temporary.write_text(json.dumps(origin) + "\n")
    return target


def origin_of(trainer: Trainer) -> dict[str, Any]:
    """What tells a run's last checkpoint from any other, also of the same step: its checksums have
    one of their own.
    """
    last = trainer.checkpoints / f"step-{trainer.step:07d}" / COUNTERS_FILE
    return {"step": trainer.step, "checkpoint": checksum(last)}


def exported_from(run_dir: Path) -> Any:
    """The ``origin_of`` of the export of a run folder; None if there is none, or nothing says
    so.
    """
    try:
        return json.loads((run_dir / EXPORTED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def card_of(trainer: Trainer, config: RunConfig) -> str:
    """The model card of an exported student."""
    facts = {
        "method": (
            f"{config.method}, {trainer.step} steps of batch {config.train.batch_size}, seed"
            f" {config.train.seed}"
        ),
        "started from": shown(config.student.path) if config.student.path else "random weights",
        "teacher": shown(config.teacher.path),
        "data": (
            config.data.kind + (f" ({Path(config.data.path).name})" if config.data.path else "")
        ),
    }
    guidance = getattr(config.options, "guidance_scale", None)
    if guidance is not None:
        facts["guidance of the teacher"] = f"{guidance:g}"
    return model_card(config.train.name, facts, config.stream)
