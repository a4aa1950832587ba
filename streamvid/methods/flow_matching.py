"""Flow matching: training of a teacher, and the two causal starts of a student.

Lipman et al., arXiv 2210.02747. The network's velocity at ``x_t = (1 - t) x0 + t eps`` is fitted to
``eps - x0`` on encoded clips; with probability ``uncond_share`` the prompt is replaced by the empty
one, so that guidance works. ``mode`` chooses what the network sees:

- ``bidirectional``: the whole clip at one time (a teacher);
- ``diffusion_forcing``: block-causal, each chunk at a time of its own (CausVid, arXiv 2412.07772;
  after Chen et al., arXiv 2407.01392);
- ``teacher_forcing``: block-causal, each noisy chunk over the clean chunks before it
  (Causal-Forcing, arXiv 2602.02214), at one time a chunk.

Cuts from the middle of a clip carry no loss on their first chunk: its context was cut away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from streamvid.core.fitting import flow_matching_loss
from streamvid.core.process import add_noise
from streamvid.core.times import TimeLaw, sample_times
from streamvid.seeding import keyed_generator, keyed_normal
from streamvid.training.method import as_floats


@dataclass
class Config:
    """Settings of flow matching."""

    mode: Literal["bidirectional", "diffusion_forcing", "teacher_forcing"] = "bidirectional"
    """What a chunk may see."""
    chunk_frames: int = 3
    """Latent frames a chunk; unused in bidirectional mode."""
    time_law: TimeLaw = "logit_normal"
    """Law of the nominal time."""
    shift: float = 3.0
    """Shift of the time law."""
    uncond_share: float = 0.1
    """Share of samples trained on the empty prompt; 0 for a student that runs without guidance."""


class FlowMatching:
    """The method. ``student`` is the network that is trained, whatever it will be used as.

    Args:
        config: see ``Config``.
        student: a Wan transformer, causal in the two causal modes.
        uncond: embedding of the empty prompt ``[L, D]``.
        seed: of all random draws.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: Config, student: nn.Module, uncond: Tensor, seed: int = 0):
        self.config = config
        self.student = student
        self.uncond = uncond
        self.seed = seed

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    def turns(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def choices(self, turn: str, step: int) -> None:
        """All steps cost the same."""

    def loss(self, turn: str, batch: dict, step: int) -> tuple[Tensor, dict[str, float]]:
        """Batches hold ``latents [B, C, T, h, w]``, ``cond [B, L, D]``, ``offset [B]`` and
        ``keys``.
        """
        x0, keys = batch["latents"], batch["keys"]
        eps = torch.stack(
            [keyed_normal(tuple(x0.shape[1:]), self.seed, "eps", key) for key in keys]
        ).to(x0)
        t = torch.stack([self._times(key, x0.shape[2]) for key in keys]).to(x0)  # [B, T]
        cond = self._drop_prompts(batch["cond"], keys)
        v = self._predict(add_noise(x0, eps, t), t, cond, x0)
        loss = flow_matching_loss(v, x0, eps, mask=self._counts(batch["offset"], x0))
        return loss, as_floats({"loss": loss})

    def _times(self, key: int, num_frames: int) -> Tensor:
        """A time a frame ``[T]``: one for all, or one a chunk."""
        chunk = num_frames if self.config.mode == "bidirectional" else self.config.chunk_frames
        draws = -(-num_frames // chunk)
        t = sample_times(
            draws, self.config.time_law, self.config.shift, keyed_generator(self.seed, "t", key)
        )
        return t.repeat_interleave(chunk)[:num_frames]

    def _drop_prompts(self, cond: Tensor, keys: list[int]) -> Tensor:
        draws = [
            float(torch.rand((), generator=keyed_generator(self.seed, "drop", key))) for key in keys
        ]
        drop = torch.tensor(draws, device=cond.device) < self.config.uncond_share
        return torch.where(drop[:, None, None], self.uncond.to(cond), cond)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Tensor, x0: Tensor) -> Tensor:
        if self.config.mode == "bidirectional":
            return self.student(x_t, 1000 * t[:, 0], cond, return_dict=False)[0]
        chunk = {"chunk_frames": self.config.chunk_frames}
        if self.config.mode == "teacher_forcing":
            chunk["clean_context"] = x0
        return self.student(x_t, 1000 * t, cond, **chunk, return_dict=False)[0]

    def _counts(self, offset: Tensor, x0: Tensor) -> Tensor | None:
        """``[B, T]``: False on the first chunk of cuts that do not begin at the clip's
        beginning.
        """
        if self.config.mode == "bidirectional":
            return None
        frame = torch.arange(x0.shape[2], device=x0.device)
        return (offset.to(x0.device)[:, None] == 0) | (frame >= self.config.chunk_frames)[None]


Method = FlowMatching
