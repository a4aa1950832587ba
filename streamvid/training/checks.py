"""What a trainer refuses before the first step: names that fit nothing, nothing to train, another
run's folder.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from torch.nn import Module, Parameter

from streamvid.config import flat_defaults, flatten, to_plain
from streamvid.training.config import TrainConfig

# What may change between the start of a run and its continuation.
CHANGEABLE = {
    "output_dir",
    "max_steps",
    "max_minutes",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "trackers",
}
SHIPPED = "/streamvid/assets/"
_MENDING = (
    "if it is the same run, delete that file, it is written anew; else give this run another name"
)


def check_names(config: TrainConfig, networks: dict[str, Module]) -> None:
    """A ValueError unless each network has an optimiser, and each section is for a network."""
    for section, configured in (("optimizers", config.optimizers), ("ema", config.ema)):
        unknown = sorted(configured.keys() - networks.keys())
        if unknown:
            near = difflib.get_close_matches(unknown[0], networks, n=1, cutoff=0.0)
            raise ValueError(
                f"{section}.{unknown[0]} is for no network of the objective; did you mean"
                f" '{section}.{near[0]}'?"
            )
    missing = sorted(networks.keys() - config.optimizers.keys())
    if missing:
        raise ValueError(
            f"network '{missing[0]}' has no optimizer; set optimizers.{missing[0]}.lr, such as 1e-5"
        )


def check_parameters(name: str, parameters: dict[str, Parameter]) -> None:
    """A ValueError unless there is something to train, in a precision that keeps small updates."""
    if not parameters:
        raise ValueError(
            f"network '{name}' has no parameter that requires a gradient; nothing to train"
        )
    for key, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{key} of network '{name}' is {parameter.dtype}, in which small updates are"
                " rounded away; load the network in float32 and set mixed_precision=bf16"
            )


def check_trackers(trackers: list[str]) -> None:
    """accelerate leaves out in silence what is not installed."""
    known = [tracker.value for tracker in LoggerType if tracker is not LoggerType.ALL]
    for tracker in trackers:
        if tracker not in known:
            raise ValueError(f"tracker '{tracker}' is unknown; known are {', '.join(known)}")
        if tracker not in {str(available) for available in get_available_trackers()}:
            raise ValueError(
                f"tracker '{tracker}' is not installed; `pip install {tracker}` or leave it out"
            )


def _place_of(config: TrainConfig, resolved: Any) -> str:
    """The prefix of the trainer's keys in the resolved configuration: `train.`, or nothing."""
    if resolved is config or not is_dataclass(resolved):
        return ""
    for part in fields(resolved):
        if getattr(resolved, part.name) is config:
            return f"{part.name}."
    return ""


def _portable(value: Any) -> Any:
    """A path into the package's assets without the place of the package, which may have moved;
    others as they are.
    """
    if not isinstance(value, str) or SHIPPED not in value:
        return value
    return SHIPPED.lstrip("/") + value.rpartition(SHIPPED)[2]


def _settings(
    config: TrainConfig, resolved: Any
) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """A run's configuration by dotted keys, its defaults, and the keys that may change."""
    now = flatten(json.loads(json.dumps(to_plain(resolved))))
    defaults = {
        key: _portable(value) for key, value in flat_defaults(resolved).items() if key in now
    }
    free = {_place_of(config, resolved) + key for key in CHANGEABLE}
    return {key: _portable(value) for key, value in now.items()}, defaults, free


def fingerprint(config: TrainConfig, resolved: Any) -> str:
    """Tells this run's checkpoints from those of runs with another configuration.

    Only what differs from the defaults counts, so that a setting which comes with a later version
    changes nothing.
    """
    now, defaults, free = _settings(config, resolved)
    own = {
        key: value
        for key, value in now.items()
        if key not in free and (key not in defaults or defaults[key] != value)
    }
    return hashlib.blake2b(json.dumps(own, sort_keys=True).encode(), digest_size=8).hexdigest()


def check_same_run(path: Path, config: TrainConfig, resolved: Any) -> None:
    """A run folder holds one run: all but the keys that are free to change must be as they were.

    A setting that came with a later version counts as having had its default.
    """
    if not path.is_file():
        return
    now, defaults, free = _settings(config, resolved)
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no YAML ({' '.join(str(error).split())[:120]}); {_MENDING}"
        ) from None
    if not isinstance(saved, dict):
        raise ValueError(
            f"{path} holds a {type(saved).__name__}, expected `key: value` lines; {_MENDING}"
        )
    was = defaults | {key: _portable(value) for key, value in flatten(saved).items()}
    differing = [
        f"{key} was {was.get(key, 'not there')}, now {now.get(key, 'not there')}"
        for key in sorted(was.keys() | now.keys(), key=str)
        if key not in free and was.get(key) != now.get(key)
    ]
    if differing:
        raise ValueError(
            f"{path.parent} holds a run with another configuration: {'; '.join(differing)}. "
            "Give this run another name, or delete that folder"
        )
