"""Published distillation objectives, each written once; ``objectives/base.py`` says what one is.

``all_objectives()`` maps names to classes, family after family; ``settings/plane.py`` trains them
on points, ``settings/video.py`` on images and clips.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamvid.objectives.base import Objective

FAMILIES = (
    "dmd",
    "score",
    "diagonal",
    "asd",
    "adversarial",
    "afd",
    "flowmap",
    "preferences",
    "flow_matching",
    "trajectory",
)
"""The modules that hold objectives."""


def all_objectives() -> dict[str, type[Objective]]:
    """Name to class, family after family, in the order of the files."""
    modules = [importlib.import_module(f"streamvid.objectives.{family}") for family in FAMILIES]
    return {
        kind.name: kind
        for module in modules
        for kind in vars(module).values()
        if getattr(kind, "__module__", "") == module.__name__ and getattr(kind, "paper", "")
    }


def find_objective(name: str) -> type[Objective]:
    """The class of a name.

    Raises:
        ValueError: one line with the nearest name, if there is none such.
    """
    known = all_objectives()
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    raise ValueError(
        f"objective={name} is unknown, did you mean {nearest}? `streamvid toy2d --list` names all"
    )
