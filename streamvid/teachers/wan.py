"""Wan as a teacher: the transformers and the text encoder of a diffusers folder.

Wan, arXiv 2503.20314. It is a rectified flow with our signs, so the only conversion of the process
at this border is that of the time, ``timestep = 1000 t``. What the folders of the family differ in:

- Wan 2.1 and 2.2 TI2V have one transformer. Wan 2.2 A14B has two: ``transformer/`` for t >=
  ``boundary_ratio`` and ``transformer_2/`` below (``model_index.json``; published are .875 for
  text, .9 for images).
- An image-to-video transformer has 36 input channels: the 16 of the noisy clip, 4 that mark the
  known frames, and 16 of the clip that shows the image and then grey. That of Wan 2.1 looks at the
  image through CLIP besides.
- TI2V (``expand_timesteps``) takes the first frame in its place instead, at t = 0.

Shapes: B batch, C latent channels, T latent frames, h w latent size, L tokens, D their width.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from streamvid.codecs.base import VideoCodec
from streamvid.codecs.text import PromptEncoder
from streamvid.core.times import step_times
from streamvid.hub import resolve_checkpoint
from streamvid.teachers.base import TIMESTEPS, VideoCond, check_family, open_prompts
from streamvid.weights import load_strictly, read_json

MASK_CHANNELS = 4  # one per pixel frame of a latent frame


class WanTeacher:
    """A frozen Wan with its prompt encoder.

    Args:
        transformer: frozen in place; with ``transformer_2``, the expert of the high noise levels.
        prompt_encoder: None for a teacher that is fed embeddings only; then ``uncond`` is None
            until it is set.
        shift: timestep shift that the model is sampled with.
        negative_prompt: what guidance leads away from.
        transformer_2: the expert of the low noise levels, of the same geometry; None for a model
            without experts.
        boundary_ratio: the t from which on ``transformer`` serves; given with ``transformer_2``.
        expand_timesteps: whether a known first frame is put in its place (TI2V).
        image_encoder: of models that look at the first frame through one; None if embeddings are
            given.
        offload: keep the expert that is not in use on the CPU: half the memory, and a transfer at
            each change. Not for gradients through ``predict``.

    Raises:
        ValueError: if these do not fit together.
    """

    provides: frozenset[str] = frozenset({"score"})

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        prompt_encoder: PromptEncoder | None,
        shift: float,
        negative_prompt: str = "",
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        image_encoder: ImageEncoder | None = None,
        offload: bool = False,
    ):
        _check_experts(transformer, transformer_2, boundary_ratio)
        self.transformer = transformer.requires_grad_(False).eval()
        self.transformer_2 = (
            None if transformer_2 is None else transformer_2.requires_grad_(False).eval()
        )
        self.boundary_ratio = boundary_ratio
        self.first_frame_by = _first_frame_by(transformer, expand_timesteps)
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.shift = shift
        self.offload = offload and transformer_2 is not None
        self._device = transformer.device
        self.uncond: Tensor | None = (
            None if prompt_encoder is None else self.encode_prompt([negative_prompt])[0]
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        negative_prompt: str = "",
        load_text_encoder: bool = True,
        cache_dir: str | Path | None = None,
        text_dtype: torch.dtype = torch.float32,
        text_device: torch.device | str | None = None,
        offload: bool = False,
    ) -> WanTeacher:
        """Open a diffusers folder. Weights are read file by file into their precision, never twice
        at once.

        Args:
            path: the folder, or its name on the hub; ``vae/`` is not looked at.
            torch_dtype: of the transformers, None is float32 whatever the file has.
            device: of the transformers.
            negative_prompt: what guidance leads away from.
            load_text_encoder: False leaves it out, and an image encoder too, where all embeddings
                are already on disk.
            cache_dir: where embeddings are kept, see ``PromptEncoder``.
            text_dtype: of the text encoder; published recipes use bfloat16, as diffusers' pipelines
                do when opened in it.
            text_device: of the text encoder, None is the CPU; each prompt is encoded once.
            offload: see the class.

        Raises:
            ValueError: if a part is missing, damaged, or does not fit its configuration.
        """
        path, dtype = resolve_checkpoint(path), torch_dtype or torch.float32
        check_family(path, "WanTransformer3DModel")
        shift, index = read_shift(path), read_index(path)
        transformer = load_wan_transformer(path, dtype)
        encoder = image_encoder = None
        if load_text_encoder:
            encoder = open_prompts(
                path, transformer.config.text_dim, cache_dir, text_dtype, text_device
            )
        if load_text_encoder and transformer.config.image_dim is not None:
            image_encoder = ImageEncoder.from_pretrained(path)
        two = index["boundary_ratio"] is not None
        transformer_2 = load_wan_transformer(path, dtype, "transformer_2") if two else None
        teacher = cls(
            transformer,
            encoder,
            shift,
            negative_prompt,
            transformer_2,
            **index,
            image_encoder=image_encoder,
            offload=offload,
        )
        return teacher.to(device or "cpu")

    def to(self, device: torch.device | str) -> WanTeacher:
        """Move what ``predict`` computes with; with ``offload`` the experts follow when they are
        needed.
        """
        self._device = torch.device(device)
        if not self.offload:
            for expert in self._experts():
                expert.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where ``predict`` computes."""
        return self._device if self.offload else self.transformer.device

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.transformer.config.out_channels

    @property
    def text_dim(self) -> int:
        """Width of the prompt embeddings."""
        return self.transformer.config.text_dim

    def step_times(self, num_steps: int) -> tuple[float, ...]:
        """The times of the model's own Euler sampler, for ``schedule.full_sequence``."""
        return step_times(num_steps, self.shift)

    def encode_prompt(self, prompts: list[str]) -> Tensor:
        """Embeddings ``[B, L, D]``, float32 on the CPU.

        Raises:
            ValueError: if the teacher was opened without its text encoder.
        """
        if self.prompt_encoder is None:
            raise ValueError(
                "this teacher was opened without its text encoder; set load_text_encoder=True"
            )
        return self.prompt_encoder.encode(prompts)

    def encode_first_frame(
        self, images: Tensor, cond: Tensor, codec: VideoCodec, latent_frames: int
    ) -> VideoCond:
        """Prompts with the first frame of the clip, as an image-to-video model takes them.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1], of the clip's size.
            cond: of the prompts, ``[B, L, D]``.
            codec: of the checkpoint.
            latent_frames: T of the clips that are predicted.

        Raises:
            ValueError: if the model is one of text only, or lacks its image encoder.
        """
        if self.first_frame_by is None:
            raise ValueError(
                "this teacher is a text-to-video model and takes no first frame; use an I2V or TI2V"
                " checkpoint"
            )
        image_embeds = None
        if self.transformer.config.image_dim is not None:
            if self.image_encoder is None:
                raise ValueError(
                    "this teacher was opened without its image encoder; set load_text_encoder=True"
                )
            image_embeds = self.image_encoder.encode(images)
        clip = images[:, None]
        if self.first_frame_by == "channels":
            grey = torch.full_like(clip, 0.5).expand(
                -1, codec.temporal_ratio * (latent_frames - 1), -1, -1, -1
            )
            clip = torch.cat([clip, grey], dim=1)
        with torch.no_grad():
            return VideoCond(cond, codec.encode_frames(clip), image_embeds)

    def predict(self, x_t: Tensor, t: Tensor, cond: Tensor | VideoCond) -> Tensor:
        """See ``Teacher.predict``; in the transformer's precision (float32 with TI2V's first frame)
        and on its device.

        Of two experts, a sample goes to that of its noise level; where its frames differ in it, to
        that of the noisiest.

        Raises:
            ValueError: if an image-to-video model gets no first frame, or a text-to-video model
                gets one.
        """
        self._check_cond(x_t, cond)
        if self.transformer_2 is None:
            return self._forward(self.transformer, x_t, t, cond)
        level = TIMESTEPS * (t if t.ndim == 1 else t.amax(dim=1)).float()
        high = level >= TIMESTEPS * self.boundary_ratio  # as diffusers compares
        parts = [
            (expert, rows.nonzero()[:, 0])
            for expert, rows in zip(self._experts(), (high, ~high))
            if rows.any()
        ]
        velocities = [self._forward(e, x_t[rows], t[rows], _rows(cond, rows)) for e, rows in parts]
        order = torch.cat([rows for _, rows in parts]).argsort()
        return torch.cat(velocities)[order.to(velocities[0].device)]

    def trainable_copy(self) -> WanTransformer3DModel:
        """See ``Teacher.trainable_copy``; of two experts, that of the high noise levels."""
        return copy.deepcopy(self.transformer).float().requires_grad_(True).train()

    def _experts(self) -> list[WanTransformer3DModel]:
        return (
            [self.transformer]
            if self.transformer_2 is None
            else [self.transformer, self.transformer_2]
        )

    def _forward(
        self, expert: WanTransformer3DModel, x_t: Tensor, t: Tensor, cond: Tensor | VideoCond
    ) -> Tensor:
        """One transformer on a batch that is all its own."""
        if self.offload:
            self._bring(expert, x_t)
        weight = expert.patch_embedding.weight
        x_t, t = x_t.to(weight.device), t.to(weight.device, torch.float32)
        if not isinstance(cond, VideoCond):
            return self._call(expert, x_t, t, cond, None)
        if self.first_frame_by == "channels":
            return self._call(
                expert, _with_channels(x_t, cond.first_frame), t, cond.embeddings, cond.image_embeds
            )
        known = cond.first_frame.to(x_t)
        times = t if t.ndim == 2 else t[:, None].repeat(1, x_t.shape[2])
        held = torch.cat([torch.zeros_like(times[:, :1]), times[:, 1:]], dim=1)
        velocity = self._call(
            expert,
            torch.cat([known, x_t[:, :, 1:]], dim=2),
            held,
            cond.embeddings,
            cond.image_embeds,
        )
        return torch.cat(
            [_velocity_to(known, x_t[:, :, :1], times[:, :1]), velocity[:, :, 1:].to(x_t)], dim=2
        )

    def _call(
        self,
        expert: WanTransformer3DModel,
        x_t: Tensor,
        t: Tensor,
        cond: Tensor,
        image_embeds: Tensor | None,
    ) -> Tensor:
        weight, timestep = expert.patch_embedding.weight, TIMESTEPS * t
        if t.ndim == 2:
            _, rows, columns = expert.config.patch_size
            tokens = (x_t.shape[3] // rows) * (x_t.shape[4] // columns)
            timestep = timestep.repeat_interleave(tokens, dim=1)  # diffusers takes one per token
        image_embeds = None if image_embeds is None else image_embeds.to(weight)
        return expert(x_t.to(weight), timestep, cond.to(weight), image_embeds, return_dict=False)[0]

    def _bring(self, expert: WanTransformer3DModel, x_t: Tensor) -> None:
        """Put an expert on the device and the other one away."""
        if torch.is_grad_enabled() and x_t.requires_grad:
            raise ValueError(
                "offload=True moves weights that the gradient still needs; set offload=False"
            )
        for other in self._experts():
            if other is not expert:
                other.to("cpu")
        expert.to(self.device)

    def _check_cond(self, x_t: Tensor, cond: Tensor | VideoCond) -> None:
        if not isinstance(cond, VideoCond):
            if self.first_frame_by == "channels":
                raise ValueError(
                    "this teacher is an image-to-video model; give the first frame, see"
                    " encode_first_frame"
                )
            return
        if self.first_frame_by is None:
            raise ValueError(
                "this teacher is a text-to-video model and takes no first frame; give the"
                " embeddings alone"
            )
        frames = x_t.shape[2] if self.first_frame_by == "channels" else 1
        expected = (x_t.shape[0], self.latent_channels, frames, *x_t.shape[3:])
        if tuple(cond.first_frame.shape) != expected:
            raise ValueError(
                f"first_frame of the shape {tuple(cond.first_frame.shape)}, expected {expected}"
            )
        if (cond.image_embeds is None) != (self.transformer.config.image_dim is None):
            needs = "needs" if cond.image_embeds is None else "takes no"
            raise ValueError(
                f"this teacher {needs} image_embeds; make cond with encode_first_frame"
            )


class ImageEncoder:
    """The CLIP through which Wan 2.1 looks at the first frame: hidden states of the last layer but
    one.

    Args:
        processor: ``CLIPImageProcessor`` of the checkpoint.
        model: ``CLIPVisionModel``, frozen in place.
    """

    def __init__(self, processor, model: torch.nn.Module):
        self.processor, self.model = processor, model.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, path: Path) -> ImageEncoder:
        """Open ``path/image_encoder`` and ``path/image_processor``, in float32 on the CPU.

        Raises:
            ValueError: if one of them is missing or damaged.
        """
        from transformers import CLIPImageProcessor, CLIPVisionModel

        if not (path / "image_processor").is_dir():
            raise ValueError(
                f"{path} has no folder image_processor/; expected an I2V checkpoint in the"
                " diffusers layout"
            )
        model = load_strictly(CLIPVisionModel, path / "image_encoder")
        return cls(
            CLIPImageProcessor.from_pretrained(path / "image_processor", local_files_only=True),
            model,
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in [0, 1], rounded to 8 bits as in files, to embeddings ``[B, 1 +
        patches, D']``.
        """
        pixels = (images * 255).round().clamp(0, 255).to(torch.uint8)
        inputs = self.processor(images=list(pixels.cpu()), return_tensors="pt")
        return self.model(**inputs, output_hidden_states=True).hidden_states[-2]


def _check_experts(
    first: WanTransformer3DModel, second: WanTransformer3DModel | None, boundary: float | None
) -> None:
    if (second is None) != (boundary is None):
        raise ValueError("transformer_2 and boundary_ratio belong together; give both or neither")
    if second is None:
        return
    if not 0 < boundary < 1:
        raise ValueError(f"boundary_ratio={boundary}, expected a noise level between 0 and 1")
    for name in ("in_channels", "out_channels", "text_dim", "patch_size", "image_dim"):
        sizes = [getattr(network.config, name) for network in (first, second)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the experts are of different models: {name} is {sizes[0]} and {sizes[1]}"
            )


def _first_frame_by(
    transformer: WanTransformer3DModel, expand_timesteps: bool
) -> Literal["channels", "frame"] | None:
    """How the model takes a first frame; None if it takes none."""
    taken, made = transformer.config.in_channels, transformer.config.out_channels
    if transformer.config.pos_embed_seq_len is not None:
        raise ValueError(
            "this transformer takes a first and a last frame (pos_embed_seq_len); use one of a"
            " first frame"
        )
    if taken == 2 * made + MASK_CHANNELS:
        return "channels"
    if taken != made:
        raise ValueError(
            f"a transformer of {taken} input and {made} output channels, expected equal ones (text"
            f" to video) or {2 * made + MASK_CHANNELS} (image to video); controls and masks of"
            " other kinds are not supported"
        )
    return "frame" if expand_timesteps else None


def _with_channels(x_t: Tensor, first_frame: Tensor) -> Tensor:
    """The noisy clip with the mask of known frames and their latents, ``[B, 2 C + 4, T, h, w]``."""
    mask = torch.zeros_like(x_t[:, :1]).repeat(1, MASK_CHANNELS, 1, 1, 1)
    mask[:, :, 0] = 1
    return torch.cat([x_t, mask, first_frame.to(x_t)], dim=1)


def _velocity_to(known: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The velocity at ``t [B, 1]`` by which every sampler arrives at a known frame; 0 at t = 0,
    where it is there.
    """
    t = t[:, None, :, None, None].to(x_t)  # [B, 1, 1, 1, 1]
    return torch.where(t > 0, (x_t - known) / torch.where(t > 0, t, 1), 0)


def _rows(cond: Tensor | VideoCond, index: Tensor) -> Tensor | VideoCond:
    return cond.rows(index) if isinstance(cond, VideoCond) else cond[index]


def read_shift(path: Path) -> float:
    """The timestep shift in a checkpoint's ``scheduler/``: ``flow_shift`` (UniPC) or ``shift``
    (Euler).

    Raises:
        ValueError: if there is none.
    """
    file = path / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise ValueError(
            f"{path} has no scheduler/scheduler_config.json; expected the diffusers layout"
        )
    config = read_json(file)
    shift = config.get("flow_shift", config.get("shift"))
    if not isinstance(shift, (int, float)) or shift <= 0:
        raise ValueError(
            f"{file} has neither a positive flow_shift nor a positive shift; Wan has 3 to 8"
        )
    return float(shift)


def read_index(path: Path) -> dict:
    """``boundary_ratio`` (None without experts) and ``expand_timesteps`` of a checkpoint's
    ``model_index.json``.

    A folder without that file has one transformer and takes no first frame in its place.

    Raises:
        ValueError: if what it says does not fit the folder.
    """
    file = path / "model_index.json"
    index = read_json(file) if file.is_file() else {}
    boundary, expand = index.get("boundary_ratio"), index.get("expand_timesteps", False)
    if boundary is not None and not (type(boundary) in (int, float) and 0 < boundary < 1):
        raise ValueError(
            f"{file} has boundary_ratio {boundary}, expected a noise level between 0 and 1"
        )
    if boundary is None and (path / "transformer_2").is_dir():
        raise ValueError(
            f"{path} has transformer_2/ but no boundary_ratio in model_index.json; copy that"
            " file too"
        )
    return {"boundary_ratio": boundary, "expand_timesteps": bool(expand)}


def load_wan_transformer(
    path: str | Path, dtype: torch.dtype = torch.float32, part: str = "transformer"
) -> WanTransformer3DModel:
    """``path/part``, bidirectional; a ValueError of one line if it is missing or does not fit."""
    return load_strictly(WanTransformer3DModel, Path(path) / part, dtype)
