"""C++ text that each PyTorch installation carries: its headers, split by library."""

import re
from pathlib import Path

import torch
from datasets import Dataset

from fedbe.corpora.base import check_fractions, check_split, hash_position
from fedbe.errors import Facts, Problem

LIBRARIES = (
    "c10",
    "ATen/core",
    "ATen/native",
    "ATen/cpu",
    "torch/csrc/api",
    "torch/csrc/jit",
    "torch/csrc/autograd",
    "torch/csrc/distributed",
    "pybind11",
    "fmt",
)
_SUFFIXES = {".h", ".hpp", ".cuh"}
# What opens and closes nearly every header of an installation: a guard that packaging adds, and a licence comment.
_GUARD_START = re.compile(r"\A#if !defined\(TORCH_STABLE_ONLY\).*\n")
_GUARD_END = re.compile(r"\n#else\n#error \"This file should not be included.*\n#endif.*\s*\Z")
_FIRST_COMMENT = re.compile(r"\A\s*(/\*.*?\*/|(?://[^\n]*\n)+)", re.DOTALL)
_LICENCE = re.compile(r"copyright|licen[cs]e", re.IGNORECASE)


class TorchHeaders:
    """The C++ headers under ``torch/include``, ten libraries that differ in style and subject.

    In each library the files are ordered by a hash of their path; the first ones are the test split, the next ones
    validation, so that each library has at least one file in each split whose fraction is not 0. Licence comments are
    taken off. Columns: ``text``, ``library``, ``path``.

    Args:
        libraries: Folders below ``torch/include``, each a value of the column ``library``. By default ten.
        max_characters: Most characters of a library, shared out to the splits by their fractions; the file that goes
            beyond its split's share is cut. By default everything.
        validation_fraction: Share of each library's files in the validation split.
        test_fraction: Share of each library's files in the test split.
        root: Folder in place of the installation's ``torch/include``.
    """

    def __init__(
        self,
        libraries: list[str] | None = None,
        max_characters: int | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.1,
        root: str | None = None,
    ) -> None:
        self.libraries = list(LIBRARIES) if libraries is None else libraries
        self.max_characters = max_characters
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.root = Path(torch.__file__).parent / "include" if root is None else Path(root)

    def load(self, split: str) -> Dataset:
        """Return one split, a row per file, library after library."""
        check_split(split)
        rows = [row for library in self.libraries for row in self._rows(library, split)]
        return Dataset.from_dict({name: [row[name] for row in rows] for name in ("text", "library", "path")})

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the problems of the arguments; a library without enough headers for its splits is one of them."""
        problems = check_fractions(key, self.validation_fraction, self.test_fraction)
        if self.max_characters is not None and self.max_characters < 1:
            problems.append(Problem(f"{key}.max_characters", self.max_characters, "must be at least 1, or null."))
        if not self.libraries:
            problems.append(Problem(f"{key}.libraries", self.libraries, "is empty; name at least one folder."))
        for library in self.libraries:
            if (found := len(self._files(library))) < 3:
                remedy = f"{found} headers in {self.root / library}; three are needed, one for each split."
                problems.append(Problem(f"{key}.libraries", library, remedy))
        return problems

    def _files(self, library: str) -> list[str]:
        """Return the paths of a library's headers below the root, ordered by hash."""
        files = (self.root / library).rglob("*")
        paths = [file.relative_to(self.root).as_posix() for file in files if file.suffix in _SUFFIXES]
        return sorted(paths, key=hash_position)

    def _rows(self, library: str, split: str) -> list[dict[str, str]]:
        paths = self._files(library)
        test = _count(len(paths), self.test_fraction)
        held_out = test + _count(len(paths), self.validation_fraction)
        part = {"test": slice(test), "validation": slice(test, held_out), "train": slice(held_out, None)}[split]
        left = self._limit(split)
        rows = []
        for path in paths[part]:
            if left <= 0:
                break
            text = strip_boilerplate((self.root / path).read_text(encoding="utf-8", errors="replace"))[:left]
            left -= len(text)
            rows.append({"text": text, "library": library, "path": path})
        return [row for row in rows if row["text"]]

    def _limit(self, split: str) -> int:
        share = {"test": self.test_fraction, "validation": self.validation_fraction}
        if self.max_characters is None:
            return 2**63
        return round(self.max_characters * share.get(split, 1 - sum(share.values())))


def _count(files: int, fraction: float) -> int:
    return max(1, round(files * fraction)) if fraction else 0


def strip_boilerplate(text: str) -> str:
    """Return a header without its packaging guard and without the licence comments that it opens with."""
    text = _GUARD_END.sub("\n", _GUARD_START.sub("", text))
    while (comment := _FIRST_COMMENT.match(text)) and _LICENCE.search(comment[0]):
        text = text[comment.end() :]
    return text.strip() + "\n"
