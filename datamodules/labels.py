"""The set of classes of a labelled corpus, fixed from its training split."""

from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from fedbe.errors import Problem


class LabelSet:
    """Class names in order, and the class of each value of a label column.

    Strings are classes by name, in sorted order unless ``names`` gives another. Integers are classes in increasing
    order, or class numbers when ``names`` (or the column's own names) are known.

    Args:
        train: The training split.
        column: Column of the label: integers, strings, booleans or `datasets.ClassLabel`.
        names: The classes; ``None`` to take the values that the training split has.
    """

    def __init__(self, train: Dataset, column: str, names: Sequence[str] | None = None) -> None:
        self.column = column
        feature = train.features[column]
        values = sorted({value for value in train[column] if value is not None})
        if isinstance(feature, ClassLabel):
            names = names or feature.names
        if names is not None and any(isinstance(value, int) for value in values):
            self.index: dict[Any, int] = {number: number for number in range(len(names))}
        else:
            self.index = {value: number for number, value in enumerate(names or values)}
        self.names = [str(name) for name in (names or values)]

    def problems(self, key: str, split: str, rows: Dataset) -> list[Problem]:
        """Return the values of a split that are no class: missing, fractional, or not in the set."""
        strangers = [value for value in dict.fromkeys(rows[self.column]) if not self._known(value)]
        if not strangers:
            return []
        known = ", ".join(self.names[:8]) + (", …" if len(self.names) > 8 else "")
        remedy = (
            f"in `{self.column}` of the {split} split is none of the classes {known}; list all classes in `labels`."
        )
        return [Problem(key, strangers[0], remedy)]

    def classes(self, rows: Dataset) -> list[int]:
        """Return the class of each row."""
        return [self.index[value] for value in rows[self.column]]

    def _known(self, value: Any) -> bool:
        return isinstance(value, str | int) and value in self.index
