"""Prompts, from a file or from the verifiable world, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from streamvid.data.world import caption, sample_spec
from streamvid.seeding import key_to_seed, keyed_generator


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line.

    A line ends with a line feed, a carriage return, or both, and with nothing else that Unicode
    counts as an end. Blank lines are skipped, and comments: lines that are ``#`` alone or begin
    with ``#`` and white space. A prompt may begin with a ``#hashtag``.

    Raises:
        ValueError: if the file is missing, is not UTF-8 text, or holds no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no prompt file at {path}; expected a text file with one prompt a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    # UTF-16 without a mark at its beginning is valid UTF-8, with a zero beside each letter
    if "\0" in text:
        place = text.index("\0")
        raise ValueError(
            f"{path} has a zero byte (character {place}), it is UTF-16 or no text; save it as UTF-8"
        )
    lines = [line.strip() for line in text.split("\n")]
    prompts = [line for line in lines if line and not is_comment(line)]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def is_comment(line: str) -> bool:
    """Whether a line of a prompt file is ``#`` alone or ``#`` and white space before anything
    else.
    """
    return line[0] == "#" and not line[1:2].strip()


def world_prompts(num: int, first_seed: int = 0, held_out: bool = False) -> list[str]:
    """Captions of ``num`` scenes of the verifiable world, one each; scene i has the seed
    ``first_seed`` + i.

    With the seeds of a latent set (``data.latents``) they are the first captions of its clips.

    Args:
        num: at least 1.
        first_seed: seed of the first scene.
        held_out: take combinations of attributes that training never sees.

    Raises:
        ValueError: if ``num`` is below 1.
    """
    if num < 1:
        raise ValueError(f"num={num}, expected at least 1 prompt")
    seeds = range(first_seed, first_seed + num)
    return [
        caption(sample_spec(seed, held_out=held_out), key_to_seed("paraphrase", seed, 0))
        for seed in seeds
    ]


class PromptBatches:
    """Batches of prompts, stateless: the same arguments always give the same batch.

    Args:
        encode: texts to embeddings ``[B, L, D]``, such as ``PromptEncoder.encode``. It is asked for
            the prompts of a batch only: ten thousand of Wan's, padded, are 80 GB.
        prompts: the texts.
        seed: of the choice of prompts.

    Raises:
        ValueError: if there are none.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], prompts: Sequence[str], seed: int):
        if not len(prompts):
            raise ValueError("there are no prompts, expected at least one")
        self.encode = encode
        self.prompts = list(prompts)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def fingerprint(self) -> str:
        """Changes with what the batches are made of."""
        return f"{key_to_seed(*self.prompts):016x}"

    def batch(self, step: int, turn: str, micro: int, indices: range) -> dict:
        """Samples ``indices`` of the joint batch: cond ``[B, L, D]`` (float32), prompts, ``keys``,
        one seed per sample.
        """
        keys = [key_to_seed(self.seed, "prompt", step, turn, micro, index) for index in indices]
        rows = [
            int(torch.randint(len(self), (), generator=keyed_generator("row", key))) for key in keys
        ]
        prompts = [self.prompts[row] for row in rows]
        return {"cond": self.encode(prompts).float(), "prompts": prompts, "keys": keys}
