"""Any diffusers video pipeline as a black box: prompts in, clips out.

For families without a file here, and for pipelines that are more than their transformer (refiners,
upscalers). Its clips teach as those of a folder do: ``clip_folder.encode_clips(path,
ClipRenderer(teacher.render, prompts), codec, embed)``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamvid.hub import resolve_checkpoint
from streamvid.teachers.clip_folder import ClipRenderer
from streamvid.weights import check_weights, read_json

OURS = ("prompt", "generator", "output_type")  # arguments that ``render`` gives itself
SIZES = ("num_frames", "height", "width")


class PipelineTeacher:
    """A text-to-video pipeline that gives finished clips only.

    Args:
        pipeline: called with ``prompt``, ``generator``, ``output_type="np"`` and the settings; its
            ``frames`` are read.
        settings: what else its call gets, such as ``{"num_frames": 81, "num_inference_steps":
            50}``; names are checked.

    Raises:
        ValueError: if the call knows no such argument, or needs one that is not given.
    """

    provides: frozenset[str] = frozenset({"clips"})

    def __init__(self, pipeline: Any, settings: Mapping[str, Any] | None = None):
        self.pipeline, self.settings = pipeline, dict(settings or {})
        self._check_settings()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        settings: Mapping[str, Any] | None = None,
        torch_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        offload: bool = False,
    ) -> PipelineTeacher:
        """Open a folder, or a name on the hub, of a pipeline that diffusers knows; code that lies
        in it is never run.

        Args:
            torch_dtype: of all parts.
            offload: keep on the device only the part that is at work.

        Raises:
            ValueError: one line, if it is missing, damaged, no pipeline, or brings code of its own.
        """
        from diffusers import DiffusionPipeline

        folder = resolve_checkpoint(path)
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                f"{folder} has no model_index.json; expected the folder of a diffusers pipeline"
            )
        _check_no_code(folder)
        for part in sorted({file.parent for file in folder.glob("*/*.safetensors*")}):
            check_weights(part)
        try:
            pipeline = DiffusionPipeline.from_pretrained(
                folder,
                torch_dtype=torch_dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
        except Exception as error:  # diffusers raises many kinds for a folder that does not fit
            raise ValueError(
                f"cannot open the pipeline in {folder}: {' '.join(str(error).split())[:300]}"
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        teacher = cls(pipeline, settings)
        if offload:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
        return teacher

    def generate(self, prompts: Sequence[str], seed: int = 0) -> Tensor:
        """Clips ``[B, T, 3, H, W]`` in [0, 1], on the CPU; each depends on its prompt, its place
        and ``seed`` only.
        """
        return torch.stack([frames for frames, _ in ClipRenderer(self.render, prompts, seed)])

    def render(self, prompt: str, seed: int) -> Tensor:
        """A clip ``[T, 3, H, W]`` in [0, 1], on the CPU.

        Raises:
            ValueError: if the pipeline gives anything but frames, or of another length or size than
                was asked for.
        """
        with torch.no_grad():
            output = self.pipeline(
                prompt=prompt,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="np",
                **self.settings,
            )
        frames = getattr(output, "frames", None)
        clip = np.asarray(frames[0]) if frames is not None else np.empty(0)
        if clip.ndim != 4 or clip.shape[-1] != 3:
            raise ValueError(
                f"{self.name} gave {clip.shape}, expected frames [T, H, W, 3]; it is no video"
                " pipeline"
            )
        came = dict(zip(SIZES, clip.shape))
        for name in SIZES:
            if self.settings.get(name, came[name]) != came[name]:
                asked = self.settings[name]
                raise ValueError(
                    f"{self.name} made {name}={came[name]} of {name}={asked}; ask for what it can"
                    " make"
                )
        return torch.from_numpy(clip).permute(0, 3, 1, 2).float().clamp(0, 1).contiguous()

    @property
    def name(self) -> str:
        """The pipeline's class."""
        return type(self.pipeline).__name__

    def _check_settings(self) -> None:
        known = inspect.signature(self.pipeline.__call__).parameters
        for name in OURS:
            if name not in known or name in self.settings:
                said = (
                    "is not to be set"
                    if name in self.settings
                    else f"is unknown to the call of {self.name}"
                )
                raise ValueError(
                    f"{name} {said}; a clip is made for each prompt, from a seed of its own"
                )
        for name in self.settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known)}"
                raise ValueError(f"{self.name} has no setting {name}; {hint}")
        plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        needed = [
            n for n, p in known.items() if p.default is inspect.Parameter.empty and p.kind in plain
        ]
        missing = [name for name in needed if name not in self.settings and name not in OURS]
        if missing:
            raise ValueError(f"{self.name} needs {' and '.join(missing)}; give it in settings")


def _check_no_code(folder: Path) -> None:
    """A ValueError unless a pipeline and all of its parts are classes that diffusers or
    transformers ship.

    diffusers looks for code beside the weights by several names, and its versions before 0.38 run
    it unasked.
    """
    index = folder / "model_index.json"
    parts = {name: value for name, value in read_json(index).items() if not name.startswith("_")}
    if not isinstance(read_json(index).get("_class_name"), str):
        raise ValueError(
            f"{index} names no _class_name of diffusers; a pipeline with code of its own is"
            " never run"
        )
    for name, value in parts.items():
        if isinstance(value, list) and value and value[0] is not None:
            _check_part(index, name, value)
    code = sorted(
        file
        for place in (folder, *(folder / name for name in parts))
        for file in place.glob("*.py")
    )
    if code:
        raise ValueError(
            f"{code[0]} is code, which is never run; remove it if the pipeline is complete"
            " without it"
        )


def _check_part(index: Path, name: str, value: list) -> None:
    """``value`` is the library and the class of a part, as ``model_index.json`` has them."""
    from diffusers import pipelines

    library, kind = value[0], value[-1]
    shipped = library in ("diffusers", "transformers") or library in dir(pipelines)
    if not isinstance(library, str) or not isinstance(kind, str) or not shipped:
        raise ValueError(
            f"{index} names {library} for {name}, expected diffusers or transformers; other code is"
            " never run"
        )
    # what the part itself names, code included
    if kind.startswith("Auto") and not kind.startswith("Autoencoder"):
        raise ValueError(
            f"{index} names {kind} for {name}, expected the class itself; other code is never run"
        )
