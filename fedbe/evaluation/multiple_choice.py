"""Multiple choice by length-normalised log-likelihood: questions of a file, or continuations of held-out text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.corpora import Corpus
from fedbe.data.batch import IGNORED, pad
from fedbe.errors import Facts, Problem, check_at_least
from fedbe.evaluation.scoring import token_statistics
from fedbe.evaluation.tasks import TaskScore
from fedbe.evaluation.text_task import TextTask
from fedbe.modeling.passes import evaluation_mode
from fedbe.seeding import generator
from fedbe.text.tokens import begin_token, evenly_spread, maximum_length, tokenise


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        context: Token ids before each choice.
        choices: Token ids of each choice.
        lengths: What the log-likelihood of each choice is divided by: its characters.
        answer: Index of the right choice.
    """

    context: list[int]
    choices: list[list[int]]
    lengths: list[int]
    answer: int

    def shortened(self, length: int) -> "Item":
        """Return the item with as much of its context's end as fits before the longest choice; one token at least."""
        room = max(1, length - max(map(len, self.choices)))
        return replace(self, context=self.context[-room:])


def log_likelihoods(model: PreTrainedModel, items: Sequence[Item], batch_size: int) -> list[Tensor]:
    """Return log p(choice | context) in nats for the choices of each item. Shapes ``[c]``, float64, on the CPU.

    Args:
        model: A causal language model; its training modes are left as they are.
        items: Questions; a context that is too long for the model loses its beginning.
        batch_size: Choices in a forward pass.

    A context is computed once and its key-value cache shared by the choices: less than half the work of scoring each
    choice with its context. Items are batched by the length of their contexts, so that the caches need no filling up.
    """
    longest = maximum_length(model)
    items = [item if longest is None else item.shortened(longest) for item in items]
    result: dict[int, Tensor] = {}
    with evaluation_mode(model):
        for batch in _equal_contexts(items, batch_size):
            result.update(zip(batch, _score(model, [items[index] for index in batch]), strict=True))
    return [result[index] for index in range(len(items))]


def _equal_contexts(items: Sequence[Item], batch_size: int) -> Iterator[list[int]]:
    def lengths(index: int) -> tuple[int, int]:
        return len(items[index].context), max(map(len, items[index].choices))

    order = sorted(range(len(items)), key=lengths)
    for _, group in groupby(order, key=lambda index: lengths(index)[0]):
        indices = list(group)
        size = max(1, batch_size // max(len(items[index].choices) for index in indices))
        yield from (indices[start : start + size] for start in range(0, len(indices), size))


def _score(model: PreTrainedModel, items: Sequence[Item]) -> tuple[Tensor, ...]:
    counts = [len(item.choices) for item in items]
    prefix = torch.tensor([item.context[:-1] for item in items], dtype=torch.long)  # [items, s]
    cache = None
    if prefix.shape[1]:
        cache = model.base_model(input_ids=prefix.to(model.device), use_cache=True).cache
        owners = torch.arange(len(items)).repeat_interleave(torch.tensor(counts))  # [choices]
        cache.batch_select_indices(owners.to(model.device))
    rows = [[item.context[-1], *choice] for item in items for choice in item.choices]
    filler = rows[0][0]  # any token will do: what is filled up is not scored
    logits = model(input_ids=pad(rows, filler).to(model.device), cache=cache, use_cache=True).logits
    loss = token_statistics(logits, pad(rows, IGNORED).to(logits.device)).loss
    return torch.split(-loss.cpu().double(), counts)


def pick(log_likelihoods: Tensor, lengths: Sequence[int]) -> int:
    """Return the choice of the highest log-likelihood per character; the first of equal ones.

    Source: ``acc_norm`` of lm-evaluation-harness.
    """
    return int((log_likelihoods / torch.tensor(lengths)).argmax())


def score_items(model: PreTrainedModel, items: Sequence[Item], batch_size: int) -> TaskScore:
    """Return accuracy over items, and the right choices' cross-entropy in nats per token."""
    per_item = log_likelihoods(model, items, batch_size)
    right = [pick(values, item.lengths) == item.answer for values, item in zip(per_item, items, strict=True)]
    accuracy = sum(right) / len(right)
    loss = -sum(values[item.answer].item() for values, item in zip(per_item, items, strict=True))
    return TaskScore(
        score=accuracy,
        standard_error=(accuracy * (1 - accuracy) / max(1, len(right) - 1)) ** 0.5,
        cross_entropy=loss / sum(len(item.choices[item.answer]) for item in items),
    )


def encode(tokenizer: PreTrainedTokenizerBase, context: str, choices: Sequence[str]) -> list[list[int]]:
    """Return the token ids of a context, then those of each choice after it.

    White space at the end of the context belongs to the choices, and each is tokenised together with the context, so
    that the tokens are those of running text. Source: lm-evaluation-harness.
    """
    before = context.rstrip()
    space = context[len(before) :]
    prefix, *both = tokenise(tokenizer, [before, *(f"{before}{space}{choice}" for choice in choices)])
    return [prefix, *(tokens[len(prefix) :] for tokens in both)]


class _ItemsTask(TextTask):
    items: list[Item]
    batch_size: int

    def evaluate(self, model: PreTrainedModel) -> TaskScore:
        """Return accuracy, and the right choices' cross-entropy in nats per token."""
        return score_items(model, self.items, self.batch_size)


class MultipleChoiceTask(_ItemsTask):
    """Multiple choice for causal language models: the choice of the highest log-likelihood per character wins.

    This is ``acc_norm`` of lm-evaluation-harness; a begin token stands before each question, and a space
    before each choice.

    Args:
        corpus: Rows with a question, a list of choices, and the answer.
        split: Part of the corpus: ``train``, ``validation`` or ``test``.
        name: Key of the task in metrics, tables and plots.
        max_items: Most questions to ask, spread evenly over the corpus; ``None`` for all.
        template: What is put before the choices; ``{question}`` stands for the question.
        question_column: Column of the question.
        choices_column: Column of the list of choices.
        answer_column: Column of the right choice: its index, its letter (A is the first), or its text.
        batch_size: Sequences in a forward pass.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str = "test",
        name: str = "multiple_choice",
        max_items: int | None = None,
        template: str = "{question}",
        question_column: str = "question",
        choices_column: str = "choices",
        answer_column: str = "answer",
        batch_size: int = 32,
    ) -> None:
        self.corpus = corpus
        self.splits = (split,)
        self.name = name
        self.max_items = max_items
        self.template = template
        self.columns = (question_column, choices_column, answer_column)
        self.batch_size = batch_size

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the numbers, the template or the corpus."""
        problems = check_at_least(key, 1, max_items=self.max_items, batch_size=self.batch_size)
        if "{question}" not in self.template:
            problems.append(Problem(f"{key}.template", self.template, "must contain {question}."))
        return [*problems, *self.check_corpus(key, facts)]

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> None:
        """Tokenise the questions.

        Raises:
            ConfigError: A column is missing, an answer is not among its choices, or there is no tokenizer.
        """
        tokenizer = self.require_tokenizer(tokenizer)
        ((questions, choices, answers),) = self.take_rows()
        begin = begin_token(tokenizer, model.config)
        self.items = [
            self._item(tokenizer, begin, str(questions[row]), choices[row], answers[row])
            for row in evenly_spread(len(questions), self.max_items).tolist()
        ]

    def _item(
        self, tokenizer: PreTrainedTokenizerBase, begin: int, question: str, choices: object, answer: object
    ) -> Item:
        texts = [str(choice) for choice in choices] if isinstance(choices, list) else []
        context = self.template.replace("{question}", question)
        prefix, *encoded = encode(tokenizer, context, [f" {text}" for text in texts])
        index = answer_index(answer, texts)
        if index is None or not all(encoded):
            remedy = f"answer {answer!r} is not the index, letter or text of one of a list of non-empty choices."
            self.fail("corpus", {"question": question, "choices": choices}, remedy)
        return Item([begin, *prefix], encoded, [len(text) for text in texts], index)


def answer_index(answer: object, choices: Sequence[str]) -> int | None:
    """Return which choice an answer names by its text, index or letter; ``None`` if it names none."""
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        letters = [chr(ord("A") + index) for index in range(len(choices))]
        if answer.strip().upper() in letters:
            return letters.index(answer.strip().upper())
        answer = int(answer) if answer.isdecimal() else None
    return answer if isinstance(answer, int) and 0 <= answer < len(choices) else None


class ContinuationTask(_ItemsTask):
    """Which of several continuations is the true one of a held-out text? Built in: it needs text only.

    A piece of a document is the context; the piece that follows it competes with pieces from other documents,
    drawn by the run's seed. The highest log-likelihood per character wins.

    Args:
        corpus: Where the text comes from; documents shorter than context and continuation are passed over.
        split: Part of the corpus: ``train``, ``validation`` or ``test``.
        name: Key of the task in metrics, tables and plots.
        choices: Number of continuations to choose from.
        context_tokens: Tokens of text before them.
        continuation_tokens: Tokens of each continuation.
        max_items: Most questions, spread evenly over the documents; ``None`` for all.
        batch_size: Sequences in a forward pass.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str = "test",
        name: str = "continuation",
        choices: int = 4,
        context_tokens: int = 64,
        continuation_tokens: int = 32,
        max_items: int | None = 100,
        batch_size: int = 32,
    ) -> None:
        self.corpus = corpus
        self.splits = (split,)
        self.name = name
        self.choices = choices
        self.context_tokens = context_tokens
        self.continuation_tokens = continuation_tokens
        self.max_items = max_items
        self.batch_size = batch_size

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the numbers or the corpus."""
        positive = {"context_tokens": self.context_tokens, "continuation_tokens": self.continuation_tokens}
        return [
            *check_at_least(key, 2, choices=self.choices),
            *check_at_least(key, 1, **positive, max_items=self.max_items, batch_size=self.batch_size),
            *self.check_corpus(key, facts),
        ]

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> None:
        """Cut the documents into contexts and continuations, and draw the false ones.

        Raises:
            ConfigError: There is no tokenizer, or fewer long enough documents than choices.
        """
        tokenizer = self.require_tokenizer(tokenizer)
        ((texts,),) = self.take_rows()
        documents = tokenise(tokenizer, texts)
        pieces = [pieces for document in documents if (pieces := self._pieces(document))]
        if len(pieces) < self.choices:
            needed = self.context_tokens + self.continuation_tokens
            remedy = f"only {len(pieces)} documents have {needed} tokens; lower it, or ask for shorter pieces."
            self.fail("choices", self.choices, remedy)
        begin = begin_token(tokenizer, model.config)
        chance = generator(seed, "general task", self.name)
        places = [(index, true) for index, document in enumerate(pieces) for true in document]
        drawn = [places[row] for row in evenly_spread(len(places), self.max_items).tolist()]
        cut = self.context_tokens
        self.items = []
        for document, true in drawn:
            choices = [piece[cut:] for piece in self._others(pieces, document, chance)]
            answer = int(torch.randint(self.choices, (), generator=chance))  # among equal ones the first is picked
            choices.insert(answer, true[cut:])
            lengths = [max(1, len(tokenizer.decode(choice))) for choice in choices]
            self.items.append(Item([begin, *true[:cut]], choices, lengths, answer))

    def _pieces(self, document: Sequence[int]) -> list[list[int]]:
        length = self.context_tokens + self.continuation_tokens
        return [list(document[start : start + length]) for start in range(0, len(document) - length + 1, length)]

    def _others(self, pieces: Sequence[Sequence[list[int]]], document: int, chance: torch.Generator) -> list[list[int]]:
        """Return a piece each of as many other documents as there are false choices."""
        others = [index for index in torch.randperm(len(pieces), generator=chance).tolist() if index != document]
        return [
            pieces[other][int(torch.randint(len(pieces[other]), (), generator=chance))]
            for other in others[: self.choices - 1]
        ]
