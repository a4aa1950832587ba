"""Configuration: dataclasses hold defaults and types, YAML overrides them, `key=value` overrides
that.

The dataclass lives next to the code that it configures. Files are read and interpolated by
OmegaConf; the merge into dataclasses is ours, because OmegaConf's structured configs know neither
`Literal` nor tuples nor unions of dataclasses, and because an error has to name the key, what was
expected, what came, and the nearest key that exists.

An empty text, such as an unset variable of a shell leaves it, sets nothing: it is an error wherever
the default is not empty itself. None is the word `null`, where the type allows it.

A YAML file may start from others: `base: ../method/dmd.yaml`, or a list of them, later ones
winning; paths are relative to the file that names them. A mapping is merged into its default key by
key, a list replaces its default, and `key: null` removes an entry of a dictionary.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, TextIO, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from streamvid.files import atomic_file

T = TypeVar("T")
MISSING = dataclasses.MISSING
MOST_DEPTH = 50
"""Of keys within keys on the command line."""
LARGEST = sys.float_info.max
_SIXTIES = re.compile(r"[-+]?([1-9][0-9_]*(:[0-5]?[0-9])+|[0-9][0-9_]*(:[0-5]?[0-9])+\.[0-9_]*)")
"""What YAML reads as a number in sixties, 1:30 as 90, which nobody means who writes it; 0:30 is a
text."""


class _Typed(str):
    """The text of a command line value, kept until the type that is expected says how to read
    it.
    """


def load_config(
    cls: type[T],
    path: str | Path | None = None,
    overrides: list[str] | None = None,
    default: T | None = None,
) -> T:
    """An instance of the dataclass `cls` from its defaults, the YAML file and then the `key=value`
    texts.

    default: an instance whose values stand in for the defaults of `cls`. Raises ValueError with one
    line for a file that is not there, an unknown key or a value of a wrong type.
    """
    return build_config(cls, read_config(path, overrides), default)


def save_config(config: Any, path: str | Path) -> None:
    """Writes a dataclass as YAML that `load_config` reads back to an equal one."""
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True))


def to_plain(config: Any) -> Any:
    """Dataclasses as dictionaries, tuples as lists, paths as texts: what YAML and JSON can hold."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def flatten(plain: dict, prefix: str = "") -> dict[str, Any]:
    """A nested dictionary as one of dotted keys; empty dictionaries stay as values."""
    flat = {}
    for key, value in plain.items():
        nested = isinstance(value, dict) and value
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def flat_defaults(config: Any, prefix: str = "") -> dict[str, Any]:
    """What a dataclass and those within it have where nothing sets it, by dotted keys as of
    `flatten`.
    """
    flat = {}
    for f in dataclasses.fields(config):
        value, default = getattr(config, f.name), _default_of(f)
        inner = value if isinstance(value, dict) else {"": value}
        for name, part in inner.items():
            if dataclasses.is_dataclass(part):
                flat.update(
                    flat_defaults(
                        part, f"{prefix}{f.name}.{name}." if name else f"{prefix}{f.name}."
                    )
                )
        if default is not MISSING:
            flat.update(flatten({f.name: to_plain(default)}, prefix))
    return flat


# Reading: files and overrides become one nested dictionary.


def read_config(path: str | Path | None = None, overrides: list[str] | None = None) -> dict:
    """The YAML file with its bases and the overrides as one dictionary that no dataclass has
    checked yet.

    For who must look at a key, such as `method`, to know which dataclass to build.
    """
    typed = _parse_overrides(overrides or [])
    merged = _merge(_read_yaml(Path(path), ()) if path is not None else {}, _as_yaml(typed))
    try:
        merged = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"config {path}: {_one_line(error)}") from None
    return _merge(merged, typed)


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict:
    """One file merged over the files that its `base` names."""
    path = path.resolve()
    if path in seen:
        raise ValueError(f"config file {path} is its own base; break the circle")
    if not path.is_file():
        named = f", named as a base in {seen[-1]}," if seen else ""
        raise ValueError(f"config file {path}{named} does not exist")
    loaded = read_mapping(path)
    bases = loaded.pop("base", None)
    bases = [] if bases is None else bases if isinstance(bases, list) else [bases]
    merged: dict = {}
    for base in bases:
        if not isinstance(base, str) or not base.strip():
            raise ValueError(
                f"config file {path}: base: expected a file or a list of files, got {_show(base)}"
            )
        merged = _merge(merged, _read_yaml(path.parent / base, (*seen, path)))
    return _merge(merged, loaded)


def read_mapping(path: str | Path) -> dict:
    """The `key: value` lines of a YAML file as they are, without its bases.

    Raises:
        ValueError: one line, if it is no YAML, holds anything but a mapping, or has a number such
            as 1:30.
    """
    try:
        with open(path, encoding="utf-8") as file:
            number = _number_in_sixties(file)
        if number is not None:
            raise ValueError(
                f"config file {path}: YAML reads {number} as a number in sixties; write one number,"
                " or quotes around a text"
            )
        loaded = OmegaConf.to_container(OmegaConf.load(path)) or {}
    except RecursionError:
        raise ValueError(
            f"config file {path} is nested too deeply; no setting is so deep"
        ) from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"config file {path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(loaded, dict):
        raise ValueError(
            f"config file {path} must hold `key: value` lines, it holds {_show(loaded)}"
        )
    return loaded


def _number_in_sixties(text: str | TextIO) -> str | None:
    """The first such number of a YAML text, with its line; None if there is none."""
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if (
            isinstance(event, yaml.ScalarEvent)
            and event.implicit[0]
            and _SIXTIES.fullmatch(event.value)
        ):
            return f"{event.value} in line {event.start_mark.line + 1}"
    return None


def _parse_overrides(overrides: list[str]) -> dict:
    """`a.b=1` texts as a nested dictionary of unread values."""
    nested: dict = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(
                f"override {_short(override)} is not of the form key=value, such as train.seed=1"
            )
        if key.count(".") > MOST_DEPTH:
            raise ValueError(
                f"override {_short(override)} is {key.count('.') + 1} keys deep; no setting is so"
                " deep"
            )
        entry: Any = _Typed(text)
        for part in reversed(key.split(".")):
            entry = {part: entry}
        nested = _merge(nested, entry)
    return nested


def _as_yaml(typed: Any) -> Any:
    """The values of overrides read as YAML, so that interpolations see them."""
    if isinstance(typed, dict):
        return {key: _as_yaml(value) for key, value in typed.items()}
    return _read_value(typed)


def _read_value(text: _Typed) -> Any:
    """A command line value read as YAML; what is no YAML, or has a number in sixties, is a plain
    text.
    """
    try:
        if _number_in_sixties(f"value: {text}") is not None:
            return str(text)
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]
    except (yaml.YAMLError, OmegaConfBaseException, KeyError, RecursionError):
        return str(text)


def _merge(below: dict, above: dict) -> dict:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, _Typed) and "${" in value and key in merged:
            continue  # `below` already holds what the interpolation gave
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


# Building: the dictionary becomes dataclasses.


def build_config(cls: type[T], plain: dict, default: T | None = None) -> T:
    """An instance of the dataclass `cls` from `plain`, a nested dictionary, over the values of
    `default`.
    """
    return _build(cls, plain, default, "", cls)


def _build(cls: type, plain: dict, default: Any, prefix: str, root: type) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in plain:
        if key not in fields:
            raise ValueError(_unknown_key(key, plain[key], list(fields), prefix, root))
    values = {}
    for name, field in fields.items():
        base = _default_of(field) if default is None else getattr(default, name)
        if name in plain:
            values[name] = _coerce(hints[name], plain[name], base, f"{prefix}{name}", root)
        elif base is not MISSING:
            values[name] = base
        else:
            raise ValueError(
                f"{prefix}{name} has no default: set it, it is {_describe(hints[name])}"
            )
    return cls(**values)


def _default_of(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _coerce(kind: Any, value: Any, base: Any, key: str, root: type) -> Any:
    """`value` as an instance of the annotation `kind`, or a ValueError that names `key`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    _check_not_empty(value, kind, base, key)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(args, value, base, key, root, kind)
    if isinstance(value, _Typed):
        value = _read_text(value) if kind in (str, Path) else _read_value(value)
        _check_not_empty(value, kind, base, key)  # without its quotes
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _build(kind, value, base if isinstance(base, kind) else None, f"{key}.", root)
    if origin is typing.Literal:
        value = _unquoted_word(value, args)
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
    if origin is dict and isinstance(value, dict):
        return _coerce_dict(args, value, base if isinstance(base, dict) else {}, key, root)
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return _coerce_sequence(kind, value, key, root)
    if _is_plain(kind, value):
        return value if kind in (Any, dict, list) else kind(value)
    raise ValueError(f"{key}: expected {_describe(kind)}, got {_show(value)}")


def _check_not_empty(value: Any, kind: Any, base: Any, key: str) -> None:
    if isinstance(value, str) and not value.strip() and not (kind is str and base == ""):
        raise ValueError(f"{key}: expected {_describe(kind)}, got an empty text")


def _is_plain(kind: Any, value: Any) -> bool:
    """Whether `value` is an exact instance of a kind without parts; 1 is a float and 1e5 an int,
    true is neither.
    """
    if kind is Any or kind in (bool, dict, list):
        return kind is Any or isinstance(value, kind)
    if isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if kind is float and isinstance(value, (int, float)) and not abs(value) <= LARGEST:
        return False
    accepted = {float: (int, float), str: str, Path: (str, Path)}.get(kind)
    return accepted is not None and isinstance(value, accepted)


def _unquoted_word(value: Any, choices: tuple) -> Any:
    """YAML reads the bare words no and off as false; where they are choices, they were meant as
    words.
    """
    words = (
        {False: ("no", "off"), True: ("yes", "on")}.get(value, ())
        if isinstance(value, bool)
        else ()
    )
    return next((word for word in words if word in choices), value)


def _read_text(text: _Typed) -> str | None:
    """A text needs no quotes on the command line, `name=007`; a pair that is there is taken off.
    `null` is none.
    """
    if _is_null(text):
        return None
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return str(text[1:-1] if quoted else text)


def _is_null(value: Any) -> bool:
    return value is None or isinstance(value, _Typed) and value.strip() == "null"


def _coerce_union(args: tuple, value: Any, base: Any, key: str, root: type, kind: Any) -> Any:
    """The first alternative that fits; with one alternative besides null, its own error."""
    alternatives = [arg for arg in args if arg is not type(None)]
    if _is_null(value) and len(alternatives) < len(args):
        return None
    if len(alternatives) == 1 and not _is_null(value):
        return _coerce(alternatives[0], value, base, key, root)
    for alternative in alternatives:
        try:
            return _coerce(alternative, value, base, key, root)
        except ValueError:
            continue
    plain = _read_value(value) if isinstance(value, _Typed) else value
    raise ValueError(f"{key}: expected {_describe(kind)}, got {_show(plain)}")


def _coerce_dict(args: tuple, value: dict, base: dict, key: str, root: type) -> dict:
    key_kind, kind = args
    merged = dict(base)
    for name, item in value.items():
        item = None if _is_null(item) else item
        name = int(name) if key_kind is int and str(name).isdigit() else name
        if not _is_plain(key_kind, name):
            raise ValueError(
                f"{key}: expected keys of type {_describe(key_kind)}, got {_show(name)}"
            )
        if item is None and type(None) not in typing.get_args(kind):
            merged.pop(name, None)
        else:
            merged[name] = _coerce(kind, item, base.get(name), f"{key}.{name}", root)
    return merged


def _coerce_sequence(kind: Any, value: Any, key: str, root: type) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    fixed = origin is tuple and args[-1] is not Ellipsis
    if fixed and len(value) != len(args):
        raise ValueError(f"{key}: expected {_describe(kind)}, got {_show(value)}")
    kinds = args if fixed else (args[0],) * len(value)
    items = zip(kinds, value)
    return origin(_coerce(k, v, MISSING, f"{key}[{i}]", root) for i, (k, v) in enumerate(items))


# Saying what was wrong.


def _describe(kind: Any) -> str:
    """An annotation in words: `one of 'no', 'bf16'`, `a list of float`, `float or null`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        names = [_describe(arg) for arg in args if arg is not type(None)]
        return " or ".join(names + ["null"] * (type(None) in args))
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin is dict:
        return f"a mapping of {_describe(args[0])} to {_describe(args[1])}"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)} values ({', '.join(map(_describe, args))})"
    if origin in (list, tuple):
        return f"a list of {_describe(args[0])}"
    if dataclasses.is_dataclass(kind):
        return f"a mapping of {', '.join(f.name for f in dataclasses.fields(kind))}"
    return {Any: "anything", Path: "a path"}.get(kind) or getattr(kind, "__name__", str(kind))


def _show(value: Any) -> str:
    if value is None:
        return "null"
    return f"{type(value).__name__} {_short(value)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown_key(key: str, value: Any, siblings: list[str], prefix: str, root: type) -> str:
    """One line that names the whole key and the nearest one: a sibling first, else one of the same
    last name.
    """
    rest = "".join(f".{part}" for part in _first_leaf(value))
    message = f"unknown key '{prefix}{key}{rest}'; "
    near = difflib.get_close_matches(str(key), siblings, n=1, cutoff=0.6)
    if near:
        return f"{message}did you mean '{prefix}{near[0]}{rest}'?"
    last = f"{key}{rest}".split(".")[-1]
    elsewhere = [known for known in _known_keys(root) if known.split(".")[-1] == last]
    if elsewhere:
        return f"{message}did you mean '{elsewhere[0]}'?"
    where = f"'{prefix[:-1]}' knows" if prefix else "known are"
    return f"{message}{where} {', '.join(siblings) or 'no keys'}"


def _first_leaf(value: Any) -> list[str]:
    """The keys that lead to the first value inside a mapping."""
    if not isinstance(value, dict) or not value:
        return []
    key = next(iter(value))
    return [str(key), *_first_leaf(value[key])]


def _known_keys(cls: type, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass; the entries of a dictionary of dataclasses are written
    <name>.
    """
    keys = []
    for name, kind in typing.get_type_hints(cls).items():
        keys.append(f"{prefix}{name}")
        for part in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(part):
                entry = ".<name>" if typing.get_origin(kind) is dict else ""
                keys.extend(_known_keys(part, f"{prefix}{name}{entry}."))
    return keys


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
