"""Published distillation objectives over one loss core, each written once.

``all_objectives()`` maps a name to its class; ``objectives/base.py`` says what an objective is and
what its losses may use, ``settings/`` trains points, images and clips with them.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamvid.objectives.base import Objective


def all_objectives() -> dict[str, type[Objective]]:
    """Name to class, family after family."""
    from streamvid.objectives import adversarial, flowmap, preferences, score
    from streamvid.objectives.base import Objective

    return {
        kind.name: kind
        for family in (score, adversarial, flowmap, preferences)
        for kind in vars(family).values()
        if isinstance(kind, type)
        and issubclass(kind, Objective)
        and kind.__module__ == family.__name__
    }


def find_objective(name: str) -> type[Objective]:
    """The class of a name.

    Raises:
        ValueError: if there is none; the nearest known one is named.
    """
    known = all_objectives()
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    raise ValueError(f"objective={name!r} is unknown, did you mean {nearest!r}?")
