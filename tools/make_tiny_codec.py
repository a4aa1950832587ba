"""Make the tiny codec: train the video autoencoder on clips of the verifiable world and write its
folder.

python tools/make_tiny_codec.py --out streamvid/assets/teacher --minutes 10
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from streamvid.codecs.tiny_vae import AutoencoderTinyVideo, reconstruction_loss
from streamvid.command_line import Parser, run_tool
from streamvid.data.world import render, sample_spec
from streamvid.files import atomic_folder
from streamvid.seeding import keyed_generator
from streamvid.training.ema import EMA, EMAConfig
from streamvid.training.optimizers import (
    OptimizerConfig,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from streamvid.video import ensure_place

CLIP_FRAMES = 13
OPTIMIZER = OptimizerConfig(
    kind="muon",
    lr=2e-3,
    betas=(0.9, 0.99),
    weight_decay=0.0,
    clip_norm=0.5,
    warmup_steps=50,
    schedule="linear",
    final_lr_ratio=0.01,
)
NOISE, PRIOR_WEIGHT = 0.1, 3e-5
NUM_MEASURED = 96  # clips whose latents give the statistics


def psnr(codec: AutoencoderTinyVideo, clips: Tensor) -> float:
    """Peak signal-to-noise ratio of held-out reconstructions in dB, from the mean squared error of
    all clips.
    """
    with torch.no_grad():
        errors = [
            (codec.raw_decode(codec.raw_encode(x)).clamp(0, 1) - x).square().mean()
            for x in clips.split(8)
        ]
    return -10 * torch.stack(errors).mean().log10().item()


def draw(clips: Tensor, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Cuts ``[B, 13, 3, 64, 64]`` and the noise of their latents."""
    generator = keyed_generator("codec", step)
    rows = torch.randint(len(clips), (batch_size,), generator=generator).tolist()
    starts = torch.randint(
        clips.shape[1] - CLIP_FRAMES + 1, (batch_size,), generator=generator
    ).tolist()
    frames = (
        torch.stack(
            [clips[row, start : start + CLIP_FRAMES] for row, start in zip(rows, starts)]
        ).float()
        / 255
    )
    shape = (batch_size, 16, 1 + (CLIP_FRAMES - 1) // 4, frames.shape[3] // 8, frames.shape[4] // 8)
    return frames, NOISE * torch.randn(shape, generator=generator)


def train(codec: AutoencoderTinyVideo, clips: Tensor, minutes: float, batch_size: int) -> EMA:
    """Train for a time; the learning rate falls to nothing at its end."""
    parameters = dict(codec.named_parameters())
    optimizer, ema = (
        build_optimizer(parameters, OPTIMIZER),
        EMA(parameters, EMAConfig(decay=0.995, warmup=True)),
    )
    started, step, shown = time.monotonic(), 0, 0.0
    with tqdm(total=round(60 * minutes), unit="s", desc="training the codec") as bar:
        while (elapsed := time.monotonic() - started) < 60 * minutes:
            set_learning_rate(optimizer, learning_rate(OPTIMIZER, step, elapsed / (60 * minutes)))
            frames, noise = draw(clips, step, batch_size)
            # 2 to 3 times faster where the processor has bf16
            with torch.autocast("cpu", torch.bfloat16):
                loss, error = reconstruction_loss(codec, frames, noise, PRIOR_WEIGHT)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(codec.parameters(), OPTIMIZER.clip_norm)
            optimizer.step()
            ema.update()
            step += 1
            bar.update(round(elapsed - shown))
            shown += round(elapsed - shown)
            bar.set_postfix(step=step, psnr=f"{-10 * math.log10(error.item()):.1f}")
    return ema


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--out", required=True, help="the folder that gets vae/")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clips", type=int, default=1500)
    args = parser.parse_args(argv)
    return run_tool(lambda: make(Path(args.out), args.minutes, args.clips))


def make(out: Path, minutes: float, num_clips: int) -> None:
    if not 0 < minutes < 1e5 or not NUM_MEASURED <= num_clips <= 100_000:
        raise ValueError(
            f"--minutes {minutes:g} --clips {num_clips}: expected some minutes, and {NUM_MEASURED}"
            " to 100,000 clips"
        )
    ensure_place(out / "vae")
    torch.manual_seed(0)
    specs = (sample_spec(seed) for seed in range(num_clips))
    clips = torch.stack(
        [
            (render(spec, 33) * 255).round().to(torch.uint8)
            for spec in tqdm(specs, total=num_clips, desc="rendering")
        ]
    )
    codec = AutoencoderTinyVideo()
    with train(codec, clips, minutes, 8).weights():
        codec.eval()
        with torch.no_grad():
            latents = torch.cat(
                [codec.raw_encode(x.float() / 255) for x in clips[:NUM_MEASURED].split(8)]
            )
        codec.set_statistics(latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)))
        held_out = torch.stack([render(sample_spec(seed, held_out=True), 33) for seed in range(64)])
        print(f"held-out PSNR {psnr(codec, held_out):.2f} dB")
        with atomic_folder(out / "vae") as temporary:
            codec.half().save_pretrained(temporary)


if __name__ == "__main__":
    sys.exit(main())
