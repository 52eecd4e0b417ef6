"""Federated fine-tuning of transformers with expanded blocks (FedBE, arXiv 2506.05977)."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["Federation", "expand_blocks", "load"]

_HOMES = {"Federation": "fedbe.config.federation", "expand_blocks": "fedbe.expansion", "load": "fedbe.expansion"}


_MOVED = {
    "fedbe.callback": "fedbe.federation.callback",
    "fedbe.loop": "fedbe.federation.loop",
    "fedbe.models": "fedbe.modeling.base_model",
    "fedbe.trainer": "fedbe.client.trainer",
    "fedbe.update": "fedbe.messages",
}


class _Moved:
    """Finds modules under the names that they had in earlier versions, with a warning that says the new one."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """Return how to load one of these modules; nothing for any other name."""
        return ModuleSpec(name, cls) if name in _MOVED else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        """Leave it to `exec_module`."""

    @staticmethod
    def exec_module(module: Any) -> None:
        """Put the module of the new name in this one's place."""
        new = _MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {new}", FutureWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(new)


sys.meta_path.append(_Moved)


class _Beside:
    """Finds the packages of the project that are top-level folders of its repository; an installation has them here.

    In a checkout they stand beside this package, among folders that are no part of it and must not be found through it.
    """

    names = frozenset({"fedbe.callbacks", "fedbe.configs", "fedbe.datamodules"})
    root = Path(__file__).resolve().parent.parent

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """Return where one of these packages is; nothing for any other name."""
        return PathFinder.find_spec(name, [str(cls.root)]) if name in cls.names else None


if (_Beside.root / "pyproject.toml").is_file() and (_Beside.root / "callbacks").is_dir():
    sys.meta_path.insert(0, _Beside)  # before the finder of another checkout that is installed


def __getattr__(name: str) -> Any:
    """Import the public functions when they are used first: they bring in torch and transformers."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
