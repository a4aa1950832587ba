"""Make the tiny text encoder: a UMT5 encoder and its tokenizer, for the captions of the verifiable
world.

The encoder is trained to let every token of a caption tell all that the caption says (linear probes
on each token), so that a small diffusion model need not learn English. Example:

    python tools/make_tiny_text.py --out streamvid/assets/teacher --steps 2500
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from streamvid.command_line import Parser, run_tool
from streamvid.data.world import (
    COLOURS,
    DIRECTIONS,
    ELASTICITY,
    RADII,
    SHAPES,
    SPEEDS,
    caption,
    describe,
    sample_spec,
)
from streamvid.seeding import keyed_generator
from streamvid.video import ensure_place

MAX_LENGTH = 32


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A unigram tokenizer (as UMT5's) over the world's words, with letters and bytes for all
    others.
    """
    captions = (caption(sample_spec(i, held_out=bool(i % 2)), i) for i in range(4000))
    counts = Counter(word for text in captions for word in text.replace(",", "").split())
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [
        (f"<0x{byte:02X}>", -20.0) for byte in range(256)
    ]
    vocab += [("▁" + word, -math.log(4e4 / count)) for word, count in sorted(counts.items())]
    vocab += [("▁", -12.0), (",", -8.0)] + [
        (letter, -15.0) for letter in "abcdefghijklmnopqrstuvwxyz"
    ]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=MAX_LENGTH,
    )


BODY_WORDS = {
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "size": list(RADII),
    "direction": list(DIRECTIONS),
}
CLIP_WORDS = {
    "speed": list(SPEEDS),
    "elasticity": list(ELASTICITY),
    "family": ["move", "fall", "cross"],
}


def labels(said) -> list[int]:
    """The caption's content as class indices; the last class of each is 'not said'."""
    rows = []
    for place in range(2):
        body = said.bodies[place] if place < len(said.bodies) else None
        rows += [_index(words, getattr(body, name, None)) for name, words in BODY_WORDS.items()]
    return rows + [_index(words, getattr(said, name)) for name, words in CLIP_WORDS.items()]


def _index(words: list[str], value: str | None) -> int:
    return words.index(value) if value is not None else len(words)


def class_counts() -> list[int]:
    body = [len(words) + 1 for words in BODY_WORDS.values()]
    return body + body + [len(words) + 1 for words in CLIP_WORDS.values()]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=2500)
    args = parser.parse_args(argv)
    return run_tool(lambda: make(Path(args.out), args.steps))


def make(out: Path, num_steps: int) -> None:
    if not 1 <= num_steps <= 1_000_000:
        raise ValueError(f"--steps {num_steps}: expected 1 to 1,000,000")
    ensure_place(out / "text_encoder")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=192,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    encoder = UMT5EncoderModel(config)
    sizes = class_counts()
    probe = torch.nn.Linear(config.d_model, sum(sizes))
    optimizer = torch.optim.AdamW(
        [*encoder.parameters(), *probe.parameters()], lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01
    )
    bar = tqdm(range(num_steps))
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (1 - step / num_steps)
        seeds = torch.randint(0, 2**40, (64,), generator=keyed_generator("text", step)).tolist()
        specs = [sample_spec(seed) for seed in seeds]
        tokens = tokenizer(
            [caption(s, k) for s, k in zip(specs, seeds)],
            padding="max_length",
            max_length=MAX_LENGTH,
            return_tensors="pt",
        )
        target = torch.tensor([labels(describe(spec)) for spec in specs])
        hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        mask = tokens.attention_mask.bool()
        logits = probe(hidden)[mask].split(sizes, dim=-1)
        per_token = target[:, None].expand(-1, mask.shape[1], -1)[mask]
        loss = sum(F.cross_entropy(logit, per_token[:, i]) for i, logit in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    encoder.save_pretrained(out / "text_encoder")
    tokenizer.save_pretrained(out / "tokenizer")


if __name__ == "__main__":
    sys.exit(main())
