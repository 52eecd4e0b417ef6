"""Which classes a configuration may name: of the kind that a key asks for, from modules that have such classes.

A class path is code: to look at a class its module is imported, which runs that module, and to use it its constructor
is called. So before anything is imported the first part of the path is looked at (`may_import`), and before anything
is called it must be a class of the right kind (`find_class`); functions are never called.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from importlib.metadata import packages_distributions, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings

FRAMEWORKS = ("fedbe", "torch", "lightning", "pytorch_lightning", "transformers", "flwr_datasets")
"""Packages whose classes may be named; those of packages that require one of these may be, too."""

SHELVES = (
    "fedbe.algorithms", "fedbe.datamodules", "fedbe.corpora", "fedbe.objectives", "fedbe.aggregation", "fedbe.engines",
    "fedbe.evaluation", "fedbe.callbacks", "fedbe.allocation", "fedbe.expansion", "torch.optim",
    "lightning.pytorch.loggers", "lightning.pytorch.callbacks",
)  # fmt: skip
"""Where the classes stand that are offered when there is none of the name given."""

_apart: ContextVar[Path | None] = ContextVar("_apart", default=None)

INSTALLED = {"site-packages", "dist-packages"}
_DOTTED = re.compile(r"([A-Za-z_]\w*)\.[A-Za-z_]")
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def guard_imports(raw: Any, apart: Path | None = None) -> None:
    """Have the parser import what `may_import` allows and nothing else, in this process from now on.

    Args:
        raw: A configuration; installed packages that it names are looked at.
        apart: A folder whose modules are not imported: a run's folder that may be a stranger's.
    """
    _apart.set(apart)
    own, refused = own_modules(apart)
    named = {name for text in _texts(raw) for name in _DOTTED.findall(text)} - own - refused
    allowed = sorted(own | {name for name in named if _builds_on_framework(name)} | set(FRAMEWORKS))
    set_parsing_settings(
        import_path_denylist=["*", *sorted(refused - set(FRAMEWORKS))],
        import_path_allowlist=allowed,
        instantiate_subclass_spec_in_any=False,
    )


def may_import(name: str) -> bool:
    """Whether classes of a top-level module may be named in a configuration.

    They may be if it is one of `FRAMEWORKS`, an installed package that requires one of them, or a file or folder of
    the user's own, in the folder where the command is called or on PYTHONPATH.
    """
    if name in FRAMEWORKS:
        return True
    own, refused = own_modules(_apart.get())
    return name in own or (name not in refused and _builds_on_framework(name))


_STANDARD = {*sys.stdlib_module_names, *sys.builtin_module_names, "jsonargparse"}


def own_modules(apart: Path | None = None) -> tuple[set[str], set[str]]:
    """Return the top-level modules in the user's own places, and those which lead into the folder `apart`."""
    own: set[str] = set()
    refused: set[str] = set()
    for place in _own_places():
        for entry in place.iterdir():
            name = entry.name.removesuffix(".py")
            if name.isidentifier() and name not in _STANDARD and (entry.suffix == ".py" or entry.is_dir()):
                (refused if _leads_into(entry, apart) else own).add(name)
    return own - refused, refused


def _leads_into(entry: Path, folder: Path | None) -> bool:
    """Whether a module of this path, or one in it, stands in the folder."""
    if folder is None:
        return False
    module, apart = entry.resolve(), folder.resolve()
    return module.is_relative_to(apart) or apart.is_relative_to(module)


def _own_places() -> Iterator[Path]:
    """Yield the folders of `sys.path` that are neither Python's nor those of installed packages."""
    paths = sysconfig.get_paths()
    python = {Path(paths[name]).resolve() for name in ("stdlib", "platstdlib", "scripts")}
    for place in dict.fromkeys(Path(text or ".").resolve() for text in sys.path):
        installed = INSTALLED & {*place.parts} or any(place in (home, home / "lib-dynload") for home in python)
        if place.is_dir() and not installed:
            yield place


@cache
def _builds_on_framework(name: str) -> bool:
    if name in _STANDARD:
        return False
    needed = {re.split(r"[^\w-]", text)[0].lower().replace("-", "_") for d in _distributions(name) for text in d}
    return not needed.isdisjoint(FRAMEWORKS)


def _distributions(name: str) -> list[list[str]]:
    """Return what each distribution that holds a top-level module requires."""
    return [requires(distribution) or [] for distribution in _installed().get(name, [])]


@cache
def _installed() -> Mapping[str, list[str]]:
    """Return the distributions by the top-level modules that they hold; it takes a second to look at all of them."""
    return packages_distributions()


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    parts = [*node, *node.values()] if isinstance(node, dict) else node if isinstance(node, list) else []
    for part in parts:
        yield from _texts(part)


def find_class(path: Any, kinds: Sequence[type]) -> type | str:
    """Return the class of a class path, or else what is wrong with the path.

    Args:
        path: Dotted path, or the name alone of a class that is loaded.
        kinds: The class must be one of these, or a subclass.
    """
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        return f"is no path of a class{_offer('', kinds)}"
    module, _, name = path.rpartition(".")
    if not module:
        named = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _subclasses(kinds) if kind.__name__ == path}
        concrete = [kind for kind in named.values() if not inspect.isabstract(kind)] or list(named.values())
        return (
            _judged(concrete[0], path, kinds) if len(concrete) == 1 else f"there is no such class{_offer(path, kinds)}"
        )
    if not may_import(module.split(".")[0]):
        return _not_importable(module.split(".")[0], path, kinds)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        return f"there is no module {error.name!r}{_offer(path, kinds)}"
    except Exception as error:  # whatever a module of the user's own does when it is imported
        return f"{module} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}"
    return f"there is no such class in {module}{_offer(path, kinds)}" if found is None else _judged(found, path, kinds)


def _judged(found: Any, path: str, kinds: Sequence[type]) -> type | str:
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if not inspect.isclass(found):
        return f"is no class, and nothing but classes is called: give a {wanted}{_offer(path, kinds)}"
    if not any(_is_a(found, kind) for kind in kinds):
        return f"is no {wanted}{_offer(path, kinds)}"
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        return f"lacks {missing}: write these methods, or give another class"
    return found


def _is_a(found: type, kind: type) -> bool:
    """Whether a class is of a kind; of a protocol every class is that has its methods."""
    if getattr(kind, "_is_protocol", False):
        return all(callable(getattr(found, name, None)) for name in vars(kind) if not name.startswith("_"))
    return issubclass(found, kind)


def _not_importable(top: str, path: str, kinds: Sequence[type]) -> str:
    if top in _STANDARD or _distributions(top):
        return f"{top} has no classes for a configuration: give one of your own files or of {', '.join(FRAMEWORKS)}"
    if _found(top):
        return f"{top} stands where no class is taken from: give one of your own files, outside of the run's folder"
    extra = " (pip install 'fedbe[partitioners]')" if top == "flwr_datasets" else ""
    return (
        f"there is no module {top!r}{extra}: it is looked for in the folder where fedbe is called, on PYTHONPATH and "
        f"among installed packages{_offer(path, kinds)}"
    )


def _found(top: str) -> bool:
    try:
        return find_spec(top) is not None
    except (ImportError, ValueError):
        return False


def _subclasses(kinds: Sequence[type]) -> set[type]:
    found = set(kinds)
    todo = list(kinds)
    while todo:
        new: set[type] = set(todo.pop().__subclasses__()) - found
        found |= new
        todo += new
    return found


def known_classes(kinds: Sequence[type]) -> list[str]:
    """Return the paths of the classes of these kinds that come with fedbe, torch and Lightning."""
    paths = []
    for shelf in SHELVES:
        module = importlib.import_module(shelf)
        for name in getattr(module, "__all__", dir(module)):
            found = getattr(module, name, None)
            fits = inspect.isclass(found) and any(_is_a(found, kind) for kind in kinds)
            if fits and not inspect.isabstract(found) and not getattr(found, "_is_protocol", False):
                paths.append(f"{shelf}.{name}")
    return paths


def _offer(path: str, kinds: Sequence[type]) -> str:
    known = known_classes(kinds)
    by_name = {name.rsplit(".", 1)[1]: name for name in known}
    close = difflib.get_close_matches(path.rsplit(".", 1)[-1], by_name, n=1)
    if close:
        return f": did you mean `{by_name[close[0]]}`?"
    return f": there are {', '.join(known)}" if known else ""
