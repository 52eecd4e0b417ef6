"""What the general tasks share that read text: their corpus, and the base model's tokens."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NoReturn

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.corpora import Corpus
from fedbe.errors import ConfigError, Facts, Problem
from fedbe.evaluation.tasks import GeneralTask
from fedbe.text.tokens import maximum_length

Columns = list[list[Any]]
"""The rows' values, one list per column."""


class TextTask(GeneralTask):
    """Base class of general tasks that read a corpus.

    Attributes:
        corpus: Where the rows come from.
        splits: Parts of the corpus that are read.
        columns: Columns that are read; the first holds text.
    """

    corpus: Corpus
    splits: Sequence[str]
    columns: Sequence[str] = ("text",)

    @cached_property
    def rows(self) -> dict[str, Columns]:
        """Split → its columns, read once; `take_rows` lets go of them.

        Raises:
            ConfigError: A column is missing, or no row has text.
        """
        return {split: self._read(split) for split in self.splits}

    def take_rows(self) -> list[Columns]:
        """Return the columns of each split, and let go of them: a run need not hold its general tasks' text."""
        rows = list(self.rows.values())
        del self.rows
        return rows

    def check_corpus(self, key: str, facts: Facts) -> list[Problem]:
        """Return why the corpus cannot be scored: what it says itself, a missing column, or no text."""
        place = f"{key}.corpus"
        if problems := self.corpus.check(f"{place}.init_args", facts):
            return problems
        try:
            _ = self.rows
        except ConfigError as error:
            return [Problem(place, problem.value, problem.remedy) for problem in error.problems]
        except Exception as error:  # whatever a file or a parser does
            return [Problem(place, type(self.corpus).__name__, f"cannot be loaded: {error}")]
        return []

    def fail(self, argument: str, value: object, remedy: str) -> NoReturn:
        """Raise a `ConfigError` about one argument of this task."""
        raise ConfigError(Problem(argument, value, remedy))

    def require_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Raises:
            ConfigError: There is none.
        """
        if tokenizer is None:
            self.fail("name", self.name, "scores text, and the base model has no tokenizer; leave this task out.")
        return tokenizer

    def _read(self, split: str) -> Columns:
        rows = self.corpus.load(split)
        missing = [column for column in self.columns if column not in rows.column_names]
        if missing:
            self.fail("corpus", missing, f"no such column in split {split!r}; it has {rows.column_names}.")
        first, *others = (list(rows[column]) for column in self.columns)
        kept = [index for index, text in enumerate(first) if str(text or "").strip()]
        if not kept:
            remedy = f"split {split!r} has no text in column {self.columns[0]!r}; name a source that has."
            self.fail("corpus", type(self.corpus).__name__, remedy)
        return [[column[index] for index in kept] for column in (first, *others)]


def require_length(model: PreTrainedModel, length: int) -> None:
    """Check that a general task's sequences are not longer than the model takes.

    Raises:
        ConfigError: They are.
    """
    most = maximum_length(model)
    if most is not None and length > most:
        raise ConfigError(Problem("sequence_length", length, f"the model takes {most} at most."))
