"""A Wan folder in the diffusers layout, with random weights."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "ball", "falls", "cat"]
SIZES = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
    freq_dim=16, ffn_dim=32, num_layers=2,
)  # fmt: skip


@pytest.fixture(scope="session")
def pristine_folder(tmp_path_factory):
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    WanTransformer3DModel(**SIZES).half().save_pretrained(folder / "transformer")
    config = UMT5Config(vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=6
    ).save_pretrained(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"flow_shift": 3.0, "shift": 1.0}))
    return folder


@pytest.fixture
def wan_folder(pristine_folder, tmp_path):
    """A copy to damage."""
    import shutil

    return shutil.copytree(pristine_folder, tmp_path / "teacher")
