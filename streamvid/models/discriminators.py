"""Heads on the features of a transformer that is somebody else's: a discriminator at the price of
its heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamvid.core.adversary import FeatureHeads, capture


class TrunkHeads(nn.Module):
    """Logits from registers that attend to the tokens of some blocks of a Wan transformer (APT,
    arXiv 2501.08316).

    The trunk is not held, so that nobody trains or saves it here; the gradient to its input passes
    all the same.

    Args:
        trunk: whose blocks are read; only its depth and width matter now.
        layers: numbers of the blocks.
        num_logits: K.
        hidden: width of the heads, a multiple of 4.
        seed: of their first weights.

    Raises:
        ValueError: if a layer does not exist.
    """

    def __init__(
        self,
        trunk: nn.Module,
        layers: Sequence[int],
        num_logits: int = 1,
        hidden: int = 64,
        seed: int = 0,
    ):
        super().__init__()
        depth = len(trunk.blocks)
        if not layers or any(not 0 <= layer < depth for layer in layers):
            raise ValueError(
                f"layers={list(layers)}, but the discriminator's trunk has the blocks 0 to"
                f" {depth - 1}"
            )
        self.layers = list(layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = trunk.patch_embedding.out_channels
            self.heads = FeatureHeads([width] * len(self.layers), "query", num_logits, hidden)

    def forward(
        self, trunk: nn.Module, call: Callable[[], Any], num_parts: int | None = 1
    ) -> Tensor:
        """Logits ``[B, P, K]`` of what the trunk sees in ``call``.

        Args:
            trunk: the transformer.
            call: runs it, on a clip of T latent frames.
            num_parts: P, equal stretches of the clip that get logits of their own; 1 is the clip as
                a whole, T its frames, None each token.

        Raises:
            ValueError: if the parts do not divide the clip.
        """
        with capture(trunk, [f"blocks.{layer}" for layer in self.layers]) as features:
            call()
        # [B, L, D]; a causal trunk keeps frames apart
        features = [f.flatten(1, -2) for f in features]
        batch, length = features[0].shape[:2]
        num_parts = length if num_parts is None else num_parts
        if length % num_parts:
            raise ValueError(f"{num_parts} parts do not divide the clip's {length} tokens")
        # [B P, L / P, D]
        tokens = [f.unflatten(1, (num_parts, -1)).flatten(0, 1) for f in features]
        return self.heads(tokens).view(batch, num_parts, -1)
