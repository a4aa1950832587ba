"""Checkpoint folders in the diffusers layout, with random weights, written by diffusers' own
pipelines.
"""

import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.fakes import TINY_WAN

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "ball", "falls", "cat"]
TEXT = dict(vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
VAE = dict(
    base_dim=4,
    z_dim=4,
    num_res_blocks=1,
    latents_mean=[0.1, -0.2, 0.3, 0.0],
    latents_std=[1.0, 2.0, 0.5, 1.5],
)
VAE22 = dict(
    VAE,
    decoder_base_dim=6,
    is_residual=True,
    patch_size=2,
    in_channels=12,
    out_channels=12,
    scale_factor_spatial=16,
)
COG = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=8,
    text_embed_dim=8,
    num_layers=2,
    sample_width=8,
    sample_height=8,
    sample_frames=9,
    max_text_seq_length=6,
)
PUBLISHED_COG = dict(
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    set_alpha_to_one=True,
    timestep_spacing="trailing",
    clip_sample=False,
)
"""Of CogVideoX-2b (with snr_shift_scale 3) and 5b (1)."""


def tokenizer():
    tokens = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=6,
    )


def transformer(seed, **sizes):
    torch.manual_seed(seed)
    return WanTransformer3DModel(**{**TINY_WAN, **sizes})


def clip():
    """A CLIP of 4 x 4 pixels, 1 + 4 tokens."""
    config = CLIPVisionConfig(
        hidden_size=6,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=4,
        patch_size=2,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 4}, crop_size={"height": 4, "width": 4})
    return {"image_encoder": CLIPVisionModel(config), "image_processor": processor}


WAN_KINDS = {
    "2.1": dict(cls=WanPipeline),
    "a14b": dict(cls=WanPipeline, boundary_ratio=0.875),
    "ti2v": dict(cls=WanPipeline, expand_timesteps=True, vae=VAE22),
    "ti2v_image": dict(cls=WanImageToVideoPipeline, expand_timesteps=True, vae=VAE22),
    "2.1_image": dict(
        cls=WanImageToVideoPipeline, sizes=dict(in_channels=12, image_dim=6, added_kv_proj_dim=24)
    ),
    "a14b_image": dict(cls=WanImageToVideoPipeline, sizes=dict(in_channels=12), boundary_ratio=0.9),
}


def save_wan(folder, cls, sizes={}, vae=VAE, boundary_ratio=None, expand_timesteps=False):
    torch.manual_seed(0)
    image_parts = clip() if "image_dim" in sizes else {}
    cls(
        tokenizer=tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(**TEXT)),
        vae=AutoencoderKLWan(**vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer(1, **sizes),
        transformer_2=None if boundary_ratio is None else transformer(2, **sizes),
        boundary_ratio=boundary_ratio,
        expand_timesteps=expand_timesteps,
        **image_parts,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wan(tmp_path_factory):
    """A kind of ``WAN_KINDS`` to its folder, which is not to be changed."""
    made = {}

    def folder_of(kind):
        if kind not in made:
            made[kind] = save_wan(tmp_path_factory.mktemp("wan"), **WAN_KINDS[kind])
        return made[kind]

    return folder_of


COG_KINDS = {
    "2b": dict(snr_shift_scale=3.0),
    "5b": dict(snr_shift_scale=1.0, sizes=dict(use_rotary_positional_embeddings=True)),
    "1.5": dict(
        snr_shift_scale=1.0, sizes=dict(use_rotary_positional_embeddings=True, patch_size_t=2)
    ),
}


@pytest.fixture(scope="session")
def cogvideox(tmp_path_factory):
    """A kind of ``COG_KINDS`` to its folder, which is not to be changed."""
    made = {}

    def folder_of(kind):
        if kind not in made:
            made[kind] = save_cogvideox(tmp_path_factory.mktemp("cogvideox"), **COG_KINDS[kind])
        return made[kind]

    return folder_of


def save_cogvideox(folder, snr_shift_scale, sizes={}):
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    CogVideoXPipeline(
        tokenizer(),
        T5EncoderModel(T5Config(**TEXT)),
        vae,
        CogVideoXTransformer3DModel(**{**COG, **sizes}),
        CogVideoXDDIMScheduler(**PUBLISHED_COG, snr_shift_scale=snr_shift_scale),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pristine_folder(tmp_path_factory, wan):
    """Wan 2.1 in half precision, as far as a teacher reads it; not to be changed."""
    folder = tmp_path_factory.mktemp("wan") / "half"
    shutil.copytree(wan("2.1"), folder, ignore=shutil.ignore_patterns("vae", "model_index.json"))
    transformer(0).half().save_pretrained(folder / "transformer")
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"flow_shift": 3.0, "shift": 1.0})
    )
    return folder


@pytest.fixture
def wan_folder(pristine_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(pristine_folder, tmp_path / "teacher")
