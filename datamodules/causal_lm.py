"""Causal language modelling on packed documents."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset

from fedbe.corpora import Corpus
from fedbe.data import Batch, pad_samples, pad_token_id
from fedbe.datamodules.corpus import (
    CorpusDataModule,
    length_problem,
    tokenizer_problems,
    vocabulary_problems,
)
from fedbe.datamodules.flower import FlowerPartitioner
from fedbe.datamodules.partition import Partitioner, raise_problems
from fedbe.datamodules.separation import family_separates_documents
from fedbe.datamodules.tokens import TokenSamples, pack_documents, tokenise_documents
from fedbe.errors import Problem
from fedbe.text.ragged import Ragged

_log = logging.getLogger(__name__)


class CausalLMDataModule(CorpusDataModule):
    """Text for next-token prediction: long documents are cut, short ones packed to ``sequence_length`` tokens.

    Each document has the begin token before it and, as `end_token` says, the end token after it, unless its text has
    them already. Documents without text are left out and counted in `left_out`.
    Documents in one sample are kept apart: the loss never predicts a document's first token from the one before,
    and, in the model families of `fedbe.datamodules.family_separates_documents`, positions restart at each document
    and no attention crosses; the model must then be called with ``use_cache=False``. Batches hold ``input_ids`` and
    ``labels``, and then ``position_ids``, each ``[samples, tokens]``.

    Args:
        corpus: Source of the three splits.
        partitioner: Rule that gives each client its documents.
        sequence_length: Most tokens of a sample.
        batch_size: Samples in a client's local step.
        eval_batch_size: Samples in a validation or test batch; ``None`` for four times `batch_size`.
        max_validation_sequences: Keep this many validation samples, spread evenly over the split; ``None`` for all.
        max_test_sequences: The same for the test split.
        text_column: Column of the text.
        separate_documents: ``False`` joins the documents to one stream that is cut every ``sequence_length`` tokens,
            with attention and loss across documents.
        pack: ``False`` gives each document, or each piece of a long one, a sample of its own.
        end_token: Put the end token after each document, so that it is learned where to stop. By default it is put
            there with ``pack: false``, where a document is a sample, and where the tokenizer has no begin token that
            would tell packed documents apart.
    """

    def __init__(
        self,
        corpus: Corpus,
        partitioner: Partitioner | FlowerPartitioner,
        sequence_length: int = 128,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_validation_sequences: int | None = None,
        max_test_sequences: int | None = None,
        text_column: str = "text",
        separate_documents: bool = True,
        pack: bool = True,
        end_token: bool | None = None,
    ) -> None:
        super().__init__(corpus, partitioner, batch_size, eval_batch_size)
        self.sequence_length = sequence_length
        self.max_sequences = {"validation": max_validation_sequences, "test": max_test_sequences}
        self.text_column = text_column
        self.separate_documents = separate_documents
        self.pack = pack
        self.end_token = not pack if end_token is None else end_token
        self._end_wanted = bool(end_token)

    def setup(self, stage: str | None = None) -> None:
        """Load, divide, tokenise and pack; a second call does nothing."""
        if not self.client_ids and self.pack and self.separate_documents and not self.restarts_positions:
            model = None if self.model_config is None else self.model_config.model_type
            _log.warning("Attention crosses packed documents: model type %r does not separate them.", model)
        super().setup(stage)

    @property
    def restarts_positions(self) -> bool:
        """Whether samples carry positions that restart at each document; known after `connect`."""
        return self.pack and self.separate_documents and family_separates_documents(self.model_config)

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        """Join samples, the shorter ones padded at the right, where nothing attends to the padding."""
        return pad_samples(samples, pad_token_id(self.tokenizer), attention_mask=False)

    def _columns(self) -> Mapping[str, str]:
        return {"text_column": self.text_column}

    def _argument_problems(self, key: str) -> list[Problem]:
        caps = (
            problem
            for split, cap in self.max_sequences.items()
            if cap is not None
            for problem in length_problem(f"{key}.max_{split}_sequences", cap, 1)
        )
        return [*length_problem(f"{key}.sequence_length", self.sequence_length, 2), *caps]

    def _model_problems(self, key: str) -> list[Problem]:
        problems = tokenizer_problems(f"{key}.sequence_length", self.sequence_length, self.tokenizer, self.model_config)
        if self._end_wanted and self.tokenizer is not None and self.tokenizer.eos_token_id is None:
            problems.append(Problem(f"{key}.end_token", True, "the model's tokenizer has no end token; leave it out."))
        return problems

    def _text_columns(self) -> Mapping[str, str]:
        return self._columns()

    def _encode(self, rows: Dataset, split: str) -> TokenSamples:
        if self.tokenizer is None:
            raise RuntimeError("`setup` needs a tokenizer; call `connect` first.")
        all_documents = Ragged.of(tokenise_documents(self.tokenizer, rows[self.text_column], self.end_token))
        self._leave_out("have no text", all_documents.empty)
        documents = all_documents.without_empty()
        raise_problems(vocabulary_problems(documents.tokens, self.model_config))
        if self.pack and self.separate_documents:
            samples = pack_documents(documents, self.sequence_length, self.restarts_positions)
        else:
            cut = documents.concatenated if self.pack else documents.chunked
            samples = TokenSamples(cut(self.sequence_length), torch.ones(len(documents.tokens), dtype=torch.bool))
        return samples.evenly(self.max_sequences.get(split))
