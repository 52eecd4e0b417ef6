"""Text of one's own: local files, data sets saved with `datasets`, data sets of the Hugging Face Hub."""

import glob
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets.config import HF_DATASETS_CACHE
from datasets.features.features import require_decoding
from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode

from fedbe.corpora.base import check_fractions, check_split, split_of
from fedbe.corpora.columns import Part, unified
from fedbe.corpora.reading import CONFIGS, SourceFile, file_names, find_files, first_row, options_of, read_parts
from fedbe.errors import Facts, Problem

Names = str | list[str]


class FilesCorpus:
    """Rows of local JSONL, CSV, TSV, Parquet, Arrow or text files, compressed or not.

    A name may be that of a file, a pattern such as ``letters/*.jsonl``, or a folder, in which each text file is a
    document. Formats may differ from file to file. The cells of a CSV file are the strings that stand in it, "NA",
    "None" and "007" too, and an empty cell is no value; a column is one of numbers only if every value of every split
    is written as that number is printed. A column has the same type in all splits. Splits without files of their own
    are drawn from the training rows by a hash of the row.

    Args:
        train: File, or list of files, of the training split.
        validation: File or files of the validation split.
        test: File or files of the test split.
        format: ``json`` (an object a line), ``csv``, ``parquet``, ``arrow``, ``text`` (a row a line) or ``document``
            (a row a file); by default each file's ending decides.
        columns: New names of columns, the file's name first, for example ``{"content": "text"}``.
        validation_fraction: Expected share of the training rows to hold out where ``validation`` is not given.
        test_fraction: Expected share of the training rows to hold out where ``test`` is not given.
        seed: Seed of the rows held out.
        files: In place of ``train``, each client's file or files, by the client's name; the name stands in
            `client_column`.
        client_column: New column of the client's name, with ``files``.
        file_column: New column of the file's name, without its ending; ``None`` for no such column.
        sep: What separates the cells of a CSV file; a tab where the ending is ``.tsv``, a comma elsewhere.
        encoding: Encoding of CSV, JSON and text files, for example ``latin-1``; UTF-8 by default.
        options: Further options of the readers of `datasets`, for example ``{"quotechar": "'"}`` or
            ``{"field": "data"}``; each reader takes those that it knows.
    """

    def __init__(
        self,
        train: Names | None = None,
        validation: Names | None = None,
        test: Names | None = None,
        format: str | None = None,
        columns: dict[str, str] | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.1,
        seed: int = 0,
        files: dict[str, Names] | None = None,
        client_column: str = "client",
        file_column: str | None = None,
        sep: str | None = None,
        encoding: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        given = {"train": train, "validation": validation, "test": test}
        self.names = {split: _as_list(names) for split, names in given.items() if names is not None}
        self.files = {client: _as_list(names) for client, names in (files or {}).items()}
        self.format = format
        self.columns = columns or {}
        self.fractions = _fractions(self.names, validation_fraction, test_fraction)
        self.seed = seed
        self.client_column = client_column
        self.file_column = file_column
        own = {"sep": sep, "encoding": encoding}
        self.options = {**(options or {}), **{name: value for name, value in own.items() if value is not None}}
        self._read: tuple[Any, dict[str, Dataset]] | None = None

    def load(self, split: str) -> Dataset:
        """Return one split. Files that have changed since the last time are read again."""
        check_split(split)
        sources = self._sources()
        stamp = [(file.path, os.stat(file.path).st_mtime_ns) for files in sources.values() for file in files]
        if self._read is None or self._read[0] != stamp:
            self._read = stamp, self._rows(sources)
        source = split if split in sources else "train"
        return _finish(self._read[1][source], source, split, self.columns, self.fractions, self.seed, self._added)

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the problems of the arguments and of the files, of which the first rows are read."""
        problems = [*check_fractions(key, **self.fractions), *self._argument_problems(key)]
        if problems:
            return problems
        sources = self._sources()
        found = [file for files in sources.values() for file in files if not _is_pattern(file.path)]
        unknown = [file for file in found if file.format not in CONFIGS]
        if unknown:
            remedy = f"unknown format; set it to one of {', '.join(sorted(CONFIGS))}."
            return [Problem(f"{key}.format", self.format or unknown[0].format, remedy)]
        for split, files in sources.items():
            if not files:
                problems.append(Problem(f"{key}.{split}", self.names.get(split), self._nothing(split)))
            for file in files:
                problems.extend(self._check_file(self._key(key, file, split), file))
        return problems or self._option_problems(key, sources)

    @property
    def _added(self) -> list[str]:
        """The columns that say where a row comes from, and are no part of what identifies it."""
        clients = [self.client_column] if self.files else []
        return clients if self.file_column is None else [*clients, self.file_column]

    def _sources(self) -> dict[str, list[SourceFile]]:
        """Return the files of each split that has its own."""
        train = [file for name, names in self.files.items() for file in find_files(names, self.format, name)]
        found = {split: find_files(names, self.format) for split, names in self.names.items()}
        return {"train": train, **found} if self.files else found

    def _rows(self, sources: Mapping[str, list[SourceFile]]) -> dict[str, Dataset]:
        """Return the rows of each split's own files, every column of one type in all of them."""
        apart = self.file_column is not None
        read = [(split, *part) for split, files in sources.items() for part in read_parts(files, self.options, apart)]
        rows = unified([Part(part, typed=file.format != "csv") for _, file, part in read])
        names = {
            file.path: name for files in sources.values() for file, name in zip(files, file_names(files), strict=True)
        }
        parts: dict[str, list[Dataset]] = {}
        for (split, file, _), part in zip(read, rows, strict=True):
            parts.setdefault(split, []).append(self._with_origin(part, file, names[file.path]))
        return {split: concatenate_datasets(found) for split, found in parts.items()}

    def _with_origin(self, rows: Dataset, file: SourceFile, name: str) -> Dataset:
        for column, value in ((self.client_column, file.owner), (self.file_column, name)):
            if column is not None and value is not None:
                rows = rows.add_column(column, [value] * len(rows), feature=Value("string"))
        return rows

    def _key(self, key: str, file: SourceFile, split: str = "train") -> str:
        return f"{key}.{split}" if file.owner is None else f"{key}.files.{file.owner}"

    def _nothing(self, split: str) -> str:
        if not self.names.get(split):
            return "is empty; name at least one file."
        return f"holds no file of a known format ({', '.join(sorted(CONFIGS))}); set `format` to read all files as one."

    def _argument_problems(self, key: str) -> list[Problem]:
        if bool(self.files) == ("train" in self.names):
            remedy = "give either the training files or, with `files`, those of each client."
            return [Problem(f"{key}.train", self.names.get("train"), remedy)]
        if self.format is not None and self.format not in CONFIGS:
            remedy = f"unknown format; set it to one of {', '.join(sorted(CONFIGS))}."
            return [Problem(f"{key}.format", self.format, remedy)]
        return []

    def _option_problems(self, key: str, sources: Mapping[str, list[SourceFile]]) -> list[Problem]:
        formats = sorted({file.format for files in sources.values() for file in files})
        known = {name for format in formats for name in options_of(format)}
        remedy = f"no reader of {' or '.join(formats)} takes this option; leave it out."
        place = {"sep": "sep", "encoding": "encoding"}
        return [
            Problem(f"{key}.{place.get(name, f'options.{name}')}", value, remedy)
            for name, value in self.options.items()
            if name not in known
        ]

    def _check_file(self, key: str, file: SourceFile) -> list[Problem]:
        if not Path(file.path).is_file():
            missing = "no file fits this pattern." if _is_pattern(file.path) else "there is no such file."
            return [Problem(key, file.path, missing)]
        if not Path(file.path).stat().st_size and file.format != "document":
            return [Problem(key, file.path, "is empty.")]
        try:
            first = first_row(file, self.options)
        except Exception as error:  # whatever a parser makes of a broken file
            reason = _first_line(error.__cause__ or error)
            remedy = f"cannot be read as {file.format} ({reason}); mend it, or set `format`{_ways(file)}."
            return [Problem(key, file.path, remedy)]
        if first is None:
            return [Problem(key, file.path, "holds no rows.")]
        found = [*first, *self._added]
        if file.format == "csv" and len(first) == 1 and (other := [mark for mark in ";\t|" if mark in found[0]]):
            return [Problem(key, file.path, f"has one column, {found[0]!r}; set `sep`, perhaps to {other[0]!r}.")]
        twice = [name for name in self._added if name in first]
        if twice:
            return [Problem(key, file.path, f"has a column `{twice[0]}` already; choose another name for the new one.")]
        return _check_columns(key, file.path, found, self.columns)


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) and not Path(path).exists()


def _ways(file: SourceFile) -> str:
    return {"csv": ", `sep` or `encoding`", "parquet": "", "arrow": ""}.get(file.format, " or `encoding`")


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


def _as_list(files: Names) -> list[str]:
    return [files] if isinstance(files, str) else list(files)


def _fractions(given: Mapping[str, object], validation_fraction: float, test_fraction: float) -> dict[str, float]:
    """Return the shares to hold out of the training split: none for a split that is given."""
    return {
        "validation_fraction": 0.0 if "validation" in given else validation_fraction,
        "test_fraction": 0.0 if "test" in given else test_fraction,
    }


def _finish(
    rows: Dataset,
    source: str,
    split: str,
    columns: dict[str, str],
    fractions: dict[str, float],
    seed: int,
    added: Sequence[str] = (),
) -> Dataset:
    """Return the part of the source's rows that makes up a split, its columns renamed."""
    if source == "train" and any(fractions.values()):
        names = _row_names(rows.remove_columns(list(added)))
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
