"""A student as a diffusers pipeline.

    from streamvid.students.pipeline import StreamVidPipeline pipe =
    StreamVidPipeline.from_pretrained("runs/NAME/student").to("cuda") frames = pipe("a small red
    circle moves up", num_frames=33, height=64, width=64, generator=7).frames[0]

What a diffusers user knows works as in a `WanPipeline`: `.to`, `save_pretrained`,
`load_lora_weights`, output types, `callback_on_step_end`, offloading. Three things differ, because
the noise of a stream is keyed, not drawn in a row, and its clips are made a chunk at a time:

- a generator stands for the seed that it was made with; asked twice, it gives the same clip twice.
  `generator=7` is the clip of `streamvid sample --seed 7`, bit for bit, and the i-th video of a
  call has the seed 7 + i;
- the callback gets the chunk that is being denoised, as the data prediction of the step, and may
  return another one;
- there is no scheduler: when which chunk is denoised is in `stream_config.json`.

The loop is `rollout.sampler.stream`. A folder of `students.folder` opens as a pipeline, and the
other way round. Shapes: B videos, C channels, T frames, H W pixels; f latent frames a chunk, h w
latent size.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils import is_peft_available
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn

from streamvid.codecs.base import VideoCodec, latent_frames_of
from streamvid.codecs.text import PromptEncoder
from streamvid.files import atomic_folder
from streamvid.hub import resolve_checkpoint
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.convert import (
    Difference,
    LowRank,
    Update,
    lora_updates,
    read_lora,
    resolved_updates,
)
from streamvid.models.lora import LORA_FILE
from streamvid.rollout import sampler
from streamvid.rollout.loop import ChunkHook
from streamvid.rollout.schedule import STREAM_CONFIG_FILE, StreamConfig
from streamvid.students.card import model_card
from streamvid.students.folder import CARD_FILE, TEXT_PARTS, Student, deployed, load_student
from streamvid.students.session import Session
from streamvid.video import to_uint8

OutputType = Literal["pil", "np", "pt", "latent"]
Seed = int | torch.Generator
Callback = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor] | None]
PARTS = ("transformer", "vae", *TEXT_PARTS)
FILE_OPTIONS = {
    "weight_name",
    "subfolder",
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
}
"""Of ``load_lora_weights``: where its file is."""

log = logging.getLogger(__name__)


@dataclass
class _Call:
    """A clip under way."""

    pipe: StreamVidPipeline
    num_stops: int  # of the pipeline, when the clip began
    interrupted: bool = False


_CALL: ContextVar[_Call | None] = ContextVar("call", default=None)
"""The call whose callback is running."""


class StreamVidPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """Text to video with a causal student, as a clip or as a stream.

    Args:
        transformer: the student.
        vae: the codec of its latents, with a streaming decoder.
        text_encoder, tokenizer: as ``codecs.text`` takes them; both None where embeddings are
            given.
        stream_config: how the student wants to be streamed.
        card: text of the model card that ``save_pretrained`` writes; "" is a new one.

    Raises:
        ValueError: for a text encoder without a tokenizer, or the other way round.
    """

    model_cpu_offload_seq = "text_encoder->transformer"
    _exclude_from_cpu_offload = ["vae"]  # decodes between two chunks, not by its forward
    _optional_components = list(TEXT_PARTS)
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: CausalWanTransformer3DModel,
        vae: VideoCodec,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        stream_config: StreamConfig = StreamConfig(),
        card: str = "",
    ) -> None:
        super().__init__()
        if (text_encoder is None) != (tokenizer is None):
            given, lacking = TEXT_PARTS if tokenizer is None else reversed(TEXT_PARTS)
            raise ValueError(
                f"a {given} without a {lacking}; pass both, or None for both and prompt_embeds for"
                " prompts"
            )
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.stream_config, self.card = stream_config, card
        self._num_stops = 0

    @property
    def interrupt(self) -> bool:
        """Whether the clip whose callback asks ends after the chunk under way.

        As in diffusers, a callback sets ``pipe._interrupt = True``, which ends the call that it is
        the callback of; several calls may be under way, in threads or as streams in turns. Set from
        elsewhere, it ends all that are under way.
        """
        call = _CALL.get()
        return call is not None and call.interrupted

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        call = _CALL.get()
        if call is not None and call.pipe is self:
            call.interrupted = bool(value)
        elif value:
            self._num_stops += 1

    # ---- folders ---------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        components: str | Path | None = None,
        codec: str | Path | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **parts: Any,
    ) -> StreamVidPipeline:
        """Open a student folder, or one that ``save_pretrained`` wrote.

        Args:
            pretrained_model_name_or_path: the folder, or its name on the hub.
            components, codec: where parts that it lacks come from, see ``load_student``.
            dtype: of the transformer (default float32); the codec and the text encoder compute in
                float32.
            torch_dtype: diffusers' former name of ``dtype``.
            parts: any of transformer, vae, text_encoder, tokenizer, to be used in place of the
                folder's.

        Raises:
            ValueError: one line, if a part is missing, damaged or does not fit the others, or for
                another option.
        """
        for name in sorted(parts.keys() - set(PARTS)):
            raise ValueError(
                f"from_pretrained has no option {name}; it takes components, codec, dtype,"
                f" {', '.join(PARTS)}"
            )
        folder = resolve_checkpoint(pretrained_model_name_or_path)
        student = load_student(
            folder, components, dtype=dtype or torch_dtype or torch.float32, codec=codec
        )
        own = {
            "transformer": student.transformer,
            "vae": student.codec,
            "tokenizer": student.prompts.tokenizer,
        }
        if "text_encoder" not in parts:  # large, so not loaded in vain
            own["text_encoder"] = student.prompts.text_encoder
        card = folder / CARD_FILE
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        return cls(**{**own, **parts}, stream_config=student.stream, card=text)

    @classmethod
    def from_pipe(
        cls,
        pipeline: StreamVidPipeline,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> StreamVidPipeline:
        """A pipeline of another one's own parts, not of copies, that makes the same clips.

        Args:
            dtype: of the transformer, in both pipelines; None leaves it, where diffusers would make
                it float32.
            torch_dtype: diffusers' former name of ``dtype``.
            options: any of the constructor's arguments, in place of the other pipeline's.

        Raises:
            ValueError: one line, for a pipeline of another class or an unknown option.
        """
        if not isinstance(pipeline, StreamVidPipeline):
            raise ValueError(
                f"from_pipe takes a StreamVidPipeline, got {type(pipeline).__name__}; use"
                " from_pretrained"
            )
        own = {
            **pipeline.components,
            "stream_config": pipeline.stream_config,
            "card": pipeline.card,
        }
        for name in sorted(options.keys() - own.keys()):
            raise ValueError(f"from_pipe has no option {name}; it takes dtype, {', '.join(own)}")
        made = cls(**{**own, **options})
        dtype = dtype or torch_dtype
        return made if dtype is None else made.to(dtype)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write a folder that ``from_pretrained``, ``load_student`` and ``streamvid sample`` open,
        at once.

        Args:
            save_directory: a student that is already there is replaced.
            options: ``safe_serialization`` and others of diffusers.

        Raises:
            ValueError: if a folder of something else is there, or the transformer has adapters that
                are not merged.
        """
        folder = Path(save_directory)
        if (
            folder.exists()
            and not (folder / STREAM_CONFIG_FILE).is_file()
            and not _is_empty(folder)
        ):
            raise ValueError(f"{folder} is there and is no student folder; name a new one")
        if getattr(self.transformer, "peft_config", None):
            raise ValueError(
                "the transformer has LoRA adapters; merge them by fuse_lora() and"
                " unload_lora_weights(), or only unload them"
            )
        with atomic_folder(folder) as temporary:
            super().save_pretrained(temporary, **options)
            (temporary / STREAM_CONFIG_FILE).write_text(self.stream_config.to_json())
            card = self.card or model_card(folder.name, {}, self.stream_config)
            (temporary / CARD_FILE).write_text(card, encoding="utf-8")

    def to(self, *args: Any, **kwargs: Any) -> StreamVidPipeline:
        """As in diffusers, but a dtype is of the transformer alone, and what needs float32 in it
        stays so.

        The result is that of ``from_pretrained(..., dtype=dtype)``.
        """
        dtypes = [
            given for given in (*args, kwargs.pop("dtype", None)) if isinstance(given, torch.dtype)
        ]
        places = [given for given in args if not isinstance(given, torch.dtype)]
        if places or kwargs:
            super().to(*places, **kwargs)
        for dtype in dtypes:
            _cast(self.transformer, dtype)
        return self

    # ---- adapters --------------------------------------------------------------------------------

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        adapter_name: str | None = None,
        **options: Any,
    ) -> None:
        """Load adapters of a Wan transformer; `set_adapters`, `fuse_lora` and `unload_lora_weights`
        are diffusers'.

        Of what is published an adapter can hold low-rank updates and biases of linear layers.
        Differences of other weights, which some files have besides, are refused unless they are 0;
        ``streamvid convert --lora`` merges them.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder such as
                `runs/NAME/student/lora`, a name on the hub, or tensors by name, in any of the forms
                of ``models.convert.lora_updates``.
            adapter_name: to select it by later.
            options: those of ``WanPipeline.load_lora_weights``; of a file ``weight_name`` and
                ``subfolder``, and for one on the hub those of ``hf_hub_download`` too.

        Raises:
            ValueError: one line, if peft is not installed, or the adapter cannot be read, holds
                what an adapter cannot, or is of another model.
        """
        if not is_peft_available():
            raise ValueError(
                "LoRA weights need peft, which is not installed; `pip install 'streamvid[lora]'`"
            )
        source, name = pretrained_model_name_or_path_or_dict, "the adapter"
        if isinstance(source, dict):
            updates = lora_updates(source, name)
        else:
            name = str(source)
            try:
                updates = read_lora(
                    _adapter_file(
                        name, **{k: options.pop(k) for k in FILE_OPTIONS & options.keys()}
                    )
                )
            except Exception as error:  # of the hub, the disk or the file
                raise ValueError(
                    f"cannot read LoRA weights from {name}: {' '.join(str(error).split())[:300]}"
                ) from error
        tensors = _adapter_tensors(name, updates, self.transformer)
        before = set(getattr(self.transformer, "peft_config", {}))
        super().load_lora_weights(tensors, adapter_name, **options)
        (added,) = set(self.transformer.peft_config) - before
        loaded = sum(
            f".lora_A.{added}.weight" in name for name, _ in self.transformer.named_parameters()
        )
        if loaded != sum(".lora_A." in key for key in tensors):
            self.delete_adapters(added)
            raise ValueError(
                f"of {name} only {loaded} layers could be loaded; merge it with streamvid convert"
                " --lora"
            )
        log.info("loaded %d layers of %s as %s", loaded, name, added)

    # ---- clips and streams -----------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_frames: int,
        height: int,
        width: int,
        num_inference_steps: int | None = None,
        num_videos_per_prompt: int = 1,
        generator: Seed | Sequence[Seed] | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> WanPipelineOutput | tuple[Any]:
        """Make clips, all chunks of them; the arguments and errors of ``stream``.

        Returns:
            ``.frames``, or with ``return_dict=False`` a tuple of it: for "pil" a list of images a
            video, for "np" an array ``[B, T, H, W, 3]``, for "pt" a tensor ``[B, T, 3, H, W]``,
            both in [0, 1], for "latent" normalised latents ``[B, C, 1 + k, h, w]``, not decoded.
            Fewer frames than asked for, if a callback interrupted.
        """
        if num_frames is None:
            raise ValueError(
                "num_frames=None is an endless clip; use stream(...) for that, or give a number"
            )
        _check_output_type(output_type)
        undecoded = output_type == "latent"
        chunks = self.stream(
            prompt,
            num_frames=num_frames,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            num_videos_per_prompt=num_videos_per_prompt,
            generator=generator,
            prompt_embeds=prompt_embeds,
            output_type="latent" if undecoded else "pt",
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        axis, total = (
            (2, latent_frames_of(num_frames, self.vae.temporal_ratio))
            if undecoded
            else (1, num_frames)
        )
        made = []
        with self.progress_bar(total=total) as bar:
            for frames in chunks:
                made.append(frames)
                bar.update(frames.shape[axis])
        video = _output(torch.cat(made, dim=axis), output_type)
        return WanPipelineOutput(frames=video) if return_dict else (video,)

    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_frames: int | None = None,
        height: int,
        width: int,
        num_inference_steps: int | None = None,
        num_videos_per_prompt: int = 1,
        generator: Seed | Sequence[Seed] | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Iterator[Any]:
        """The frames of each chunk as soon as they exist; joined, they are the clip of
        ``__call__``, bit for bit.

        Args:
            prompt: one or several; or ``prompt_embeds`` ``[B, L, D]``.
            num_frames: pixel frames, a whole number of chunks; None streams for ever.
            height, width: in pixels.
            num_inference_steps: a chunk; None is as the student was trained.
            num_videos_per_prompt: each with a seed of its own; those of a prompt follow each other.
            generator: a seed, or a generator that stands for its seed, for the first video, those
                after it count on; or a list with one for each. None draws seeds from torch's global
                generator.
            output_type: "pil", "np", "pt" or "latent", see ``__call__``.
            callback_on_step_end: called as ``callback(pipe, step, timestep, {"latents": x0})``
                after each step of each chunk, ``step`` counting from 0 over the whole clip,
                ``timestep`` in (0, 1000], ``x0 [B, C, f, h, w]`` the step's data prediction; if it
                returns ``{"latents": ...}``, the stream goes on with that.
            callback_on_step_end_tensor_inputs: what it is given; there is only "latents".

        Raises:
            ValueError: one line, at once, for whatever of this cannot be.
        """
        counts = {
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "num_videos_per_prompt": num_videos_per_prompt,
        }
        for name, value in counts.items():
            if type(value) is not int and not (name == "num_frames" and value is None):
                raise ValueError(f"{name}={value!r}, expected a whole number")
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt={num_videos_per_prompt}, expected at least 1")
        _check_output_type(output_type)
        call = _Call(self, self._num_stops)
        hook = self._hook(call, callback_on_step_end, callback_on_step_end_tensor_inputs)
        cond = self._make_cond(prompt, prompt_embeds).repeat_interleave(
            num_videos_per_prompt, dim=0
        )
        chunks = sampler.stream(
            self.transformer,
            _Undecoded(self.vae) if output_type == "latent" else self.vae,
            cond,
            deployed(self.stream_config, steps=num_inference_steps),
            seeds=_seeds(generator, len(cond)),
            height=height,
            width=width,
            num_frames=num_frames,
            after_x0=hook,
        )
        return self._until_interrupted(
            call, (_output(chunk.frames, output_type) for chunk in chunks)
        )

    def session(
        self,
        prompt: str,
        *,
        height: int,
        width: int,
        seed: int = 0,
        num_inference_steps: int | None = None,
        start: Tensor | None = None,
    ) -> Session:
        """A live stream that can be steered, saved and continued, see ``students.session``.

        Unsteered it gives the frames of ``stream(prompt, generator=seed)``, bit for bit.

        Raises:
            ValueError: one line, as ``Session``; and for a pipeline without a text encoder, or one
                that is offloaded.
        """
        if self.text_encoder is None:
            raise ValueError("a session encodes its prompts; open the pipeline with a text encoder")
        if next(self.transformer.parameters()).device != self._execution_device:
            raise ValueError("a session needs the transformer on its device; don't offload it")
        prompts = PromptEncoder(self.tokenizer, self.text_encoder)
        return Session(
            Student(self.transformer, self.stream_config, self.vae, prompts),
            prompt,
            seed=seed,
            height=height,
            width=width,
            steps=num_inference_steps,
            start=start,
        )

    def _until_interrupted(self, call: _Call, outputs: Iterator[Any]) -> Iterator[Any]:
        try:
            for output in outputs:
                yield output
                if call.interrupted or call.num_stops != self._num_stops:
                    return
        finally:
            self.maybe_free_model_hooks()

    def _make_cond(
        self, prompt: str | Sequence[str] | None, prompt_embeds: Tensor | None
    ) -> Tensor:
        """``[B, L, D]`` in float32, where the transformer computes."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("pass either prompt or prompt_embeds, one of the two")
        cond = self._encode(prompt) if prompt_embeds is None else prompt_embeds
        width = self.transformer.config.text_dim
        if cond.ndim != 3 or not len(cond) or cond.shape[-1] != width:
            raise ValueError(f"expected prompt embeddings [B, L, {width}], got {list(cond.shape)}")
        return cond.to(self._execution_device, torch.float32)

    def _encode(self, prompt: str | Sequence[str]) -> Tensor:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"prompt={prompt!r}, expected a text or a list of texts")
        if self.text_encoder is None:
            raise ValueError(
                "this pipeline has no text encoder; pass prompt_embeds, or open it with its"
                " text_encoder"
            )
        return PromptEncoder(self.tokenizer, self.text_encoder).encode(prompts)

    def _hook(
        self, call: _Call, callback: Callback | None, tensor_inputs: Sequence[str]
    ) -> ChunkHook | None:
        """A callback of diffusers as a hook of the rollout."""
        if callback is None:
            return None
        # a diffusers PipelineCallback has its own
        names = list(getattr(callback, "tensor_inputs", tensor_inputs))
        for name in names:
            if name not in self._callback_tensor_inputs:
                raise ValueError(
                    f"callback_on_step_end_tensor_inputs has {name}; there is only latents"
                )
        steps = itertools.count()

        def after_x0(chunk: int, t: float, x0: Tensor) -> Tensor:
            token = _CALL.set(call)
            try:
                returned = callback(self, next(steps), 1000 * t, {"latents": x0} if names else {})
            finally:
                _CALL.reset(token)
            return (returned or {}).get("latents", x0)

        return after_x0


# ---- parts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Undecoded:
    """A codec whose frames are the latents."""

    codec: VideoCodec

    @property
    def latent_channels(self) -> int:
        return self.codec.latent_channels

    @property
    def temporal_ratio(self) -> int:
        return self.codec.temporal_ratio

    @property
    def spatial_ratio(self) -> int:
        return self.codec.spatial_ratio

    def new_decoder_state(self) -> None:
        return None

    def decode_chunk(self, latents: Tensor, state: None) -> tuple[Tensor, None]:
        return latents, None


def _check_output_type(output_type: str) -> None:
    if output_type not in get_args(OutputType):
        raise ValueError(
            f"output_type={output_type!r}, expected one of {', '.join(get_args(OutputType))}"
        )


def _output(frames: Tensor, output_type: OutputType) -> Any:
    """Frames ``[B, T, 3, H, W]`` in [0, 1] in the type that was asked for."""
    if output_type == "pil":
        return [[Image.fromarray(image) for image in to_uint8(clip)] for clip in frames]
    if output_type == "np":
        return frames.float().cpu().permute(0, 1, 3, 4, 2).numpy()
    return frames


def _seeds(generator: Seed | Sequence[Seed] | None, num: int) -> list[int]:
    """A seed for each of ``num`` videos."""
    if generator is None:
        return torch.randint(2**62, (num,)).tolist()
    if not isinstance(generator, (list, tuple)):
        return [_seed(generator) + video for video in range(num)]
    if len(generator) != num:
        raise ValueError(
            f"{len(generator)} generators for {num} videos; give one for each, or one in all"
        )
    return [_seed(one) for one in generator]


def _seed(generator: Seed) -> int:
    if isinstance(generator, torch.Generator):
        return generator.initial_seed()
    if type(generator) is not int:
        raise ValueError(f"generator={generator!r}, expected a torch.Generator or a seed")
    return generator


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


@torch.no_grad()
def _cast(transformer: CausalWanTransformer3DModel, dtype: torch.dtype) -> None:
    """Cast weights in place as diffusers does while loading: those that the class names stay in
    float32.
    """
    kept = set(transformer._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.data.to(
            dtype if kept.isdisjoint(name.split(".")) else torch.float32
        )


def _adapter_file(
    source: str, weight_name: str | None = None, subfolder: str | None = None, **hub: Any
) -> Path:
    """The file of an adapter: itself, that of its folder, or one on the hub."""
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        return Path(hf_hub_download(source, weight_name or LORA_FILE, subfolder=subfolder, **hub))
    folder = path / (subfolder or "")
    named = folder / (weight_name or LORA_FILE)
    files = [named] if named.is_file() else sorted(folder.glob("*.safetensors"))
    if len(files) != 1 or (weight_name and files != [named]):
        raise ValueError(
            f"no {named.name} there, and {len(files)} .safetensors files; give weight_name"
        )
    return files[0]


def _adapter_tensors(
    source: str, updates: Mapping[str, Update], transformer: nn.Module
) -> dict[str, Tensor]:
    """Updates as diffusers' adapters have them, each scale put into B.

    Raises:
        ValueError: if one is of another model, or is none that an adapter can hold; diffusers would
            warn, or say nothing.
    """
    own = {
        name.replace(".base_layer.", "."): p
        for name, p in transformer.named_parameters()
        if ".lora_" not in name
    }
    modules = transformer.named_modules()
    linear = {
        name.replace(".base_layer", "") for name, module in modules if isinstance(module, nn.Linear)
    }
    low: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, update in resolved_updates(own, updates, source):
        module, _, leaf = name.rpartition(".")
        if isinstance(update, LowRank) and module in linear:
            low.setdefault(module, {}).update(A=update.down, B=update.scale * update.up)
        elif isinstance(update, Difference) and leaf == "bias" and module in linear:
            low.setdefault(module, {})["bias"] = update.value()
        elif update.value().any():
            strange.append(name)
    if strange:
        raise ValueError(
            f"{source} holds differences of {len(strange)} weights that an adapter cannot hold,"
            f" such as {strange[0]}; merge it into a student with streamvid convert --lora"
        )
    with_bias, tensors = any("bias" in side for side in low.values()), {}
    for module, side in low.items():
        outputs, inputs = own[f"{module}.weight"].shape
        tensors[f"transformer.{module}.lora_A.weight"] = side.get("A", torch.zeros(1, inputs))
        tensors[f"transformer.{module}.lora_B.weight"] = side.get("B", torch.zeros(outputs, 1))
        if with_bias:  # peft has one for all layers or for none
            tensors[f"transformer.{module}.lora_B.bias"] = side.get("bias", torch.zeros(outputs))
    if not tensors:
        raise ValueError(f"{source} holds no update that changes anything")
    return tensors
