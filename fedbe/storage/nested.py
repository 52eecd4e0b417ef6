"""Nested mappings and lists: walked by dotted keys such as ``a.b[0].c``, built from them, and laid over each other."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

Lists = Literal["all", "of mappings", "none"]
"""Which lists are walked; any other is a value."""


def leaves(node: Any, separator: str = ".", prefix: str = "", lists: Lists = "all") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings and lists with their keys, for example ``a.b[0]``.

    Args:
        node: Mappings with names as keys, lists, and values; an empty mapping or list is a leaf.
        separator: What stands between the names of nested mappings.
        prefix: Key of `node` itself.
        lists: Which lists are walked: all, those that hold a mapping, or none.
    """
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from leaves(value, separator, f"{prefix}{separator}{key}" if prefix else str(key), lists)
    elif isinstance(node, list) and node and _walked(node, lists):
        for index, value in enumerate(node):
            yield from leaves(value, separator, f"{prefix}[{index}]", lists)
    else:
        yield prefix, node


def section(key: str) -> str:
    """Return the first name of a dotted key: ``a`` of ``a[0].b``."""
    return key.partition(".")[0].partition("[")[0]


def dotted(path: Iterable[str | int]) -> str:
    """Return ``a.b[0].c`` for the path a, b, 0, c."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def look_up(node: Any, path: Iterable[str | int]) -> Any:
    """Return what stands at a path of names and indices."""
    for step in path:
        node = node[step]
    return node


def nest(key: str, value: Any) -> dict[str, Any]:
    """Return ``{"a": {"b": value}}`` for the key ``a.b``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Lay `other` over `into`, mapping by mapping; one that names a class takes the place of what was there."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict) and "class_path" not in value:
            merge(into[key], value)
        else:
            into[key] = value


def _walked(node: list[Any], lists: Lists) -> bool:
    return lists == "all" or (lists == "of mappings" and any(isinstance(value, Mapping) for value in node))
