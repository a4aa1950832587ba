"""Random numbers that are named by a key instead of drawn from a shared state.

Every draw in training and streaming is a function of a tuple of integers such as (seed, chunk,
event), so that it does not depend on batch size, rank, device or on what was drawn before: an
exported clip equals the stream bit for bit, two processes draw what one would, and a resumed run
continues exactly. What a network makes of equal numbers in batches of another size differs by the
rounding of its matrix products.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def key_to_seed(*key: int | str) -> int:
    """A 63-bit seed from a tuple of integers and strings; the same on every machine and Python."""
    text = "/".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator in the state that the key names; torch uses 32 bits of the seed, so of a
    million keys about a hundred pairs share their numbers.
    """
    return torch.Generator().manual_seed(key_to_seed(*key))


def keyed_normal(shape: tuple[int, ...], *key: int | str) -> Tensor:
    """Standard normal float32 numbers on the CPU, a function of the key and the shape only."""
    return torch.randn(shape, generator=keyed_generator(*key))
