"""Files and how they are read: which files a name means, their formats, and the reader's options."""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas
from datasets import Dataset, Features, Value, load_dataset
from datasets.packaged_modules.arrow.arrow import ArrowConfig
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from datasets.packaged_modules.text.text import TextConfig

CONFIGS: Mapping[str, type] = {
    "arrow": ArrowConfig,
    "csv": CsvConfig,
    "document": TextConfig,
    "json": JsonConfig,
    "parquet": ParquetConfig,
    "text": TextConfig,
}
"""Format → the options that its reader in `datasets` takes."""

_ENDINGS = {
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".tsv": "csv",
    ".txt": "text",
}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_NO_OPTIONS = {"name", "version", "data_dir", "data_files", "description", "features", "sample_by"}


@dataclass(frozen=True)
class SourceFile:
    """A file and how it is read.

    Attributes:
        path: Where it is.
        format: A key of `CONFIGS`, or the file's ending where that is unknown.
        owner: Name of the client whose file it is; ``None`` where no client was named.
    """

    path: str
    format: str
    owner: str | None = None


def find_files(names: Sequence[str], format: str | None, owner: str | None = None) -> list[SourceFile]:
    """Return the files that names mean: files, folders with all below them, or patterns with ``*``, ``?`` and ``**``.

    In a folder hidden files and those of unknown endings are passed over, and a text file is a document. A name
    that means nothing is returned as it is.
    """
    return [file for name in names for file in _find(os.path.expanduser(name), format, owner)]


def _find(name: str, format: str | None, owner: str | None) -> Iterator[SourceFile]:
    path = Path(name)
    if path.is_dir():
        for file in sorted(inner for inner in path.rglob("*") if inner.is_file()):
            kind = format or {"text": "document"}.get(ending(file), ending(file))
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if kind in CONFIGS and not hidden:
                yield SourceFile(str(file), kind, owner)
        return
    matches = (
        [] if path.exists() else sorted(match for match in glob.glob(name, recursive=True) if os.path.isfile(match))
    )
    for match in matches or [name]:
        yield SourceFile(match, format or ending(Path(match)), owner)


def ending(file: Path) -> str:
    """Return the format that a file's ending says, or the ending where it says none that is known."""
    known = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in _COMPRESSED]
    return _ENDINGS.get(known[-1], known[-1]) if known else ""


def file_names(files: Sequence[SourceFile]) -> list[str]:
    """Return a name for each file: its path below the folder that all are in, without endings where that is enough."""
    paths = [Path(file.path).absolute() for file in files]
    common = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    full = [path.relative_to(common).as_posix() for path in paths]
    short = [name[: -len("".join(_endings(Path(name)))) or None] for name in full]
    return [long if short.count(brief) > 1 else brief for long, brief in zip(full, short, strict=True)]


def _endings(file: Path) -> list[str]:
    """Return the endings that say how a file is read, the last ones of its name."""
    known: list[str] = []
    for suffix in reversed(file.suffixes):
        if suffix.lower() not in {*_ENDINGS, *_COMPRESSED}:
            break
        known.insert(0, suffix)
    return known


def options_of(format: str) -> set[str]:
    """Return the names of the options that a format's reader takes."""
    return {field.name for field in fields(CONFIGS[format])} - _NO_OPTIONS


def reader_options(file: SourceFile, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options to read a file with: those of ``given`` that its format knows, and what the format needs.

    Of a CSV file only an empty cell is no value: "NA" and "None" are words like others.
    """
    known = {name: value for name, value in given.items() if name in options_of(file.format)}
    if file.format == "csv":
        tabs = {"sep": "\t"} if ".tsv" in map(str.lower, Path(file.path).suffixes) else {}
        return {"keep_default_na": False, "na_values": [""], **tabs, **known}
    return {**known, "sample_by": "document"} if file.format == "document" else known


def read(files: Sequence[SourceFile], given: Mapping[str, Any], streaming: bool = False) -> Any:
    """Return the rows of files of one format and the same columns, as strings where the format is CSV."""
    builder = "text" if files[0].format == "document" else files[0].format
    options = reader_options(files[0], given)
    if builder == "csv":
        options["features"] = Features({name: Value("string") for name in header(files[0], given)})
    paths = [glob.escape(file.path) for file in files]
    return load_dataset(builder, data_files={"train": paths}, split="train", streaming=streaming, **options)


def first_row(file: SourceFile, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the first row of a file; ``None`` where it has none."""
    if file.format == "csv":
        return next(iter(_begin_csv(file, given, 1).to_dict("records")), None)
    return next(iter(read([file], given, streaming=True)), None)


def header(file: SourceFile, given: Mapping[str, Any]) -> list[str]:
    """Return the names of a CSV file's columns."""
    return [str(name) for name in _begin_csv(file, given, 0).columns]


def _begin_csv(file: SourceFile, given: Mapping[str, Any], rows: int) -> pandas.DataFrame:
    options = CsvConfig(**reader_options(file, given)).pd_read_csv_kwargs
    return pandas.read_csv(file.path, **{**options, "nrows": rows, "skipfooter": 0, "chunksize": None, "dtype": str})


def read_parts(files: Sequence[SourceFile], given: Mapping[str, Any], apart: bool) -> list[tuple[SourceFile, Dataset]]:
    """Return the rows of files in parts, each with the first of its files; neighbours that are alike are read at once.

    Args:
        files: The files, in order.
        given: The reader's options.
        apart: Make each file a part of its own.
    """

    def kind(file: SourceFile) -> tuple[Any, ...]:
        columns = tuple(header(file, given)) if file.format == "csv" else ()
        return (file.format, file.owner, columns, str(reader_options(file, given)), file.path if apart else None)

    groups = [list(group) for _, group in groupby(files, kind)]
    return [part for group in groups for part in _read_group(group, given)]


def _read_group(files: list[SourceFile], given: Mapping[str, Any]) -> Iterator[tuple[SourceFile, Dataset]]:
    try:
        parts = [(files[0], read(files, given))]
    except Exception:  # of files whose columns differ none can be read together
        if len(files) == 1:
            raise
        parts = [(file, read([file], given)) for file in files]
    yield from parts
