"""A discriminator of finished clips that has read their prompts.

A video transformer looks at the clip in latent space, all frames at once and at one small noise
level, with the prompt in its cross-attention; on the activations of some blocks, heads whose
learned registers gather what they need (``core.adversary.FeatureHeads`` of kind "query"; APT, arXiv
2501.08316) give one logit for the clip, one per chunk, or one per token. The trunk begins as a
denoiser, such as the student: it knows the world and the words already. APT and AAPT train all of
it, diffusion GANs keep it frozen (LADD, arXiv 2403.12015).

Shapes: B batch, C channels, T latent frames, h w latent size, K chunks of f frames, S tokens per
frame, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from streamvid.models.discriminators import TrunkHeads


class VideoDiscriminator(nn.Module):
    """Prompt-conditioned logits of clean clips.

    Args:
        trunk: a Wan transformer, causal or not; used as it is given, in place.
        layers: blocks whose activations the heads read; None takes one at half the depth and the
            last.
        t: noise level that the trunk is told, in [0, 1]; the clip itself is clean. APT found 0 to
            collapse.
        train_trunk: False freezes it; the gradient to the clip passes all the same.
        hidden: width of the heads, a multiple of 4.
        chunk_frames: f, for one logit per chunk; None gives one for the clip.
        per_token: a logit for each of the clip's T S tokens instead, of what the trunk makes of it
            amid all others.
        seed: of the heads' first weights.

    Raises:
        ValueError: if a layer does not exist, ``t`` is no noise level, or logits are asked both a
            chunk and a token.
    """

    def __init__(
        self,
        trunk: nn.Module,
        layers: Sequence[int] | None = None,
        t: float = 0.1,
        train_trunk: bool = True,
        hidden: int = 64,
        chunk_frames: int | None = None,
        per_token: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        depth = len(trunk.blocks)
        layers = sorted({(depth - 1) // 2, depth - 1}) if layers is None else list(layers)
        if per_token and chunk_frames is not None:
            raise ValueError(f"chunk_frames={chunk_frames} and per_token: give one of them")
        if not 0 <= t <= 1:
            raise ValueError(f"t={t}, expected a noise level in [0, 1]")
        self.trunk = trunk.requires_grad_(train_trunk)
        self.t, self.chunk_frames, self.per_token = t, chunk_frames, per_token
        self.heads = TrunkHeads(trunk, layers, hidden=hidden, seed=seed)
        trunk.norm_out.requires_grad_(False)  # what follows the blocks is not read
        for parameter in (trunk.scale_shift_table, *trunk.proj_out.parameters()):
            parameter.requires_grad_(False)

    def forward(self, latents: Tensor, cond: Tensor) -> Tensor:
        """Logits ``[B, 1]``, ``[B, K]`` or ``[B, T S]`` of ``latents [B, C, T, h, w]`` for the
        prompts ``cond [B, L, D]``.

        Raises:
            ValueError: if the chunks do not divide the clip.
        """
        frames = latents.shape[2]
        if self.chunk_frames is not None and frames % self.chunk_frames:
            raise ValueError(
                f"chunk_frames={self.chunk_frames} does not divide {frames} latent frames"
            )
        num_chunks = 1 if self.chunk_frames is None else frames // self.chunk_frames
        num_parts = None if self.per_token else num_chunks
        timestep = torch.full((len(latents),), 1000 * self.t, device=latents.device)
        call = lambda: self.trunk(latents, timestep, cond, return_dict=False)
        return self.heads(self.trunk, call, num_parts)[..., 0]
