"""Prompts to embeddings, exactly as diffusers' WanPipeline makes them, with a cache on disk.

A folder holds ``text_encoder/`` (a ``transformers.UMT5EncoderModel``) and ``tokenizer/``, the layout of every
Wan checkpoint. A prompt is cleaned, tokenised to ``max_length`` tokens, encoded, cut at its attention mask and
padded with zeros; no mask is passed on, as Wan's own pipeline passes none.
"""

from __future__ import annotations

import hashlib
import html
import re
from pathlib import Path

import ftfy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from streamvid.files import atomic_file

WAN_MAX_LENGTH = 512


def clean_prompt(text: str) -> str:
    """Repair mis-decoded characters, resolve HTML entities and fold white space."""
    unescaped = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", unescaped).strip()


class PromptEncoder:
    """Encodes prompts; embeddings are kept in memory and, with ``cache_dir``, on disk.

    Args:
        tokenizer: of the checkpoint.
        text_encoder: a frozen ``UMT5EncoderModel``.
        max_length: tokens a prompt is padded or cut to; None takes the tokenizer's own limit, at most 512.
        cache_dir: a folder for embeddings, one safetensors file a prompt; None keeps them in memory only.
    """

    def __init__(self, tokenizer, text_encoder: nn.Module, max_length: int | None = None, cache_dir: str | Path | None = None):
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.max_length = max_length or min(tokenizer.model_max_length, WAN_MAX_LENGTH)
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        self._memory: dict[str, Tensor] = {}
        self._fingerprint: str | None = None

    @classmethod
    def from_pretrained(cls, path: str | Path, **options) -> PromptEncoder:
        """Open ``path/text_encoder`` and ``path/tokenizer``.

        Raises:
            ValueError: if one of them is missing or damaged.
        """
        from transformers import AutoTokenizer, UMT5EncoderModel
        from transformers.utils import logging

        for part in ("text_encoder", "tokenizer"):
            if not (Path(path) / part).is_dir():
                raise ValueError(f"{path} has no folder {part}/; expected a Wan checkpoint in the diffusers layout")
        logging.disable_progress_bar()  # it would draw a bar for 32 small tensors
        try:
            text_encoder = UMT5EncoderModel.from_pretrained(Path(path) / "text_encoder")
            tokenizer = AutoTokenizer.from_pretrained(Path(path) / "tokenizer")
        except Exception as error:  # transformers raises many kinds for a damaged folder
            raise ValueError(f"cannot load the text encoder of {path}: {str(error).splitlines()[0]}") from error
        return cls(tokenizer, text_encoder, **options)

    @property
    def embedding_dim(self) -> int:
        return self.text_encoder.config.d_model

    def encode(self, prompts: list[str]) -> Tensor:
        """Embeddings ``[B, max_length, D]`` in float32 on the CPU; the same prompt always gives the same bits."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._memory]
        for prompt in missing:
            self._memory[prompt] = self._load(prompt)
        return torch.stack([self._memory[prompt] for prompt in prompts])

    def _load(self, prompt: str) -> Tensor:
        path = self._cache_path(prompt)
        if path is not None and path.exists():
            return load_file(path)["embedding"]
        embedding = self._compute(prompt)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                save_file({"embedding": embedding}, temporary)
        return embedding

    @torch.no_grad()
    def _compute(self, prompt: str) -> Tensor:
        """One prompt at a time, so that an embedding does not depend on the batch it came in: ``[L, D]``."""
        tokens = self.tokenizer(
            [clean_prompt(prompt)], padding="max_length", max_length=self.max_length, truncation=True,
            return_attention_mask=True, return_tensors="pt",
        )
        device = next(self.text_encoder.parameters()).device
        hidden = self.text_encoder(tokens.input_ids.to(device), tokens.attention_mask.to(device)).last_hidden_state
        mask = tokens.attention_mask[0, :, None].to(hidden)
        return (hidden[0] * mask).float().cpu().contiguous()

    def _cache_path(self, prompt: str) -> Path | None:
        if self.cache_dir is None:
            return None
        name = hashlib.blake2b(f"{self._encoder_fingerprint()}\0{prompt}".encode(), digest_size=16).hexdigest()
        return self.cache_dir / f"{name}.safetensors"

    def _encoder_fingerprint(self) -> str:
        """Names the encoder, its sizes and the token limit, so that a cache can't serve another encoder."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(f"{self.max_length}".encode(), digest_size=16)
            for name, parameter in self.text_encoder.named_parameters():
                digest.update(f"{name}{tuple(parameter.shape)}{parameter.detach().double().sum().item():.12e}".encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint
