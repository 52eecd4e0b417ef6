"""From a parsed configuration to objects: nothing but classes is called, and what a constructor raises is a mistake."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch.optim import Optimizer

from fedbe.config.mistakes import below
from fedbe.config.sections import default_optimizer
from fedbe.errors import ConfigError, Problem


class _NotBuilt(Exception):
    """A constructor has raised; the cause is what it raised."""

    def __init__(self, kind: type) -> None:
        self.kind = kind


def check_called(config: Any) -> None:
    """Refuse functions in a parsed configuration, before anything of it is built.

    Raises:
        ConfigError: With a problem for each.
    """
    remedy = "is no class, and nothing but classes is called: give a class"
    problems = [
        Problem(below(key, "class_path") if isinstance(value, str) else key, _named(value), remedy)
        for key, value in _values(config, "")
        if (_names_no_class(value) if isinstance(value, str) else _is_function(value))
    ]
    if problems:
        raise ConfigError(*problems)


def instantiate(parser: ArgumentParser, namespace: Namespace) -> dict[str, Any]:
    """Return the objects that a parsed configuration describes.

    Raises:
        ConfigError: A constructor has raised; with the key of its class and what it said.
    """
    try:
        values: dict[str, Any] = parser.instantiate(namespace, instantiators=_INSTANTIATORS).as_dict()
    except _NotBuilt as error:
        raise ConfigError(_problem(error, namespace.as_dict())) from error
    return values


def _build(class_type: type, *args: Any, **kwargs: Any) -> Any:
    try:
        return class_type(*args, **kwargs)
    except (_NotBuilt, ConfigError):
        raise
    except Exception as error:  # whatever a constructor of the user's own raises
        raise _NotBuilt(class_type) from error


def _call(class_type: type, *args: Any, **kwargs: Any) -> Any:
    return class_type(*args, **kwargs)


_INSTANTIATORS = [(_call, Optimizer, True), (_build, object, True)]
"""How what is called; an optimizer is built by each client, whose errors are a client's."""


def _problem(error: _NotBuilt, config: Any) -> Problem:
    cause = error.__cause__
    said = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    named = [(key, path) for key, path in _values(config, "") if _loaded(path) is error.kind]
    key, path = named[0] if named else ("command line", error.kind.__qualname__)
    hint = "install what it needs" if isinstance(cause, ImportError) else "mend its arguments, or the class"
    return Problem(below(key, "class_path") if named else key, path, f"its constructor raises {said}: {hint}")


def _values(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield what might be called: the class path of each class with the key of the class, and every other leaf."""
    if isinstance(node, Namespace):
        node = node.as_dict()
    if isinstance(node, dict):
        if isinstance(node.get("class_path"), str):
            yield key, node["class_path"]
        for name, part in node.items():
            if name != "class_path":
                yield from _values(part, key if name == "init_args" and "class_path" not in node else below(key, name))
    elif isinstance(node, list | tuple):
        for index, part in enumerate(node):
            yield from _values(part, f"{key}[{index}]")
    elif not isinstance(node, str):
        yield key, node


def _is_function(value: Any) -> bool:
    """Whether a value is a function, and not the optimizer that there is without naming one."""
    return inspect.isroutine(value) and value is not default_optimizer


def _names_no_class(path: str) -> bool:
    found = _loaded(path)
    return found is not None and not inspect.isclass(found)


def _loaded(path: Any) -> Any:
    """Return the object of a below path whose module is loaded already, as it is once the parser has looked at it."""
    if not isinstance(path, str):
        return None
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _named(value: Any) -> Any:
    return value if isinstance(value, str) else f"{value.__module__}.{getattr(value, '__qualname__', value)}"
