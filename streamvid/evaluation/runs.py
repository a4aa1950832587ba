"""Running a model on held-out prompts: its clips, their world scores, what they cost and how long
they take.

Shapes: B batch, T pixel frames, H W pixels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from streamvid.codecs.base import VideoCodec, latent_frames_of
from streamvid.data.world import SIZE, caption, render, sample_spec
from streamvid.evaluation.world_score import WorldScore, mean_scores, score
from streamvid.rollout.runner import Runner
from streamvid.rollout.sampler import generate, stream
from streamvid.rollout.schedule import build_schedule, cost_of
from streamvid.seeding import key_to_seed

HELD_OUT_SEED = 5_000_000


@dataclass(frozen=True)
class ClipCost:
    """What a clip takes; seconds are medians at batch 1."""

    nfe: int
    """Forwards of the network that denoise."""
    commits: int
    """Forwards that write context."""
    latent_frames: int
    """What all forwards push through."""
    denoise_s: float
    decode_s: float
    first_frame_s: float

    @property
    def clip_s(self) -> float:
        return self.denoise_s + self.decode_s


def held_out_prompts(num: int, first_seed: int = HELD_OUT_SEED) -> list[str]:
    """Captions of combinations of attributes that no training clip has."""
    seeds = range(first_seed, first_seed + num)
    return [
        caption(sample_spec(seed, held_out=True), key_to_seed("held-out caption", seed))
        for seed in seeds
    ]


@torch.no_grad()
def reconstructed_clips(
    codec: VideoCodec,
    num: int,
    num_frames: int,
    first_seed: int = HELD_OUT_SEED,
    batch_size: int = 16,
) -> Tensor:
    """The true clips ``[B, T, 3, H, W]``, on the CPU, of ``held_out_prompts`` after the codec: what
    a perfect model would score.
    """
    seeds, clips = range(first_seed, first_seed + num), []
    for start in tqdm(range(0, num, batch_size), desc="true clips", unit="batch", leave=False):
        batch = [
            render(sample_spec(seed, held_out=True), num_frames)
            for seed in seeds[start : start + batch_size]
        ]
        frames = torch.stack(batch).to(next(codec.parameters()).device)
        clips.append(codec.decode_latents(codec.encode_frames(frames)).cpu())
    return torch.cat(clips)


def make_clips(
    runner: Runner,
    codec: VideoCodec,
    cond: Tensor,
    seeds: Sequence[int],
    num_frames: int,
    batch_size: int = 16,
) -> Tensor:
    """Clips ``[B, T, 3, H, W]`` of the prompts, on the CPU, made in batches, on which a clip
    depends up to rounding only.
    """
    clips = []
    for start in tqdm(
        range(0, len(seeds), batch_size), desc=runner.label, unit="batch", leave=False
    ):
        rows = slice(start, start + batch_size)
        clips.append(
            generate(
                runner.model,
                codec,
                cond[rows],
                runner.stream,
                seeds=list(seeds[rows]),
                height=SIZE,
                width=SIZE,
                num_frames=num_frames,
            ).cpu()
        )
    return torch.cat(clips)


def score_clips(
    clips: Tensor, prompts: Sequence[str], window: int | None = None
) -> list[WorldScore]:
    """The world score of each clip ``[B, T, 3, H, W]``."""
    return [score(clip, prompt, window) for clip, prompt in zip(clips, prompts)]


def clips_by_seed(
    runner: Runner,
    codec: VideoCodec,
    cond: Tensor,
    seeds: Sequence[int],
    num_frames: int,
    batch_size: int = 16,
) -> Iterator[Tensor]:
    """The clips ``[B, T, 3, H, W]`` of all prompts, for one seed after the other; what a runner is
    scored on.
    """
    for seed in seeds:
        yield make_clips(
            runner,
            codec,
            cond,
            evaluation_keys(seed, len(cond)),
            num_frames,
            batch_size,
        )


def evaluation_keys(seed: int, num: int) -> list[int]:
    """A seed per prompt; they don't depend on the runner, so that all are compared on the same
    noise.
    """
    return [key_to_seed("evaluation", seed, index) for index in range(num)]


def score_by_seed(
    runner: Runner,
    codec: VideoCodec,
    cond: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_frames: int,
    batch_size: int = 16,
) -> list[dict[str, float]]:
    """Mean scores of all prompts, one dictionary per seed."""
    clips = clips_by_seed(runner, codec, cond, seeds, num_frames, batch_size)
    return [mean_scores(score_clips(each, prompts)) for each in clips]


def make_long_clips(
    runner: Runner, codec: VideoCodec, cond: Tensor, num_times: int, window: int
) -> Tensor:
    """Clips ``[B, T, 3, H, W]`` of the prompts, ``num_times`` windows long, on the CPU."""
    num_frames = long_frames(num_times, window, runner.stream.chunk_frames, codec.temporal_ratio)
    keys = evaluation_keys(0, len(cond))
    return make_clips(runner, codec, cond, keys, num_frames, batch_size=8)


def score_windows(clips: Tensor, prompts: Sequence[str], window: int) -> list[dict[str, float]]:
    """Mean scores of each time window of ``window`` frames of long clips, first to last."""
    scores = score_clips(clips, prompts, window)
    return [mean_scores(column) for column in zip(*(each.windows for each in scores))]


def score_long(
    runner: Runner,
    codec: VideoCodec,
    cond: Tensor,
    prompts: Sequence[str],
    num_times: int,
    window: int,
) -> dict[str, Any]:
    """Scores of streams ``num_times`` windows long, window by window, as a row of a report."""
    clips = make_long_clips(runner, codec, cond, num_times, window)
    windows = score_windows(clips, prompts, window)
    overall = [each["overall"] for each in windows]
    return {
        "label": runner.label,
        "num_frames": clips.shape[1],
        "window": window,
        "prompts": len(prompts),
        "windows": windows,
        "first": overall[0],
        "last": overall[-1],
        "least": min(overall),
    }


def long_frames(num_times: int, window: int, chunk_frames: int, temporal_ratio: int) -> int:
    """The shortest whole number of chunks that has ``num_times`` windows of pixel frames after its
    first chunk.
    """
    chunks = -(-num_times * window // (temporal_ratio * chunk_frames))
    return 1 + temporal_ratio * (chunk_frames * (1 + chunks) - 1)


def measure_cost(
    runner: Runner, codec: VideoCodec, cond: Tensor, num_frames: int, repeats: int = 3
) -> ClipCost:
    """Count a clip's forwards and time it at batch 1, the median of ``repeats`` after one to warm
    up.

    Args:
        cond: of one prompt ``[1, L, D]``.
    """
    chunks = latent_frames_of(num_frames, codec.temporal_ratio) // runner.stream.chunk_frames
    count = cost_of(
        build_schedule(runner.stream, chunks), runner.stream.chunk_frames, runner.stream.commit
    )
    times = [_time_clip(runner, codec, cond, num_frames) for _ in range(repeats + 1)][1:]
    denoise_s, decode_s, first_frame_s = (statistics.median(column) for column in zip(*times))
    return ClipCost(
        count.nfe * runner.passes,
        count.commits,
        count.latent_frames * runner.passes,
        denoise_s,
        decode_s,
        first_frame_s,
    )


def _time_clip(
    runner: Runner, codec: VideoCodec, cond: Tensor, num_frames: int
) -> tuple[float, float, float]:
    first_frame_s = denoise_s = decode_s = 0.0
    started = time.perf_counter()
    chunks = stream(
        runner.model,
        codec,
        cond,
        runner.stream,
        seeds=[0],
        height=SIZE,
        width=SIZE,
        num_frames=num_frames,
    )
    for chunk in chunks:
        if chunk.index == 0:
            first_frame_s = time.perf_counter() - started
        denoise_s += chunk.denoise_s
        decode_s += chunk.decode_s
    return denoise_s, decode_s, first_frame_s
