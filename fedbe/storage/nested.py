"""Nested mappings and lists, walked by dotted keys."""

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(node: Any, separator: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings and lists with their keys, for example ``a.b[0]``.

    Args:
        node: Mappings with names as keys, lists, and values; an empty mapping or list is a leaf.
        separator: What stands between the names of nested mappings.
        prefix: Key of `node` itself.
    """
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from leaves(value, separator, f"{prefix}{separator}{key}" if prefix else str(key))
    elif isinstance(node, list) and node:
        for index, value in enumerate(node):
            yield from leaves(value, separator, f"{prefix}[{index}]")
    else:
        yield prefix, node
