"""What the ready data modules share: a corpus in three splits whose training split is divided among clients."""

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from datasets.exceptions import DatasetsError
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fedbe.corpora import SPLITS, Corpus
from fedbe.corpora.columns import as_strings
from fedbe.data import FederatedDataModule, LeftOut, left_out_lines
from fedbe.datamodules.flower import FlowerPartitioner, as_partitioner
from fedbe.datamodules.partition import Partitioner, column_problems, partition_problems, raise_problems
from fedbe.errors import NO_FACTS, ConfigError, Facts, Problem, under
from fedbe.text.tokens import token_limit

_log = logging.getLogger(__name__)


class CorpusDataModule(FederatedDataModule):
    """Base class of data modules over a corpus: loads it, checks it, divides it, keeps each client's samples encoded.

    A subclass says which columns it reads and how it encodes rows, and by `_leave_out` which rows it does not use:
    they are counted, told once in `setup`, and kept in `left_out`.

    Args:
        corpus: Source of the three splits.
        partitioner: Rule that gives each client its rows; those of `flwr_datasets.partitioner` are accepted too.
        batch_size: Samples in a client's local step.
        eval_batch_size: Samples in a validation or test batch; ``None`` for four times `batch_size`.
    """

    def __init__(
        self,
        corpus: Corpus,
        partitioner: Partitioner | FlowerPartitioner,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size)
        self.corpus = corpus
        self.partitioner = as_partitioner(partitioner)
        self._loaded: dict[str, Dataset] = {}
        self._encoded: dict[str, TorchDataset[Any]] = {}
        self._clients: dict[str, TorchDataset[Any]] = {}
        self._rows: dict[str, int] = {}
        self._labels: dict[str, Counter[str]] = {}
        self._left_out: list[LeftOut] = []
        self._at: tuple[str, str | None, Sequence[int]] = ("train", None, ())

    @abstractmethod
    def _columns(self) -> Mapping[str, str]:
        """Return the columns that are read, by the name of the argument that names them."""

    @abstractmethod
    def _encode(self, rows: Dataset, split: str) -> TorchDataset[Any]:
        """Return the samples of some rows of a split, of known length."""

    def _text_columns(self) -> Mapping[str, str]:
        """Return the columns that are read as text, by the name of their argument; numbers become strings."""
        return {}

    def _argument_problems(self, key: str) -> list[Problem]:
        """Return the mistakes in the subclass's own arguments; ``key`` is the start of their keys."""
        return []

    def _model_problems(self, key: str) -> list[Problem]:
        """Return what the connected tokenizer and model cannot do; nothing before `connect`."""
        return []

    def _row_problems(self, key: str) -> list[Problem]:
        """Return mistakes in the rows themselves; the splits are loaded and have the columns."""
        return []

    @property
    def label_column(self) -> str | None:
        """Column whose distribution over the clients is reported; the partitioner's by default."""
        return self.partitioner.label_column

    @property
    def client_ids(self) -> Sequence[str]:
        """The clients' names, in the partitioner's order; available after `setup`."""
        return tuple(self._clients)

    def client_dataset(self, client_id: str) -> TorchDataset[Any]:
        """Return the training set of one client."""
        return self._clients[client_id]

    def validation_dataset(self) -> TorchDataset[Any]:
        """Return the validation split."""
        return self._encoded["validation"]

    def test_dataset(self) -> TorchDataset[Any]:
        """Return the test split."""
        return self._encoded["test"]

    @property
    def left_out(self) -> Sequence[LeftOut]:
        """Rows that belong to nobody or make no sample, and why."""
        return tuple(self._left_out)

    def client_rows(self, client_id: str) -> int:
        """Return how many rows of the training split a client holds."""
        return self._rows[client_id]

    def client_labels(self, client_id: str) -> Counter[str]:
        """Return how many rows of each label a client holds; empty when there is no `label_column`."""
        return self._labels.get(client_id, Counter())

    def connect(
        self, tokenizer: PreTrainedTokenizerBase | None, model_config: PretrainedConfig | None, seed: int
    ) -> None:
        """Receive tokenizer, model configuration and seed.

        Raises:
            ConfigError: When the data cannot be given to this model.
        """
        super().connect(tokenizer, model_config, seed)
        raise_problems(self._model_problems(self.key))

    def check(self, key: str = "data.init_args", facts: Facts = NO_FACTS) -> list[Problem]:
        """Return every mistake in the configuration and the corpus; the splits are loaded once, here or in `setup`."""
        problems = [
            *(
                Problem(f"{key}.{name}", value, "must be 1 or more.")
                for name, value in (("batch_size", self.batch_size), ("eval_batch_size", self.eval_batch_size))
                if value < 1
            ),
            *self._argument_problems(key),
            *self._model_problems(key),
        ]
        found = self.corpus.check(f"{key}.corpus.init_args", facts) or self._load(f"{key}.corpus")
        found = found or self._column_problems(key) or self._text_problems(key)
        if not found:
            facts = replace(facts, dataset=self._loaded["train"])
            found += self.partitioner.check(f"{key}.partitioner.init_args", facts)
            found += self._row_problems(key)
        return [*problems, *found]

    def setup(self, stage: str | None = None) -> None:
        """Load, divide and encode the corpus; a second call does nothing.

        Raises:
            ConfigError: With every mistake that `check` finds, or for a client or split without a sample.
        """
        if self._clients:
            return
        raise_problems(self.check(self.key, Facts()))
        train = self._loaded["train"]
        with under(self.key):
            partition = self.partitioner.partition(train, self.seed)
            raise_problems(partition_problems("partitioner", partition, len(train)))
        held = {client: train.select(rows) for client, rows in partition.items()}
        nobodys = self.partitioner.unassigned(train, partition)
        self._left_out = [LeftOut("train", reason, tuple(rows)) for reason, rows in nobodys.items()]
        clients = {client: self._samples(rows, "train", client, partition[client]) for client, rows in held.items()}
        others = {split: self._loaded[split] for split in SPLITS if split != "train"}
        self._encoded = {split: self._samples(rows, split, None, range(len(rows))) for split, rows in others.items()}
        raise_problems(self._emptiness(clients))
        for line in left_out_lines(self._left_out):
            _log.warning(line)
        self._rows = {client: len(rows) for client, rows in partition.items()}
        if self.label_column is not None:
            self._labels = {client: _histogram(rows, self.label_column) for client, rows in held.items()}
        self._clients = clients
        self._loaded = {}  # encoded by now; an encoding that reads rows late holds them itself

    def _samples(self, rows: Dataset, split: str, holder: str | None, numbers: Sequence[int]) -> TorchDataset[Any]:
        self._at = split, holder, numbers
        return self._encode(rows, split)

    def _leave_out(self, reason: str, rows: Iterable[int], what: str = "rows") -> None:
        """Count what `_encode` does not use of the rows that it was given.

        Args:
            reason: Why, in words that follow "5 rows of the train split", for example ``have no text``.
            rows: Their places among the rows given, from 0; one for each thing left out.
            what: What is left out, in the plural.
        """
        split, holder, numbers = self._at
        if found := tuple(numbers[row] for row in rows):
            self._left_out.append(LeftOut(split, reason, found, holder, what))

    def _emptiness(self, clients: Mapping[str, TorchDataset[Any]]) -> list[Problem]:
        problems = []
        if empty := [client for client, samples in clients.items() if not len(samples)]:  # type: ignore[arg-type]
            remedy = "have rows but no sample that can be trained on; give them more data or leave these clients out."
            problems.append(Problem(f"{self.key}.partitioner", ", ".join(empty), remedy))
        for split, samples in self._encoded.items():
            if not len(samples):  # type: ignore[arg-type]
                remedy = "no row of this split makes a sample; check its columns."
                problems.append(Problem(f"{self.key}.corpus", split, remedy))
        return problems

    def _split(self, split: str) -> Dataset:
        """Return a split, loaded on first use."""
        if split not in self._loaded:
            self._loaded[split] = self.corpus.load(split)
        return self._loaded[split]

    def _load(self, key: str) -> list[Problem]:
        problems: list[Problem] = []
        for split in SPLITS:
            try:
                if len(self._split(split)) == 0:
                    problems.append(Problem(key, split, "this split has no row: name a source, or hold out more."))
            except ConfigError as error:
                problems += error.problems
            except (OSError, ValueError, DatasetsError) as error:
                problems.append(Problem(key, split, f"this split cannot be read: {error}"))
        return problems

    def _text_problems(self, key: str) -> list[Problem]:
        """Turn the columns of text into strings, and return those that cannot be."""
        problems: dict[str, Problem] = {}
        for name, column in self._text_columns().items():
            for split in SPLITS:
                rows = as_strings(self._loaded[split], column)
                if rows is None:
                    remedy = f"holds {self._loaded[split].features[column]}, not text; name a column of strings."
                    problems[name] = Problem(f"{key}.{name}", column, remedy)
                else:
                    self._loaded[split] = rows
        return list(problems.values())

    def _column_problems(self, key: str) -> list[Problem]:
        found = (
            problem
            for split in SPLITS
            for name, column in self._columns().items()
            for problem in column_problems(f"{key}.{name}", column, self._loaded[split])
        )
        return list({problem.key: problem for problem in found}.values())


def tokenizer_problems(
    key: str, value: int, tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig | None
) -> list[Problem]:
    """Return a missing tokenizer, or sequences longer than the model has positions for.

    Args:
        key: Key of the argument that sets the length.
        value: The length, in tokens.
        tokenizer: The base model's tokenizer.
        config: The base model's configuration; nothing is known before it is connected.
    """
    if config is None:
        return []
    problems = []
    if tokenizer is None:
        name = config.name_or_path or config.model_type
        remedy = "has no tokenizer, and this data is text; name a model that has one."
        problems.append(Problem("model.name", name, remedy))
    positions = token_limit(config)
    if positions is not None and value > positions:
        problems.append(Problem(key, value, f"the model has {positions} positions; write {positions} or less."))
    return problems


def vocabulary_problems(tokens: Tensor, config: PretrainedConfig | None) -> list[Problem]:
    """Return a problem when the largest of the token ids has no embedding in the model."""
    size = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    largest = int(tokens.max()) if len(tokens) else 0
    if not isinstance(size, int) or largest < size:
        return []
    remedy = f"embeds only {size} tokens, and {largest} is a token id of the tokenizer; use the model's own tokenizer."
    return [Problem("model.name", config.name_or_path if config is not None else None, remedy)]


def length_problem(key: str, value: int, least: int) -> list[Problem]:
    """Return a problem when a number of tokens is below ``least``."""
    return [] if value >= least else [Problem(key, value, f"must be {least} or more.")]


def _histogram(rows: Dataset, column: str) -> Counter[str]:
    names = getattr(rows.features[column], "names", None)
    return Counter(str(value if names is None or value is None else names[value]) for value in rows[column])
