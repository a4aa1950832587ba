"""Embeddings are those of diffusers' pipeline, do not depend on their batch, and survive a restart."""

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from streamvid.codecs.text import PromptEncoder, clean_prompt

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "ball", "falls", "cat", "&", "café"]
PROMPTS = ["a red ball falls", "", "a   cat\n", "a cat &amp;amp; a ball", "cafÃ©", "a cat " * 20]


def make_tokenizer(max_length=12):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_length
    )


def make_text_encoder(seed=0):
    torch.manual_seed(seed)
    return UMT5EncoderModel(UMT5Config(vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2))


def test_embeddings_are_those_of_the_diffusers_pipeline():
    tokenizer, text_encoder = make_tokenizer(), make_text_encoder().eval()
    pipeline = WanPipeline(tokenizer=tokenizer, text_encoder=text_encoder, vae=None, scheduler=None)
    with torch.no_grad():
        expected, negative = pipeline.encode_prompt(PROMPTS, "", max_sequence_length=12)
    encoder = PromptEncoder(tokenizer, text_encoder)
    torch.testing.assert_close(encoder.encode(PROMPTS), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.encode([""])[0], negative[0], rtol=0, atol=1e-6)
    assert (encoder.encode(["a red ball"])[0, 4:] == 0).all()  # three words and the end; no mask is passed on
    assert encoder.embedding_dim == 8


def test_an_embedding_does_not_depend_on_its_batch():
    one_by_one = PromptEncoder(make_tokenizer(), make_text_encoder())
    together = PromptEncoder(make_tokenizer(), make_text_encoder())
    assert torch.equal(together.encode(PROMPTS), torch.cat([one_by_one.encode([prompt]) for prompt in PROMPTS]))


def test_a_prompt_is_cleaned_as_diffusers_cleans_it():
    assert clean_prompt(" a  cat &amp;amp;\n a ball ") == "a cat & a ball" and clean_prompt("cafÃ©") == "café"


class Counting(torch.nn.Module):
    """A text encoder that counts its passes."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.config, self.passes = encoder, encoder.config, 0

    def forward(self, *args):
        self.passes += 1
        return self.encoder(*args)


def test_a_prompt_is_encoded_once_and_then_read_from_memory_and_disk(tmp_path):
    first, again = Counting(make_text_encoder()), Counting(make_text_encoder())
    prompts = ["a cat", "a ball", "a cat"]
    embeddings = PromptEncoder(make_tokenizer(), first, cache_dir=tmp_path).encode(prompts)
    assert first.passes == 2 and len(list(tmp_path.glob("*.safetensors"))) == 2
    assert torch.equal(PromptEncoder(make_tokenizer(), again, cache_dir=tmp_path).encode(prompts), embeddings)
    assert again.passes == 0
    assert all(load_file(path)["embedding"].shape == (12, 8) for path in tmp_path.glob("*.safetensors"))


def test_a_cache_is_not_read_by_another_encoder_or_length(tmp_path):
    PromptEncoder(make_tokenizer(), make_text_encoder(), cache_dir=tmp_path).encode(["a cat"])
    for encoder, length in ((make_text_encoder(seed=1), 12), (make_text_encoder(), 8)):
        other = Counting(encoder)
        embedding = PromptEncoder(make_tokenizer(), other, length, cache_dir=tmp_path).encode(["a cat"])
        assert other.passes == 1 and embedding.shape[1] == length


def test_the_length_is_the_tokenizers_but_at_most_wans():
    assert PromptEncoder(make_tokenizer(12), make_text_encoder()).max_length == 12
    assert PromptEncoder(make_tokenizer(4096), make_text_encoder()).max_length == 512


def test_a_folder_opens_and_a_damaged_one_is_one_line(tmp_path):
    make_text_encoder().save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(ValueError, match="no folder tokenizer/"):
        PromptEncoder.from_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    opened = PromptEncoder.from_pretrained(tmp_path)
    assert torch.equal(opened.encode(PROMPTS), PromptEncoder(make_tokenizer(), make_text_encoder()).encode(PROMPTS))
    assert not any(p.requires_grad for p in opened.text_encoder.parameters())
    file = tmp_path / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot load the text encoder") as caught:
        PromptEncoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
