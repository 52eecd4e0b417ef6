"""A run's objects as a configuration: what was said in Python, for the run's folder and for loggers."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from fedbe.algorithms import Algorithm
from fedbe.config.run import RunConfig

_MOST_ITEMS = 100


def described(run: RunConfig) -> dict[str, Any]:
    """Return the configuration of a run as plain values, as far as its objects keep their arguments under their names.

    Objects are ``class_path`` and ``init_args``, as in a YAML file, which such a configuration often is.
    """
    config = {field.name: plain(getattr(run, field.name)) for field in fields(run)}
    return config | {"output": None, "ckpt_path": None}


def plain(value: Any) -> Any:
    """Return a value as what YAML can hold."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value] if len(value) <= _MOST_ITEMS else f"{len(value)} items"
    if isinstance(value, functools.partial):
        return {"class_path": _path(value.func), "init_args": plain(value.keywords)}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.init}
    if callable(value) and hasattr(value, "__qualname__"):
        return _path(value)
    return {"class_path": _path(type(value)), "init_args": _arguments(value)}


def _arguments(value: Any) -> dict[str, Any]:
    parts = [value.adaptation, value.strategy] if isinstance(value, Algorithm) else []
    known = {name: item for part in (*parts, value) for name, item in getattr(part, "__dict__", {}).items()}
    return {name: plain(known[name]) for name in inspect.signature(type(value)).parameters if name in known}


def _path(kind: Any) -> str:
    """Return the shortest name under which a class or function can be imported, by the packages that are loaded."""
    parts = kind.__module__.split(".")
    modules = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    loaded = (name for name in modules if getattr(sys.modules.get(name), kind.__qualname__, None) is kind)
    return f"{next(loaded, kind.__module__)}.{kind.__qualname__}"
