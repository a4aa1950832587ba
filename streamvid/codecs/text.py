"""Prompts to embeddings, exactly as diffusers' pipelines make them, with a cache on disk.

A folder holds ``text_encoder/`` and ``tokenizer/``, the layout of every diffusers checkpoint. What
kind of encoder it is says how its pipeline encodes, see ``RECIPES``. Wan cleans a prompt, tokenises
it to 512 tokens, encodes it, cuts the result at its attention mask and pads it with zeros; no mask
is passed on, as Wan's own pipeline passes none.

An encoder can be larger than the model that it serves (UMT5-XXL is 11 GB in bf16). It is loaded
when the first prompt that is not in the cache comes, and can be dropped with ``release`` when all
prompts are encoded.
"""

from __future__ import annotations

import hashlib
import html
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ftfy
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from streamvid.files import atomic_file
from streamvid.weights import check_weights, load_strictly, read_json

log = logging.getLogger(__name__)
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096  # of a weight file, for its fingerprint
TOKENS_PER_PASS = 384
"""At most, or one prompt. Prompts of a published encoder, 226 or 512 tokens, have a pass each, as
in its pipeline. The short ones of a small encoder share one: its passes cost their calls."""


@dataclass(frozen=True)
class Recipe:
    """How a pipeline encodes with a kind of text encoder."""

    encoder_class: str
    """Of transformers."""
    max_length: int
    """Tokens that a prompt is padded or cut to."""
    cleaned: bool
    """Whether prompts pass `clean_prompt`."""
    masked: bool
    """Whether padding is hidden from the encoder, and zero after it."""


RECIPES = {
    "umt5": Recipe("UMT5EncoderModel", max_length=512, cleaned=True, masked=True),  # WanPipeline
    # CogVideoXPipeline
    "t5": Recipe("T5EncoderModel", max_length=226, cleaned=False, masked=False),
}
"""By ``model_type`` in the encoder's ``config.json``."""


def clean_prompt(text: str) -> str:
    """Repair mis-decoded characters, resolve HTML entities and fold white space."""
    unescaped = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", unescaped).strip()


class EncoderFolder:
    """A text encoder on disk: checked when it is named, loaded when it is needed.

    Args:
        folder: ``text_encoder/`` of a checkpoint.
        dtype: to compute in, whatever the file has.
        device: to compute on.

    Raises:
        ValueError: if a file of it is missing or ends early, or it is of a kind without a recipe.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} has no config.json; expected a diffusers folder with {folder.name}/"
            )
        self.folder, self.dtype, self.device = folder, dtype, device
        config = read_json(folder / "config.json")
        self.recipe = _recipe(config.get("model_type"), folder)
        if type(config.get("d_model")) is not int:
            raise ValueError(
                f"{folder / 'config.json'} has no width d_model; copy the checkpoint again"
            )
        self.embedding_dim: int = config["d_model"]
        check_weights(folder)

    def load(self) -> nn.Module:
        """The encoder, every weight of it."""
        import transformers
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # it would draw a bar for 32 small tensors
        return load_strictly(
            getattr(transformers, self.recipe.encoder_class), self.folder, self.dtype
        ).to(self.device)

    def fingerprint(self) -> str:
        """Names the weights without reading all of them: blocks spread over each file, its header
        among them.
        """
        digest = hashlib.blake2b(f"{self.dtype}".encode(), digest_size=16)
        for path in [self.folder / "config.json", *sorted(self.folder.glob("*.safetensors"))]:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for block in range(SAMPLED_BLOCKS):
                    file.seek(max(0, size - BLOCK_BYTES) * block // (SAMPLED_BLOCKS - 1))
                    digest.update(file.read(BLOCK_BYTES))
        return digest.hexdigest()


class PromptEncoder:
    """Encodes prompts, each once; embeddings are kept in memory or, with ``cache_dir``, on disk.

    A prompt past the token limit is cut, as the pipelines do it, and a warning says what of it is
    not seen.

    Args:
        tokenizer: of the checkpoint.
        text_encoder: a ``UMT5EncoderModel`` or ``T5EncoderModel``, frozen in place; or its folder,
            loaded when needed.
        max_length: tokens that a prompt is padded or cut to; None takes the tokenizer's own limit,
            at most the recipe's.
        cache_dir: a folder for embeddings, one safetensors file per prompt, read whenever it is
            asked for; None keeps them in memory. A file that is damaged, or of another prompt or
            encoder, is made anew.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: nn.Module | EncoderFolder,
        max_length: int | None = None,
        cache_dir: str | Path | None = None,
    ):
        self.tokenizer = tokenizer
        if isinstance(text_encoder, EncoderFolder):
            self._source, self._encoder = text_encoder, None
            self.recipe, self.embedding_dim = text_encoder.recipe, text_encoder.embedding_dim
        else:
            self._source, self._encoder = None, text_encoder.requires_grad_(False).eval()
            self.recipe = _recipe(text_encoder.config.model_type, type(text_encoder).__name__)
            self.embedding_dim = text_encoder.config.d_model
        self.max_length = max_length or tokenizer.model_max_length
        if isinstance(self.max_length, (int, float)) and not max_length:
            self.max_length = min(self.max_length, self.recipe.max_length)
        if type(self.max_length) is not int or self.max_length < 1:
            raise ValueError(
                f"the tokenizer's model_max_length is {self.max_length!r}, expected a number of"
                " tokens, at least 1"
            )
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        self._memory: dict[str, Tensor] = {}
        self._told: set[str] = set()
        self._fingerprint: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        max_length: int | None = None,
        cache_dir: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> PromptEncoder:
        """Open ``path/text_encoder`` and ``path/tokenizer``; the weights are checked now and loaded
        with the first prompt.

        Args:
            dtype: that the encoder computes in. diffusers' pipelines compute in the one they are
                opened with, mostly bf16.
            device: that it computes on.

        Raises:
            ValueError: if one of them is missing or damaged, or needs code of its own, which is
                never run.
        """
        for part in ("text_encoder", "tokenizer"):
            if not (Path(path) / part).is_dir():
                raise ValueError(
                    f"{path} has no folder {part}/; expected a checkpoint in the diffusers layout"
                )
        source = EncoderFolder(Path(path) / "text_encoder", dtype, device)
        return cls(_open_tokenizer(Path(path) / "tokenizer"), source, max_length, cache_dir)

    @property
    def text_encoder(self) -> nn.Module:
        """The encoder; loads it if it is not."""
        if self._encoder is None:
            self._encoder = self._source.load().requires_grad_(False).eval()
        return self._encoder

    def release(self) -> None:
        """Drop an encoder that can be loaded again; what is in the cache stays."""
        if self._source is not None:
            self._encoder = None

    def encode(self, prompts: list[str]) -> Tensor:
        """Embeddings ``[B, max_length, D]`` in float32 on the CPU; the same prompt always gives the
        same bits.
        """
        each = dict(self._load(dict.fromkeys(prompts)))
        return torch.stack(
            [F.pad(each[p], (0, 0, 0, self.max_length - len(each[p]))) for p in prompts]
        )

    def prepare(self, prompts: list[str]) -> None:
        """Encode what is not encoded yet, and hold no more of it in memory than ``encode`` will."""
        unique = dict.fromkeys(prompts)
        bar = dict(total=len(unique), desc="encoding prompts", unit="prompt", delay=2)
        for _ in tqdm(self._load(unique), **bar):
            pass

    def _load(self, prompts: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Each prompt with its embedding ``[L, D]`` without the zeros behind it, mostly a tenth of
        the padded size; from memory or the disk if it is there, the others in passes of several.
        """
        missing: list[str] = []
        for prompt in prompts:
            kept = self._kept(prompt)
            if kept is not None:
                yield prompt, kept
                continue
            missing.append(prompt)
            if len(missing) == max(1, TOKENS_PER_PASS // self.max_length):
                yield from self._compute(missing)
                missing = []
        if missing:
            yield from self._compute(missing)

    def _kept(self, prompt: str) -> Tensor | None:
        """The embedding in memory or on the disk; None if it is in neither."""
        if prompt in self._memory:
            return self._memory[prompt]
        read = self._read(self._cache_path(prompt))
        if read is None:
            return None
        self._tell_cut(prompt, read[1])
        return read[0]

    def _read(self, path: Path | None) -> tuple[Tensor, str] | None:
        """What ``_compute`` gave, from the disk; None if it is not there. What is there but is no
        good is removed.
        """
        if path is None or not path.exists():
            return None
        try:
            return read_cached(path)
        except FileNotFoundError:  # another process has just removed it
            return None
        except ValueError as error:
            self._tell_once(f"{error}; encoding the prompt anew")
            path.unlink(missing_ok=True)
            return None

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning("%s", message)

    def _tell_cut(self, prompt: str, cut: str) -> None:
        if cut:
            self._tell_once(
                f"a prompt has at most {self.max_length} tokens: {cut[:200]!r} is cut off"
                f" {prompt[:60]!r}..."
            )

    def _compute(self, prompts: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Embed prompts in one pass, and keep what comes."""
        texts = [clean_prompt(prompt) if self.recipe.cleaned else prompt for prompt in prompts]
        for prompt, text, embedding in zip(prompts, texts, self._pass(texts)):
            cut, path = self._cut_off(text), self._cache_path(prompt)
            self._tell_cut(prompt, cut)
            if path is None:
                self._memory[prompt] = embedding
            elif not path.exists():
                write_cached(path, embedding, cut)
            yield prompt, embedding

    @torch.no_grad()
    def _pass(self, texts: list[str]) -> list[Tensor]:
        """Embeddings ``[L, D]`` of texts that are clean; all are padded to one length, so that none
        depends on the others.
        """
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        device = device_of(self.text_encoder)
        ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
        if not self.recipe.masked:
            return list(self.text_encoder(ids).last_hidden_state.float().cpu())
        hidden = self.text_encoder(ids, mask).last_hidden_state.float().cpu()
        lengths = tokens.attention_mask.sum(1).tolist()
        # copies: a view would hold the padding
        return [each[:length].clone() for each, length in zip(hidden, lengths)]

    def _cut_off(self, text: str) -> str:
        """The end of a prompt that is past the token limit, before the end mark; mostly empty."""
        ids = self.tokenizer(text, verbose=False).input_ids
        return (
            self.tokenizer.decode(ids[self.max_length - 1 : -1])
            if len(ids) > self.max_length
            else ""
        )

    def _cache_path(self, prompt: str) -> Path | None:
        if self.cache_dir is None:
            return None
        name = hashlib.blake2b(
            f"{self._encoder_fingerprint()}\0{prompt}".encode(), digest_size=16
        ).hexdigest()
        return self.cache_dir / f"{name}.safetensors"

    def _encoder_fingerprint(self) -> str:
        """Names the encoder, its sizes and the token limit, so that a cache can't serve another
        encoder.
        """
        if self._fingerprint is None:
            weights = (
                self._source.fingerprint()
                if self._source is not None
                else _parameter_fingerprint(self._encoder)
            )
            self._fingerprint = f"{self.max_length} {weights}"
        return self._fingerprint


def write_cached(path: Path, embedding: Tensor, cut: str) -> None:
    """Keep an embedding ``[L, D]``, and what of its prompt was cut off, at a path whose name says
    whose it is.
    """
    facts = {"cut": cut, "checksum": _checksum(path, embedding, cut)}
    with atomic_file(path) as temporary:
        save_file({"embedding": embedding}, temporary, metadata=facts)


def read_cached(path: Path) -> tuple[Tensor, str]:
    """What ``write_cached`` kept at this path.

    Raises:
        ValueError: one line, if the file is damaged, or is not what was written under this name.
    """
    try:
        with safe_open(path, "pt") as file:
            facts, embedding = file.metadata() or {}, file.get_tensor("embedding")
    except SafetensorError as error:
        raise ValueError(
            f"cached embedding {path} is damaged ({' '.join(str(error).split())[:200]})"
        ) from error
    if "checksum" not in facts:
        raise ValueError(
            f"embeddings cached in {path.parent} have no checksum, they are of an earlier version"
        )
    if facts["checksum"] != _checksum(path, embedding, facts.get("cut", "")):
        raise ValueError(
            f"cached embedding {path} is damaged or of another prompt (its checksum differs)"
        )
    return embedding, facts["cut"]


def _checksum(path: Path, embedding: Tensor, cut: str) -> str:
    """Of all that a cached file says, its name included, which stands for the encoder and the
    prompt.
    """
    said = f"{path.stem}\0{cut}\0{embedding.dtype}\0{tuple(embedding.shape)}\0".encode()
    return hashlib.blake2b(
        said + embedding.reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=16
    ).hexdigest()


def device_of(encoder: nn.Module) -> torch.device:
    """Where an encoder computes: where accelerate's hooks bring its weights, or else where they
    are.

    Raises:
        ValueError: if its weights are nowhere.
    """
    hooks = [getattr(module, "_hf_hook", None) for module in encoder.modules()]
    places = [
        place
        for place in (getattr(hook, "execution_device", None) for hook in hooks)
        if place is not None
    ]
    device = torch.device(places[0]) if places else next(encoder.parameters()).device
    if device.type == "meta":
        raise ValueError(
            "the text encoder has no weights (it is on the device meta); load them, or offload with"
            " accelerate"
        )
    return device


def _open_tokenizer(folder: Path) -> Any:
    """A tokenizer of transformers; code that its folder names (``auto_map``) is neither run nor
    asked about.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a damaged folder
        if "trust_remote_code" in str(error):  # its text advises to run the code
            reason = (
                "it needs code of its own (auto_map), which is never run; take one that"
                " transformers knows"
            )
        else:
            reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot load the tokenizer of {folder.parent}: {reason}") from error


def _recipe(model_type: str | None, named: Path | str) -> Recipe:
    """The recipe of a kind of encoder; a ValueError of one line if there is none."""
    if model_type not in RECIPES:
        raise ValueError(
            f"{named} is a text encoder of the kind {model_type}; expected one of"
            f" {', '.join(RECIPES)}"
        )
    return RECIPES[model_type]


def _parameter_fingerprint(encoder: nn.Module) -> str:
    """Names an encoder that is in memory, by its parameters' shapes and sums."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in encoder.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is offloaded, so that its encoder has no name in a cache; give no"
                " cache_dir, or its folder"
            )
        total = parameter.detach().double().sum().item()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}{total:.12e}".encode())
    return digest.hexdigest()
