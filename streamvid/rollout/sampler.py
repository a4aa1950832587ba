"""Streaming a student, and sampling anything else through the same loop.

``stream`` yields the frames of each chunk as soon as they exist; ``generate``, the exported clip,
is its concatenation, and so equal to it bit for bit. A bidirectional teacher is sampled by
``generate_latents`` of a ``GuidedModel`` under ``StreamConfig(order="full_sequence",
stepper="euler", commit="none", ...)``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamvid.codecs.base import VideoCodec, latent_frames_of
from streamvid.core.guidance import guide
from streamvid.rollout.loop import ChunkHook, ChunkResult, rollout
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.schedule import StreamConfig, build_schedule

MOST_PIXELS = 7680 * 4320
"""Of a frame; no model here is made for so many, and a slip of the keyboard would take all
memory."""


@dataclass(frozen=True)
class StreamChunk:
    """The part of a stream that a viewer gets at once."""

    frames: Tensor  # [B, T, 3, H, W] in [0, 1]; chunk 0 has 1 + r (f - 1) of them, the others r f
    latents: Tensor  # [B, C, f, h, w]
    index: int
    denoise_s: float  # of this chunk, with the commit of the one before
    decode_s: float


def stream(
    student: Any,
    codec: VideoCodec,
    cond: Tensor,
    config: StreamConfig,
    *,
    seeds: Sequence[int],
    height: int,
    width: int,
    num_frames: int | None = None,
    before_step: ChunkHook | None = None,
    after_x0: ChunkHook | None = None,
) -> Iterator[StreamChunk]:
    """Frames, chunk after chunk, for as long as they are asked for.

    Args:
        student: as ``rollout`` takes it.
        codec: decodes chunk by chunk.
        cond: the prompts ``[B, L, D]``.
        config: how the student wants to be streamed.
        seeds: one per prompt; a sample depends on its prompt and its seed, up to rounding of the
            batch's matrix products.
        height, width: of the frames, in pixels.
        num_frames: None streams for ever.
        before_step, after_x0: as in ``rollout``.

    Raises:
        ValueError: if codec and patches do not divide the size, the size is beyond ``MOST_PIXELS``,
            or ``num_frames`` is no whole number of chunks; at the first chunk, if prompts, latents
            or frames are not finite.
    """
    results = stream_latents(
        student,
        cond,
        config,
        seeds=seeds,
        latent_shape=latent_shape_of(codec, student, height, width),
        num_chunks=(
            None if num_frames is None else _num_chunks(num_frames, config.chunk_frames, codec)
        ),
        before_step=before_step,
        after_x0=after_x0,
    )
    return _decoded(results, codec, cond)


def generate(
    student: Any,
    codec: VideoCodec,
    cond: Tensor,
    config: StreamConfig,
    *,
    seeds: Sequence[int],
    height: int,
    width: int,
    num_frames: int,
) -> Tensor:
    """The frames ``[B, num_frames, 3, H, W]`` of a whole stream, with the arguments and errors of
    ``stream``.
    """
    chunks = stream(
        student,
        codec,
        cond,
        config,
        seeds=seeds,
        height=height,
        width=width,
        num_frames=num_frames,
    )
    return torch.cat([chunk.frames for chunk in chunks], dim=1)


def stream_latents(
    student: Any,
    cond: Tensor,
    config: StreamConfig,
    *,
    seeds: Sequence[int],
    latent_shape: tuple[int, int, int],
    num_chunks: int | None = None,
    before_step: ChunkHook | None = None,
    after_x0: ChunkHook | None = None,
) -> Iterator[ChunkResult]:
    """The rollout that a configuration describes, without gradient, over a new cache.

    Args:
        latent_shape: (C, h, w).
        num_chunks: None streams for ever.
    """
    results = rollout(
        student,
        cond,
        build_schedule(config, num_chunks),
        KeyedNoise(seeds),
        latent_shape=latent_shape,
        chunk_frames=config.chunk_frames,
        cache=new_cache(student, config, cond.shape[0], latent_shape),
        commit=config.commit,
        context_t=config.context_t,
        stepper=config.stepper,
        before_step=before_step,
        after_x0=after_x0,
    )
    return _without_gradient(results)


def generate_latents(
    model: Any,
    cond: Tensor,
    config: StreamConfig,
    *,
    seeds: Sequence[int],
    latent_shape: tuple[int, int, int],
    num_chunks: int,
) -> Tensor:
    """The latents ``[B, C, num_chunks * chunk_frames, h, w]`` of a whole stream."""
    results = stream_latents(
        model,
        cond,
        config,
        seeds=seeds,
        latent_shape=latent_shape,
        num_chunks=num_chunks,
    )
    return torch.cat([result.latents for result in results], dim=2)


def new_cache(
    student: Any, config: StreamConfig, batch_size: int, latent_shape: tuple[int, int, int]
) -> Any:
    """The cache that a configuration asks for; None if it commits nothing."""
    if config.commit == "none":
        return None
    _, height, width = latent_shape
    return student.new_cache(
        batch_size,
        height,
        width,
        window_frames=config.window_frames,
        sink_frames=config.sink_frames,
        positions=config.positions,
        max_trained_frames=config.max_trained_frames,
    )


@dataclass(frozen=True)
class Velocity:
    """A model output as the loop reads it."""

    sample: Tensor


@dataclass(frozen=True)
class GuidedModel:
    """A teacher's ``predict(x_t, t, cond) -> velocity``, guided, in the call of a student without a
    cache.

    Raises:
        ValueError: if guidance lacks ``uncond``.
    """

    predict: Callable[[Tensor, Tensor, Any], Tensor]
    uncond: Tensor | None = None  # the negative prompts [B, L, D], or one for all [1, L, D]
    guidance_scale: float = 1.0  # 1 is none, and runs no second pass

    def __post_init__(self) -> None:
        if self.guidance_scale != 1 and self.uncond is None:
            raise ValueError(
                f"guidance_scale={self.guidance_scale} needs uncond; pass it, or use 1 for no"
                " guidance"
            )

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        cond: Tensor,
        cache: None = None,
    ) -> Velocity:
        """The velocity at ``timestep`` 0 to 1000, ``[B]`` or ``[B, T]``."""
        t = timestep / 1000
        velocity = self.predict(hidden_states, t, cond)
        if self.guidance_scale == 1:
            return Velocity(velocity)
        assert self.uncond is not None  # __post_init__
        uncond = self.uncond.to(cond).expand(len(hidden_states), -1, -1)
        return Velocity(
            guide(velocity, self.predict(hidden_states, t, uncond), self.guidance_scale)
        )


def _without_gradient(results: Iterator[ChunkResult]) -> Iterator[ChunkResult]:
    """Advance a rollout under ``no_grad``, which ends before each yield."""
    while True:
        with torch.no_grad():
            result = next(results, None)
        if result is None:
            return
        yield result


def _decoded(
    results: Iterator[ChunkResult], codec: VideoCodec, cond: Tensor
) -> Iterator[StreamChunk]:
    state, device = codec.new_decoder_state(), cond.device
    start_s, first = now_s(device), True
    for result in results:
        denoised_s = now_s(device)
        with torch.no_grad():
            frames, state = codec.decode_chunk(result.latents, state)
        if first:
            check_finite(cond, result.latents, frames)
            first = False
        decoded_s = now_s(device)
        yield StreamChunk(
            frames, result.latents, result.index, denoised_s - start_s, decoded_s - denoised_s
        )
        start_s = now_s(device)  # the viewer's time is not ours


def check_finite(cond: Tensor, latents: Tensor, frames: Tensor) -> None:
    """Refuse a stream that would be black; which part is damaged shows in what it made of finite
    inputs.

    The first chunk is enough: damaged weights are damaged from the start, and a check makes the
    device wait.
    """
    made = {"text encoder": cond, "transformer": latents, "codec": frames}
    for part, tensor in made.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"the {part} gave numbers that are not finite (NaN or infinite): its weights are"
                " damaged, or too large for the precision; copy the checkpoint again, or use"
                " float32"
            )


def now_s(device: torch.device) -> float:
    """The time when everything asked of the device so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def latent_shape_of(
    codec: VideoCodec, student: Any, height: int, width: int
) -> tuple[int, int, int]:
    """(C, h, w) of frames in pixels, which codec and patches have to divide."""
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"frames of {height} x {width} pixels are too large; expected at most {MOST_PIXELS:,}"
            " pixels, 8K"
        )
    ratio = codec.spatial_ratio
    patch = getattr(getattr(student, "config", None), "patch_size", (1, 1, 1))
    units = [ratio * side for side in patch[1:]]
    if any(size < unit or size % unit for size, unit in zip((height, width), units)):
        nearest = " x ".join(
            str(max(1, round(size / unit)) * unit) for size, unit in zip((height, width), units)
        )
        several = units[0] if units[0] == units[1] else " and ".join(map(str, units))
        raise ValueError(
            f"frames of {height} x {width} pixels, expected multiples of {several}; use {nearest}"
        )
    return codec.latent_channels, height // ratio, width // ratio


def _num_chunks(num_frames: int, chunk_frames: int, codec: VideoCodec) -> int:
    """The chunks of a clip of ``num_frames`` pixel frames."""
    latent_frames = latent_frames_of(num_frames, codec.temporal_ratio)
    if latent_frames % chunk_frames == 0:
        return latent_frames // chunk_frames
    lower = latent_frames // chunk_frames * chunk_frames
    fits = [frames for frames in (lower, lower + chunk_frames) if frames]
    clips = [1 + codec.temporal_ratio * (frames - 1) for frames in fits]
    raise ValueError(
        f"chunk_frames={chunk_frames} does not divide {latent_frames} latent frames; "
        f"use {' or '.join(map(str, fits))}, i.e. num_frames={' or '.join(map(str, clips))}"
    )
