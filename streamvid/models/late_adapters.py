"""diffusers' adapters of a model, imported when one is asked for.

``diffusers.loaders.PeftAdapterMixin`` brings peft and what peft knows of other libraries: a second
of every start, for methods that most starts don't call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

METHODS = (
    "load_lora_adapter",
    "save_lora_adapter",
    "set_adapters",
    "add_adapter",
    "set_adapter",
    "disable_adapters",
    "enable_adapters",
    "active_adapters",
    "fuse_lora",
    "unfuse_lora",
    "unload_lora",
    "disable_lora",
    "enable_lora",
    "delete_adapters",
    "enable_lora_hotswap",
    "_fuse_lora_apply",
    "_unfuse_lora_apply",
    "_optionally_disable_offloading",
)


class _Late:
    """A method of the mixin, looked up when it is used."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        from diffusers.loaders import PeftAdapterMixin

        return vars(PeftAdapterMixin)[self.name].__get__(instance, owner)


class LatePeftAdapters:
    """In the place of ``diffusers.loaders.PeftAdapterMixin`` among a model's bases."""

    _hf_peft_config_loaded = False
    _prepare_lora_hotswap_kwargs: dict | None = None


for _name in METHODS:
    setattr(LatePeftAdapters, _name, _Late(_name))
