"""Whether the device computes what it should: gradients under autocast, streams, attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from streamvid.codecs.load import open_codec
from streamvid.experiment.build import build_method
from streamvid.experiment.config import load_run
from streamvid.gpu_check.check import ROOT
from streamvid.gpu_check.measure import (
    Report,
    difference,
    in_precision,
    median_ms,
    psnr,
    random_cond,
    random_network,
    student_sizes,
)
from streamvid.models.attention import attention, flash_attn_func
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.rollout.sampler import generate
from streamvid.seeding import keyed_normal
from streamvid.students.folder import (
    TINY_STUDENT,
    TINY_TEACHER,
    load_stream_config,
    load_transformer,
)
from streamvid.teachers.wan import WanTeacher
from streamvid.training.trainer import switch_on

CPU = torch.device("cpu")
TEXT_TOKENS = 64
FRAMES, MORE_FRAMES = 33, 57  # pixel frames of a short stream, and of one that goes on


# ---- gradients -----------------------------------------------------------------------------------


def gradients(report: Report) -> None:
    """The part ``gradients``: the student's turn of DMD, at each step that can end its rollout."""
    turn = StudentTurn()
    exits = range(turn.method.num_steps)
    for exit_index in (exits[0], exits[-1]) if report.tiny else exits:
        expected: dict[str, Tensor] = {}
        for checkpointing in (False, True):
            name = f"exit {exit_index}, {'recomputed' if checkpointing else 'kept'}"
            if not checkpointing:
                expected = (
                    report.attempt(f"{name}, norm", lambda: turn.on(report.device, exit_index))
                    or {}
                )
                report.measurements[f"{name}, norm"] = (
                    _flat(expected).norm().item() if expected else None
                )
            half = lambda: turn.on(report.device, exit_index, torch.bfloat16, checkpointing)
            report.attempt(f"{name}, bf16 against float32", lambda: compared(half(), expected))
            whole = lambda: turn.on(report.device, exit_index, None, checkpointing)
            if checkpointing:
                report.attempt(f"{name}, float32 against kept", lambda: compared(whole(), expected))
        report.attempt(
            f"exit {exit_index}, float32 against the CPU",
            lambda: compared(turn.on(CPU, exit_index), expected),
        )


class StudentTurn:
    """The tiny recipe's, on prompts of random numbers."""

    def __init__(self) -> None:
        config = load_run(ROOT / "configs" / "run" / "tiny_dmd.yaml", ["train.batch_size=2"])
        student = load_transformer(ROOT / config.student.path)
        teacher = WanTeacher.from_pretrained(TINY_TEACHER, load_text_encoder=False)
        width = int(student.config.text_dim)
        teacher.uncond = keyed_normal((TEXT_TOKENS, width), "gpu check", "uncond")
        self.method = build_method(config, student, teacher.uncond, teacher)
        self.config, self.width = config, width
        switch_on(self.method.networks(), replace(config.train, gradient_checkpointing=True))

    def on(
        self,
        device: torch.device,
        exit_index: int,
        dtype: torch.dtype | None = None,
        checkpointing: bool = False,
    ) -> dict[str, Tensor]:
        """The student's gradient, by parameter; on the CPU."""
        method = self.method
        method.teacher.to(device)
        for name, network in method.networks().items():
            network.to(device).train().requires_grad_(name == "student").zero_grad(set_to_none=True)
        method.student.gradient_checkpointing = checkpointing
        cond = keyed_normal((2, TEXT_TOKENS, self.width), "gpu check", "cond").to(device)
        exits = (method.step_of("student", None, i).decide() for i in itertools.count())
        step = next(i for i, drawn in enumerate(exits) if drawn.exit_index == exit_index)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            loss, _ = method.loss("student", {"cond": cond, "keys": [0, 1]}, step)
        loss.backward()
        named = method.student.named_parameters()
        return {name: p.grad.detach().float().cpu() for name, p in named if p.grad is not None} | {
            name: torch.zeros(0) for name, p in method.student.named_parameters() if p.grad is None
        }


def compared(came: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """How two gradients of the same parameters agree; a parameter without one has an empty
    tensor.
    """
    a, b = _flat(came), _flat(expected)
    missing = [name for name, gradient in came.items() if not gradient.numel()]
    if a.shape != b.shape:
        raise ValueError(
            f"{len(missing)} of {len(came)} parameters have no gradient: {', '.join(missing[:3])}"
        )
    worst = min(came, key=lambda name: _cosine(came[name], expected[name]))
    return {
        "cosine": _cosine(a, b),
        "norm_ratio": (a.norm() / b.norm()).item(),
        "without_gradient": len(missing),
        "finite": bool(a.isfinite().all()),
        "worst": f"{_cosine(came[worst], expected[worst]):.4f} of {worst}",
    }


def _flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient[name].flatten().double() for name in sorted(gradient)])


def _cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


# ---- streams -------------------------------------------------------------------------------------


def equality(report: Report) -> None:
    """The part ``equality``."""
    device, clips = report.device, {}

    def keep(name: str, work: Callable[[], Tensor]) -> Callable[[], list[int]]:
        def made() -> list[int]:
            clips[name] = work()
            return list(clips[name].shape)

        return made

    report.attempt("clip on the CPU", keep("cpu", lambda: tiny_clip(CPU)))
    report.attempt("clip on the device", keep("device", lambda: tiny_clip(device)))
    report.attempt("device against CPU", lambda: _of_clips(clips["device"], clips["cpu"]))
    report.attempt(
        "device without tf32 against CPU",
        lambda: _of_clips(_without_tf32(lambda: tiny_clip(device)), clips["cpu"]),
    )
    report.attempt("again", lambda: {"equal": torch.equal(tiny_clip(device), clips["device"])})
    report.attempt(
        "prefix of a longer",
        lambda: {"equal": torch.equal(tiny_clip(device, MORE_FRAMES)[:, :FRAMES], clips["device"])},
    )
    report.attempt(
        "bf16 against float32",
        lambda: _of_clips(tiny_clip(device, dtype=torch.bfloat16), clips["device"]),
    )
    report.attempt("1.3B chunk, bf16 against float32", lambda: _large_chunk(device, report.tiny))
    _attentions(report)


def tiny_clip(
    device: torch.device, num_frames: int = FRAMES, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Frames of the shipped student, on a prompt of random numbers."""
    student = load_transformer(TINY_STUDENT, dtype).to(device).eval()
    cond = keyed_normal((1, TEXT_TOKENS, int(student.config.text_dim)), "gpu check", "cond").to(
        device
    )
    size = {"height": 64, "width": 64, "num_frames": num_frames}
    return generate(
        student,
        open_codec(TINY_TEACHER, device),
        cond,
        load_stream_config(TINY_STUDENT),
        seeds=[0],
        **size,
    )


def _without_tf32(work: Callable[[], Tensor]) -> Tensor:
    """Convolutions in float32 have it by default, matrix products have not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return work()
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _of_clips(came: Tensor, expected: Tensor) -> dict[str, float]:
    return {**difference(came, expected), "psnr_db": psnr(came, expected)}


def _large_chunk(device: torch.device, tiny: bool) -> dict[str, float]:
    """One pass over a chunk behind a context, of random weights."""
    sizes = student_sizes(tiny)
    height, width = (8, 8) if tiny else (60, 104)
    network = random_network(CausalWanTransformer3DModel, sizes, torch.float32, device)
    expected = _velocity_behind_context(network, sizes, height, width, device)
    in_precision(network, torch.bfloat16)
    came = _velocity_behind_context(network, sizes, height, width, device)
    return difference(came, expected)


@torch.no_grad()
def _velocity_behind_context(
    network: nn.Module, sizes: dict[str, Any], height: int, width: int, device: torch.device
) -> Tensor:
    cond = random_cond(sizes, device, torch.float32)
    before, x = (
        keyed_normal((1, 16, 3, height, width), "gpu check", i).to(device) for i in range(2)
    )
    cache = network.new_cache(1, height, width)
    network.commit(before, 0.0, cond, cache)
    return network(x, 500.0, cond, cache=cache).sample


# ---- attention -----------------------------------------------------------------------------------

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def _attentions(report: Report) -> None:
    """A chunk of the 1.3B model over a full window, by each kernel that there is, against float32
    arithmetic.
    """
    heads, size = (2, 24) if report.tiny else (12, 128)
    queries, keys = (48, 192) if report.tiny else (4680, 18720)
    shapes = (1, queries, heads, size), (1, keys, heads, size), (1, keys, heads, size)
    q, k, v = (
        keyed_normal(shape, "gpu check", "attention", i).to(report.device)
        for i, shape in enumerate(shapes)
    )
    kept: dict[str, Tensor] = {}

    def reference() -> dict[str, float]:
        kept["out"] = backend(SDPBackend.MATH)(q, k, v)
        return {"rms": kept["out"].square().mean().sqrt().item()}

    report.attempt("attention, float32 math", reference)
    half = [x.bfloat16() for x in (q, k, v)]
    there = BACKENDS if report.device.type == "cuda" else ("flash", "math")
    ways = {name: backend(BACKENDS[name]) for name in there} | {"ours": attention}
    if flash_attn_func is not None:
        ways["flash_attn"] = flash_attn_func
    for name, way in ways.items():
        report.attempt(
            f"attention bf16, {name}",
            lambda: {
                "relative": difference(way(*half), kept["out"])["relative"],
                "ms": median_ms(lambda: way(*half), report.device),
            },
        )
    text = [x[:, :512] for x in half[1:]]
    report.attempt(
        "attention to 512 text tokens, ours",
        lambda: {"ms": median_ms(lambda: attention(half[0], *text), report.device)},
    )


def backend(which: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention over [B, L, N, D] by one of torch's kernels."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(which):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return attend
