"""Pictures of one's own: a folder of them for each class."""

import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image, Value

from fedbe.corpora.base import SPLITS, check_fractions, check_split, split_of
from fedbe.errors import Facts, Problem

_log = logging.getLogger(__name__)

_FOLDERS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


class ImageFolder:
    """Pictures in folders that are named after their classes: ``path/CLASS/….png``.

    If ``path/train`` holds folders, these are the classes', and ``path/validation`` and ``path/test`` hold the other
    splits in the same way. A split without a folder of its own is drawn from the training pictures by a hash of each
    file's path in the folder. Rows have ``image``, ``label`` (a `datasets.ClassLabel`) and ``file``, that path.

    Args:
        path: The folder.
        validation_fraction: Expected share of the training pictures to hold out where there is no validation folder.
        test_fraction: Expected share of the training pictures to hold out where there is no test folder.
        seed: Seed of the pictures held out.
    """

    def __init__(self, path: str, validation_fraction: float = 0.1, test_fraction: float = 0.1, seed: int = 0) -> None:
        self.path = path
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.seed = seed

    def load(self, split: str) -> Dataset:
        """Return one split, its rows in the order of the files' paths."""
        check_split(split)
        files = [file for file in self._pictures[split if split in self._folders else "train"] if self._in(file, split)]
        features = Features({"image": Image(), "label": ClassLabel(names=self._classes), "file": Value("string")})
        columns = {
            "image": [str(file) for file in files],
            "label": [self._class_of(file) for file in files],
            "file": [self._name(file) for file in files],
        }
        return Dataset.from_dict(columns, features=features)

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the problems of the arguments, of the folders, and of pictures that cannot be opened."""
        problems = check_fractions(key, self.validation_fraction, self.test_fraction)
        if not self._root.is_dir():
            return [*problems, Problem(f"{key}.path", self.path, "there is no such folder.")]
        return problems + [Problem(f"{key}.path", self.path, fault) for fault in self._faults()]

    @cached_property
    def _root(self) -> Path:
        return Path(self.path).expanduser()

    @cached_property
    def _folders(self) -> dict[str, Path]:
        """Return where the classes of each split lie that has a folder of its own."""
        if not _folders_in(self._root / "train"):
            return {"train": self._root}
        found = ((split, self._root / name) for split in SPLITS for name in _FOLDERS[split])
        return {split: folder for split, folder in found if folder.is_dir()}

    @cached_property
    def _pictures(self) -> dict[str, list[Path]]:
        """Return the pictures of each split that has a folder, in order; other files are counted in the log."""
        endings = {end for end, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN}
        files = {split: sorted(_files(folder)) for split, folder in self._folders.items()}
        others = [file for found in files.values() for file in found if file.suffix.lower() not in endings]
        if others:
            _log.warning(
                "%d files in %s are no pictures and are left out, such as %s", len(others), self.path, others[0]
            )
        return {split: [file for file in found if file.suffix.lower() in endings] for split, found in files.items()}

    @cached_property
    def _classes(self) -> list[str]:
        folder = self._folders["train"]
        return sorted({file.relative_to(folder).parts[0] for file in self._pictures["train"]})

    def _class_of(self, file: Path) -> str:
        folder = next(folder for folder in self._folders.values() if file.is_relative_to(folder))
        return file.relative_to(folder).parts[0]

    def _name(self, file: Path) -> str:
        return file.relative_to(self._root).as_posix()

    def _in(self, file: Path, split: str) -> bool:
        """Whether a picture of the folder that a split is taken from is one of the split's."""
        if split != "train" and split in self._folders:
            return True
        held_out = {"validation": self.validation_fraction, "test": self.test_fraction}
        shares = {f"{name}_fraction": 0.0 if name in self._folders else share for name, share in held_out.items()}
        return split_of(self._name(file), **shares, seed=self.seed) == split

    def _faults(self) -> Iterator[str]:
        beside = [folder.name for folder in _folders_in(self._root) if folder not in self._folders.values()]
        if self._folders["train"] != self._root and beside:
            yield f"has folders beside `train`, `validation` and `test`: {', '.join(sorted(beside)[:8])}; move them."
        for split, files in self._pictures.items():
            loose = [file for file in files if file.parent == self._folders[split]]
            if loose:
                yield f"{self._name(loose[0])} lies in no class's folder; {len(loose)} pictures do not: move them."
            elif strangers := sorted({self._class_of(file) for file in files} - set(self._classes)):
                yield f"class {strangers[0]!r} has pictures for {split} and none to train on: add some."
        files = [file for found in self._pictures.values() for file in found]
        broken = [(file, fault) for file in files if (fault := _fault(file))]
        if broken:
            yield f"{len(broken)} pictures cannot be opened, such as {self._name(broken[0][0])} ({broken[0][1]})."
        if not files:
            yield "holds no pictures; give a folder that has one folder of pictures for each class."


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and in those inside it, but no hidden ones."""
    for file in folder.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def _folders_in(folder: Path) -> list[Path]:
    inside = folder.iterdir() if folder.is_dir() else ()
    return [path for path in inside if path.is_dir() and not path.name.startswith(".")]


def _fault(file: Path) -> str | None:
    try:
        with PIL.Image.open(file):
            return None
    except (OSError, ValueError, SyntaxError) as error:
        return type(error).__name__
