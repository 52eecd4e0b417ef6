"""Retrieval: how often an encoder's own representation finds the text that belongs to a query."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.corpora import Corpus
from fedbe.errors import Facts, Problem, check_at_least
from fedbe.evaluation.centroid import embed, token_ids
from fedbe.evaluation.tasks import TaskScore
from fedbe.evaluation.text_task import TextTask
from fedbe.text.tokens import evenly_spread


def found_first(queries: Tensor, documents: Tensor) -> Tensor:
    """Return for each query whether the document in its own row is the nearest by cosine. Shape ``[n]``, bool.

    Args:
        queries: Unit vectors. Shape ``[n, h]``.
        documents: Unit vectors, the one at row i belonging to query i. Shape ``[n, h]``.
    """
    similarity = queries @ documents.T
    own = similarity.diagonal()[:, None]
    return (similarity > own).sum(1) == 0


class RetrievalTask(TextTask):
    """Find the document that belongs to a query among all of them, for encoders; the score is recall at 1.

    A text is the mean of the last hidden states over its tokens, the nearest by cosine is found. Nothing is trained.

    Args:
        corpus: Rows with a query and its document each; the test split is read.
        name: Key of the task in metrics, tables and plots.
        query_column: Column of the query.
        document_column: Column of the document.
        max_items: Most rows, spread evenly over the split; ``None`` for all.
        max_length: Tokens after which a text is cut.
        batch_size: Texts in a forward pass.
    """

    splits = ("test",)

    def __init__(
        self,
        corpus: Corpus,
        query_column: str,
        document_column: str,
        name: str = "retrieval",
        max_items: int | None = 500,
        max_length: int = 128,
        batch_size: int = 64,
    ) -> None:
        self.corpus = corpus
        self.name = name
        self.columns = (query_column, document_column)
        self.max_items = max_items
        self.max_length = max_length
        self.batch_size = batch_size

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the numbers or the corpus."""
        numbers = check_at_least(key, 1, batch_size=self.batch_size, max_length=self.max_length)
        return [*numbers, *check_at_least(key, 2, max_items=self.max_items), *self.check_corpus(key, facts)]

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> None:
        """Tokenise queries and documents, once.

        Raises:
            ConfigError: A column or the tokenizer is missing.
        """
        tokenizer = self.require_tokenizer(tokenizer)
        [columns] = self.take_rows()
        kept = evenly_spread(len(columns[0]), self.max_items).tolist()
        self.queries, self.documents = (
            token_ids(tokenizer, [texts[row] for row in kept], self.max_length) for texts in columns
        )

    def evaluate(self, model: PreTrainedModel) -> TaskScore:
        """Return the share of queries whose document comes first; its standard error is over the queries."""
        vectors = embed(model, [*self.queries, *self.documents], self.batch_size)
        return TaskScore.of_items(found_first(*torch.split(vectors, len(self.queries))))
