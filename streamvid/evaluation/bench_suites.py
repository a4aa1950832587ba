"""What ``streamvid bench`` measures: how a student streams, and what each term of the loss core
costs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from streamvid.core.adversary import discriminator_loss, euler_pair, generator_loss
from streamvid.core.fitting import flow_matching_loss, loss_weight
from streamvid.core.flowmap import (
    adaptive,
    arc_displacement,
    bootstrap_target,
    consistency_pair,
    distance,
    mean_velocity_target,
    normalized_tangent,
    secant_velocity,
    straightness,
    subpath_input,
    total_derivative,
)
from streamvid.core.guidance import guide
from streamvid.core.inject import (
    dmd_gradient,
    f_weight,
    residual_gradient,
    sid_loss,
    surrogate,
    temporal_difference,
)
from streamvid.core.moments import RandomFeatures, mmd2, relational_kl, spectral_distance
from streamvid.core.policy import nft_loss, pairwise, step_logp
from streamvid.core.process import add_noise, eta_step, gamma_step
from streamvid.metering import MIB, measure
from streamvid.rollout.loop import rollout
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.sampler import StreamChunk, new_cache, stream
from streamvid.rollout.schedule import StreamConfig, autoregressive

Row = dict[str, Any]


# ---- streaming -----------------------------------------------------------------------------------


def streams(
    student: Any,
    steps: Sequence[int],
    num_frames: int,
    size: tuple[int, int],
    device: torch.device,
    repeats: int,
) -> list[Row]:
    """A row for each number of steps per chunk: latencies, frames per second, and the cache's
    bytes.

    Args:
        student: of ``students.folder.load_student``.
        num_frames: of a stream; it should have some chunks after the window is full.
        size: height and width of the frames.
    """
    cond = student.prompts.encode(["a red circle moves to the right"]).to(device, _dtype(student))
    return [
        _stream_row(student, _with_steps(student.stream, n), n, num_frames, size, cond, repeats)
        for n in steps
    ]


def _dtype(student: Any) -> torch.dtype:
    return next(student.transformer.parameters()).dtype


def _with_steps(config: StreamConfig, num_steps: int) -> StreamConfig:
    if num_steps == config.num_steps:
        return config
    return replace(config, num_steps=num_steps, step_table=())


def _stream_row(
    student: Any,
    config: StreamConfig,
    num_steps: int,
    num_frames: int,
    size: tuple[int, int],
    cond: Tensor,
    repeats: int,
) -> Row:
    _stream_once(student, config, num_frames, size, cond)  # to warm up
    runs = [_stream_once(student, config, num_frames, size, cond) for _ in range(repeats)]
    chunks = [chunk for run in runs for chunk in run[1:]]  # the first is reported apart
    if not chunks:
        raise ValueError(
            f"{num_frames} frames are one chunk; a stream to measure has at least two, use"
            " --num-frames 129"
        )
    denoise_s = statistics.median(chunk.denoise_s for chunk in chunks)
    decode_s = statistics.median(chunk.decode_s for chunk in chunks)
    return {
        "": f"{num_steps} steps per chunk",
        "first frame ms": (
            1000 * statistics.median(run[0].denoise_s + run[0].decode_s for run in runs)
        ),
        "chunk ms": 1000 * (denoise_s + decode_s),
        "denoise ms": 1000 * denoise_s,
        "decode ms": 1000 * decode_s,
        "frames/s": chunks[0].frames.shape[1] / (denoise_s + decode_s),
        "cache MiB": _cache_bytes(student, config, size, cond) / MIB,
    }


def _stream_once(
    student: Any, config: StreamConfig, num_frames: int, size: tuple[int, int], cond: Tensor
) -> list[StreamChunk]:
    height, width = size
    return list(
        stream(
            student.transformer,
            student.codec,
            cond,
            config,
            seeds=[0],
            height=height,
            width=width,
            num_frames=num_frames,
        )
    )


def _cache_bytes(student: Any, config: StreamConfig, size: tuple[int, int], cond: Tensor) -> int:
    """Bytes of a cache whose window is full, after as many chunks at one step each."""
    shape = (student.codec.latent_channels, *(side // student.codec.spatial_ratio for side in size))
    cache = new_cache(student.transformer, config, 1, shape)
    if cache is None:
        return 0
    num_chunks = -(-(config.window_frames or 7 * config.chunk_frames) // config.chunk_frames)
    events = autoregressive((1.0,), num_chunks)
    with torch.no_grad():
        for _ in rollout(
            student.transformer,
            cond,
            events,
            KeyedNoise([0]),
            latent_shape=shape,
            chunk_frames=config.chunk_frames,
            cache=cache,
            commit=config.commit,
            commit_last=True,
        ):
            pass
    return cache.memory_bytes()


# ---- terms of the loss core ----------------------------------------------------------------------


def losses(shape: tuple[int, ...], device: torch.device, repeats: int) -> list[Row]:
    """A row for each term: forward and backward on a latent ``[B, C, T, h, w]``, seconds and peak
    bytes against an MSE's.

    Networks are left out: predictions are given, and where a term calls one it is a multiplication.
    """
    generator = torch.Generator(device).manual_seed(0)
    x, *given = (torch.randn(shape, generator=generator, device=device) for _ in range(5))
    x.requires_grad_()
    t = torch.full(shape[:1], 0.6, device=device)

    def work(term: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.backward(term(), inputs=[x])
            x.grad = None

        return run

    measured = measure(
        {name: work(term) for name, term in _terms(x, given, t).items()}, device, repeats
    )
    plain = measured["mse"]
    return [
        {
            "": name,
            "ms": 1000 * each.seconds,
            "time / MSE": each.seconds / plain.seconds,
            "peak MiB": each.peak_bytes / MIB,
            "peak / MSE": each.peak_bytes / plain.peak_bytes,
        }
        for name, each in measured.items()
    ]


Terms = dict[str, Callable[[], Tensor]]
"""Each term as a scalar of the same latent."""


def _terms(x: Tensor, given: Sequence[Tensor], t: Tensor) -> Terms:
    """All terms of ``x [B, C, T, h, w]``, in the order of the report.

    Args:
        given: four more latents, which stand for predictions, noise and data.
        t: times ``[B]``.
    """
    a, b, c, d = given
    s, r = 0.2 * t, 0.9 * t
    return {
        **_regression_terms(x, a, b, t),
        **_score_terms(x, a, b, c),
        **_step_terms(x, a, b, t, s),
        **_adversarial_terms(x, a, b, t),
        **_flow_map_terms(x, a, t, r, s),
        **_tangent_terms(x, a, b, c, d, t, s),
        **_moment_terms(x, a, b),
        **_policy_terms(x, a, b, c, t),
    }


def _network(z: Tensor, *_: Tensor) -> Tensor:
    """Stands for a network: a multiplication."""
    return 0.9 * z


def _discriminator(z: Tensor) -> Tensor:
    """Stands for a discriminator: the mean of each sample, ``[B, 1]``."""
    return z.flatten(1).mean(1, keepdim=True)


def _regression_terms(x: Tensor, a: Tensor, b: Tensor, t: Tensor) -> Terms:
    return {
        "mse": lambda: (x - a).square().mean(),
        "flow matching": lambda: flow_matching_loss(x, a, b),
        "flow matching, weighted": lambda: flow_matching_loss(x, a, b, loss_weight("edm", t)),
    }


def _score_terms(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Terms:
    group = torch.zeros(len(x), device=x.device)
    moves = temporal_difference

    def weighted() -> Tensor:
        return surrogate(x, dmd_gradient(x, a, b), weight=f_weight(_discriminator(a)[:, 0]))

    return {
        "DMD": lambda: surrogate(x, dmd_gradient(x, a, b)),
        "DMD, guided teacher": lambda: surrogate(x, dmd_gradient(x, a, guide(b, c, 4.0))),
        "DMD, group normaliser": lambda: surrogate(x, dmd_gradient(x, a, b, "group", group)),
        "DMD, Huber": lambda: surrogate(x, dmd_gradient(x, a, b), form="huber"),
        "DMD, dot": lambda: surrogate(x, dmd_gradient(x, a, b), form="dot"),
        "f-distill weight": weighted,
        "residual (SDS)": lambda: surrogate(x, residual_gradient(x, a)),
        "SiD": lambda: sid_loss(x, a, b, 1.0),
        "motion (flow DMD)": lambda: surrogate(
            moves(x), dmd_gradient(moves(x), moves(a), moves(b))
        ),
    }


def _step_terms(x: Tensor, a: Tensor, b: Tensor, t: Tensor, s: Tensor) -> Terms:
    return {
        "noising": lambda: add_noise(x, a, t).mean(),
        "eta step": lambda: eta_step(x, a, t, s, 0.5, b).mean(),
        "gamma step": lambda: gamma_step(x, a, t, s, 0.5, b).mean(),
    }


def _adversarial_terms(x: Tensor, a: Tensor, b: Tensor, t: Tensor) -> Terms:
    def game() -> Tensor:
        lowered = generator_loss("paired", _discriminator(x), _discriminator(a))
        return lowered + discriminator_loss("ns", _discriminator(x), _discriminator(a))

    def adm_pair() -> Tensor:
        fake, real = euler_pair(x, t, 1 / 64, a, b)
        return fake.mean() + real.mean()

    return {"game, logits only": game, "ADM pair": adm_pair}


def _flow_map_terms(x: Tensor, a: Tensor, t: Tensor, r: Tensor, s: Tensor) -> Terms:
    def pair(to_data: Callable[..., Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return consistency_pair(_network, _network, x, t, a, r, s, to_data)

    return {
        "consistency pair, squared": lambda: distance(*pair()).mean(),
        "consistency pair, Huber": lambda: distance(*pair(), "huber").mean(),
        "CTM, mapped to data": lambda: distance(*pair(to_data=_network)).mean(),
        "SLAM input": lambda: subpath_input(x, a, t, r, 0.5)[0].mean(),
    }


def _tangent_terms(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, t: Tensor, s: Tensor
) -> Terms:
    one = torch.ones_like(t)

    def tangent(u: Tensor) -> Tensor:
        network = lambda z, time, _: 0.9 * z * time.reshape(-1, 1, 1, 1, 1)
        return total_derivative(network, a, t, s, b)[1] + 0 * u

    def normalised_tangent() -> Tensor:
        target = normalized_tangent(d, mean_velocity_target(b, tangent(c), t, 0 * t))
        return distance(x, target).mean()

    def arc_jump() -> Tensor:
        velocities = torch.stack([x, a], 1)
        logits = torch.zeros(1, 2, 1, 1, 1, 1).to(x)
        log_rates = torch.full((1, 2, 1, 1, 1, 1), 0.5).to(x)
        return arc_displacement(velocities, logits, log_rates, one, t, s).square().mean()

    return {
        "BOOT target": lambda: distance(x, bootstrap_target(a, b, t, s)).mean(),
        "MeanFlow": lambda: adaptive(distance(x, mean_velocity_target(b, tangent(c), t, s))).mean(),
        "sCM, normalised": normalised_tangent,
        "secant": lambda: distance(x, secant_velocity(a, b, t, s)).mean(),
        "straightness": lambda: straightness(a, x),
        "ArcFlow jump, 2 components": arc_jump,
    }


def _moment_terms(x: Tensor, a: Tensor, b: Tensor) -> Terms:
    features = RandomFeatures(x.shape[1], seed=0, width=16, depth=2).to(x.device)

    def relational() -> Tensor:
        made, true = torch.cat([x, 2 * x + a]), torch.cat([a, b])
        return relational_kl(made.flatten(1), true.flatten(1))

    return {
        "Embedding Loss, 16 features": lambda: mmd2(features(x), features(a), unbiased=False),
        "spectral": lambda: spectral_distance(x, a),
        "relational": relational,
    }


def _policy_terms(x: Tensor, a: Tensor, b: Tensor, c: Tensor, t: Tensor) -> Terms:
    one = torch.ones_like(t)

    def preference() -> Tensor:
        winner, loser = step_logp(a, x, t, "mean"), step_logp(b, x, t, "mean")
        return pairwise(winner, loser, 50.0)

    return {
        "NFT": lambda: nft_loss(x, a, b, one, 0.5),
        "NFT, self-normalised": lambda: nft_loss(x, a, b, one, 0.5, c, t),
        "preference (PSO)": preference,
    }
