"""A black box as a teacher: all that is known of it are finished clips for prompts.

``ClipFolder`` is a folder of captioned clips, ``ClipRenderer`` anything that makes a clip for a
prompt, be it a program or a paid service. Neither has scores, latents or steps. ``encode_clips``
passes the clips once through the student's own codec into a latent set (``data.latents``): a
discriminator shall not tell teacher and student by a codec, a size or a frame rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from streamvid.codecs.base import VideoCodec, check_frames
from streamvid.data.clips import ClipFormat, check_clip, read_captions, read_clip
from streamvid.data.latents import write_latents
from streamvid.seeding import key_to_seed


class ClipFolder:
    """Clips of a folder, captioned as ``data.clips`` says.

    Args:
        folder: of the clips.
        form: what they are brought to.

    Raises:
        ValueError: if there is no clip, or one without a caption.
    """

    provides: frozenset[str] = frozenset({"clips"})

    def __init__(self, folder: str | Path, form: ClipFormat):
        self.folder, self.form = Path(folder), form
        self.clips = read_captions(folder)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        """Frames ``[T, 3, H, W]`` in [0, 1] and the caption of a clip."""
        path, caption = self.clips[index]
        return read_clip(path, self.form), [caption]

    def check(self) -> None:
        """A ValueError of the first clip that can't be opened or is too short, before hours of
        decoding.
        """
        for path, _ in tqdm(self.clips, desc="opening clips", unit="clip"):
            check_clip(path, self.form)

    def names(self) -> list[str]:
        """A name of each clip that changes with the file, its caption and the format, for what is
        made of it.
        """
        f = self.form
        form = [f"{f.fps:g}", f.num_frames, f.height, f.width]
        names = []
        for path, caption in self.clips:
            state = path.stat()
            key = [*form, path.relative_to(self.folder), caption, state.st_size, state.st_mtime_ns]
            names.append(f"{key_to_seed(*map(str, key)):016x}")
        return names

    def fingerprint(self) -> int:
        """A number that changes with any of the names, to name what was made of all clips."""
        return key_to_seed(*self.names())


class ClipRenderer:
    """Clips that are made for prompts, when they are asked for.

    Args:
        render: (prompt, seed) to frames ``[T, 3, H, W]`` in [0, 1], always of one length and size.
        prompts: a clip is made for each.
        seed: of the clips' own seeds.
    """

    provides: frozenset[str] = frozenset({"clips"})

    def __init__(self, render: Callable[[str, int], Tensor], prompts: Sequence[str], seed: int = 0):
        self.render, self.prompts, self.seed = render, list(prompts), seed
        self._shape: torch.Size | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        """Frames and prompt of a clip.

        Raises:
            ValueError: if it has another shape than the first one that was made.
        """
        prompt = self.prompts[index]
        frames = self.render(prompt, key_to_seed("clip", self.seed, index))
        self._shape = self._shape or frames.shape
        if frames.ndim != 4 or frames.shape[1] != 3 or frames.shape != self._shape:
            raise ValueError(
                f"the clip rendered for {prompt!r} has the shape {tuple(frames.shape)}; expected"
                f" [T, 3, H, W], the same for all prompts, the first was {tuple(self._shape)}"
            )
        return frames, [prompt]

    def names(self) -> list[str]:
        """A name of each clip that changes with its prompt and seed, for what is made of it."""
        return [
            f"{key_to_seed('clip', self.seed, index, prompt):016x}"
            for index, prompt in enumerate(self.prompts)
        ]


def encode_clips(
    path: str | Path,
    teacher: ClipFolder | ClipRenderer,
    codec: VideoCodec,
    embed: Callable[[list[str]], Tensor],
    **options: Any,
) -> None:
    """Encode a black box's clips, one at a time, and write them as the latent set ``path``, which
    appears when it is complete. What was encoded is kept: after a clip that can't be read was
    mended or removed, the others are not read again.

    Args:
        codec: the student's.
        embed: prompts to embeddings ``[B, L, D]``.
        options: ``settings``, ``share``, ``device`` and ``keep_in`` of ``write_latents``; settings
            should name codec and teacher, or what an interrupted call has kept is taken over by one
            with others.

    Raises:
        ValueError: if the codec can't take the clips' length or size, or a clip can't be read.
    """
    if isinstance(teacher, ClipFolder):  # before hours of decoding
        f = teacher.form
        shape = (1, f.num_frames, 3, f.height, f.width)
        check_frames(torch.empty(shape, device="meta"), codec.temporal_ratio, codec.spatial_ratio)
        teacher.check()
    write_latents(path, teacher, codec.encode_frames, embed, names=teacher.names(), **options)
