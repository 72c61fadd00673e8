"""Dataclasses from plain data and back, with errors that name the field, its value and the remedy."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

T = TypeVar("T")

PathText = Annotated[str, "path"]
"""The path of a file or folder, as a setting: never empty, and with ~ for the home folder."""
Weights = Annotated[dict[PathText, float], "weights"]
"""Path -> weight, as a setting: a mapping, or for paths that cannot be a key on the command line a list, of weight and path in
turn or of {path: ..., weight: ...}."""


class ConfigError(ValueError):
    """A setting that cannot work: says which field, which value, why, and what to do instead."""

    def __init__(self, field: str, value: Any, problem: str, remedy: str) -> None:
        super().__init__(f"{field} = {value!r}: {problem}. {remedy}")
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy


def require(condition: bool, field: str, value: Any, problem: str, remedy: str) -> None:
    """Raise :class:`ConfigError` unless `condition` holds."""
    if not condition:
        raise ConfigError(field, value, problem, remedy)


def require_positive(config: Any, prefix: str, *names: str, remedy: str = "") -> None:
    """Raise :class:`ConfigError` unless the settings `names` of the group `prefix` are positive."""
    for name in names:
        field, value = f"{prefix}.{name}", getattr(config, name)
        known = f"Set {field} {'above 0' if isinstance(value, float) else 'to 1 or more'}"
        require(value > 0, field, value, "must be positive", remedy.format(field=field) or known)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain nested dicts and lists, ready for YAML or JSON; :func:`from_dict` reads it back."""
    return dataclasses.asdict(config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items})


class _Dumper(yaml.SafeDumper):
    """Writes text so that every loader of YAML reads it as text: OmegaConf's takes 1e5 for a number, and those of YAML 1.2 0o7."""

    def represent_text(self, text: str) -> yaml.Node:
        plain = text[:1].isalpha() or text[:1] in ("/", "_")
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


def to_yaml(tree: Any, escape: bool = True) -> str:
    """Plain data as YAML, in ASCII, that ``--config`` reads back to the same values; without `escape`, ${...} in a text still
    refers to another value."""
    return yaml.dump(_escaped(tree) if escape else tree, Dumper=_Dumper, sort_keys=False)


def _escaped(value: Any) -> Any:
    """The data with a backslash before each ${, which OmegaConf would replace, and backslashes already there doubled."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def from_dict(cls: type[T], data: Any, path: str = "") -> T:
    """Build dataclass `cls` from nested plain data, checking keys and types.

    Raises :class:`ConfigError` for an unknown key (with the nearest known one), a missing key or a value of the wrong type.
    """
    check_names(cls, data, path)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls, include_extras=True)
    built = {key: convert(hints[key], value, _join(path, key)) for key, value in data.items()}
    for name, spec in fields.items():
        if name not in built and spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(_join(path, name), None, "is required and was not given", f"Set {_join(path, name)}=...")
    return cls(**built)


def check_names(cls: Any, data: Any, path: str = "") -> None:
    """Raise :class:`ConfigError` for a key of nested plain data that dataclass `cls` does not have, with the nearest known one."""
    require(isinstance(data, dict), path or "config", data, "expected a group of settings", "Write key: value pairs")
    hints = typing.get_type_hints(cls)
    for key, value in data.items():
        if key not in hints:
            near = [*difflib.get_close_matches(str(key), hints, n=1), *_settings_called(str(key), cls)]
            remedy = f"Did you mean {_join(path, near[0])}?" if near else f"Known: {', '.join(hints)}"
            raise ConfigError(_join(path, key), value, "unknown setting", remedy)
        for group in (hints[key], *typing.get_args(hints[key])):
            if dataclasses.is_dataclass(group) and isinstance(value, dict):
                check_names(group, value, _join(path, key))


def _settings_called(name: str, cls: Any, path: str = "") -> list[str]:
    """Settings of that name in the groups of `cls`, and in theirs."""
    found = []
    for key, hint in typing.get_type_hints(cls).items():
        for group in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(group):
                names = [field.name for field in dataclasses.fields(group)]
                found += [_join(_join(path, key), name)] if name in names else []
                found += _settings_called(name, group, _join(path, key))
    return found


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint` of the setting `path`; :class:`ConfigError` if it is none."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _weights(value, path) if args[1] == "weights" else _path(convert(args[0], value, path), path)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return convert(next(a for a in args if a is not type(None)), value, path)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path)
    if origin is Literal:
        require(value in args, path, value, "not one of the choices", f"Choose from {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        ok = isinstance(value, list | tuple) and len(value) == len(args)
        require(ok, path, value, f"expected {len(args)} values", f"For example {path}=[{','.join('1' * len(args))}]")
        return tuple(convert(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        require(math.isfinite(value), path, value, "is not a finite number", "Write a number, for example 1.0 or 3e-4")
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    exact = isinstance(value, hint) and not (hint is not bool and isinstance(value, bool))
    remedy = f"Give a value of type {hint.__name__}"
    if hint is str and isinstance(value, int | float):
        text = "TEXT" if isinstance(value, float) else value  # 1e5 was read as 100000.0.
        remedy = f"Quote what reads like {'a truth value' if isinstance(value, bool) else 'a number'}: {path}=\\'{text}\\'"
    require(exact, path, value, f"expected {hint.__name__}, got {type(value).__name__}", remedy)
    return value


def _weights(value: Any, path: str) -> dict[str, float]:
    """What :data:`Weights` describes, as a mapping."""
    remedy = f'For example {path}={{a:0.7,b:0.3}} or, for any path, {path}=[0.7,"a",0.3,"b"]'
    entries: list[tuple[str, Any, str, Any]] = []  # what to call the path, the path, what to call the weight, the weight
    if isinstance(value, dict):
        for key in value:
            require(isinstance(key, str), path, key, "is a name that reads like a number", "As a path, write it with ./ before it")
        entries = [(f"{path}[{key}]", key, f"{path}[{key}]", weight) for key, weight in value.items()]
    elif isinstance(value, list | tuple) and value and all(isinstance(entry, dict) for entry in value):
        for i, entry in enumerate(value):
            names = {"path", "weight"}
            require(entry.keys() == names, f"{path}[{i}]", entry, "expected the keys path and weight", "Give both, and no other")
            entries.append((f"{path}[{i}].path", entry["path"], f"{path}[{i}].weight", entry["weight"]))
    else:
        require(isinstance(value, list | tuple), path, value, "expected corpora with their weights", remedy)
        require(len(value) % 2 == 0, path, value, "expected weight and path in turn, but their number is odd", remedy)
        entries = [(f"{path}[{i + 1}]", value[i + 1], f"{path}[{i}]", value[i]) for i in range(0, len(value), 2)]
    weights: dict[str, float] = {}
    for path_field, text, weight_field, weight in entries:
        number = convert(float, weight, weight_field)
        name = convert(PathText, text, path_field)
        require(name not in weights, path_field, name, "is given twice", "Give each corpus once, with the sum of its weights")
        require(number > 0, weight_field, weight, "must be positive", "Raise it, or leave the corpus out")
        weights[name] = number
    require(bool(weights), path, value, "names no corpus", remedy)
    return weights


def _path(text: str, path: str) -> str:
    """The path that a setting names. What a variable that is not set leaves is no path: it would be the folder one is in."""
    require(bool(text.strip()), path, text, "is empty", "Give a path, or leave the setting out; a variable may not be set")
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:
        raise ConfigError(path, text, "names a home folder that is not known", "Write the path in full") from error
