"""Wan as a teacher: the transformer and the text encoder of a diffusers folder.

Wan, arXiv 2503.20314. It is a rectified flow with our signs, so the only conversion at this border is that of
the time, ``timestep = 1000 t``.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from streamvid.codecs.text import PromptEncoder


class WanTeacher:
    """A frozen Wan transformer with its prompt encoder.

    Args:
        transformer: text-to-video; frozen in place.
        prompt_encoder: None for a teacher that is fed embeddings only; then ``uncond`` is None until it is set.
        shift: timestep shift that the model is sampled with.
        negative_prompt: what guidance leads away from.
    """

    provides: frozenset[str] = frozenset({"score"})

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        prompt_encoder: PromptEncoder | None,
        shift: float,
        negative_prompt: str = "",
    ):
        self.transformer = transformer.requires_grad_(False).eval()
        self.prompt_encoder = prompt_encoder
        self.shift = shift
        self.uncond: Tensor | None = None if prompt_encoder is None else self.encode_prompt([negative_prompt])[0]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        negative_prompt: str = "",
        load_text_encoder: bool = True,
        cache_dir: str | Path | None = None,
    ) -> WanTeacher:
        """Open ``transformer/``, ``scheduler/``, ``text_encoder/`` and ``tokenizer/`` of a diffusers folder.

        Args:
            path: the folder; ``vae/`` is not looked at.
            torch_dtype: of the transformer, None is float32 whatever the file has. The text encoder is float32.
            device: of the transformer; prompts are encoded on the CPU, once each.
            negative_prompt: what guidance leads away from.
            load_text_encoder: False leaves it out, where all embeddings are already on disk.
            cache_dir: where embeddings are kept, see ``PromptEncoder``.

        Raises:
            ValueError: if a part is missing, damaged, or does not fit its configuration.
        """
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"no teacher folder at {path}; expected a Wan checkpoint in the diffusers layout")
        shift = read_shift(path)
        transformer = load_wan_transformer(path, torch_dtype or torch.float32)
        encoder = PromptEncoder.from_pretrained(path, cache_dir=cache_dir) if load_text_encoder else None
        text_dim = transformer.config.text_dim
        if encoder is not None and encoder.embedding_dim != text_dim:
            raise ValueError(
                f"{path}: the text encoder makes embeddings of {encoder.embedding_dim} numbers, the transformer takes "
                f"{text_dim}; they are from different checkpoints"
            )
        return cls(transformer.to(device), encoder, shift, negative_prompt)

    @property
    def device(self) -> torch.device:
        """Where ``predict`` computes."""
        return self.transformer.device

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.transformer.config.in_channels

    def predict(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """See ``Teacher.predict``; in the transformer's precision and on its device."""
        weight = self.transformer.patch_embedding.weight
        timestep = 1000 * t.to(weight.device, torch.float32)
        if t.ndim == 2:
            timestep = timestep.repeat_interleave(self._frame_tokens(x_t), dim=1)  # diffusers takes one a token
        return self.transformer(x_t.to(weight), timestep, cond.to(weight), return_dict=False)[0]

    def encode_prompt(self, prompts: list[str]) -> Tensor:
        """Embeddings ``[B, L, D]``, float32 on the CPU.

        Raises:
            ValueError: if the teacher was opened without its text encoder.
        """
        if self.prompt_encoder is None:
            raise ValueError("this teacher was opened without its text encoder; set load_text_encoder=True")
        return self.prompt_encoder.encode(prompts)

    def _frame_tokens(self, x_t: Tensor) -> int:
        _, rows, columns = self.transformer.config.patch_size
        return (x_t.shape[3] // rows) * (x_t.shape[4] // columns)


def read_shift(path: Path) -> float:
    """The timestep shift in a checkpoint's ``scheduler/``: ``flow_shift`` (UniPC) or ``shift`` (Euler).

    Raises:
        ValueError: if there is none.
    """
    file = path / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise ValueError(f"{path} has no scheduler/scheduler_config.json; expected the diffusers layout")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    shift = config.get("flow_shift", config.get("shift"))
    if not isinstance(shift, (int, float)) or shift <= 0:
        raise ValueError(f"{file} has neither a positive flow_shift nor a positive shift; Wan has 3 to 8")
    return float(shift)


def load_wan_transformer(path: str | Path, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """``path/transformer``, bidirectional; a ValueError of one line if it is missing or does not fit."""
    folder = Path(path) / "transformer"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{path} has no transformer/config.json; expected a Wan checkpoint in the diffusers layout")
    try:
        transformer, info = WanTransformer3DModel.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # diffusers and safetensors raise many kinds for a damaged folder
        raise ValueError(f"cannot load the transformer of {path}: {' '.join(str(error).split())[:300]}") from error
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing or unexpected:
        kind, names = ("lacks", missing) if missing else ("has the unknown", unexpected)
        raise ValueError(
            f"cannot load the transformer of {path}: the file {kind} {names[0]} and {len(names) - 1} more; "
            "config.json and the weights are from different models"
        )
    return transformer
