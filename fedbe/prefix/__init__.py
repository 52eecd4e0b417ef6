"""The frozen prefix cache: outputs of the frozen blocks below the lowest trained one, computed once per sequence."""

from fedbe.prefix.reuse import Prefix, reuse_prefix
from fedbe.prefix.store import KEY, PrefixReuse, Store

__all__ = ["KEY", "Prefix", "PrefixReuse", "Store", "reuse_prefix"]
