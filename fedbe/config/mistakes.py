"""Finds every mistake of a configuration at once, where the parser stops at the first."""

import difflib
import importlib
import inspect
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from fedbe.errors import ConfigError, Problem
from fedbe.storage.nested import dotted, look_up, merge, nest

_NESTED_KEY = re.compile(r'Parser key "([^"]+)":|(Problem with given class_path)|class: (?=Option)')
_UNKNOWN = re.compile(r"Option '([^']+)' is not accepted|Group '([^']+)' does not accept option '([^']+)'")
_EXPECTED = re.compile(r"Expected a (<class '[^']+'>|typing\.Literal\[[^\]]*\]|\S+)")
_MISSING = re.compile(r"following arguments are required: (.+)")

Raw = dict[str, Any]

MOVED = {
    "federation.workers": "engine: {{class_path: fedbe.engines.Forked, init_args: {{workers: {value}}}}}",
    "federation.clients_in_one_pass": "engine: {{class_path: fedbe.engines.OnePass, init_args: {{clients: {value}}}}}",
}
"""Keys of earlier versions → what to write in their place."""


def read_raw(arguments: Sequence[str]) -> Raw:
    """Return what ``--config FILE`` and ``--key value`` say, merged in order, unchecked.

    Raises:
        ConfigError: A file cannot be read, or is not a YAML mapping.
    """
    raw: Raw = {}
    words = iter(arguments)
    for word in words:
        key, separator, value = word.removeprefix("--").partition("=")
        text = value if separator else next(words, "")
        merge(raw, _read_file(Path(text)) if key == "config" else nest(key, _as_yaml(text)))
    return raw


def _as_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _read_file(path: Path) -> Raw:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(Problem("config", str(path), f"cannot be read as YAML: {reason}")) from error
    if not isinstance(content, dict):
        raise ConfigError(Problem("config", str(path), "must hold a YAML mapping of sections, such as `data:`"))
    return content


def collect(parser: ArgumentParser, raw: Raw) -> tuple[list[Problem], Raw]:
    """Return every mistake that the parser finds in `raw`, and what is left of `raw` without them.

    The parser stops at its first mistake; here the mistaken entry is taken out and the rest is parsed again.
    """
    problems: list[Problem] = []
    rest = deepcopy(raw)
    for _ in range(100):
        try:
            parser.parse_object(deepcopy(rest))
        except ArgumentError as error:
            problem, path = _locate(parser, str(error), rest)
            # An entry whose own mistake was taken out before is not missing.
            if not (problem.value is None and any(known.key.startswith(problem.key) for known in problems)):
                problems.append(problem)
            if not path:
                break
            remove(rest, path)
        else:
            break
    return problems, rest


def _locate(parser: ArgumentParser, message: str, raw: Raw) -> tuple[Problem, list[str | int]]:
    missing, unknown = _MISSING.search(message), _UNKNOWN.search(message)
    path = _find_path(message, raw)
    if missing:
        key = dotted([*path, *(["init_args"] if path else []), missing[1].strip()])
        return Problem(key, None, "is required: name it in the config"), path
    value = look_up(raw, path)
    if unknown and path:
        return Problem(dotted(path), value, _unknown_remedy(parser, raw, path)), path
    return Problem(dotted(path) or "command line", value if path else None, _plain(message)), path


def _find_path(message: str, raw: Raw) -> list[str | int]:
    """Return the longest path into `raw` along the keys that the message names."""
    names: list[str] = []
    for key, _ in _NESTED_KEY.findall(message):
        names += key.split(".") if key else []
    for option, group, inner in _UNKNOWN.findall(message)[:1]:
        names += [*group.split("."), *inner.split(".")] if group else option.split(".")
    return follow(raw, names)


def follow(node: Any, names: Sequence[str]) -> list[str | int]:
    """Return the path that `names` take from `node`, passing through ``init_args`` and lists by themselves."""
    if not names:
        return []
    if isinstance(node, dict):
        if names[0] in node:
            return [names[0], *follow(node[names[0]], names[1:])]
        if "init_args" in node:
            return _prefixed("init_args", node["init_args"], names)
    if isinstance(node, list):
        paths = [_prefixed(index, part, names) for index, part in enumerate(node)]
        return max(paths, key=len, default=[])
    return []


def _prefixed(step: str | int, node: Any, names: Sequence[str]) -> list[str | int]:
    inner = follow(node, names)
    return [step, *inner] if inner else []


def remove(raw: Raw, path: Sequence[str | int]) -> None:
    """Take out what stands at `path`; an entry of a class with a bad name goes as a whole."""
    parent = look_up(raw, path[:-1])
    del parent[path[-1]]


def _unknown_remedy(parser: ArgumentParser, raw: Raw, path: Sequence[str | int]) -> str:
    if dotted(path) in MOVED:
        value = look_up(raw, path)
        now = MOVED[dotted(path)].format(value=value)
        return "there is no such key any more: leave it out" + ("" if value == 1 else f", and write `{now}`")
    known = known_keys(parser, raw, path)
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    if close:
        return f"no such key: did you mean `{close[0]}`?"
    return f"no such key: there are {', '.join(sorted(known))}" if known else "no such key"


def known_keys(parser: ArgumentParser, raw: Raw, path: Sequence[str | int]) -> list[str]:
    """Return the keys that may stand where the last step of `path` does."""
    if len(path) > 1 and path[-2] == "init_args":
        given = look_up(raw, path[:-2]).get("class_path", "")
        module, _, attribute = given.rpartition(".")
        try:
            return list(inspect.signature(getattr(importlib.import_module(module), attribute)).parameters)
        except (ImportError, ValueError, AttributeError):  # a short name, which only the parser can resolve
            return []
    prefix = dotted([*path[:-1], ""])
    keys = [key.removeprefix(prefix) for key, _ in parser.get_defaults().items() if key.startswith(prefix)]
    return sorted({key.split(".")[0] for key in keys})


def _plain(message: str) -> str:
    """Return what the parser says was expected, on one line."""
    expected = [_type_name(name) for name in _EXPECTED.findall(message)]
    lines = [line.strip() for line in message.splitlines()]
    useful = [line for line in lines if line and not line.startswith(("Parser key", "Problem with given class_path"))]
    reasons = [line.removeprefix("- ") for line in useful if "has no attribute" in line or "No module named" in line]
    if reasons:
        return reasons[0].split(": ", 1)[-1]
    if expected:
        return f"expected {' or '.join(dict.fromkeys(expected))}"
    return " ".join(useful)[:300]


def _type_name(text: str) -> str:
    name = text.replace("typing.", "").removeprefix("<class '").removesuffix("'>").rsplit(".", 1)[-1]
    return {"NoneType": "null"}.get(name, name.replace("Literal", "one of "))
