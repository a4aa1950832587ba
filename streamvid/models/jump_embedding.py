"""Telling a student where it is to land, as flow maps are told: CTM (arXiv 2310.02279), MeanFlow
(2505.13447).

A flow map u(x_t, t, s) is the mean velocity of the way from t to s <= t, and x_t - (t - s) u is the
jump. The student's time embedding already holds t, so this one is a function of the span t - s
alone, and is added to it before the modulation (MeanFlow's table 1b finds t and t - s the best
pair). Three properties, each by construction:

- At span 0 it is exactly 0, whatever was trained: its waves vanish there and no layer has a bias.
  Hence u(x_t, t, t), the velocity, is the output of a student that is told nothing, and context
  passes need no target.
- At first it is 0 at every span, since the last layer is 0, so a Wan checkpoint is unchanged bit
  for bit: u(x_t, t, s) = v(x_t, t). The last layer has a gradient from the first step on.
- Its waves are slow, at most 20 radians over the whole process, where those of Wan's time embedding
  turn by 1,000. MeanFlow and sCM differentiate the student by time, and fast waves make that
  derivative large (sCM, arXiv 2410.11081, section 4.1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamvid.models.lora import is_adapted
from streamvid.seeding import keyed_normal

FASTEST = 0.02
"""Radians per unit of native time, of which the process has 1,000."""
RATIO = 10_000
"""From the fastest wave to the slowest, as in Wan's time embedding."""


class JumpEmbedding(nn.Module):
    """A vector for the span of a jump; 0 at span 0, and 0 everywhere at first."""

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__()
        self.num_waves = freq_dim // 2
        with torch.random.fork_rng(devices=[]):  # the layers' own values are not kept
            self.linear_1 = nn.Linear(2 * self.num_waves, dim, bias=False)
            self.linear_2 = nn.Linear(dim, dim, bias=False)
        shape = tuple(self.linear_1.weight.shape)
        with torch.device("cpu"):  # whatever device is the default here
            values = keyed_normal(shape, "jump embedding")  # the same in every process
        with torch.no_grad():
            self.linear_1.weight.copy_(values / shape[1] ** 0.5)
            self.linear_2.weight.zero_()

    def forward(self, span: Tensor) -> Tensor:
        """Spans t - s [B, F] in native time, 0 to 1000, to [B, F, D]."""
        exponents = torch.arange(self.num_waves, device=span.device) / self.num_waves
        phase = span.unsqueeze(-1) * (FASTEST * RATIO**-exponents)
        # 2 sin^2(p / 2) is 1 - cos(p), without its cancellation at small spans
        waves = torch.cat([phase.sin(), 2 * (phase / 2).sin().square()], dim=-1)
        hidden = F.silu(self.linear_1(waves.to(self.linear_1.weight.dtype)))
        return self.linear_2(hidden)


def add_jump_embedding(network: nn.Module) -> None:
    """Let a causal student, new or loaded, be told where to land; nothing changes before it is
    trained.

    The student takes ``target_timestep`` from then on. ``config.jump_embedding`` is True, so
    folders, copies and state dicts have the embedding. Its parameters are float32 and trainable,
    whatever the others are, and equal in every process. A student that has one keeps it.

    Raises:
        ValueError: if the network is no causal student, or an adapted one.
    """
    if not hasattr(network, "takes_target"):
        raise ValueError(
            "a jump embedding is added to a causal student, CausalWanTransformer3DModel, not to a"
            f" {type(network).__name__}"
        )
    if network.takes_target:
        return
    if is_adapted(network):
        raise ValueError(
            "the network has an adapter already, which would not hold a new embedding; call"
            " add_jump_embedding before adapt"
        )
    config = network.config
    dim = config.num_attention_heads * config.attention_head_dim
    device = network.scale_shift_table.device
    with torch.device(device):
        network.condition_embedder.jump_embedder = JumpEmbedding(config.freq_dim, dim).float()
    # diffusers' list of what was not given, which ``from_config`` leaves out; absent if all was
    defaults = [n for n in config.get("_use_default_values", ()) if n != "jump_embedding"]
    network.register_to_config(jump_embedding=True, _use_default_values=defaults)
