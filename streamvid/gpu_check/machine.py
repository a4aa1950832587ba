"""The machine: versions, what its matrix units and its memory reach; and the tests that need a
GPU.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from streamvid.gpu_check.check import ROOT
from streamvid.gpu_check.measure import Report, median_ms

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "einops",
    "flash-attn",
    "torchao",
    "numpy",
)


def machine(report: Report) -> None:
    """The part ``machine``."""
    report.attempt("device", lambda: _device(report.device))
    report.attempt("versions", _versions)
    size = 256 if report.tiny else 8192
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        report.attempt(f"matmul_{name}", lambda: matmul(report.device, size, dtype, tf32))
    report.attempt("copy", lambda: _copy(report.device, 2**22 if report.tiny else 2**32))
    report.attempt("launch_us", lambda: _launch_us(report.device))


def _device(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"device": str(device), "python": platform.python_version()}
    facts["cpu_threads"] = torch.get_num_threads()
    if device.type != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(device)
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,power.limit,clocks.max.sm",
        "--format=csv,noheader",
    ]
    try:
        smi = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        smi = str(error)
    return facts | {
        "name": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver, power limit, clock": smi,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def matmul(
    device: torch.device, size: int, dtype: torch.dtype, tf32: bool = False
) -> dict[str, float]:
    """A square matrix product of random numbers."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        ms = median_ms(lambda: a @ b, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {"ms": ms, "tflops": 2 * size**3 / ms / 1e9}


def _copy(device: torch.device, size: int) -> dict[str, float]:
    """Bytes read and written."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), device)
    return {"ms": ms, "tb_per_s": 2 * size / ms / 1e9}


def _launch_us(device: torch.device, count: int = 1000) -> float:
    """Of one small operation in a row of many: what a launch costs the host."""
    x = torch.zeros(8, device=device)

    def row() -> None:
        for _ in range(count):
            x.add_(1)

    return 1000 * median_ms(row, device, repeats=5, warm_up=1) / count


def gpu_tests(report: Report) -> None:
    """The part ``tests``: those marked gpu; they skip themselves where there is none."""
    report.attempt("pytest", _pytest)


def _pytest() -> dict[str, Any]:
    files = [
        str(file)
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in file.read_text()
    ]
    if not files:
        return {"files": 0}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-o",
        "addopts=--import-mode=importlib -q",
        "-rs",
        *files,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode not in (0, 5):
        raise RuntimeError(done.stdout[-1500:] + done.stderr[-500:])
    return {"files": len(files), "result": done.stdout.strip().splitlines()[-1]}
