"""Clips as latents on disk: encoded once with the student's own codec, captioned, embedded, then only read.

A latent set is one safetensors file: ``latents [N, C, T, h, w]`` (float16), ``embeddings [N, P, L, D]`` (float16;
P paraphrases a clip) and the captions in the file's metadata. ``LatentClips`` serves batches from it that are a
pure function of (seed, step, turn, micro-batch, sample index).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from streamvid.data.world import caption, render, sample_spec
from streamvid.files import atomic_file
from streamvid.seeding import key_to_seed, keyed_generator


@dataclass
class WorldSet:
    """Which clips of the verifiable world a latent set holds."""

    num_clips: int = 12000
    """Clips in the set."""
    num_frames: int = 33
    """Pixel frames a clip, 1 + 4k."""
    paraphrases: int = 2
    """Captions a clip."""
    first_seed: int = 0
    """Seed of the first scene; scene i has seed first_seed + i."""
    held_out: bool = False
    """Take combinations of attributes that training never sees."""


def world_clips(config: WorldSet) -> Iterator[tuple[Tensor, list[str]]]:
    """Frames ``[T, 3, 64, 64]`` and captions of each scene of the set."""
    for seed in range(config.first_seed, config.first_seed + config.num_clips):
        spec = sample_spec(seed, held_out=config.held_out)
        captions = [caption(spec, key_to_seed("paraphrase", seed, k)) for k in range(config.paraphrases)]
        yield render(spec, config.num_frames), captions


@torch.no_grad()
def write_latents(
    path: str | Path,
    clips: Iterator[tuple[Tensor, list[str]]],
    num_clips: int,
    encode_frames: Callable[[Tensor], Tensor],
    embed: Callable[[list[str]], Tensor],
    batch_size: int = 16,
) -> None:
    """Encode clips and captions and write the set; the file appears only when it is complete.

    Args:
        clips: pairs of frames ``[T, 3, H, W]`` in [0, 1] and P captions, all clips of one length and size.
        encode_frames: frames ``[B, T, 3, H, W]`` to latents ``[B, C, T', h, w]``.
        embed: prompts to embeddings ``[B, L, D]``.
    """
    latents, embeddings, captions, held = [], [], [], []
    for frames, texts in tqdm(clips, total=num_clips, desc="encoding clips", unit="clip"):
        held.append(frames)
        captions.append(texts)
        if len(held) == batch_size:
            latents.append(encode_frames(torch.stack(held)).half())
            held = []
    if held:
        latents.append(encode_frames(torch.stack(held)).half())
    for texts in tqdm(captions, desc="embedding captions", unit="clip"):
        embeddings.append(embed(texts).half())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tensors = {"latents": torch.cat(latents).contiguous(), "embeddings": torch.stack(embeddings).contiguous()}
    with atomic_file(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"captions": json.dumps(captions)})


class LatentClips:
    """Batches of latent clips, stateless: the same arguments always give the same batch.

    Args:
        path: a file of ``write_latents``.
        seed: of the choice of clips.
        latent_frames: frames to cut from each clip; None takes the whole clip.
        window_stride: cuts start at multiples of it; None cuts at the clip's beginning only.
        first_share: with ``window_stride``, the share of cuts that are taken at the beginning.
    """

    def __init__(
        self,
        path: str | Path,
        seed: int,
        latent_frames: int | None = None,
        window_stride: int | None = None,
        first_share: float = 0.5,
    ):
        if not Path(path).is_file():
            raise ValueError(f"no latent set at {path}; a run with data.kind=world and data.path={path} makes one")
        try:
            with safe_open(path, "pt") as file:
                self.captions: list[list[str]] = json.loads(file.metadata()["captions"])
                self.latents = file.get_tensor("latents")
                self.embeddings = file.get_tensor("embeddings")
        except Exception as error:
            raise ValueError(f"the latent set {path} is damaged ({str(error).splitlines()[0]}); make it again") from error
        self.seed = seed
        self.latent_frames = latent_frames or self.latents.shape[2]
        if self.latent_frames > self.latents.shape[2]:
            raise ValueError(
                f"latent_frames={latent_frames}, but the clips of {path} have {self.latents.shape[2]} latent frames"
            )
        self.window_stride = window_stride
        self.first_share = first_share

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, step: int, turn: str, micro: int, indices: range) -> dict:
        """Samples ``indices`` of the joint batch: latents ``[B, C, T, h, w]``, cond ``[B, L, D]``, prompts,
        ``offset [B]`` (latent frame at which the cut starts) and ``keys``, a seed a sample."""
        rows = [self._sample(step, turn, micro, index) for index in indices]
        clips, paraphrases, offsets, keys = zip(*rows)
        latents = [self.latents[clip, :, start : start + self.latent_frames] for clip, start in zip(clips, offsets)]
        return {
            "latents": torch.stack(latents).float(),
            "cond": torch.stack([self.embeddings[clip, k] for clip, k in zip(clips, paraphrases)]).float(),
            "prompts": [self.captions[clip][k] for clip, k in zip(clips, paraphrases)],
            "offset": torch.tensor(offsets),
            "keys": list(keys),
        }

    def _sample(self, step: int, turn: str, micro: int, index: int) -> tuple[int, int, int, int]:
        key = (self.seed, "clip", step, turn, micro, index)
        generator = keyed_generator(*key)
        clip = int(torch.randint(len(self.latents), (), generator=generator))
        paraphrase = int(torch.randint(self.embeddings.shape[1], (), generator=generator))
        return clip, paraphrase, self._start(generator), key_to_seed(*key)

    def _start(self, generator: torch.Generator) -> int:
        if self.window_stride is None or float(torch.rand((), generator=generator)) < self.first_share:
            return 0
        places = (self.latents.shape[2] - self.latent_frames) // self.window_stride
        return self.window_stride * int(torch.randint(places + 1, (), generator=generator))
