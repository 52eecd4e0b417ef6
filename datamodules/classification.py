"""Sequence classification: one class for each text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fedbe.corpora import SPLITS, Corpus
from fedbe.data import Batch, pad_samples, pad_token_id
from fedbe.datamodules.corpus import (
    CorpusDataModule,
    length_problem,
    tokenizer_problems,
    vocabulary_problems,
)
from fedbe.datamodules.flower import FlowerPartitioner
from fedbe.datamodules.labels import LabelSet, label_fault
from fedbe.datamodules.partition import Partitioner, raise_problems
from fedbe.datamodules.tokens import LabelledTokens
from fedbe.errors import Problem
from fedbe.text.ragged import Ragged


class LabelledDataModule(CorpusDataModule):
    """Base class of classification data: holds the set of classes.

    Args:
        corpus: Source of the three splits.
        partitioner: Rule that gives each client its rows.
        label_column: Column of the class: strings, integers, booleans or a `datasets.ClassLabel`.
        labels: Names of the classes in order, see `LabelSet`; ``None`` to take those of the training split.
        batch_size: Samples in a client's local step.
        eval_batch_size: Samples in a validation or test batch; ``None`` for four times `batch_size`.
        class_weights: What a sample weighs in the clients' loss: a number for each class by name, or ``balanced``, n ÷
            (classes · n_k) where a class has n_k of the n training samples of this process. Scores are not weighted.
    """

    def __init__(
        self,
        corpus: Corpus,
        partitioner: Partitioner | FlowerPartitioner,
        label_column: str = "label",
        labels: list[str] | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        class_weights: Literal["balanced"] | dict[str, float] | None = None,
    ) -> None:
        super().__init__(corpus, partitioner, batch_size, eval_batch_size)
        self.class_weights = class_weights
        self._label_column = label_column
        self.labels = labels
        self._label_set: LabelSet | None = None

    @property
    def label_column(self) -> str:
        """Column of the class."""
        return self._label_column

    @property
    def label_set(self) -> LabelSet:
        """The classes, read from the training split on first use; numbered as in the connected model's head."""
        if self._label_set is None:
            self._label_set = LabelSet(self._split("train"), self._label_column, self.labels, self.model_config)
        return self._label_set

    @property
    def num_labels(self) -> int:
        """Number of classes; known before `connect`, so that a model can be made for it."""
        return len(self.label_set.names)

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the classes in the order of their numbers."""
        return self.label_set.names

    @property
    def loss_weights(self) -> Sequence[float] | None:
        """What a sample of each class weighs in the clients' loss; available after `setup`."""
        if isinstance(self.class_weights, Mapping):
            return [self.class_weights[name] for name in self.class_names]
        if self.class_weights is None:
            return None
        targets = [cast(Any, self.client_dataset(client)).targets for client in self.client_ids]
        counts = torch.bincount(torch.cat(targets), minlength=self.num_labels)
        weights: list[float] = (counts.sum() / (self.num_labels * counts.clamp(min=1))).tolist()
        return weights

    def connect(
        self, tokenizer: PreTrainedTokenizerBase | None, model_config: PretrainedConfig | None, seed: int
    ) -> None:
        """Receive tokenizer, model configuration and seed; classes are numbered as in the model's head if it has them.

        Raises:
            ConfigError: When the data cannot be given to this model.
        """
        if not self.client_ids:
            self._label_set = None
        super().connect(tokenizer, model_config, seed)

    def _row_problems(self, start: str) -> list[Problem]:
        key = f"{start}.label_column" if self.labels is None else f"{start}.labels"
        if fault := label_fault(self._split("train").features[self._label_column]):
            return [Problem(key, self._label_column, fault)]
        problems = [problem for split in SPLITS for problem in self.label_set.problems(key, split, self._split(split))]
        if len(set(self.class_names)) < self.num_labels:
            problems.append(Problem(key, self.labels, "has a name twice; give each class one of its own."))
        if self.num_labels < 2:
            problems.append(Problem(key, self.label_set.names, "classification needs two classes or more."))
        return [*problems, *self._weight_problems(f"{start}.class_weights")]

    def _weight_problems(self, key: str) -> list[Problem]:
        given = self.class_weights
        if not isinstance(given, Mapping):
            fits = given in (None, "balanced")
            return [] if fits else [Problem(key, given, "give balanced, or a weight for each class by its name.")]
        if differing := sorted(set(given) ^ set(self.class_names)):
            known = ", ".join(self.class_names[:8]) + (", …" if self.num_labels > 8 else "")
            return [Problem(key, differing[0], f"give each of the classes {known} a weight, and no other.")]
        wrong = [name for name, weight in given.items() if not 0 < weight < math.inf]
        return [Problem(f"{key}.{name}", given[name], "a weight is a number above 0.") for name in wrong]


class SequenceClassificationDataModule(LabelledDataModule):
    """Texts and their classes.

    Texts have the tokenizer's special tokens and are cut at the right to ``max_length`` tokens; those without any
    token, special ones included, are left out and counted in `left_out`. Of a pair the longer text is cut first.
    Batches hold ``input_ids``, ``attention_mask`` and, for pairs, ``token_type_ids`` if the tokenizer gives them, all
    ``[samples, tokens]``, and ``labels``, ``[samples]``.

    Args:
        corpus: Source of the three splits.
        partitioner: Rule that gives each client its rows.
        text_column: Column of the text.
        label_column: Column of the class: strings, integers, booleans or a `datasets.ClassLabel`.
        labels: Names of the classes in order, see `LabelSet`; ``None`` to take those of the training split.
        max_length: Most tokens of a sample.
        batch_size: Samples in a client's local step.
        eval_batch_size: Samples in a validation or test batch; ``None`` for four times `batch_size`.
        text_pair_column: Column of the second text, where the class is that of a pair.
        class_weights: What a sample weighs in the clients' loss, see `LabelledDataModule`.
    """

    def __init__(
        self,
        corpus: Corpus,
        partitioner: Partitioner | FlowerPartitioner,
        text_column: str = "text",
        label_column: str = "label",
        labels: list[str] | None = None,
        max_length: int = 128,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        text_pair_column: str | None = None,
        class_weights: Literal["balanced"] | dict[str, float] | None = None,
    ) -> None:
        super().__init__(corpus, partitioner, label_column, labels, batch_size, eval_batch_size, class_weights)
        self.text_column = text_column
        self.text_pair_column = text_pair_column
        self.max_length = max_length

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        """Join samples, padded at the right to the longest, with an attention mask."""
        return pad_samples(samples, pad_token_id(self.tokenizer), attention_mask=True)

    def _columns(self) -> Mapping[str, str]:
        return {**self._text_columns(), "label_column": self.label_column}

    def _text_columns(self) -> Mapping[str, str]:
        pair = {} if self.text_pair_column is None else {"text_pair_column": self.text_pair_column}
        return {"text_column": self.text_column, **pair}

    def _argument_problems(self, key: str) -> list[Problem]:
        return length_problem(f"{key}.max_length", self.max_length, 1 if self.text_pair_column is None else 8)

    def _model_problems(self, key: str) -> list[Problem]:
        return tokenizer_problems(f"{key}.max_length", self.max_length, self.tokenizer, self.model_config)

    def _encode(self, rows: Dataset, split: str) -> LabelledTokens:
        if self.tokenizer is None:
            raise RuntimeError("`setup` needs a tokenizer; call `connect` first.")
        texts = [[text or "" for text in rows[column]] for column in self._text_columns().values()]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length, return_attention_mask=False)
        sequences = Ragged.of(encoded["input_ids"])
        types = Ragged.of(encoded["token_type_ids"]).tokens if len(texts) > 1 and "token_type_ids" in encoded else None
        self._leave_out("have no token", sequences.empty)
        raise_problems(vocabulary_problems(sequences.tokens, self.model_config))
        targets = torch.tensor(self.label_set.classes(rows), dtype=torch.int64)
        return LabelledTokens(sequences.without_empty(), targets[sequences.offsets.diff() > 0], types)
