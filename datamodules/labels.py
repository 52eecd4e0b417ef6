"""The set of classes of a labelled corpus, fixed from its training split."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, List, Value
from transformers import PretrainedConfig

from fedbe.errors import Problem
from fedbe.modeling.head import in_head_order

_WHOLE = re.compile(r"[+-]?\d+")


class LabelSet:
    """The names of the classes in the order of their numbers, and the class of each value of a label column.

    Strings are names, in sorted order unless ``names`` gives another. Whole numbers are the names that are written so,
    or else, where ``names`` are words, their places in the list, from 0; without ``names`` they are named as they are
    written, in increasing order. Booleans are the names "false" and "true", or else the first and the second. A
    `datasets.ClassLabel` brings its own names, which ``names`` may put into another order or replace one by one.

    Where the head of ``model_config`` is for these very names, classes are numbered as in that head.

    Args:
        train: The training split.
        column: Column of the label: integers, strings, booleans or `datasets.ClassLabel`.
        names: The classes; ``None`` to take the values that the training split has.
        model_config: The base model's configuration; ``None`` where it is not known.

    Attributes:
        names: The names of the classes, by number.
        index: Value of the column → number of its class.
    """

    def __init__(
        self,
        train: Dataset,
        column: str,
        names: Sequence[str] | None = None,
        model_config: PretrainedConfig | None = None,
    ) -> None:
        names = names or None
        self.column = column
        feature = train.features[column]
        values = sorted({value for value in train[column] if value is not None})
        own = feature.names if isinstance(feature, ClassLabel) else None
        known = _by_value(values, own, names)
        self.names = in_head_order(model_config, list(names or dict.fromkeys(known.values())))
        numbers = {name: number for number, name in enumerate(self.names)}
        self.index: dict[Any, int] = {value: numbers[name] for value, name in known.items()}
        self._given = own is None and names is not None

    def problems(self, key: str, split: str, rows: Dataset) -> list[Problem]:
        """Return the values of a split that are no class: missing, fractional, or not in the set."""
        strangers = [value for value in dict.fromkeys(rows[self.column]) if not self._known(value)]
        if not strangers:
            return []
        return [Problem(key, strangers[0], f"in `{self.column}` of the {split} split {self._remedy(strangers[0])}")]

    def classes(self, rows: Dataset) -> list[int]:
        """Return the class of each row."""
        return [self.index[value] for value in rows[self.column]]

    def _remedy(self, stranger: Any) -> str:
        if isinstance(stranger, float):
            return "is a score (regression), and a model is trained to tell classes: write whole numbers or names."
        known = ", ".join(self.names[:8]) + (", …" if len(self.names) > 8 else "")
        if stranger is None:
            return f"is missing; drop these rows, or give them one of the classes {known}."
        places = self._given and isinstance(stranger, int) and not all(map(_WHOLE.fullmatch, self.names))
        counted = " (whole numbers are their places in `labels`, from 0)" if places else ""
        return f"is none of the classes {known}{counted}; list all classes in `labels`."

    def _known(self, value: Any) -> bool:
        return isinstance(value, str | int) and value in self.index


def label_fault(feature: Any) -> str | None:
    """Return why a column of this kind cannot hold one class for each row; ``None`` if it can."""
    if isinstance(feature, List | list):
        return "holds several labels a row, and a model is trained to give one class: name a column of single values."
    if not isinstance(feature, Value | ClassLabel):
        return "is no column of single values; name one of strings or integers."
    return None


def _by_value(values: Sequence[Any], own: Sequence[str] | None, names: Sequence[str] | None) -> Mapping[Any, str]:
    """Return the name of each value of a label column."""
    if own is not None:
        return dict(enumerate(own if names is None or set(own) <= set(names) else names))
    if names is None:
        return {value: str(value) for value in values}
    if not values or not isinstance(values[0], int):
        return {name: name for name in names}
    return _boolean(names) if isinstance(values[0], bool) else _numbered(names)


def _numbered(names: Sequence[str]) -> Mapping[int, str]:
    """Return what whole numbers name: themselves where all names are whole numbers, or else places in the list."""
    written = all(_WHOLE.fullmatch(name) for name in names)
    return {int(name): name for name in names} if written else dict(enumerate(names))


def _boolean(names: Sequence[str]) -> Mapping[bool, str]:
    words = {name.casefold(): name for name in names}
    pair = (words["false"], words["true"]) if {"false", "true"} <= words.keys() else names[:2]
    return dict(zip((False, True), pair, strict=False))
