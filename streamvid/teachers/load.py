"""Opening a teacher: a folder or a name on the hub, of whichever family its transformer is."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from streamvid.hub import resolve_checkpoint
from streamvid.teachers.base import ModelTeacher, transformer_class

FAMILIES: dict[str, tuple[str, str]] = {
    "WanTransformer3DModel": ("streamvid.teachers.wan", "WanTeacher"),
    "CogVideoXTransformer3DModel": ("streamvid.teachers.cogvideox", "CogVideoXTeacher"),
}
"""Module and class, by the class name in ``transformer/config.json``. A family is imported when it
is opened: CogVideoX's brings its pipeline along."""


def open_teacher(path: str | Path, **options: Any) -> ModelTeacher:
    """The teacher in a folder in the diffusers layout, or of that name on the Hugging Face hub.

    Args:
        path: such as ``Wan-AI/Wan2.1-T2V-1.3B-Diffusers``; a folder of that name comes first.
        options: those of the family's ``from_pretrained``.

    Raises:
        ValueError: one line, if it is not there, cannot be fetched, is damaged, or of a family
            without scores here.
    """
    folder = resolve_checkpoint(path)
    name = transformer_class(folder)
    if name not in FAMILIES:
        raise ValueError(
            f"{path} is of another family: its transformer is a {name}, with scores here are"
            f" {', '.join(FAMILIES)}; its clips can still teach, see teachers/pipeline.py"
        )
    module, cls = FAMILIES[name]
    open_folder = getattr(importlib.import_module(module), cls).from_pretrained
    unknown = sorted(options.keys() - inspect.signature(open_folder).parameters.keys())
    if unknown:
        raise ValueError(f"{cls} has no option {unknown[0]}; leave it out for {path}")
    return open_folder(folder, **options)
