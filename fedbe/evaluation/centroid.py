"""Few-shot nearest-centroid classification: how well an encoder's own representation tells classes apart."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.corpora import Corpus
from fedbe.data import by_length
from fedbe.data.batch import pad
from fedbe.errors import Facts, Problem, check_at_least
from fedbe.evaluation.tasks import TaskScore
from fedbe.evaluation.text_task import TextTask
from fedbe.modeling.passes import evaluation_mode
from fedbe.seeding import generator
from fedbe.text.tokens import evenly_spread


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[object], max_length: int) -> list[list[int]]:
    """Return the token ids of each text, special tokens included, cut to `max_length`."""
    encoded = tokenizer([str(text) for text in texts], truncation=True, max_length=max_length)
    sequences: list[list[int]] = encoded["input_ids"]
    return sequences


def embed(model: PreTrainedModel, sequences: Sequence[Sequence[int]], batch_size: int) -> Tensor:
    """Return unit vectors: the mean over tokens of the last hidden state. Shape ``[n, h]``, float32, on the CPU.

    Args:
        model: An encoder, or a classifier on top of one; its training modes are left as they are.
        sequences: Token ids of each text, special tokens included.
        batch_size: Texts in a forward pass; they are sorted by length and filled up on the right.
    """
    vectors: dict[int, Tensor] = {}
    with evaluation_mode(model):
        for batch in by_length([len(sequence) for sequence in sequences], batch_size):
            tokens = pad([sequences[index] for index in batch], value=0).to(model.device)
            mask = pad([[1] * len(sequences[index]) for index in batch], value=0).to(model.device)
            hidden = model.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()  # [b, s, h]
            sums = (hidden * mask[:, :, None]).sum(1)  # the norm below makes a sum as good as a mean
            vectors.update(zip(batch, normalize(sums, dim=-1).cpu(), strict=True))
    return torch.stack([vectors[index] for index in range(len(sequences))])


def nearest_centroid(support: Tensor, support_labels: Tensor, queries: Tensor) -> Tensor:
    """Return for each query the class whose centroid is nearest by cosine. Shape ``[q]``.

    Args:
        support: Unit vectors of labelled examples. Shape ``[n, h]``.
        support_labels: Their classes 0…c-1, each at least once. Shape ``[n]``.
        queries: Unit vectors. Shape ``[q, h]``.
    """
    sums = torch.zeros(int(support_labels.max()) + 1, support.shape[1]).index_add_(0, support_labels, support)
    return (queries @ normalize(sums, dim=-1).T).argmax(-1)


class CentroidTask(TextTask):
    """Few-shot classification by the nearest class centroid, for encoders.

    A text is the mean of the last hidden states over its tokens; a class is the mean direction of a few
    training texts; the nearest by cosine wins. Nothing is trained, which would hide forgetting. The score is
    the mean over episodes.

    Args:
        corpus: Texts with labels: the training split gives the examples, the test split the questions.
        name: Key of the task in metrics, tables and plots.
        shots: Examples of a class in an episode; a class with fewer gives all it has.
        episodes: Independent draws of the examples.
        text_column: Column of the text.
        label_column: Column of the label.
        max_items: Most questions, spread evenly over the test split; ``None`` for all.
        max_length: Tokens after which a text is cut.
        batch_size: Texts in a forward pass.
    """

    splits = ("train", "test")

    def __init__(
        self,
        corpus: Corpus,
        name: str = "centroid",
        shots: int = 10,
        episodes: int = 3,
        text_column: str = "text",
        label_column: str = "label",
        max_items: int | None = 1000,
        max_length: int = 128,
        batch_size: int = 64,
    ) -> None:
        self.corpus = corpus
        self.name = name
        self.shots = shots
        self.episodes = episodes
        self.columns = (text_column, label_column)
        self.max_items = max_items
        self.max_length = max_length
        self.batch_size = batch_size

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the numbers or the corpus."""
        counts = {"shots": self.shots, "episodes": self.episodes, "batch_size": self.batch_size}
        return [
            *check_at_least(key, 1, **counts, max_items=self.max_items, max_length=self.max_length),
            *self.check_corpus(key, facts),
        ]

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> None:
        """Draw the episodes' examples and tokenise them and the questions, once.

        Raises:
            ConfigError: A column or the tokenizer is missing, or a label of a question has no example.
        """
        tokenizer = self.require_tokenizer(tokenizer)
        (texts, labels), (questions, answers) = self.take_rows()
        kept = evenly_spread(len(questions), self.max_items).tolist()
        classes = {label: index for index, label in enumerate(dict.fromkeys(labels))}
        if unknown := [label for label in answers if label not in classes]:
            self.fail("corpus", unknown[0], "this label of the test split has no training example.")
        episodes = self._draw([classes[label] for label in labels], len(classes), seed)
        used = sorted({row for episode in episodes for row in episode})
        place = {row: index for index, row in enumerate(used)}
        self.support = token_ids(tokenizer, [texts[row] for row in used], self.max_length)
        self.support_labels = torch.tensor([classes[labels[row]] for row in used])
        self.episode_rows = [torch.tensor([place[row] for row in episode]) for episode in episodes]
        self.queries = token_ids(tokenizer, [questions[row] for row in kept], self.max_length)
        self.query_labels = torch.tensor([classes[answers[row]] for row in kept])

    def _draw(self, labels: Sequence[int], classes: int, seed: int) -> list[list[int]]:
        members: list[list[int]] = [[] for _ in range(classes)]
        for row, label in enumerate(labels):
            members[label].append(row)
        chance = generator(seed, "general task", self.name)
        return [
            [
                rows[index]
                for rows in members
                for index in torch.randperm(len(rows), generator=chance)[: self.shots].tolist()
            ]
            for _ in range(self.episodes)
        ]

    def evaluate(self, model: PreTrainedModel) -> TaskScore:
        """Return the accuracy, averaged over episodes; its standard error is over the questions."""
        vectors = embed(model, [*self.support, *self.queries], self.batch_size)
        support, queries = vectors[: len(self.support)], vectors[len(self.support) :]
        right = torch.stack(
            [
                nearest_centroid(support[rows], self.support_labels[rows], queries) == self.query_labels
                for rows in self.episode_rows
            ]
        ).double()
        return TaskScore.of_items(right.mean(0))
