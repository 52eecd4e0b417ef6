"""Next-token accuracy and loss on text: a corpus, or what the base model itself writes."""

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.corpora import Corpus
from fedbe.errors import Facts, Problem, check_at_least
from fedbe.evaluation.scoring import ratio_standard_error, sequence_statistics
from fedbe.evaluation.tasks import GeneralTask, TaskScore
from fedbe.evaluation.text_task import TextTask, require_length
from fedbe.seeding import generator
from fedbe.text.packing import pack
from fedbe.text.sampling import sample_sequences
from fedbe.text.tokens import begin_token, evenly_spread, tokenise


def next_token_score(model: PreTrainedModel, tokens: Tensor, labels: Tensor, batch_size: int) -> TaskScore:
    """Return accuracy and mean cross-entropy over all predicted tokens of sequences of shape ``[n, s]``."""
    sums = sequence_statistics(model, tokens, labels, batch_size)
    total = sums.items.sum().item()
    return TaskScore(
        score=sums.correct.sum().item() / total,
        standard_error=ratio_standard_error(sums.correct, sums.items),
        cross_entropy=sums.loss.sum().item() / total,
    )


class NextTokenTask(TextTask):
    """Next-token accuracy and loss of a causal language model on held-out text.

    Documents are packed one after another, a begin token before each, and cut into sequences; those that are
    scored are spread evenly over the whole text, the same ones in every run whatever its seed.

    Args:
        corpus: Where the text comes from.
        split: Part of the corpus: ``train``, ``validation`` or ``test``.
        name: Key of the task in metrics, tables and plots.
        sequence_length: Tokens of a sequence.
        max_sequences: Most sequences to score; ``None`` for all.
        batch_size: Sequences in a forward pass.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str = "test",
        name: str = "next_token",
        sequence_length: int = 128,
        max_sequences: int | None = 128,
        batch_size: int = 32,
    ) -> None:
        self.corpus = corpus
        self.splits = (split,)
        self.name = name
        self.sequence_length = sequence_length
        self.max_sequences = max_sequences
        self.batch_size = batch_size

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the numbers or the corpus."""
        return [
            *check_at_least(key, 2, sequence_length=self.sequence_length),
            *check_at_least(key, 1, max_sequences=self.max_sequences, batch_size=self.batch_size),
            *self.check_corpus(key, facts),
        ]

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> None:
        """Tokenise and pack the text.

        Raises:
            ConfigError: There is no text, or no tokenizer.
        """
        tokenizer = self.require_tokenizer(tokenizer)
        require_length(model, self.sequence_length)
        ((texts,),) = self.take_rows()
        documents = tokenise(tokenizer, texts)
        tokens, labels = pack(documents, begin_token(tokenizer, model.config), self.sequence_length)
        kept = evenly_spread(len(tokens), self.max_sequences)
        self.tokens, self.labels = tokens[kept], labels[kept]

    def evaluate(self, model: PreTrainedModel) -> TaskScore:
        """Return accuracy and cross-entropy in nats per token."""
        return next_token_score(model, self.tokens, self.labels, self.batch_size)


class SampledTextTask(GeneralTask):
    """Next-token accuracy and loss on text that the base model itself writes: what it was, without any data.

    Args:
        sequences: Number of sequences to sample.
        sequence_length: Tokens of a sequence, the begin token included.
        temperature: Divides the logits when sampling.
        name: Key of the task in metrics, tables and plots.
        batch_size: Sequences in a forward pass.
    """

    def __init__(
        self,
        sequences: int = 288,
        sequence_length: int = 128,
        temperature: float = 1.0,
        name: str = "own_text",
        batch_size: int = 32,
    ) -> None:
        self.sequences = sequences
        self.sequence_length = sequence_length
        self.temperature = temperature
        self.name = name
        self.batch_size = batch_size

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the numbers."""
        problems = check_at_least(key, 1, sequences=self.sequences, batch_size=self.batch_size)
        problems += check_at_least(key, 2, sequence_length=self.sequence_length)
        if self.temperature <= 0:
            problems.append(Problem(f"{key}.temperature", self.temperature, "must be above 0; 1 is the model itself."))
        return problems

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> None:
        """Sample the text from the base model; the same seed gives the same text.

        Raises:
            ConfigError: The model does not take so many tokens.
        """
        require_length(model, self.sequence_length)
        begin = begin_token(tokenizer, model.config)
        self.tokens = sample_sequences(
            model,
            begin,
            self.sequences,
            self.sequence_length,
            generator(seed, "general task", self.name),
            self.temperature,
            batch_size=4 * self.batch_size,  # a step holds the logits of one position only
        )

    def evaluate(self, model: PreTrainedModel) -> TaskScore:
        """Return accuracy and cross-entropy in nats per token."""
        return next_token_score(model, self.tokens, self.tokens, self.batch_size)
