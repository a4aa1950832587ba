"""What the parts of the check share: a report that survives a crash, times, differences, and
networks of random weights.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamvid.files import atomic_file
from streamvid.metering import GIB, MIB, seconds_of

ERROR_LINES = 3


class Report:
    """The measurements of a part, on the disk after each of them.

    Args:
        file: a ``.json``.
        tiny: whether sizes are those of a rehearsal on a CPU.
    """

    def __init__(self, file: str | Path, tiny: bool) -> None:
        self.file, self.tiny = Path(file), tiny
        self.device = torch.device("cpu" if tiny or not torch.cuda.is_available() else "cuda")
        self.measurements: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        self.write()

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """Keep what ``work`` returns, or its error, and go on; None after an error."""
        started, value = time.perf_counter(), None
        self.write(running=name)
        try:
            value = work()
        except Exception as error:  # whatever it is, the next measurement may go well
            self.errors[name] = last_lines(f"{type(error).__name__}: {error}", ERROR_LINES)
        else:
            self.measurements[name] = value
        self.write()
        self.free()
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
        return value

    def free(self) -> None:
        """Give back what the last measurement left."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def write(self, running: str | None = None) -> None:
        plain = {
            "measurements": as_plain(self.measurements),
            "errors": self.errors,
            "running": running,
        }
        with atomic_file(self.file) as temporary:
            temporary.write_text(json.dumps(plain))


def last_lines(text: str, count: int) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines()[-count:])[-600:]


def as_plain(value: Any) -> Any:
    """As JSON takes it, numbers to six digits."""
    if isinstance(value, dict):
        return {str(key): as_plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, (int, str, bool, type(None))) else str(value)


# ---- times and memory ----------------------------------------------------------------------------


def median_ms(
    work: Callable[[], Any], device: torch.device, repeats: int = 10, warm_up: int = 3
) -> float:
    """Milliseconds of a call."""
    for _ in range(warm_up):
        work()
    return 1000 * statistics.median(seconds_of(work, device) for _ in range(repeats))


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """The most that was allocated since ``reset_peak``; None on a CPU, which doesn't count."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None


def allocated_mib(device: torch.device) -> float | None:
    """What is allocated now; of a CPU all that the process holds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device) / MIB
    import psutil

    return psutil.Process().memory_info().rss / MIB


# ---- differences ---------------------------------------------------------------------------------


def difference(came: Tensor, expected: Tensor) -> dict[str, float]:
    """Greatest absolute difference, and the norm of the difference over the norm of what is
    expected.
    """
    a, b = (x.detach().float().cpu() for x in (came, expected))
    return {
        "max": (a - b).abs().max().item(),
        "relative": ((a - b).norm() / b.norm().clamp_min(1e-30)).item(),
    }


def psnr(came: Tensor, expected: Tensor) -> float:
    """In dB, of images in [0, 1]; infinite where they are equal."""
    error = (came.detach().float().cpu() - expected.detach().float().cpu()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


# ---- networks ------------------------------------------------------------------------------------


def random_network(
    cls: type, sizes: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A network of random weights, with those parts in float32 that ``from_pretrained`` keeps
    so.
    """
    torch.manual_seed(0)
    with torch.device(device):
        network = cls.from_config(sizes)
    return in_precision(network, dtype).eval()


def in_precision(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As ``from_pretrained`` casts it; in place."""
    kept = tuple(network._keep_in_fp32_modules or ())
    for name, parameter in network.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    return network


def student_sizes(tiny: bool) -> dict[str, Any]:
    """Of Wan 2.1 1.3B."""
    from streamvid.models.published import PUBLISHED

    sizes = PUBLISHED["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    small = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "ffn_dim": 96,
        "num_layers": 2,
        "text_dim": 64,
    }
    return {**sizes, **small} if tiny else dict(sizes)


def random_cond(
    sizes: dict[str, Any], device: torch.device, dtype: torch.dtype, batch: int = 1
) -> Tensor:
    """An embedding of as many tokens as a published text encoder gives."""
    from streamvid.seeding import keyed_normal

    return keyed_normal((batch, 512, sizes["text_dim"]), "gpu check", "prompt").to(device, dtype)
