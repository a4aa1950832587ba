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

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from streamvid.core.fitting import flow_matching_loss
from streamvid.core.process import add_noise
from streamvid.core.times import TimeLaw, sample_times
from streamvid.objectives.base import ClipStep, Objective, require
from streamvid.seeding import keyed_generator, keyed_normal


@dataclass
class FlowMatching(Objective):
    """Flow matching to encoded clips; ``student`` is the network that is trained, whatever it will
    be used as.
    """

    name: ClassVar[str] = "flow_matching"
    paper: ClassVar[str] = "2210.02747"
    needs: ClassVar[frozenset[str]] = frozenset({"clips"})
    role: ClassVar[Literal["complete", "add-on", "baseline", "start"]] = "start"
    on_points: ClassVar[bool] = False

    mode: Literal["bidirectional", "diffusion_forcing", "teacher_forcing"] = "bidirectional"
    """What a chunk may see."""
    chunk_frames: int = 3
    """Latent frames per chunk; unused in bidirectional mode."""
    time_law: TimeLaw = "logit_normal"
    """Law of the nominal time."""
    shift: float = 3.0
    """Shift of the time law."""
    uncond_share: float = 0.1
    """Share of samples trained on the empty prompt; 0 for a student that runs without guidance."""

    def __post_init__(self) -> None:
        require(self, chunk_frames=(1, math.inf), uncond_share=(0, 1))

    @property
    def is_causal(self) -> bool:
        return self.mode != "bidirectional"

    def choices(self, step: Any) -> None:
        """All steps cost the same."""

    def student(self, step: ClipStep) -> Tensor:  # type: ignore[override]
        """Batches hold ``latents [B, C, T, h, w]``, ``cond [B, L, D]``, ``offset [B]`` and
        ``keys``.
        """
        x0, keys, seed = step.batch["latents"], step.keys, step.seed
        eps = torch.stack([keyed_normal(tuple(x0.shape[1:]), seed, "eps", key) for key in keys])
        eps = eps.to(x0)
        t = torch.stack([self._times(seed, key, x0.shape[2]) for key in keys]).to(x0)  # [B, T]
        cond = self._drop_prompts(step)
        v = self._predict(step, add_noise(x0, eps, t), t, cond, x0)
        return flow_matching_loss(v, x0, eps, mask=self._counts(step.batch["offset"], x0))

    def _times(self, seed: int, key: int, num_frames: int) -> Tensor:
        """A time a frame ``[T]``: one for all, or one a chunk."""
        chunk = num_frames if self.mode == "bidirectional" else self.chunk_frames
        draws = -(-num_frames // chunk)
        t = sample_times(draws, self.time_law, self.shift, keyed_generator(seed, "t", key))
        return t.repeat_interleave(chunk)[:num_frames]

    def _drop_prompts(self, step: ClipStep) -> Tensor:
        assert step.uncond is not None
        cond = step.batch["cond"]
        generators = [keyed_generator(step.seed, "drop", key) for key in step.keys]
        draws = [float(torch.rand((), generator=generator)) for generator in generators]
        drop = torch.tensor(draws, device=cond.device) < self.uncond_share
        return torch.where(drop[:, None, None], step.uncond.to(cond), cond)

    def _predict(self, step: ClipStep, x_t: Tensor, t: Tensor, cond: Tensor, x0: Tensor) -> Tensor:
        if not self.is_causal:
            return step.velocity(x_t, t[:, 0], cond)
        clean = x0 if self.mode == "teacher_forcing" else None
        return step.velocity(x_t, t, cond, self.chunk_frames, clean)

    def _counts(self, offset: Tensor, x0: Tensor) -> Tensor | None:
        """``[B, T]``: False on the first chunk of cuts that do not begin at the clip's
        beginning.
        """
        if self.mode == "bidirectional":
            return None
        frame = torch.arange(x0.shape[2], device=x0.device)
        return (offset.to(x0.device)[:, None] == 0) | (frame >= self.chunk_frames)[None]
