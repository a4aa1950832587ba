"""What is streamed: a student with its codec, and geometries of Wan with random weights.

A geometry has no codec: its chunks are latents, and its frames are those that Wan's codec would
make of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streamvid.gpu_check.measure import random_cond, random_network, student_sizes
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.rollout.loop import rollout
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.sampler import latent_shape_of, new_cache, stream, stream_latents
from streamvid.rollout.schedule import StreamConfig, autoregressive
from streamvid.students.folder import Student

WAN_TEMPORAL_RATIO = 4
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
WINDOWS = {"12/3": (12, 3), "21": (21, 0)}  # latent frames and how many of them are sink
NARROW = {
    f"narrow {dtype} {window}": (dtype, window) for dtype in DTYPES for window in WINDOWS
}  # two layers of Wan 1.3B, 96 tokens per frame
PUBLISHED = {f"1.3b bf16 {window}": ("bf16", window) for window in WINDOWS}  # 1560 tokens per frame
STUDENT = "student"
GROUPS = {"student": (STUDENT,), "narrow": tuple(NARROW), "1.3b": tuple(PUBLISHED)}
PROMPT = "a red circle moves to the right"


@dataclass(frozen=True)
class Case:
    """Something to stream."""

    name: str
    student: Student
    cond: Tensor
    """[1, L, D]."""
    latent_shape: tuple[int, int, int]
    size: tuple[int, int] | None = None
    """Height and width in pixels; None where there is no codec."""

    @property
    def config(self) -> StreamConfig:
        return self.student.stream

    @property
    def network(self) -> CausalWanTransformer3DModel:
        return self.student.transformer

    @property
    def frames_per_chunk(self) -> int:
        """Pixel frames of a chunk that is not the first."""
        has_codec = self.size is not None
        ratio = self.student.codec.temporal_ratio if has_codec else WAN_TEMPORAL_RATIO
        return ratio * self.config.chunk_frames

    @property
    def filling(self) -> int:
        """Chunks until the window is full; 7 where there is no window."""
        frames = self.config.window_frames or 7 * self.config.chunk_frames
        return -(-frames // self.config.chunk_frames)

    def with_steps(self, num_steps: int) -> Case:
        """The same in ``num_steps`` steps per chunk."""
        if num_steps == self.config.num_steps:
            return self
        config = replace(self.config, num_steps=num_steps, step_table=())
        return replace(self, student=replace(self.student, stream=config))

    def stream(self) -> Iterator[Any]:
        """An endless stream, decoded where there is a codec."""
        if self.size is None:
            return stream_latents(
                self.network, self.cond, self.config, seeds=[0], latent_shape=self.latent_shape
            )
        height, width = self.size
        return stream(
            self.network,
            self.student.codec,
            self.cond,
            self.config,
            seeds=[0],
            height=height,
            width=width,
        )

    def steady_stream(self) -> Iterator[Any]:
        """An endless stream whose window is full."""
        chunks = self.stream()
        for _ in range(self.filling):
            next(chunks)
        return chunks

    @torch.no_grad()
    def full_cache(self, age: int | None = None) -> Any:
        """A cache whose window is full of random latents' keys, of a stream of ``age`` chunks."""
        frames = self.config.chunk_frames
        cache = new_cache(self.student.transformer, self.config, 1, self.latent_shape, static=True)
        channels, height, width = self.latent_shape
        latents = torch.randn(1, channels, frames, height, width, device=self.cond.device)
        for _ in range(self.filling):
            self.network.commit(latents, 0.0, self.cond, cache)
        if age is not None:
            cache.load_state(cache.state(), max(age, self.filling) * frames)
        return cache

    def latents_over(self, cache: Any) -> Iterator[Any]:
        """Chunks of latents that go on over a cache, endless; not decoded."""
        first = cache.num_committed_frames // self.config.chunk_frames
        times = autoregressive(_times(self.config))
        events = (replace(each, chunks=(each.chunks[0] + first,)) for each in times)
        chunks = rollout(
            self.network,
            self.cond,
            events,
            KeyedNoise([0]),
            latent_shape=self.latent_shape,
            chunk_frames=self.config.chunk_frames,
            cache=cache,
            commit=self.config.commit,
            context_t=self.config.context_t,
            stepper=self.config.stepper,
        )
        while True:
            with torch.no_grad():
                chunk = next(chunks)
            yield chunk


def _times(config: StreamConfig) -> tuple[float, ...]:
    """The times of a chunk that is not among the first."""
    from streamvid.core.times import step_times

    return (
        config.step_table[-1] if config.step_table else step_times(config.num_steps, config.shift)
    )


def names_in(text: str | None, cuda: bool) -> list[str]:
    """The cases that a comma-separated list of names or groups means; None is all that this
    machine can run.

    Raises:
        ValueError: for a name that is not known.
    """
    known = [name for names in GROUPS.values() for name in names]
    if text is None:
        return [name for name in known if cuda or name not in PUBLISHED]
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if part not in known and part not in GROUPS:
            raise ValueError(
                f"--cases {part[:60]}: expected some of {', '.join([*GROUPS, *NARROW, *PUBLISHED])}"
            )
        found += GROUPS.get(part, (part,))
    return list(dict.fromkeys(found))


def student_case(student: Student, size: tuple[int, int], name: str = STUDENT) -> Case:
    """A student of ``load_student``.

    Raises:
        ValueError: if the size does not fit its codec.
    """
    weight = student.transformer.patch_embedding.weight
    cond = student.prompts.encode([PROMPT]).to(weight.device, weight.dtype)
    shape = latent_shape_of(student.codec, student.transformer, *size)
    return Case(name, student, cond, shape, size)


def geometry_case(name: str, device: torch.device) -> Case:
    """The case of a name in ``NARROW`` or ``PUBLISHED``."""
    dtype, window = (NARROW | PUBLISHED)[name]
    sizes = student_sizes(tiny=False)
    latent_shape = (16, 60, 104)
    if name in NARROW:
        sizes, latent_shape = {**sizes, "num_layers": 2}, (16, 16, 24)
    return random_case(name, sizes, latent_shape, WINDOWS[window], DTYPES[dtype], device)


def random_case(
    name: str,
    sizes: dict[str, Any],
    latent_shape: tuple[int, int, int],
    window: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    num_steps: int = 4,
) -> Case:
    """A network of random weights that streams chunks of three latent frames.

    Args:
        sizes: of ``CausalWanTransformer3DModel``.
        window: latent frames, and how many of them are sink.
    """
    frames, sink = window
    network = random_network(CausalWanTransformer3DModel, sizes, dtype, device)
    config = StreamConfig(
        num_steps=num_steps,
        window_frames=frames,
        sink_frames=sink,
        positions="window",
        max_trained_frames=max(21, frames),
    )
    parts: dict[str, Any] = {"codec": None, "prompts": None}  # nothing is decoded or encoded
    student = Student(transformer=network, stream=config, **parts)
    return Case(name, student, random_cond(sizes, device, dtype), latent_shape)
