"""What configuration files and the command line say, merged, before anything is made of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedbe.errors import ConfigError, Problem
from fedbe.storage.nested import merge, nest

Raw = dict[str, Any]

MOST_VALUES = 100_000
"""A configuration of more values than this, aliases written out, is refused: it is no configuration."""

MOST_LEVELS = 40
"""How deep its mappings and lists may be nested."""


class _StrictLoader(yaml.SafeLoader):
    """Loads YAML, and refuses a key that is given twice: of two values one would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping of a node."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = (key_node.tag, key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node))
            if key in seen:
                where = f"line {key_node.start_mark.line + 1}"
                raise yaml.YAMLError(f"the key `{key_node.value}` is given twice, the second time in {where}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Return what a YAML text holds, of plain values alone.

    Raises:
        ValueError: It is no YAML, gives a key twice, or holds more or deeper than a configuration does.
    """
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    _count(content, 0, 0)
    return content


def _count(node: Any, count: int, level: int) -> int:
    """Return `count` and the number of values in `node`.

    Raises:
        ValueError: There are more than `MOST_VALUES`, or more than `MOST_LEVELS` of nesting.
    """
    if level > MOST_LEVELS:
        raise ValueError("it is nested too deeply")
    count += 1
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        count = _count(part, count, level + 1)
        if count > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES} values, aliases written out")
    return count


def read_yaml(path: Path, key: str) -> Raw:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: It cannot be read, or holds no mapping; under `key`.
    """
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # a text that is not UTF-8 is a ValueError
        reason = " ".join(str(error).split())
        raise ConfigError(Problem(key, str(path), f"cannot be read as YAML: {reason}")) from error
    if not isinstance(content, dict):
        raise ConfigError(Problem(key, str(path), "must hold a YAML mapping of sections, such as `data:`"))
    return content


def read_raw(arguments: Sequence[str]) -> Raw:
    """Return what ``--config FILE`` and ``--key value`` say, merged in order, unchecked.

    Raises:
        ConfigError: A file cannot be read, or is not a YAML mapping.
    """
    raw: Raw = {}
    words = iter(arguments)
    for word in words:
        key, separator, value = word.removeprefix("--").partition("=")
        if only_shows(word):
            continue
        text = value if separator else next(words, "")
        if key == "config":
            for name, content in read_yaml(Path(text), "config").items():
                merge(raw, nest(name, content) if isinstance(name, str) else {name: content})
        elif key.endswith("+"):
            append(raw, key.removesuffix("+"), _as_yaml(text))
        else:
            merge(raw, nest(key, _as_yaml(text)))
    return raw


def only_shows(word: str) -> bool:
    """Whether a word of the command line shows something and sets no key."""
    name = word.partition("=")[0]
    return name in ("-h", "--help", "--print_config") or (name.startswith("--") and name.endswith(".help"))


def _as_yaml(text: str) -> Any:
    try:
        return load_yaml(text)
    except ValueError:
        return text


def append(raw: Raw, key: str, value: Any) -> None:
    """Add an element, or those of a list, to the list at a dotted key."""
    node: Any = raw
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else {}
    if isinstance(node, dict):
        known = node.get(last) or []
        node[last] = [
            *(known if isinstance(known, list) else [known]),
            *(value if isinstance(value, list) else [value]),
        ]
