"""What streaming a student of Wan 2.1 1.3B's size costs: frames per second, where the time goes,
memory, compilation.

Weights are random, frames are 480 x 832, a chunk is 3 latent frames, hence 12 pixel frames, over a
window of 12 latent frames with 3 sink frames.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from streamvid.codecs.taehv import AutoencoderTAEHV
from streamvid.gpu_check.machine import matmul
from streamvid.gpu_check.measure import (
    Report,
    allocated_mib,
    difference,
    median_ms,
    peak_gib,
    random_cond,
    random_network,
    reset_peak,
    student_sizes,
)
from streamvid.metering import Meter, seconds_of
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.sampler import StreamChunk, new_cache, stream, stream_latents
from streamvid.rollout.schedule import StreamConfig

CHUNK_FRAMES, WINDOW_FRAMES, SINK_FRAMES = 3, 12, 3
PIXEL_FRAMES = 4 * CHUNK_FRAMES  # a chunk, after the first
FILLING = WINDOW_FRAMES // CHUNK_FRAMES  # chunks until the window is full
STEADY = 12  # chunks that are measured then
TOP_KERNELS = 15
VARIANTS = {
    "4_steps_clean": {"num_steps": 4},
    "2_steps_clean": {"num_steps": 2},
    "2_steps_reuse": {"num_steps": 2, "commit": "reuse"},
    "1_step_clean": {"num_steps": 1},
    "1_step_reuse": {"num_steps": 1, "commit": "reuse"},
}


@dataclass
class Setting:
    """What a stream needs."""

    student: nn.Module
    codec: Any
    cond: Tensor
    height: int
    """In pixels."""
    width: int
    device: torch.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return 16, self.height // 8, self.width // 8

    def stream(self, config: StreamConfig) -> Any:
        """Endless."""
        return stream(
            self.student,
            self.codec,
            self.cond,
            config,
            seeds=[0],
            height=self.height,
            width=self.width,
        )


def config_of(**options: Any) -> StreamConfig:
    window = {"window_frames": WINDOW_FRAMES, "sink_frames": SINK_FRAMES, "max_trained_frames": 21}
    return StreamConfig(chunk_frames=CHUNK_FRAMES, positions="window", **window, **options)


def setting(
    report: Report, height: int = 480, width: int = 832, codec_dtype: torch.dtype = torch.bfloat16
) -> Setting:
    """Random weights in bf16."""
    sizes = student_sizes(report.tiny)
    if report.tiny:
        height, width = 16, 32
    network = random_network(CausalWanTransformer3DModel, sizes, torch.bfloat16, report.device)
    codec = (
        AutoencoderTAEHV(has_encoder=False)
        .to(report.device, codec_dtype)
        .requires_grad_(False)
        .eval()
    )
    cond = random_cond(sizes, report.device, torch.bfloat16)
    return Setting(network, codec, cond, height, width, report.device)


# ---- the part stream_1.3b ------------------------------------------------------------------------


def stream_1_3b(report: Report) -> None:
    """Whole streams first, then a steady chunk taken apart."""
    here = setting(report)
    report.measurements["weights_gib"] = sum(p.nbytes for p in here.student.parameters()) / 2**30
    report.attempt("warm_up", lambda: _chunks(here, config_of(num_steps=1), 2)[0].denoise_s)
    steady = 3 if report.tiny else STEADY
    for name, options in VARIANTS.items():
        report.attempt(name, lambda: pace(here, config_of(**options), steady))
    report.attempt("breakdown_ms", lambda: breakdown(here))
    report.attempt("flops", lambda: _flops(report, here))
    report.attempt("kernels", lambda: _kernels(here))
    report.attempt(
        "4_steps_clean, decoder in float32",
        lambda: pace(replace(here, codec=here.codec.float()), config_of(num_steps=4), steady),
    )


def _chunks(here: Setting, config: StreamConfig, count: int) -> list[StreamChunk]:
    endless = here.stream(config)
    return [replace(next(endless), frames=None, latents=None) for _ in range(count)]


def pace(here: Setting, config: StreamConfig, steady: int) -> dict[str, Any]:
    """Of a stream whose window is full. A chunk's time has the commit of the one before."""
    reset_peak(here.device)
    chunks = _chunks(here, config, FILLING + 1 + steady)
    whole = sorted(1000 * (chunk.denoise_s + chunk.decode_s) for chunk in chunks[-steady:])
    denoise = statistics.median(1000 * chunk.denoise_s for chunk in chunks[-steady:])
    chunk_ms = statistics.median(whole)
    return {
        "fps": 1000 * PIXEL_FRAMES / chunk_ms,
        "chunk_ms": chunk_ms,
        "chunk_p95_ms": whole[min(len(whole) - 1, int(0.95 * len(whole)))],
        "denoise_ms": denoise,
        "fps_without_decode": 1000 * PIXEL_FRAMES / denoise,
        "first_frame_ms": 1000 * (chunks[0].denoise_s + chunks[0].decode_s),
        "peak_gib": peak_gib(here.device),
    }


@torch.no_grad()
def steady_cache(here: Setting, config: StreamConfig) -> Any:
    """A cache whose window is full."""
    cache = new_cache(here.student, config, 1, here.latent_shape)
    for _ in range(FILLING + 1):
        here.student.commit(latents_of(here), 0.0, here.cond, cache)
    return cache


def latents_of(here: Setting, frames: int = CHUNK_FRAMES) -> Tensor:
    channels, height, width = here.latent_shape
    return torch.randn(1, channels, frames, height, width, device=here.device)


@torch.no_grad()
def breakdown(here: Setting) -> dict[str, float]:
    """Milliseconds of the pieces of a steady chunk, each by itself."""
    config = config_of()
    cache, x = steady_cache(here, config), latents_of(here)
    time = torch.full((1,), 500.0, device=here.device)
    noise, shape = KeyedNoise([0]), tuple(x.shape[1:])
    decoder = {"state": here.codec.decode_chunk(x, here.codec.new_decoder_state())[1]}

    def decode() -> None:
        _, decoder["state"] = here.codec.decode_chunk(x, decoder["state"])

    def draw_context() -> None:  # what the first pass after a commit does besides
        cache._context = None
        cache.context(CHUNK_FRAMES)

    works: dict[str, Callable[[], Any]] = {
        "denoise_pass": lambda: here.student(x, time, here.cond, cache=cache),
        "commit": lambda: here.student.commit(x, time, here.cond, cache),
        "context_turn": draw_context,
        "noise_on_host_and_copy": lambda: noise.draw(0, 1, shape, here.device, torch.float32),
        "decode": decode,
    }
    return {
        name: median_ms(work, here.device, repeats=8, warm_up=2) for name, work in works.items()
    }


@torch.no_grad()
def _flops(report: Report, here: Setting) -> dict[str, float]:
    """Of one denoising pass over a full window, against the matrix units' own pace."""
    cache, x = steady_cache(here, config_of()), latents_of(here)
    run = lambda: here.student(x, 500.0, here.cond, cache=cache)
    with Meter() as meter:
        run()
    ms = median_ms(run, here.device, repeats=8, warm_up=2)
    ceiling = matmul(here.device, 256 if report.tiny else 8192, torch.bfloat16)["tflops"]
    achieved = meter.flops / ms / 1e9
    return {
        "tflop_a_pass": meter.flops / 1e12,
        "tflops": achieved,
        "matmul_tflops": ceiling,
        "share": achieved / ceiling,
    }


@torch.no_grad()
def _kernels(here: Setting) -> dict[str, Any]:
    """Where a device spends a pass, the commit of its chunk and its decoding."""
    from torch.profiler import ProfilerActivity, profile

    cuda = here.device.type == "cuda"
    cache, x = steady_cache(here, config_of()), latents_of(here)
    time = torch.full((1,), 500.0, device=here.device)
    state = here.codec.decode_chunk(x, here.codec.new_decoder_state())[1]

    def chunk() -> None:
        here.student(x, time, here.cond, cache=cache)
        here.student.commit(x, time, here.cond, cache)
        here.codec.decode_chunk(x, state)

    chunk()
    wall_ms = 1000 * seconds_of(chunk, here.device)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        seconds_of(chunk, here.device)
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, field))
    busy_ms = sum(getattr(event, field) for event in events) / 1000
    top = [
        {"ms": round(getattr(event, field) / 1000, 3), "count": event.count, "name": event.key[:90]}
        for event in events[:TOP_KERNELS]
    ]
    launches = sum(event.count for event in events if getattr(event, field) > 0)
    return {"wall_ms": wall_ms, "busy_ms": busy_ms, "launches": launches, "top": top}


# ---- the part memory -----------------------------------------------------------------------------


def memory(report: Report) -> None:
    """A long stream at a small size takes no more memory and no more time at its end than at its
    beginning.
    """
    here = setting(report, 128, 192)
    report.attempt("200_chunks", lambda: long_stream(here, 30 if report.tiny else 200))


def long_stream(here: Setting, count: int) -> dict[str, Any]:
    endless, allocated, ms = here.stream(config_of(num_steps=1)), {}, []
    for number in range(1, count + 1):
        chunk = next(endless)
        ms.append(1000 * (chunk.denoise_s + chunk.decode_s))
        if number in (20, count):
            allocated[f"mib_after_{number}"] = allocated_mib(here.device)
    return {
        **allocated,
        "chunk_ms_20_to_40": statistics.median(ms[20:40]),
        "chunk_ms_of_the_last_20": statistics.median(ms[-20:]),
    }


# ---- the part compile ----------------------------------------------------------------------------


def compiled(report: Report) -> None:
    """Blocks compiled as ``train.compile`` does it, against those that are not."""
    here = setting(report)
    kept: dict[str, Any] = {}

    def eager() -> dict[str, Any]:
        facts, kept["velocity"] = _pass_and_stream(here, 8)
        return facts

    report.attempt("eager", eager)
    modes: dict[str, dict[str, Any]] = {
        "default": {},
        "max_autotune_no_cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
    }
    if report.tiny:
        modes = {"default": {"backend": "eager"}}
    for name, options in modes.items():
        report.attempt(name, lambda: _compiled(here, options, kept["velocity"]))


def _compiled(here: Setting, options: dict[str, Any], expected: Tensor) -> dict[str, Any]:
    torch._dynamo.reset()
    counters.clear()
    here.student.compile_repeated_blocks(**options)
    graphs: list[int] = []
    endless = stream_latents(
        here.student, here.cond, config_of(num_steps=1), seeds=[0], latent_shape=here.latent_shape
    )

    def eight() -> None:
        for _ in range(8):
            next(endless)
            graphs.append(counters["stats"]["unique_graphs"])

    compile_s = seconds_of(eight, here.device)
    breaks = Counter(dict(counters["graph_break"]))
    facts, velocity = _pass_and_stream(here, 8)
    return {
        "first_8_chunks_s": compile_s,
        "graphs_after_each_chunk": str(graphs),
        "graphs_in_all": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(breaks.values()),
        "first_break": next(iter(breaks), "")[:200],
        **facts,
        **difference(velocity, expected),
    }


def _pass_and_stream(here: Setting, count: int) -> tuple[dict[str, Any], Tensor]:
    """Milliseconds of a pass over a full window and of a chunk of one step, and the pass's
    velocity.
    """
    torch.manual_seed(1)
    cache, x = steady_cache(here, config_of()), latents_of(here)
    time = torch.full((1,), 500.0, device=here.device)
    with torch.no_grad():
        run = lambda: here.student(x, time, here.cond, cache=cache).sample
        ms = median_ms(run, here.device)
        velocity = run()
    chunks = _chunks(here, config_of(num_steps=1), FILLING + 1 + count)
    denoise = statistics.median(1000 * chunk.denoise_s for chunk in chunks[-count:])
    return {"pass_ms": ms, "chunk_without_decode_ms": denoise}, velocity
