"""What a run will need, before anything of it is loaded: parameters, memory and floating-point
operations.

The objective itself is built from networks on torch's meta device, which have shapes and no data,
and its losses and their gradients are run there, with a watch on every operation: what it computes
(torch's own formulas, as in ``torch.utils.flop_counter``) and which tensors are alive. So an
estimate knows rollouts, caches, random exits and checkpointing as they are, for the price of some
seconds.

What is assumed: attention keeps no matrix of scores (flash, or the memory-efficient kernels);
``mixed_precision`` casts matrix products, convolutions and attention, and keeps one cast copy of
each weight that is trained until a loss is computed, as autocast does, but none of a sharded
network. Deep networks are measured at two depths and extrapolated, which is exact but for where a
discriminator reads. What is left out: the allocator's waste, kernels' workspaces and the context of
a device, together some 1 to 2 GiB.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from streamvid.codecs.base import latent_frames_of
from streamvid.experiment.build import (
    build_fake_score,
    build_method,
    build_student,
    needs_teacher,
    stands_on_teacher,
)
from streamvid.experiment.config import DTYPES, Geometry, RunConfig, locate_shipped
from streamvid.hub import HUB_NAME
from streamvid.metering import GIB, Meter, as_on_accelerator
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.jump_embedding import add_jump_embedding
from streamvid.models.lora import adapt, share_weights
from streamvid.models.published import EXPERTS, PUBLISHED
from streamvid.rollout.schedule import chunk_times
from streamvid.teachers.wan import WanTeacher
from streamvid.training.checks import check_names
from streamvid.training.launch import count_processes
from streamvid.training.method import Method, loss_parts
from streamvid.training.optimizers import OptimizerConfig, build_optimizer, optimizer_tensors
from streamvid.training.sharding import find_networks
from streamvid.training.trainer import switch_on
from streamvid.weights import read_json

TEXT_TOKENS = 512  # of a published text encoder
TEMPORAL_RATIO = 4  # pixel frames per latent frame, of all codecs here
DEPTHS = (4, 6)  # at which deeper networks are measured
EXAMPLE_PROCESSES = 8  # that a sharded run is shown for, if it is asked about in one process
SAMPLED_STEPS = 64  # over which random exits are averaged
# networks of this part of the memory are trained without measuring their peak, which takes some
# seconds
SMALL = 100
COUNTED_STEPS = 2**14  # of longer runs, turns are counted in this many: windows all over the run
WINDOW_STEPS = 256  # consecutive ones, longer than any cycle of turns that is in use


class UnknownSizes(ValueError):
    """The sizes of a network are not known here."""


@dataclass(frozen=True)
class Role:
    """A network in memory; bytes."""

    name: str
    parameters: int
    weights: int
    optimizer: int = 0
    average: int = 0
    """Bytes of the moving average."""

    @property
    def bytes(self) -> int:
        return self.weights + self.optimizer + self.average


@dataclass(frozen=True)
class Turn:
    """The update of one network."""

    name: str
    per_step: float
    """Updates per average step of the run."""
    flops: float
    """Operations of all accumulation passes, mean over random exits."""
    peaks: tuple[float, float]
    """Bytes besides the networks' at the worst moment until a loss is known, and of its gradient:
    activations, caches, gradients."""

    @property
    def peak(self) -> float:
        return max(self.peaks)


@dataclass(frozen=True)
class Estimate:
    """What one process of a run needs; with several, each needs all of this, but for sharded
    networks.
    """

    roles: tuple[Role, ...]
    turns: tuple[Turn, ...] = ()
    sharded: bool = False
    processes: int = 1
    """Processes that divide sharded networks."""

    @property
    def state_bytes(self) -> int:
        return sum(role.bytes for role in self.roles) // (self.processes if self.sharded else 1)

    @property
    def peak_bytes(self) -> float:
        return self.state_bytes + max((turn.peak for turn in self.turns), default=0)

    @property
    def least_peak_bytes(self) -> float:
        """The peak without gradients of sharded networks, which are divided as they are made."""
        if not self.sharded or self.processes == 1:
            return self.peak_bytes
        gradients = {role.name: role.weights for role in self.roles}
        return self.state_bytes + max(
            (max(t.peaks[0], t.peaks[1] - gradients.get(t.name, 0)) for t in self.turns), default=0
        )

    @property
    def flops(self) -> float:
        """Floating-point operations of an average step."""
        return sum(turn.per_step * turn.flops for turn in self.turns)

    def table(self) -> str:
        """For people."""
        lines = [
            f"{'network':16}{'parameters':>14}{'weights':>12}{'optimizer':>12}{'average':>12}  "
            " memory in GiB"
        ]
        for role in self.roles:
            parts = "".join(
                f"{size / GIB:12.3f}" for size in (role.weights, role.optimizer, role.average)
            )
            lines.append(f"{role.name:16}{role.parameters:14,}{parts}")
        lines.append(
            f"\n{'turn':16}{'per step':>8}{'TFLOP':>12}{'peak beyond the networks, GiB':>34}"
        )
        lines += [
            f"{t.name:16}{t.per_step:8.2f}{t.flops / 1e12:12.3f}{t.peak / GIB:34.3f}"
            for t in self.turns
        ]
        lines.append(
            f"\nin all, per process: {self.state_bytes / GIB:.2f} GiB of networks,"
            f" {self.peak_bytes / GIB:.2f} GiB at the peak, {self.flops / 1e12:.3f} TFLOP per step"
        )
        if self.sharded:
            count = self.processes if self.processes > 1 else EXAMPLE_PROCESSES
            divided = replace(self, processes=count)
            lines.append(
                f"sharded over {count} processes: {divided.state_bytes / GIB:.2f} GiB of networks"
                f" each, at most {divided.peak_bytes / GIB:.2f} GiB at the peak, where gradients"
                f" are counted whole, and {divided.least_peak_bytes / GIB:.2f} without them"
            )
        return "\n".join(lines)


def estimate(config: RunConfig, steps: int = SAMPLED_STEPS) -> Estimate:
    """What one process of a run needs.

    Args:
        config: of the run; of its folders only configurations are read, and of published names not
            even these.
        steps: of a turn, whose random choices are looked at; 1 is quick and will do for the peak.

    Raises:
        ValueError: one line, if a network's sizes can't be known, or what the objective refuses.
    """
    config = locate_shipped(config)
    method, roles = build_on_meta(config)
    networks: list[Any] = list(find_networks(method).values())
    depth = max((int(n.config.num_layers) for n in networks if hasattr(n, "config")), default=0)
    sharded = config.train.shard == "full"
    if depth <= max(DEPTHS):
        return Estimate(roles, turns_of(config, method, steps), sharded, count_processes())
    few, more = (turns_of(config, build_on_meta(config, depth)[0], steps) for depth in DEPTHS)
    turns = tuple(_extrapolate(a, b, depth) for a, b in zip(few, more))
    return Estimate(roles, turns, sharded, count_processes())


def ensure_memory(config: RunConfig, device: torch.device) -> None:
    """Refuse a run that does not fit on a device, before its networks are loaded: these alone, or
    with the peak of a turn.

    Of checkpoints that are yet to be fetched, or are of a family whose sizes are not known here,
    nothing is said.

    Raises:
        ValueError: one line, with what is needed and what is there.
    """
    try:
        roles, sharded = build_on_meta(locate_shipped(config))[1], config.train.shard == "full"
    except UnknownSizes:
        return
    needed, there = (
        Estimate(roles, (), sharded, count_processes()).state_bytes,
        memory_of(device),
    )
    if needed > there:
        raise ValueError(
            f"the networks of this run need {needed / GIB:.2f} GiB, free on {device} are"
            f" {there / GIB:.2f}; --dry-run says what each takes; teacher.dtype=bf16,"
            " student.lora.rank=64, smaller networks, or train.shard=full and more processes need"
            " less"
        )
    if SMALL * needed < there:
        return
    whole = estimate(config, steps=1)
    if whole.least_peak_bytes > there:
        turn = max(whole.turns, key=lambda turn: turn.peak)
        raise ValueError(
            f"this run needs {whole.least_peak_bytes / GIB:.2f} GiB at its peak, in the turn of"
            f" {turn.name}, free on {device} are {there / GIB:.2f}; --dry-run says what each turn"
            " takes; train.gradient_checkpointing=true, a smaller train.batch_size with more"
            " accumulate, or shorter clips need less"
        )


def memory_of(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


# ---- the networks --------------------------------------------------------------------------------


def build_on_meta(config: RunConfig, depth: int | None = None) -> tuple[Method, tuple[Role, ...]]:
    """The objective of a run on networks without data, and what these take as they are; ``depth``
    replaces their blocks'.
    """
    student, teacher = _student(config, depth), None
    if needs_teacher(config):  # of two experts the first, which costs what the other would
        dtype = DTYPES[config.teacher.dtype]
        teacher = WanTeacher(
            _transformer(config.teacher.path, "teacher.path", depth, dtype), None, shift=1.0
        )
        if stands_on_teacher(config):
            share_weights(teacher.transformer, student)
    fake_score = build_fake_score(
        config, teacher, lambda path, dtype: _transformer(path, "fake_score.path", depth, dtype)
    )
    uncond = torch.empty(text_tokens_of(config), int(student.config.text_dim), device="meta")
    if teacher is not None:
        teacher.uncond = uncond
    as_image = lambda latents: latents[:, :, -1:]  # the codec is not counted
    method = build_method(
        _move_layers(config, student, depth), student, uncond, teacher, fake_score, as_image
    )
    check_names(config.train, method.networks())
    for network in method.networks().values():
        network.to("meta").train()
    switch_on(method.networks(), replace(config.train, compile=False))
    return method, _roles(config, method)


def sizes_of(path: str, option: str) -> dict[str, Any]:
    """The configuration of a folder's transformer, or a published one's.

    Raises:
        UnknownSizes: if there is neither, and none in the hub's own cache.
    """
    file = Path(path) / "transformer" / "config.json"
    if file.is_file():
        return read_json(file)
    if path in PUBLISHED:
        return PUBLISHED[path]
    cached = (
        try_to_load_from_cache(path, "transformer/config.json")
        if HUB_NAME.fullmatch(path)
        else None
    )
    if isinstance(cached, str):
        return read_json(Path(cached))
    raise UnknownSizes(
        f"{option}={path}: no transformer/config.json there, and no published name of which the"
        f" sizes are known ({', '.join(PUBLISHED)})"
    )


def _student(run: RunConfig, depth: int | None) -> Any:
    """The network that is trained, of a checkpoint's sizes or of those that the run gives."""
    config, jumps = run.student, "jumps" in run.options.needs
    if config.path is None:
        sizes = {name: getattr(config.geometry, name) for name in Geometry.__dataclass_fields__}
        smaller = replace(config, geometry=Geometry(**_with_depth(sizes, depth)))
        with torch.device("meta"):
            return build_student(smaller, jumps=jumps)
    is_causal = config.kind == "causal"
    dtype = DTYPES[config.lora.dtype]
    network = _transformer(config.path, "student.path", depth, dtype, is_causal)
    if jumps:
        add_jump_embedding(network)
    return adapt(network, replace(config.lora, path=None)) if config.lora.rank else network


def _transformer(
    path: str, option: str, depth: int | None, dtype: torch.dtype, causal: bool = False
) -> nn.Module:
    """A network of a checkpoint's sizes, in the precision that from_pretrained gives each of its
    parts.
    """
    from diffusers import WanTransformer3DModel

    sizes = sizes_of(path, option)
    name = sizes.get("_class_name", "WanTransformer3DModel")
    if name not in ("WanTransformer3DModel", "CausalWanTransformer3DModel"):
        raise UnknownSizes(
            f"{option}={path} is a {name}; only the cost of Wan transformers is known here"
        )
    with torch.device("meta"):
        network = (CausalWanTransformer3DModel if causal else WanTransformer3DModel).from_config(
            _with_depth(sizes, depth)
        )
    kept = tuple(network._keep_in_fp32_modules or ())
    for key, parameter in network.named_parameters():
        if not any(part in key for part in kept):
            parameter.data = parameter.data.to(dtype)
    return network


def _with_depth(sizes: dict[str, Any], depth: int | None) -> dict[str, Any]:
    return sizes if depth is None else {**sizes, "num_layers": depth}


def _move_layers(config: RunConfig, student: nn.Module, depth: int | None) -> RunConfig:
    """Blocks that discriminators read move with the depth."""
    named = {"layers", "discriminator_layers"} & set(vars(config.options))
    whole = _depth_of(config)
    if depth is None or not named or whole is None:
        return config
    moved = {}
    for name in named:
        layers = getattr(config.options, name)
        moved[name] = layers and tuple(
            sorted({min(depth - 1, (layer + 1) * depth // whole) for layer in layers})
        )
    return replace(config, options=replace(config.options, **moved))


def _depth_of(config: RunConfig) -> int | None:
    path = config.student.path
    return (
        config.student.geometry.num_layers
        if path is None
        else sizes_of(path, "student.path").get("num_layers")
    )


def _roles(config: RunConfig, method: Method) -> tuple[Role, ...]:
    """What each network takes, with its optimiser and average as the trainer makes them."""
    trained = method.networks()
    networks = find_networks(method)
    roles: list[Role] = []
    counted: set[int] = set()
    # frozen ones first: adapters stand on these
    for name in sorted(networks, key=trained.__contains__):
        network = networks[name]
        # adapters list only their own
        everything = [*(p for _, p in nn.Module.named_parameters(network)), *network.buffers()]
        tensors = [tensor for tensor in everything if id(tensor) not in counted]
        counted.update(map(id, tensors))
        optimizer = average = 0
        if name in trained:
            parameters = {key: p for key, p in network.named_parameters() if p.requires_grad}
            optimizer = _optimizer_bytes(
                parameters, config.train.optimizers.get(name) or OptimizerConfig()
            )
            average = (
                4 * sum(p.numel() for p in parameters.values()) if name in config.train.ema else 0
            )
        weights = sum(t.nbytes for t in tensors)
        roles.append(
            Role(
                name,
                sum(t.numel() for t in tensors if isinstance(t, nn.Parameter)),
                weights,
                optimizer,
                average,
            )
        )
        if name == "teacher" and config.teacher.path in EXPERTS and not config.teacher.offload:
            roles.append(replace(roles[-1], name="teacher, expert 2"))
    return tuple(roles)


def _optimizer_bytes(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> int:
    """What an optimiser remembers after its first step."""
    twins = {
        name: nn.Parameter(torch.empty_like(p, device="meta")) for name, p in parameters.items()
    }
    optimizer = build_optimizer(twins, config)
    for twin in twins.values():
        twin.grad = torch.empty_like(twin)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    return sum(
        tensor.nbytes
        for tensor in optimizer_tensors(optimizer, {p: n for n, p in twins.items()}).values()
    )


# ---- the turns -----------------------------------------------------------------------------------


def turns_of(config: RunConfig, method: Method, steps: int = SAMPLED_STEPS) -> tuple[Turn, ...]:
    """What each turn of an objective on the meta device costs."""
    counted = list(counted_steps(config.train.max_steps))
    counts = Counter(turn for step in counted for turn in method.turns(step))
    return tuple(
        _turn(config, method, turn, count / len(counted), steps) for turn, count in counts.items()
    )


def counted_steps(max_steps: int) -> Iterator[int]:
    """The steps of a run that its turns are counted in: all, or windows of a long run from its
    beginning to its end.
    """
    if max_steps <= COUNTED_STEPS:
        yield from range(max_steps)
        return
    last = COUNTED_STEPS // WINDOW_STEPS - 1
    for window in range(last + 1):
        start = (max_steps - WINDOW_STEPS) * window // last
        yield from range(start, start + WINDOW_STEPS)


def _turn(config: RunConfig, method: Method, turn: str, per_step: float, sampled: int) -> Turn:
    """The mean over the random choices of some steps; those that cost the same are measured
    once.
    """
    steps = islice(
        (step for step in counted_steps(config.train.max_steps) if turn in method.turns(step)),
        sampled,
    )
    measured: dict[Any, tuple[int, tuple[int, int]]] = {}
    costs = []
    for step in steps:
        key = _choice(method, turn, step)
        if key not in measured:
            measured[key] = measure_turn(method, turn, batch_on_meta(config, method), step, config)
        costs.append(measured[key])
    flops, peaks = zip(*costs)
    optimizer = config.train.optimizers.get(turn)
    passes = 1 if optimizer is None else optimizer.accumulate
    worst = tuple(max(phase) for phase in zip(*peaks))
    return Turn(turn, per_step, passes * sum(flops) / len(flops), worst)


def _choice(method: Method, turn: str, step: int) -> Any:
    """The random choices that a step's cost depends on; the step itself, if the method does not
    tell.
    """
    choices = getattr(method, "choices", None)
    return step if choices is None else choices(turn, step)


def measure_turn(
    method: Method, turn: str, batch: dict[str, Any], step: int, config: RunConfig
) -> tuple[int, tuple[int, int]]:
    """Floating-point operations of a loss and its gradient, and the most bytes of tensors that were
    alive at once, until the loss was known and after that.

    The method's networks and the batch are all on the meta device.
    """
    for name, network in method.networks().items():
        network.requires_grad_(name == turn)
        network.zero_grad(set_to_none=True)
    precision, divided = config.train.mixed_precision, config.train.shard == "full"
    parts = loss_parts(method, turn, batch, step)
    forward = backward = 0
    with Meter() as meter:
        while True:
            with as_on_accelerator(precision, keep_casts=not divided):
                found = next(parts, None)
            if found is None:
                break
            forward, meter.peak = max(forward, meter.peak), meter.now
            with as_on_accelerator(precision, keep_casts=False):
                found[0].backward()
            backward, meter.peak = max(backward, meter.peak), meter.now
    method.networks()[turn].zero_grad(set_to_none=True)
    return meter.flops, (forward, backward)


def batch_on_meta(config: RunConfig, method: Method) -> dict[str, Any]:
    """A batch of the shapes that the run's data has."""
    size = config.train.batch_size
    student: Any = method.networks()["student"]
    frames, channels = latent_frames_of_run(config), int(student.config.in_channels)
    latents = torch.empty(size, channels, frames, *config.latent_size, device="meta")
    batch: dict[str, Any] = {
        "cond": torch.empty(
            size, text_tokens_of(config), int(student.config.text_dim), device="meta"
        ),
        "keys": list(range(size)),
        "micro": 0,
    }
    if config.data.kind == "trajectories":
        times = sorted(
            {
                t
                for each in chunk_times(config.stream, frames // config.stream.chunk_frames)
                for t in each
            }
        )
        levels = torch.tensor([*reversed(times), 0.0], dtype=torch.float64)
        batch["states"] = latents[:, None].expand(-1, len(levels), -1, -1, -1, -1).contiguous()
        batch["times"] = levels.expand(size, -1)  # numbers, not shapes
    elif config.data.kind != "prompts":
        batch["latents"], batch["offset"] = latents, torch.zeros(size, dtype=torch.long)
    return batch


def text_tokens_of(config: RunConfig) -> int:
    """Tokens of an embedded prompt: the tokenizer's own limit, at most a published encoder's."""
    file = Path(config.components) / "tokenizer" / "tokenizer_config.json"
    limit = read_json(file).get("model_max_length", TEXT_TOKENS) if file.is_file() else TEXT_TOKENS
    return int(min(limit, TEXT_TOKENS))


def latent_frames_of_run(config: RunConfig) -> int:
    """Latent frames of a training clip, as far as the run file says: 21, Wan's 81 pixel frames,
    where it does not.
    """
    data = config.data
    pixels = {"world": data.world.num_frames, "clips": data.clips.num_frames}.get(data.kind)
    if data.kind in ("world", "clips", "latents") and data.latent_frames is not None:
        return data.latent_frames
    if pixels is not None:
        return latent_frames_of(pixels, TEMPORAL_RATIO)
    if config.options.role == "start":
        return 21
    return config.rollout.num_chunks * config.stream.chunk_frames


def _extrapolate(few: Turn, more: Turn, depth: int) -> Turn:
    """The line through two depths, at a third; of each phase, as the worse may change with the
    depth.
    """
    a, b = DEPTHS
    share = (depth - a) / (b - a)
    line = lambda x, y: x + share * (y - x)
    peaks = tuple(line(x, y) for x, y in zip(few.peaks, more.peaks, strict=True))
    return replace(more, flops=line(few.flops, more.flops), peaks=peaks)
