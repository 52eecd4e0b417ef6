"""One type for a column in all files, which loses nothing of what stands in them."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Value
from datasets.features.features import Json

_NUMBERS = {"int64": pa.int64(), "float64": pa.float64()}


@dataclass(frozen=True)
class Part:
    """Rows of one source.

    Attributes:
        rows: The rows.
        typed: Whether the source has types of its own; a CSV file has none, its cells are strings.
    """

    rows: Dataset
    typed: bool


def unified(parts: Sequence[Part]) -> list[Dataset]:
    """Return the rows of all parts with one type for each column of single values.

    Columns of typed sources that agree are left alone. Otherwise a column holds whole numbers, or numbers, if all of
    its values in all parts are written as such a number is printed ("7" and not "007"), and else strings.
    """
    columns = dict.fromkeys(name for part in parts for name in part.rows.column_names)
    casts = {name: kind for name in columns if (kind := _common_type(name, parts)) is not None}
    return [_cast(part.rows, casts) for part in parts]


def as_strings(rows: Dataset, column: str) -> Dataset | None:
    """Return the rows with a column of single values as strings; ``None`` where its values are not single ones."""
    feature = rows.features[column]
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return rows
    if isinstance(feature, Json):
        return _decoded(rows, column)
    return _cast(rows, {column: "string"}) if _is_scalar(feature) else None


def _common_type(name: str, parts: Sequence[Part]) -> str | None:
    """Return the type to cast a column to; ``None`` to leave it."""
    holders = [part for part in parts if name in part.rows.column_names]
    features = [part.rows.features[name] for part in holders]
    own = {
        str(part.rows.features[name].dtype) for part in holders if part.typed and _is_scalar(part.rows.features[name])
    }
    if not all(map(_is_scalar, features)) or (len(own) <= 1 and all(part.typed for part in holders)):
        return None
    own.discard("null")
    if len(own) == 1 and all(part.typed for part in holders):
        return own.pop()
    if any(not kind.startswith(("int", "uint", "float")) for kind in own):
        return "string"
    written = [pc.cast(part.rows.data.column(name), pa.string()) for part in holders]
    if all(column.null_count == len(column) for column in written):
        return None
    return next((kind for kind, type in _NUMBERS.items() if all(_is_written(c, type) for c in written)), "string")


def _is_scalar(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith(
        ("int", "uint", "float", "bool", "string", "large_string", "null")
    )


def _is_written(column: pa.ChunkedArray, type: pa.DataType) -> bool:
    """Whether each value is written as the number of this type that it is."""
    try:
        return bool(pc.cast(pc.cast(column, type), pa.string()).equals(column))
    except pa.ArrowInvalid:
        return False


def _cast(rows: Dataset, casts: dict[str, str]) -> Dataset:
    for name, kind in casts.items():
        if name in rows.column_names and rows.features[name] != Value(kind):
            rows = rows.cast_column(name, Value(kind))
    return rows


def _decoded(rows: Dataset, column: str) -> Dataset | None:
    """Return the rows with a column of values of several types as strings."""
    values = list(rows[column])
    if any(isinstance(value, list | dict) for value in values):
        return None
    strings = [None if value is None else str(value) for value in values]
    return rows.remove_columns(column).add_column(column, strings, feature=Value("string"))
