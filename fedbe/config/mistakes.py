"""Finds every mistake of keys, types and classes in a configuration at once, where the parser stops at the first.

The signatures of the classes are gone down alongside the values: a value that the parser does not take by itself is
looked into, element by element and class by class, until the innermost that is wrong. What the parser says in words is
not read.
"""

from __future__ import annotations

import difflib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from fedbe.config.classes import find_class, known_classes
from fedbe.config.raw import Raw
from fedbe.errors import Problem

MOVED = {
    "federation.workers": "engine: {{class_path: fedbe.engines.Forked, init_args: {{workers: {value}}}}}",
    "federation.clients_in_one_pass": "engine: {{class_path: fedbe.engines.OnePass, init_args: {{clients: {value}}}}}",
}
"""Keys of earlier versions → what to write in their place."""

SPEC = {"class_path", "init_args", "dict_kwargs"}
"""The keys of a class named by its path."""

MISSING = "is required: name it in the config"
"""The remedy for what has no default and is not given."""

_GONE = object()
Found = tuple[list[Problem], Any]
"""The mistakes in a value, and what is left of it without them; `_GONE` if nothing is."""


@dataclass(frozen=True)
class Signature:
    """What a class can be given in a configuration.

    Attributes:
        kind: The class.
        skip: Arguments that a configuration does not give it.
    """

    kind: type
    skip: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        """Names of the arguments, those that it hands on to its base class included."""
        return _names(self.kind, self.skip)

    @property
    def required(self) -> list[str]:
        """Names of the arguments without a default."""
        return [name for name in self.names if name in self._given and self._given[name].default is inspect._empty]

    @property
    def _given(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.kind).parameters

    def hint(self, name: str) -> Any:
        """Return the annotation of an argument; ``Any`` where there is none."""
        hint = _hints(self.kind).get(name, Any)
        absent = name in self._given and self._given[name].default is None
        return hint | None if absent and hint is not Any and _is_type(hint) else hint

    def takes(self, name: str, value: Any) -> bool:
        """Whether the parser takes a value for an argument."""
        try:
            _parser(self.kind, self.skip | (set(self.names) - {name})).parse_object({name: deepcopy(value)})
        except Exception:  # the parser stumbles over some values with errors of all kinds
            return False
        return True


def collect(kind: type, raw: Mapping[Any, Any], key: str = "", skip: Iterable[str] = ()) -> tuple[list[Problem], Raw]:
    """Return every mistake in what a class is given, and what is left without them.

    Args:
        kind: The class, or the dataclass of a configuration's sections.
        raw: Its arguments as plain values.
        key: Dotted key at which they stand.
        skip: Arguments that a configuration does not give it.
    """
    signature = Signature(kind, frozenset(skip))
    problems: list[Problem] = []
    rest: Raw = {}
    for name, value in raw.items():
        where = below(key, name)
        if name not in signature.names:
            problems.append(Problem(where, value, _unknown(where, str(name), value, signature.names)))
            continue
        found, left = _value(signature.hint(name), value, where, partial(signature.takes, name))
        problems += found
        if left is not _GONE:
            rest[name] = left
    missing = [name for name in signature.required if name not in raw]
    return problems + [Problem(below(key, name), None, MISSING) for name in missing], rest


def _value(hint: Any, value: Any, key: str, takes: Callable[[Any], bool]) -> Found:
    """Return the mistakes in one value.

    Args:
        hint: What it should be.
        value: What it is.
        key: Where it stands.
        takes: Whether the parser takes a value in this place.
    """
    section = all(is_dataclass(option) for option in _options(hint))
    if section and not isinstance(value, dict):
        return [Problem(key, value, "give a mapping of keys and values")], _GONE
    if value is None and not _may_be_null(hint):
        return [Problem(key, None, f"null is no value here: give {expected(hint)}, or leave the key out")], _GONE
    taken = takes(value)
    if taken and not section and not _overlooked(value):
        return [], value
    found, left = _inside(hint, value, key, takes)
    if taken or found:
        return found, left
    return [Problem(key, value, f"expected {expected(hint)}")], _GONE


def _inside(hint: Any, value: Any, key: str, takes: Callable[[Any], bool]) -> Found:
    """Return the mistakes in the parts of a value; none are found in one that has no parts for this hint."""
    kinds = classes_in(hint)
    if isinstance(value, list) and (element := _argument(hint, Sequence, -1)) is not None:
        parts = [_value(element, part, f"{key}[{index}]", lambda v: takes([v])) for index, part in enumerate(value)]
        return [problem for found, _ in parts for problem in found], [left for _, left in parts if left is not _GONE]
    if isinstance(value, dict) and not kinds and (element := _argument(hint, Mapping, -1)) is not None:
        named = {n: _value(element, p, below(key, n), _in_mapping(takes, n)) for n, p in value.items()}
        rest = {name: left for name, (_, left) in named.items() if left is not _GONE}
        return [problem for found, _ in named.values() for problem in found], rest
    if isinstance(value, dict) and kinds:
        return _spec(kinds, value, key, _supplied(hint))
    if isinstance(value, str) and kinds and not _takes_text(hint):
        found = find_class(value, kinds)
        if isinstance(found, str):
            return [Problem(key, value, found)], _GONE
        problems, _ = collect(found, {}, below(key, "init_args"), _leading(found, _supplied(hint)))
        return problems, _GONE if problems else value
    return [], _GONE


def _spec(kinds: Sequence[type], value: Raw, key: str, supplied: int) -> Found:
    """Return the mistakes in a class named by its path, or in the arguments of the only class that there can be."""
    if "class_path" not in value:
        if len(kinds) == 1 and not inspect.isabstract(kinds[0]) and "init_args" not in value:
            return collect(kinds[0], value, key)
        known = ", ".join(known_classes(kinds))
        remedy = f"give `class_path` and `init_args`{f': there are {known}' if known else ''}"
        return [Problem(key, value, remedy)], _GONE
    problems = [
        Problem(below(key, name), value[name], _unknown("", str(name), None, sorted(SPEC)))
        for name in value.keys() - SPEC
    ]
    path = value["class_path"]
    found = find_class(path, kinds)
    if isinstance(found, str):
        return [*problems, Problem(below(key, "class_path"), path, found)], _GONE
    arguments = value.get("init_args") or {}
    if not isinstance(arguments, dict):
        where = below(key, "init_args")
        return [*problems, Problem(where, arguments, "give a mapping of the class's arguments")], _GONE
    inner, rest = collect(found, arguments, below(key, "init_args"), _leading(found, supplied))
    further = _further(found, value, key)
    whole = {name: value[name] for name in value.keys() & SPEC - {"dict_kwargs"}} | {"init_args": rest}
    return problems + inner + further, whole


def _further(kind: type, value: Raw, key: str) -> list[Problem]:
    if "dict_kwargs" not in value:
        return []
    open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(kind).parameters.values())
    if open_ended and isinstance(value["dict_kwargs"], dict):
        return []
    return [Problem(below(key, "dict_kwargs"), value["dict_kwargs"], "give the arguments under `init_args`")]


def _supplied(hint: Any) -> int:
    """Return how many arguments of a class are given by whoever calls it: those of a factory's hint."""
    factories = [get_args(option) for option in _options(hint) if get_origin(option) is Callable]
    return len(factories[0][0]) if factories and isinstance(factories[0][0], list) else 0


def _leading(kind: type, count: int) -> list[str]:
    return list(inspect.signature(kind).parameters)[:count]


def _unknown(where: str, name: str, value: Any, known: Sequence[str]) -> str:
    if where in MOVED:
        now = MOVED[where].format(value=value)
        return "there is no such key any more: leave it out" + ("" if value == 1 else f", and write `{now}`")
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"no such key: did you mean `{close[0]}`?"
    return f"no such key: there are {', '.join(sorted(known))}" if known else "no such key: it takes no arguments"


def below(key: str, name: Any) -> str:
    """Return ``key.name``; the name alone at the top."""
    return f"{key}.{name}" if key else str(name)


@cache
def _parser(kind: type, skip: frozenset[str]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip=set(skip))
    return parser


@cache
def _names(kind: type, skip: frozenset[str]) -> list[str]:
    defaults = _parser(kind, skip).get_defaults()
    return list(dict.fromkeys(key.split(".")[0] for key, _ in defaults.items()))


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Return the annotations of a constructor's arguments, those of base classes where it hands them on."""
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        try:
            hints |= get_type_hints(vars(base)["__init__"]) if "__init__" in vars(base) else {}
        except (NameError, TypeError, AttributeError):  # of types that are imported for type checkers alone
            continue
    return hints


def _options(hint: Any) -> list[Any]:
    """Return the members of a union, or the hint alone."""
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def _is_type(hint: Any) -> bool:
    return inspect.isclass(hint) or get_origin(hint) is not None


def _may_be_null(hint: Any) -> bool:
    return any(option in (Any, object, None, type(None)) for option in _options(hint))


def _in_mapping(takes: Callable[[Any], bool], name: Any) -> Callable[[Any], bool]:
    return lambda value: takes({name: value})


def _takes_text(hint: Any) -> bool:
    """Whether a text may be meant as a text, where it could name a class, too."""
    return any(option in (str, Path) for option in _options(hint))


def _overlooked(value: Any) -> bool:
    """Whether a value holds what the parser passes over: a null anywhere, or arguments beside ``init_args``."""
    if isinstance(value, dict) and "dict_kwargs" in value:
        return True
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(map(_overlooked, parts))


def _argument(hint: Any, origin: type, index: int) -> Any:
    """Return what a list's or a mapping's values should be, if the hint has such a member."""
    for option in _options(hint):
        held = get_origin(option)
        if inspect.isclass(held) and issubclass(held, origin) and get_args(option):
            return next(a for a in reversed(get_args(option)) if a is not Ellipsis)
    return None


def classes_in(hint: Any) -> list[type]:
    """Return the classes of which objects are built for a hint: those in it, and what a factory in it returns."""
    found: list[type] = []
    for option in _options(hint):
        built = get_args(option)[-1] if get_origin(option) is Callable and get_args(option) else option
        if inspect.isclass(built) and get_origin(built) is None and built.__module__ not in ("builtins", "pathlib"):
            found.append(built)
    return found


def expected(hint: Any) -> str:
    """Return in words what a hint asks for."""
    if hint is Any:
        return "another value"
    return " or ".join(dict.fromkeys(map(_word, _options(hint))))


def _word(hint: Any) -> str:
    if hint in (None, type(None)):
        return "null"
    if get_origin(hint) is Literal:
        return f"one of {list(get_args(hint))}"
    kinds = classes_in(hint)
    if kinds:
        name = kinds[0].__name__
        return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    arguments = [expected(argument) for argument in get_args(hint) if argument is not Ellipsis]
    name = getattr(get_origin(hint) or hint, "__name__", str(hint))
    return f"{name}[{', '.join(arguments)}]" if arguments else name
