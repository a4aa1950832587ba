"""From a run's configuration to its batches; what they need is made if it is not there."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from streamvid.codecs.load import open_codec
from streamvid.codecs.text import PromptEncoder
from streamvid.data.latents import LatentClips, WorldClips, ensure_made_of, write_latents
from streamvid.data.parts import checkpoint_key
from streamvid.data.prompts import PromptBatches, read_prompts, world_prompts
from streamvid.data.trajectories import Trajectories
from streamvid.experiment.config import RunConfig
from streamvid.seeding import key_to_seed
from streamvid.teachers.clip_folder import ClipFolder, encode_clips
from streamvid.training.launch import count_processes
from streamvid.training.method import BatchSource


def build_source(
    config: RunConfig, prompts: PromptEncoder, device: torch.device | str = "cpu"
) -> BatchSource:
    """The batches of a run.

    What they need is made if it is not there, by all processes of the run together.

    Args:
        device: that clips are encoded on.

    Raises:
        ValueError: if the data is not there, damaged, or made of something else than the run asks
            for.
    """
    data, seed = config.data, config.train.seed
    if data.kind == "prompts":
        texts = read_prompts(data.path) if data.path else world_prompts(data.num_prompts)
        index, processes = own_share()
        # others' are read from the cache
        first = index * len(texts) // processes if config.prompt_cache else 0
        prompts.prepare(texts[first:] + texts[:first])
        return PromptBatches(prompts.encode, texts, seed)
    if data.path is None:
        raise ValueError(f"data.kind={data.kind} needs data.path, the file to read or to make")
    made_by = {"text_encoder": checkpoint_key(config.components, "text_encoder", "tokenizer")}
    if data.kind == "trajectories":
        source = Trajectories(data.path, seed)
        ensure_made_of(data.path, source.settings, made_by, only_known=True)
    else:
        made_by |= {"codec": checkpoint_key(config.components, "vae")}
        source = open_latents(config, prompts, device, made_by)
    if source.text_dim != prompts.embedding_dim:
        raise ValueError(
            f"{data.path} has embeddings of {source.text_dim} numbers a token, the text encoder of"
            f" {config.components} gives {prompts.embedding_dim}; make it again, or set components"
            " to the folder that it was made with"
        )
    return source


def open_latents(
    config: RunConfig, prompts: PromptEncoder, device: torch.device | str, made_by: dict[str, str]
) -> LatentClips:
    """A latent set; of the world or of a folder it is made if it is not there.

    Args:
        made_by: keys of the codec and the text encoder.
    """
    data = config.data
    path, of = Path(data.path), made_by
    if data.kind == "world":
        of = {**asdict(data.world), **made_by}
        if not path.exists():
            clips = WorldClips(data.world)
            codec = open_codec(config.components, device)
            write_latents(
                path,
                clips,
                codec.encode_frames,
                prompts.encode,
                of,
                clips.at_once,
                own_share(),
                device,
            )
    if data.kind == "clips":
        path = encode_folder(config, prompts, device, made_by)
    source = LatentClips(
        path, config.train.seed, data.latent_frames, data.window_stride, data.first_share
    )
    ensure_made_of(path, source.settings, of, only_known=data.kind != "world")
    return source


def encode_folder(
    config: RunConfig, prompts: PromptEncoder, device: torch.device | str, made_by: dict[str, str]
) -> Path:
    """The latent set of a folder of clips, made if it is not there; its name tells clips and codec
    apart from others.
    """
    data = config.data
    teacher, home = ClipFolder(data.path, data.clips), Path(data.cache_dir) / "clips"
    name = teacher.folder.resolve().name
    path = home / f"{name}-{key_to_seed(teacher.fingerprint(), *made_by.values()):016x}.safetensors"
    if not path.exists():
        encode_clips(
            path,
            teacher,
            open_codec(config.components, device),
            prompts.encode,
            share=own_share(),
            device=device,
            settings={"clips": f"{teacher.fingerprint():016x}", **made_by},
            keep_in=home / f".{name}.parts-{key_to_seed(*made_by.values()):016x}",
        )
    return path


def ensure_same_latents(config: RunConfig, source: BatchSource, student: nn.Module) -> None:
    """A ValueError if a set's latents are not those of the student's codec."""
    made, taken = getattr(source, "latent_channels", None), student.config.out_channels
    if made is not None and made != taken:
        raise ValueError(
            f"{config.data.path} has latents of {made} channels, the student takes {taken}; make it"
            " with its codec"
        )


def own_share() -> tuple[int, int]:
    """The number of this process, and how many there are, also before they know each other."""
    return int(os.environ.get("RANK", 0)), count_processes()
