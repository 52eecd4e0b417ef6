"""English documentation that each installation carries: the docstrings of its Python packages."""

import ast
import inspect
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import metadata, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

from datasets import Dataset

from fedbe.corpora.base import check_fractions, check_split, split_of
from fedbe.corpora.paragraphs import drop_repeated
from fedbe.errors import Facts, Problem

# What `fedbe` and its optional parts bring along, named here so that nothing else in an environment changes the corpus.
# fmt: off
PACKAGES = [
    "accelerate", "aiohttp", "aiosignal", "anyio", "attr", "click", "contourpy", "datasets", "dateutil", "dill",
    "docstring_parser", "filelock", "fontTools", "frozenlist", "fsspec", "google", "h11", "httpcore", "httpx",
    "huggingface_hub", "idna", "jinja2", "jsonargparse", "lightning", "lightning_utilities", "markdown_it",
    "matplotlib", "mpl_toolkits", "mpmath", "multidict", "multiprocess", "networkx", "numpy", "packaging", "pandas",
    "PIL", "platformdirs", "propcache", "pyarrow", "pydantic", "pygments", "pyparsing", "regex", "requests", "rich",
    "safetensors", "setuptools", "sympy", "tokenizers", "torch", "torchmetrics", "tqdm", "transformers", "typer",
    "urllib3", "wandb", "xxhash", "yaml", "yarl",
]
# fmt: on
_SKIPPED = {"__pycache__", "site-packages", "dist-packages", "test", "tests"}
_SKIPPED |= {"idlelib", "lib2to3", "turtledemo", "include"}
_STANDARD_LIBRARY = ""
_TOPICS = "pydoc_data.topics"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class InstalledDocumentation:
    """Docstrings of the standard library and of the packages that `fedbe` depends on, and Python's help topics.

    One document per module, its docstrings in source order. Modules are held out by a hash of their dotted name, so
    that what is held out here is held out on every installation. Paragraphs that occur twice are kept once, and in the
    held-out documents rather than in training (test first, then validation). Columns: ``text``, ``name``.

    Args:
        packages: Top-level packages to read; those that are not installed are passed over. By default all that
            `fedbe` depends on.
        root: Folder that holds the packages, in place of the ones this interpreter imports from; the standard library
            and the help topics are then left out.
        validation_fraction: Expected share of the modules in the validation split.
        test_fraction: Expected share of the modules in the test split.
    """

    def __init__(
        self,
        packages: list[str] | None = None,
        root: str | None = None,
        validation_fraction: float = 0.02,
        test_fraction: float = 0.02,
    ) -> None:
        self.packages = list(PACKAGES) if packages is None else packages
        self.root = root
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction

    def load(self, split: str) -> Dataset:
        """Return one split; a held-out split reads only the files that are held out."""
        check_split(split)
        seen: set[bytes] = set()
        for part in ("test", "validation", "train"):
            names = sorted(name for name in self._sources if self._split_of(name) == part)
            texts = drop_repeated((_read(self._sources[name]) for name in names), seen)
            if part == split:
                break
        rows = [(name, text) for name, text in zip(names, texts, strict=True) if text]
        return Dataset.from_dict({"name": [name for name, _ in rows], "text": [text for _, text in rows]})

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the problems of the arguments; finding no documentation at all is one of them."""
        problems = check_fractions(key, self.validation_fraction, self.test_fraction)
        if self.root is not None and not Path(self.root).is_dir():
            remedy = "is not a folder; name the folder that holds the packages."
            problems.append(Problem(f"{key}.root", self.root, remedy))
        elif not self._sources:
            remedy = "none of them is found; name packages that are installed."
            problems.append(Problem(f"{key}.packages", self.packages, remedy))
        return problems

    def describe(self) -> str:
        """Return a Markdown list of the packages read, with versions and licences."""
        if self.root is not None:
            return f"Docstrings of {', '.join(self.packages)}."
        providers = packages_distributions()
        names = {name for package, _ in self._folders() for name in providers.get(package, [])}
        rows = [f"- {name} {version(name)}: {licence_of(name)}" for name in sorted(names, key=str.lower)]
        python = f"- Python {platform.python_version()}, standard library and help topics: PSF-2.0"
        return "\n".join(["Docstrings, one document per module, repeated paragraphs dropped, of:", "", python, *rows])

    def _split_of(self, name: str) -> str:
        return split_of(name, self.validation_fraction, self.test_fraction)

    @cached_property
    def _sources(self) -> dict[str, Path | str]:
        """Dotted name → source file, or the text itself for a help topic."""
        found: dict[str, Path | str] = {}
        for package, folder in self._folders():
            found.update(_modules(package, folder))
        if self.root is None:
            found.update({f"{_TOPICS}.{topic}": text.strip() for topic, text in topics.items()})
        return found

    def _folders(self) -> Iterator[tuple[str, Path]]:
        if self.root is None:
            yield _STANDARD_LIBRARY, Path(sysconfig.get_path("stdlib"))
        for package in self.packages:
            if self.root is not None:
                yield package, Path(self.root) / package
            elif (spec := find_spec(package)) is not None:
                yield from ((package, Path(place)) for place in spec.submodule_search_locations or [])


def _modules(package: str, folder: Path) -> Iterator[tuple[str, Path]]:
    for place, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED)
        parents = [part for part in (package, *Path(place).relative_to(folder).parts) if part]
        for file in files:
            if file.endswith(".py"):
                module = file.removesuffix(".py")
                yield ".".join(parents if module == "__init__" else [*parents, module]), Path(place) / file


def licence_of(distribution: str) -> str:
    """Return the licence that an installed distribution states, in SPDX form where it does so."""
    stated = metadata(distribution).json
    if expression := stated.get("license_expression"):
        return str(expression)
    names = [line.split(" :: ")[-1] for line in stated.get("classifier", []) if line.startswith("License ::")]
    return ", ".join(names) or next(iter(str(stated.get("license", "")).splitlines()), "not stated")


def _read(source: Path | str) -> str:
    return source if isinstance(source, str) else docstrings(source)


def docstrings(path: Path) -> str:
    """Return all docstrings of a Python source file, in source order with blank lines between, its code unexecuted."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template, or source for another Python
        return ""
    nodes = (node for node in _statements(tree) if isinstance(node, _DOCUMENTED))
    return "\n\n".join(inspect.cleandoc(text) for node in nodes if (text := ast.get_docstring(node, clean=False)))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and the statements below it in source order; expressions, most of a tree, are passed over."""
    yield node
    for block in ("body", "handlers", "cases", "orelse", "finalbody"):
        for statement in getattr(node, block, []):
            yield from _statements(statement)
