"""Text of one's own: local files, data sets saved with `datasets`, data sets of the Hugging Face Hub."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.config import HF_DATASETS_CACHE
from datasets.features.features import require_decoding
from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode

from fedbe.corpora.base import check_fractions, check_split, split_of
from fedbe.errors import Facts, Problem

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}


class FilesCorpus:
    """Rows of local JSONL, CSV, Parquet or text files, compressed or not.

    Splits without files of their own are drawn from the training rows by a hash of the row.

    Args:
        train: File, or list of files, of the training split.
        validation: File or files of the validation split.
        test: File or files of the test split.
        format: ``json`` (an object a line), ``csv``, ``parquet`` or ``text`` (a row a line); by default the first
            file's ending decides.
        columns: New names of columns, the file's name first, for example ``{"content": "text"}``.
        validation_fraction: Expected share of the training rows to hold out where ``validation`` is not given.
        test_fraction: Expected share of the training rows to hold out where ``test`` is not given.
        seed: Seed of the rows held out.
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        format: str | None = None,
        columns: dict[str, str] | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        given = {"train": train, "validation": validation, "test": test}
        self.files = {split: _as_list(files) for split, files in given.items() if files is not None}
        self.format = format or _format_of(self.files["train"])
        self.columns = columns or {}
        self.fractions = _fractions(self.files, validation_fraction, test_fraction)
        self.seed = seed

    def load(self, split: str) -> Dataset:
        """Return one split. Files that have changed since the last time are read again."""
        check_split(split)
        source = split if split in self.files else "train"
        rows = load_dataset(self.format, data_files={source: self.files[source]}, split=source)
        return _finish(rows, source, split, self.columns, self.fractions, self.seed)

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the problems of the arguments and of the files, of which the first rows are read."""
        problems = check_fractions(key, **self.fractions)
        if self.format not in _FORMATS.values():
            remedy = f"unknown format; set it to one of {', '.join(sorted(set(_FORMATS.values())))}."
            return [*problems, Problem(f"{key}.format", self.format, remedy)]
        for split, files in self.files.items():
            if not files:
                problems.append(Problem(f"{key}.{split}", files, "is empty; name at least one file."))
            for file in files:
                problems.extend(self._check_file(f"{key}.{split}", file))
        return problems

    def _check_file(self, key: str, file: str) -> list[Problem]:
        if not Path(file).is_file():
            return [Problem(key, file, "there is no such file.")]
        if not Path(file).stat().st_size:
            return [Problem(key, file, "is empty.")]
        try:
            rows = load_dataset(self.format, data_files=file, split="train", streaming=True)
            first = next(iter(rows), None)
        except Exception as error:  # whatever a parser makes of a broken file
            reason = _first_line(error.__cause__ or error)
            return [Problem(key, file, f"cannot be read as {self.format} ({reason}); mend it or set `format`.")]
        if first is None:
            return [Problem(key, file, "holds no rows.")]
        return _check_columns(key, file, list(first), self.columns)


class SavedCorpus:
    """A data set saved with `datasets`' ``save_to_disk``: a `DatasetDict`, or one `Dataset` to hold rows out of.

    Args:
        path: The folder.
        columns: New names of columns, the saved name first.
        validation_fraction: Expected share of the training rows to hold out where there is no validation split.
        test_fraction: Expected share of the training rows to hold out where there is no test split.
        seed: Seed of the rows held out.
    """

    def __init__(
        self,
        path: str,
        columns: dict[str, str] | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.path = path
        self.columns = columns or {}
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.seed = seed

    def load(self, split: str) -> Dataset:
        """Return one split."""
        check_split(split)
        saved = self._saved()
        source = split if split in saved else "train"
        fractions = _fractions(saved, self.validation_fraction, self.test_fraction)
        return _finish(saved[source], source, split, self.columns, fractions, self.seed)

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the problems of the arguments and of the saved data set, whose rows are not read."""
        problems = check_fractions(key, self.validation_fraction, self.test_fraction)
        try:
            saved = self._saved()
        except Exception as error:  # missing, broken, or not a saved data set
            reason = _first_line(error)
            return [*problems, Problem(f"{key}.path", self.path, f"cannot be loaded: {reason}")]
        if "train" not in saved:
            remedy = f"has no split `train`, only {', '.join(saved)}; save a DatasetDict with one."
            problems.append(Problem(f"{key}.path", self.path, remedy))
        for rows in saved.values():
            problems.extend(_check_columns(f"{key}.path", self.path, rows.column_names, self.columns))
        return problems

    def _saved(self) -> dict[str, Dataset]:
        saved = load_from_disk(self.path)
        return {str(name): rows for name, rows in saved.items()} if isinstance(saved, DatasetDict) else {"train": saved}


class HubCorpus:
    """A data set of the Hugging Face Hub, downloaded once or taken from the cache.

    Args:
        name: Its name, for example ``roneneldan/TinyStories``.
        config: Its configuration, where it has several.
        train: The Hub's name of the training split; slices such as ``train[:1%]`` are allowed.
        validation: The Hub's name of the validation split; null to hold rows out of the training split.
        test: The Hub's name of the test split; null to hold rows out of the training split.
        columns: New names of columns, the Hub's name first.
        revision: Branch, tag or commit.
        validation_fraction: Expected share of the training rows to hold out where ``validation`` is null.
        test_fraction: Expected share of the training rows to hold out where ``test`` is null.
        seed: Seed of the rows held out.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        train: str = "train",
        validation: str | None = None,
        test: str | None = None,
        columns: dict[str, str] | None = None,
        revision: str | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.name = name
        self.config = config
        given = {"train": train, "validation": validation, "test": test}
        self.splits = {split: hub_split for split, hub_split in given.items() if hub_split is not None}
        self.columns = columns or {}
        self.revision = revision
        self.fractions = _fractions(self.splits, validation_fraction, test_fraction)
        self.seed = seed

    def load(self, split: str) -> Dataset:
        """Return one split, from the cache where it is there."""
        check_split(split)
        source = split if split in self.splits else "train"
        rows = load_dataset(self.name, self.config, split=self.splits[source], revision=self.revision)
        return _finish(rows, source, split, self.columns, self.fractions, self.seed)

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the problems of the arguments; without a network one is that the data set is not in the cache."""
        problems = check_fractions(key, **self.fractions)
        if not self.name:
            problems.append(Problem(f"{key}.name", self.name, "is empty; give a data set's name on the Hub."))
        elif is_offline_mode() and not self._is_local():
            remedy = "is not in the cache and HF_HUB_OFFLINE is set; unset it, or use FilesCorpus or SavedCorpus."
            problems.append(Problem(f"{key}.name", self.name, remedy))
        return problems

    def _is_local(self) -> bool:
        prepared = Path(os.path.expanduser(HF_DATASETS_CACHE)) / self.name.replace("/", "___")
        downloaded = Path(HF_HUB_CACHE) / f"datasets--{self.name.replace('/', '--')}"
        return any(place.exists() for place in (Path(self.name), prepared, downloaded))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _as_list(files: str | list[str]) -> list[str]:
    return [files] if isinstance(files, str) else list(files)


def _format_of(files: list[str]) -> str:
    suffixes = [suffix.lower() for suffix in Path(files[0]).suffixes] if files else []
    known = [suffix for suffix in suffixes if suffix not in _COMPRESSED]
    return _FORMATS.get(known[-1], known[-1]) if known else ""


def _fractions(given: Mapping[str, object], validation_fraction: float, test_fraction: float) -> dict[str, float]:
    """Return the shares to hold out of the training split: none for a split that is given."""
    return {
        "validation_fraction": 0.0 if "validation" in given else validation_fraction,
        "test_fraction": 0.0 if "test" in given else test_fraction,
    }


def _finish(
    rows: Dataset, source: str, split: str, columns: dict[str, str], fractions: dict[str, float], seed: int
) -> Dataset:
    """Return the part of the source's rows that makes up a split, its columns renamed."""
    if source == "train" and any(fractions.values()):
        names = _row_names(rows)
        rows = rows.select([i for i, name in enumerate(names) if split_of(name, **fractions, seed=seed) == split])
    return rows.rename_columns(columns)


def _row_names(rows: Dataset) -> list[str]:
    """Return what identifies each row: its content, or its number where it holds images or sound."""
    if any(require_decoding(feature) for feature in rows.features.values()):
        return [str(number) for number in range(len(rows))]
    return [json.dumps(row, sort_keys=True, default=str) for row in rows]


def _check_columns(key: str, value: str, found: list[str], columns: dict[str, str]) -> list[Problem]:
    """Return the columns to rename that are not there; which columns are needed is known to those who read them."""
    remedy = "has no column `{}` to rename; it has {}."
    return [Problem(key, value, remedy.format(name, ", ".join(found))) for name in columns if name not in found]
