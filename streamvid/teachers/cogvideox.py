"""CogVideoX as a teacher: another process, another clock and another order of axes behind the same
interface.

CogVideoX, arXiv 2408.06072. It is a variance-preserving diffusion in 1000 steps, x = sqrt(a) x0 +
sqrt(1 - a) eps, whose network predicts v = sqrt(a) eps - sqrt(1 - a) x0. The published schedules
end in pure noise (a = 0). Its states are ours times a factor, so that its velocity is ours exactly
(``core.process.adapt``), and its deterministic DDIM sampler is our Euler sampler at the times of
its steps (``step_times``).

Latents are those of its own autoencoder times ``scaling_factor``. Shapes: B batch, C channels, T
latent frames, h w latent size, L tokens, D their width; the network itself takes ``[B, T, C, h,
w]``.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from einops import rearrange
from torch import Tensor

from streamvid.codecs.text import PromptEncoder
from streamvid.core.process import Clock, adapt, vp_clock
from streamvid.hub import resolve_checkpoint
from streamvid.teachers.base import VideoCond, check_family, open_prompts
from streamvid.weights import load_strictly, read_json

KINDS = {"v_prediction": "v", "epsilon": "eps", "sample": "x0"}  # the scheduler's prediction_type


class CogVideoXTeacher:
    """A frozen CogVideoX with its prompt encoder.

    Args:
        transformer: of text-to-video, 1.0 or 1.5; frozen in place.
        prompt_encoder: None for a teacher that is fed embeddings only; then ``uncond`` is None
            until it is set.
        scheduler: holds the process, and the steps that the model is sampled with.
        negative_prompt: what guidance leads away from.

    Raises:
        ValueError: if the transformer is an image-to-video one, or these do not fit together.
    """

    provides: frozenset[str] = frozenset({"score"})

    def __init__(
        self,
        transformer: CogVideoXTransformer3DModel,
        prompt_encoder: PromptEncoder | None,
        scheduler: CogVideoXDDIMScheduler,
        negative_prompt: str = "",
    ):
        config = transformer.config
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"a transformer of {config.in_channels} input and {config.out_channels} output"
                " channels; only the text-to-video models of CogVideoX are supported, which have"
                " equal ones"
            )
        places = config.max_text_seq_length
        length = places if prompt_encoder is None else prompt_encoder.max_length
        if length != places and not config.use_rotary_positional_embeddings:
            raise ValueError(f"prompts of {length} tokens, the transformer has places for {places}")
        if scheduler.config.prediction_type not in KINDS:
            raise ValueError(
                f"prediction_type {scheduler.config.prediction_type}, expected one of"
                f" {', '.join(KINDS)}"
            )
        self.transformer = transformer.requires_grad_(False).eval()
        self.prompt_encoder = prompt_encoder
        self.scheduler = scheduler
        self.kind = KINDS[scheduler.config.prediction_type]
        self.clock = vp_clock(scheduler.alphas_cumprod.double())
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
    ) -> CogVideoXTeacher:
        """Open a diffusers folder; arguments and errors are those of
        ``WanTeacher.from_pretrained``.
        """
        path = resolve_checkpoint(path)
        check_family(path, "CogVideoXTransformer3DModel")
        scheduler = read_scheduler(path)
        transformer = load_strictly(
            CogVideoXTransformer3DModel, path / "transformer", torch_dtype or torch.float32
        )
        encoder = None
        if load_text_encoder:
            encoder = open_prompts(
                path, transformer.config.text_embed_dim, cache_dir, text_dtype, text_device
            )
        return cls(transformer, encoder, scheduler, negative_prompt).to(device or "cpu")

    def to(self, device: torch.device | str) -> CogVideoXTeacher:
        """Move what ``predict`` computes with."""
        self.transformer.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where ``predict`` computes."""
        return self.transformer.device

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.transformer.config.out_channels

    @property
    def text_dim(self) -> int:
        """Width of the prompt embeddings."""
        return self.transformer.config.text_embed_dim

    @property
    def shift(self) -> float:
        """The timestep shift whose grid meets the model's own in the middle of the steps;
        ``step_times`` is exact.
        """
        middle = self.scheduler.alphas_cumprod[len(self.scheduler.alphas_cumprod) // 2].item()
        # t / (1 - t), which is the shift where the nominal time is 1/2
        return ((1 - middle) / middle) ** 0.5

    def step_times(self, num_steps: int) -> tuple[float, ...]:
        """The times of the model's own DDIM steps, for ``schedule.full_sequence`` with Euler steps.

        The first is 1, pure noise, in the published schedules (zero terminal signal, "trailing"
        steps).
        """
        self.scheduler.set_timesteps(num_steps)
        alpha_bar = self.scheduler.alphas_cumprod.double()[self.scheduler.timesteps]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return tuple((sigma / (alpha + sigma)).tolist())

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

    def predict(self, x_t: Tensor, t: Tensor, cond: Tensor | VideoCond) -> Tensor:
        """See ``Teacher.predict``; for t in (0, 1], one a sample. In float32 around the
        transformer's precision.

        Raises:
            ValueError: on one time per frame, a first frame, or a clip that the patches do not
                divide.
        """
        if isinstance(cond, VideoCond):
            raise ValueError(
                "this teacher is a text-to-video model and takes no first frame; give the"
                " embeddings alone"
            )
        if t.ndim != 1:
            raise ValueError(
                f"times of the shape {tuple(t.shape)}: CogVideoX has one time for all frames,"
                " give [B]"
            )
        return _velocity(self.transformer, self.kind, self.clock, x_t, t, cond)

    def trainable_copy(self) -> CogVideoXScore:
        """See ``Teacher.trainable_copy``."""
        score = copy.deepcopy(self.transformer)
        score.__class__ = CogVideoXScore  # the same parameters, with a border
        score.kind, score.clock = self.kind, self.clock
        return score.float().requires_grad_(True).train()


class CogVideoXScore(CogVideoXTransformer3DModel):
    """A CogVideoX transformer that is trained as a score, with this family's border inside; of
    ``trainable_copy``.
    """

    kind: str
    clock: Clock

    def predict(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """The velocity at ``x_t [B, C, T, h, w]`` and ``t [B]`` in (0, 1], in float32."""
        return _velocity(self, self.kind, self.clock, x_t, t, cond)


def _velocity(
    transformer: CogVideoXTransformer3DModel,
    kind: str,
    clock: Clock,
    x_t: Tensor,
    t: Tensor,
    cond: Tensor,
) -> Tensor:
    """What a transformer of this family says, converted at its border."""
    _check_size(transformer, x_t)
    weight = transformer.proj_out.weight

    def network(x: Tensor, native: Tensor) -> Tensor:
        clip = rearrange(x, "b c t h w -> b t c h w").to(weight)
        rotary = _rotary(transformer, tuple(x.shape[2:]), weight.device)
        out = transformer(
            clip, cond.to(weight), native, image_rotary_emb=rotary, return_dict=False
        )[0]
        return rearrange(out, "b t c h w -> b c t h w")

    return adapt(network, kind, clock)(x_t.to(weight.device), t.to(weight.device))


def _check_size(transformer: CogVideoXTransformer3DModel, x_t: Tensor) -> None:
    config = transformer.config
    patches = (config.patch_size_t or 1, config.patch_size, config.patch_size)
    if any(size % patch for size, patch in zip(x_t.shape[2:], patches)):
        raise ValueError(
            f"latents of {tuple(x_t.shape[2:])} frames, rows and columns, expected multiples of"
            f" {patches}"
        )


def _rotary(
    transformer: CogVideoXTransformer3DModel, size: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Rotary positions of a clip of (T, h, w); the 2B model has none."""
    c = transformer.config
    if not c.use_rotary_positional_embeddings:
        return None
    base = (c.sample_height // c.patch_size, c.sample_width // c.patch_size)
    return _rotary_tables(c.attention_head_dim, c.patch_size, c.patch_size_t, base, size, device)


@lru_cache(maxsize=8)
def _rotary_tables(
    head_dim: int,
    patch: int,
    patch_t: int | None,
    base: tuple[int, int],
    size: tuple[int, int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[tokens, head_dim]``, as ``CogVideoXPipeline`` makes them.

    CogVideoX 1.0 (``patch_t`` None) stretches the grid over the size that it was trained at, 1.5
    cuts it out of that.
    """
    frames, grid = size[0], (size[1] // patch, size[2] // patch)
    if patch_t is None:
        crop = get_resize_crop_region_for_grid(grid, base[1], base[0])
        return get_3d_rotary_pos_embed(head_dim, crop, grid, frames, device=device)
    if grid[0] > base[0] or grid[1] > base[1]:
        raise ValueError(
            f"a grid of {grid} patches, CogVideoX 1.5 was trained on at most {base}; use smaller"
            " frames"
        )
    return get_3d_rotary_pos_embed(
        head_dim, None, grid, frames // patch_t, grid_type="slice", max_size=base, device=device
    )


def read_scheduler(path: Path) -> CogVideoXDDIMScheduler:
    """The process in ``scheduler/``, whichever of CogVideoX's samplers the folder names.

    Raises:
        ValueError: if it is missing, or of another process.
    """
    file = path / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise ValueError(
            f"{path} has no scheduler/scheduler_config.json; expected the diffusers layout"
        )
    config = read_json(file)
    if not str(config.get("_class_name")).startswith("CogVideoX"):
        raise ValueError(
            f"{file} is of {config.get('_class_name')}, expected CogVideoX's DDIM or DPM scheduler"
        )
    try:
        return CogVideoXDDIMScheduler.from_config(config)
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{file} does not fit CogVideoXDDIMScheduler: {' '.join(str(error).split())[:200]}"
        ) from error
