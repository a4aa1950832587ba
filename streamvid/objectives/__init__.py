"""Published distillation objectives as compositions of the loss core, one short function each.

``all_presets()`` maps a name to a function of a guidance scale that returns a ``Preset``; see
``objectives/base.py`` for what one is, and ``streamvid/settings/plane.py`` for the laboratory in
which all of them distil the same small teachers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamvid.objectives.base import Preset


def all_presets() -> dict[str, Callable[[float], Preset]]:
    """Name to preset function, family after family."""
    from streamvid.objectives import adversarial, flowmap, preferences, score

    return {
        name: getattr(family, name)
        for family in (score, adversarial, flowmap, preferences)
        for name in family.__all__
    }
