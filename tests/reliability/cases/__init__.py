"""The hostile cases: every module here that has `cases()`, one for an area or a few small ones."""

from __future__ import annotations

import importlib
import pkgutil

from tests.reliability.runner import Case


def all_cases() -> list[Case]:
    """All cases, module by module; names are unique within an area."""
    modules = [
        importlib.import_module(f"{__name__}.{found.name}")
        for found in pkgutil.iter_modules(__path__)
    ]
    return [case for module in modules if hasattr(module, "cases") for case in module.cases()]
