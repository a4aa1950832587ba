"""Telling a score network whose samples it sees, as a class-conditional DiT (arXiv 2212.09748) is
told its class.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from streamvid.models.lora import is_adapted


def add_step_labels(network: nn.Module, num_labels: int) -> None:
    """Gives a Wan transformer a vector for each label, ``network.step_labels``; at zero, so that
    nothing changes yet.

    Raises:
        ValueError: if the network has no time embedding of Wan's form, or trains nothing but its
            adapter.
    """
    if is_adapted(network):
        raise ValueError(
            "fake_knows_steps=true needs a fake score that trains all of its weights; set"
            " fake_score.lora_rank=0"
        )
    embedder = getattr(getattr(network, "condition_embedder", None), "time_embedder", None)
    if embedder is None:
        raise ValueError(
            "labels are added to a Wan transformer's time embedding, which"
            f" {type(network).__name__} does not have"
        )
    like = next(embedder.parameters())
    network.step_labels = nn.Embedding(
        num_labels, embedder.linear_2.out_features, device=like.device, dtype=torch.float32
    )
    nn.init.zeros_(network.step_labels.weight)


@contextmanager
def labelled(network: nn.Module, label: int | None) -> Iterator[None]:
    """Within it, the label's vector is added to the time embedding of every call; None adds
    nothing.
    """
    if label is None:
        yield
        return

    def add(_module: nn.Module, _inputs: tuple, embedding: torch.Tensor) -> torch.Tensor:
        return embedding + network.step_labels.weight[label].to(embedding.dtype)

    hook = network.condition_embedder.time_embedder.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
