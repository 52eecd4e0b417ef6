"""What a corpus is, and the stable hash that holds documents out."""

import hashlib
from typing import Protocol, runtime_checkable

from datasets import Dataset

from fedbe.errors import Facts, Problem

SPLITS = ("train", "validation", "test")


@runtime_checkable
class Corpus(Protocol):
    """A source of text in three splits."""

    def load(self, split: str) -> Dataset:
        """Return one split, ``"train"``, ``"validation"`` or ``"test"``, with at least the column ``text``."""
        ...

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what would make `load` fail, found without network and without reading whole files.

        Args:
            key: Dotted key of its arguments in the configuration, the start of each problem's key.
            facts: What is known of the run.
        """
        ...


@runtime_checkable
class Described(Protocol):
    """A corpus that can say where its text comes from."""

    def describe(self) -> str:
        """Return sources, versions and licences in Markdown, for a model card."""
        ...


def hash_position(name: str, seed: int = 0) -> float:
    """Return a number in [0, 1) that follows from a name alone, the same on every machine. Source: ours."""
    digest = hashlib.blake2b(f"{seed}\x1f{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(name: str, validation_fraction: float, test_fraction: float, seed: int = 0) -> str:
    """Return the split that a name falls into, the same on every machine.

    The smallest hashes are the test split, the next ones validation; a test item therefore stays one when
    ``validation_fraction`` changes. Source: ours.

    Args:
        name: What identifies the item, for example a module's dotted name.
        validation_fraction: Expected share of names in ``"validation"``, in [0, 1].
        test_fraction: Expected share of names in ``"test"``, in [0, 1].
        seed: Another seed is another, unrelated split.
    """
    position = hash_position(name, seed)
    if position < test_fraction:
        return "test"
    return "validation" if position < test_fraction + validation_fraction else "train"


def check_fractions(key: str, validation_fraction: float, test_fraction: float) -> list[Problem]:
    """Return the problems of two held-out fractions, which must leave something to train on."""
    fractions = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    problems = [
        Problem(f"{key}.{name}", value, "a share of the data is at least 0 and below 1.")
        for name, value in fractions.items()
        if not 0 <= value < 1
    ]
    if not problems and validation_fraction + test_fraction >= 1:
        remedy = "together with `validation_fraction` nothing is left to train on; make both sum to less than 1."
        problems.append(Problem(f"{key}.test_fraction", test_fraction, remedy))
    return problems


def check_split(split: str) -> None:
    """Raise a `ValueError` unless ``split`` names one of the three splits."""
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}; it must be one of {', '.join(map(repr, SPLITS))}.")
