"""Embeddings are those of diffusers' pipeline, do not depend on their batch, and survive a
restart.
"""

import builtins
import json
import shutil

import accelerate
import pytest
import torch
from diffusers import CogVideoXPipeline, WanPipeline
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from streamvid.codecs import text
from streamvid.codecs.text import EncoderFolder, PromptEncoder, clean_prompt
from streamvid.data.prompts import world_prompts
from streamvid.students.folder import TINY_TEACHER

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "ball", "falls", "cat", "&", "café"]
PROMPTS = ["a red ball falls", "", "a   cat\n", "a cat &amp;amp; a ball", "cafÃ©", "a cat " * 20]


def make_tokenizer(max_length=12):
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )


def make_text_encoder(seed=0):
    torch.manual_seed(seed)
    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    )


def test_embeddings_are_those_of_the_diffusers_pipeline():
    tokenizer, text_encoder = make_tokenizer(), make_text_encoder().eval()
    pipeline = WanPipeline(tokenizer=tokenizer, text_encoder=text_encoder, vae=None, scheduler=None)
    with torch.no_grad():
        expected, negative = pipeline.encode_prompt(PROMPTS, "", max_sequence_length=12)
    encoder = PromptEncoder(tokenizer, text_encoder)
    torch.testing.assert_close(encoder.encode(PROMPTS), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.encode([""])[0], negative[0], rtol=0, atol=1e-6)
    # three words and the end; no mask is passed on
    assert (encoder.encode(["a red ball"])[0, 4:] == 0).all()
    assert encoder.embedding_dim == 8


@pytest.mark.parametrize("tokens_per_pass", [1, 36, 384])
def test_an_embedding_does_not_depend_on_its_batch(monkeypatch, tokens_per_pass):
    monkeypatch.setattr(text, "TOKENS_PER_PASS", tokens_per_pass)
    one_by_one = PromptEncoder(make_tokenizer(), make_text_encoder())
    together = PromptEncoder(make_tokenizer(), make_text_encoder())
    assert torch.equal(
        together.encode(PROMPTS), torch.cat([one_by_one.encode([prompt]) for prompt in PROMPTS])
    )


def test_shared_passes_give_the_shipped_encoder_the_bits_of_a_pass_per_prompt():
    together, one_by_one = (PromptEncoder.from_pretrained(TINY_TEACHER) for _ in range(2))
    prompts = world_prompts(40)
    together.prepare(prompts)
    for prompt in prompts:
        assert torch.equal(together.encode([prompt]), one_by_one.encode([prompt]))


@pytest.mark.parametrize("max_length, passes", [(12, 2), (100, 14), (226, 40)])
def test_short_prompts_share_a_pass_and_long_ones_have_their_own(max_length, passes):
    """1,886 short prompts took a pass each. Wan's and CogVideoX's have one each, as in their
    pipelines.
    """
    counting = Counting(make_text_encoder())
    encoder = PromptEncoder(make_tokenizer(), counting, max_length)
    encoder.prepare([f"a {'cat ' * number}" for number in range(40)])
    assert counting.passes == passes
    encoder.encode(["a cat ", "a "])
    assert counting.passes == passes  # both were there


def test_what_is_kept_in_memory_has_no_padding():
    """A view of the encoder's output held all of it, for Wan ten times as much."""
    encoder = PromptEncoder(make_tokenizer(), make_text_encoder())
    encoder.prepare(["a cat", "a red ball"])
    held = [embedding.untyped_storage().nbytes() for embedding in encoder._memory.values()]
    assert held == [3 * 8 * 4, 4 * 8 * 4]


def test_a_prompt_is_cleaned_as_diffusers_cleans_it():
    assert (
        clean_prompt(" a  cat &amp;amp;\n a ball ") == "a cat & a ball"
        and clean_prompt("cafÃ©") == "café"
    )


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
    assert first.passes == 1 and len(list(tmp_path.glob("*.safetensors"))) == 2
    assert torch.equal(
        PromptEncoder(make_tokenizer(), again, cache_dir=tmp_path).encode(prompts), embeddings
    )
    assert again.passes == 0
    # no padding
    assert all(
        load_file(path)["embedding"].shape == (3, 8) for path in tmp_path.glob("*.safetensors")
    )


def test_a_cache_is_not_read_by_another_encoder_or_length(tmp_path):
    PromptEncoder(make_tokenizer(), make_text_encoder(), cache_dir=tmp_path).encode(["a cat"])
    for encoder, length in ((make_text_encoder(seed=1), 12), (make_text_encoder(), 8)):
        other = Counting(encoder)
        embedding = PromptEncoder(make_tokenizer(), other, length, cache_dir=tmp_path).encode(
            ["a cat"]
        )
        assert other.passes == 1 and embedding.shape[1] == length


def flip_a_bit(path, _):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def replace_embedding(change):
    def damage(path, _):
        save_file({"embedding": change(load_file(path)["embedding"])}, path)

    return damage


CACHE_DAMAGE = {
    "a flipped bit": flip_a_bit,
    "more tokens than there are": replace_embedding(lambda e: torch.zeros(999, 8)),
    "another width": replace_embedding(lambda e: torch.zeros(3, 9)),
    "integers": replace_embedding(lambda e: e.to(torch.int8)),
    "another name": lambda path, _: save_file({"text": load_file(path)["embedding"]}, path),
    "truncated": lambda path, _: path.write_bytes(path.read_bytes()[:-3]),
    "no safetensors": lambda path, _: path.write_bytes(b""),
    "another prompt's": lambda path, other: shutil.copy(other, path),
}


@pytest.mark.parametrize("kind", CACHE_DAMAGE)
def test_a_cached_embedding_that_is_no_good_is_made_anew_and_said(tmp_path, caplog, kind):
    """It used to be served, or to end in a traceback for ever."""
    first = PromptEncoder(make_tokenizer(), Counting(make_text_encoder()), cache_dir=tmp_path)
    expected = first.encode(["a cat"])
    (path,) = tmp_path.glob("*.safetensors")
    first.encode(["a ball"])
    (other,) = set(tmp_path.glob("*.safetensors")) - {path}
    CACHE_DAMAGE[kind](path, other)
    again = PromptEncoder(make_tokenizer(), Counting(make_text_encoder()), cache_dir=tmp_path)
    assert torch.equal(again.encode(["a cat"]), expected)
    counting = Counting(make_text_encoder())
    repaired = PromptEncoder(make_tokenizer(), counting, cache_dir=tmp_path).encode(["a cat"])
    assert torch.equal(repaired, expected) and counting.passes == 0
    (record,) = caplog.records
    assert (
        str(tmp_path) in record.message
        and "encoding the prompt anew" in record.message
        and "\n" not in record.message
    )


def test_a_prompt_past_the_limit_is_cut_aloud_and_once(tmp_path, caplog):
    """Two captions that differ behind the limit gave the same clip without a word; a cache must not
    hide it either.
    """
    # 12 tokens are the end mark and 11 words
    long = "a red ball falls a red ball falls a red ball cat & red"
    for _ in range(2):
        encoder = PromptEncoder(make_tokenizer(), make_text_encoder(), cache_dir=tmp_path)
        encoder.encode(["a cat", "a red ball falls a red ball falls a red ball", long, long])
        encoder.encode([long])
    assert len(caplog.records) == 2
    assert all(
        "at most 12 tokens: 'cat & red' is cut off 'a red ball" in record.message
        for record in caplog.records
    )


def test_many_prompts_show_their_progress(monkeypatch):
    """A hundred thousand were encoded for minutes without a sign."""
    bars = []
    monkeypatch.setattr(
        text, "tqdm", lambda items, **options: bars.append((list(items), options)) or items
    )
    PromptEncoder(make_tokenizer(), make_text_encoder()).prepare(["a cat", "a ball", "a cat"])
    ((loaded, options),) = bars
    assert [prompt for prompt, _ in loaded] == ["a cat", "a ball"]
    assert options["desc"] == "encoding prompts" and options["total"] == 2


def test_an_offloaded_encoder_computes_where_its_hooks_say():
    """Its weights are on the device "meta" between passes, where the tokens used to be sent."""
    expected = PromptEncoder(make_tokenizer(), make_text_encoder()).encode(["a cat"])
    encoder = make_text_encoder()
    accelerate.cpu_offload(encoder, execution_device="cpu")
    assert next(encoder.parameters()).is_meta
    assert torch.equal(PromptEncoder(make_tokenizer(), encoder).encode(["a cat"]), expected)


def test_an_encoder_without_weights_is_refused(tmp_path):
    encoder = make_text_encoder().to("meta")
    with pytest.raises(ValueError, match="no weights .it is on the device meta."):
        PromptEncoder(make_tokenizer(), encoder).encode(["a cat"])
    with pytest.raises(ValueError, match="is offloaded.*give no cache_dir"):
        PromptEncoder(make_tokenizer(), encoder, cache_dir=tmp_path).encode(["a cat"])


def test_the_length_is_the_tokenizers_but_at_most_wans():
    assert PromptEncoder(make_tokenizer(12), make_text_encoder()).max_length == 12
    assert PromptEncoder(make_tokenizer(4096), make_text_encoder()).max_length == 512


# ---- Folders -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    make_text_encoder().save_pretrained(tmp_path / "text_encoder", max_shard_size="1KB")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def test_a_folder_opens_and_gives_the_same_embeddings(folder):
    opened = PromptEncoder.from_pretrained(folder)
    assert opened.embedding_dim == 8 and opened.max_length == 12
    assert torch.equal(
        opened.encode(PROMPTS), PromptEncoder(make_tokenizer(), make_text_encoder()).encode(PROMPTS)
    )
    assert not any(p.requires_grad for p in opened.text_encoder.parameters())


def test_weights_are_loaded_when_they_are_needed_and_can_be_dropped(folder, monkeypatch):
    """With a cache that is complete, 11 GB of UMT5 are never read."""
    loads = []
    load = EncoderFolder.load
    monkeypatch.setattr(EncoderFolder, "load", lambda self: loads.append(self.folder) or load(self))
    first = PromptEncoder.from_pretrained(folder, cache_dir=folder / "cache")
    assert loads == []
    embeddings = first.encode(["a cat", "a ball"])
    first.encode(["a ball"])
    assert len(loads) == 1
    first.release()
    assert torch.equal(first.encode(["a ball", "a cat"]), embeddings.flip(0)) and len(loads) == 1
    first.encode(["a red cat"])
    assert len(loads) == 2
    again = PromptEncoder.from_pretrained(folder, cache_dir=folder / "cache")
    assert torch.equal(again.encode(["a cat", "a ball"]), embeddings) and len(loads) == 2


def test_a_cache_is_not_read_by_another_folders_encoder(folder):
    PromptEncoder.from_pretrained(folder, cache_dir=folder / "cache").encode(["a cat"])
    # the same sizes
    make_text_encoder(seed=1).save_pretrained(folder / "text_encoder", max_shard_size="1KB")
    other = PromptEncoder.from_pretrained(folder, cache_dir=folder / "cache")
    assert torch.equal(
        other.encode(["a cat"]),
        PromptEncoder(make_tokenizer(), make_text_encoder(1)).encode(["a cat"]),
    )
    low = PromptEncoder.from_pretrained(folder, cache_dir=folder / "cache", dtype=torch.bfloat16)
    assert not torch.equal(low.encode(["a cat"]), other.encode(["a cat"]))
    assert low.text_encoder.dtype == torch.bfloat16 and low.encode(["a cat"]).dtype == torch.float32


def test_half_precision_is_that_of_the_pipeline(folder):
    low = PromptEncoder.from_pretrained(folder, dtype=torch.bfloat16)
    pipeline = WanPipeline(
        low.tokenizer,
        UMT5EncoderModel.from_pretrained(folder / "text_encoder").bfloat16(),
        None,
        None,
    )
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(PROMPTS[0], "", max_sequence_length=12)
    torch.testing.assert_close(low.encode(PROMPTS[:1]), expected.float(), rtol=0, atol=0)


def test_a_t5_is_used_as_cogvideox_uses_it(tmp_path):
    """Neither cleaned nor masked, and padding is encoded too."""
    torch.manual_seed(0)
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    ).eval()
    pipeline = CogVideoXPipeline(make_tokenizer(), t5, vae=None, transformer=None, scheduler=None)
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(PROMPTS, "", max_sequence_length=12)
    torch.testing.assert_close(
        PromptEncoder(make_tokenizer(), t5).encode(PROMPTS), expected, rtol=0, atol=1e-6
    )
    t5.save_pretrained(tmp_path / "text_encoder")
    make_tokenizer(4096).save_pretrained(tmp_path / "tokenizer")
    opened = PromptEncoder.from_pretrained(tmp_path)
    assert opened.max_length == 226 and opened.encode([""]).shape == (1, 226, 8)
    assert (opened.encode([""])[0, -1] != 0).any()


def shards(folder):
    return sorted((folder / "text_encoder").glob("*.safetensors"))


def configure(folder, **values):
    file = folder / "text_encoder/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


DAMAGE = {
    "no folder tokenizer/": lambda f: shutil.rmtree(f / "tokenizer"),
    "no folder text_encoder/": lambda f: shutil.rmtree(f / "text_encoder"),
    "text_encoder has no config.json": lambda f: (f / "text_encoder/config.json").unlink(),
    "config.json is no JSON": lambda f: (f / "text_encoder/config.json").write_text("{"),
    "of the kind llama; expected one of umt5, t5": lambda f: configure(f, model_type="llama"),
    "no width d_model": lambda f: configure(f, d_model=None),
    "index.json names model-00003-of-": lambda f: shards(f)[2].unlink(),
    "00001-of-.*is truncated": lambda f: shards(f)[0].write_bytes(shards(f)[0].read_bytes()[:200]),
    "cannot load the tokenizer": lambda f: (f / "tokenizer/tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_folder_is_one_clear_line(folder, message):
    DAMAGE[message](folder)
    with pytest.raises(ValueError, match=message) as caught:
        PromptEncoder.from_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_weights_of_another_size_are_found_when_they_are_loaded(folder):
    configure(folder, d_ff=24)
    with pytest.raises(ValueError, match="cannot load .*text_encoder") as caught:
        PromptEncoder.from_pretrained(folder).encode(["a cat"])
    assert "\n" not in str(caught.value)


# ---- Code in a folder ----------------------------------------------------------------------------


def bring_code(folder, part, file, **values):
    """A configuration that names ``evil.py`` beside it, which leaves a mark if it runs."""
    config = folder / part / file
    names = {
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        "AutoConfig": "evil.Evil",
        "AutoModel": "evil.Evil",
    }
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": names, **values}))
    (folder / part / "evil.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')\nclass Evil:\n    pass\n"
    )


@pytest.fixture
def asked(monkeypatch):
    """Questions on the terminal, of someone who says yes to all of them."""
    questions = []
    monkeypatch.setattr(builtins, "input", lambda question="": questions.append(question) or "y")
    return questions


@pytest.mark.parametrize("kind", ["Evil", "EvilFast", None])
def test_code_of_a_tokenizer_is_neither_run_nor_asked_about(folder, asked, kind):
    """transformers asks "Do you wish to run the custom code? [y/N]" where it is not told."""
    bring_code(folder, "tokenizer", "tokenizer_config.json", tokenizer_class=kind)
    if kind is None:
        (folder / "tokenizer/config.json").write_text("{}")
        bring_code(folder, "tokenizer", "config.json", model_type="evil")
    try:
        embeddings = PromptEncoder.from_pretrained(folder).encode(["a cat"])
        assert torch.equal(
            embeddings, PromptEncoder(make_tokenizer(), make_text_encoder()).encode(["a cat"])
        )
    except ValueError as error:
        assert "needs code of its own (auto_map), which is never run" in str(
            error
        ) and "\n" not in str(error)
        assert "trust_remote_code" not in str(error)
    assert asked == [] and not (folder / "ran").exists()


def test_code_beside_a_text_encoder_is_not_run(folder, asked):
    bring_code(folder, "text_encoder", "config.json", architectures=["Evil"])
    embeddings = PromptEncoder.from_pretrained(folder).encode(["a cat"])
    assert torch.equal(
        embeddings, PromptEncoder(make_tokenizer(), make_text_encoder()).encode(["a cat"])
    )
    assert asked == [] and not (folder / "ran").exists()


def test_umt5_of_the_published_form_opens(folder):
    """One embedding table, ``shared.weight``, though the configuration says that none is tied; some
    versions miss a copy.
    """
    model, part = make_text_encoder(), folder / "text_encoder"
    shutil.rmtree(part)
    model.save_pretrained(part)
    (weights,) = part.glob("*.safetensors")
    tensors = load_file(weights)
    tensors.setdefault("shared.weight", model.shared.weight.detach())
    tensors.pop("encoder.embed_tokens.weight", None)
    save_file(tensors, weights, metadata={"format": "pt"})
    configure(folder, tie_word_embeddings=False)
    expected = PromptEncoder(make_tokenizer(), make_text_encoder()).encode(["a cat"])
    assert torch.equal(PromptEncoder.from_pretrained(folder).encode(["a cat"]), expected)
