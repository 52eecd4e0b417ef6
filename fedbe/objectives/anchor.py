"""The anchor: while clients learn their task, the model's behaviour on general text is held to the base model's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.corpora import Corpus
from fedbe.data import Batch
from fedbe.errors import ConfigError, Facts, Problem, check_at_least, under
from fedbe.messages import FitTask, Update
from fedbe.modeling.base_model import forward_options
from fedbe.modeling.passes import evaluation_mode
from fedbe.objectives.base import LocalObjective, Objective, Plain
from fedbe.seeding import generator
from fedbe.text.reference import batches_of, corpus_text, own_text, predicts_tokens

CACHE_LIMIT = 2 * 2**30
"""Most bytes that the base model's outputs may take in memory."""


class Anchor(Objective):
    """Add to the loss how far the model is from the base model on general text, on some sequences at each step.

    A language model is held by its predictions, KL(base ‖ model) per token in nats; a model without them, such as an
    encoder with a classifier, by its last hidden states, their squared distance over the base's mean square. The text
    is what the base model itself writes, so that no data is needed and any client can make it from the seed; or a
    corpus. The base model's outputs on it are computed once, before round 1.

    Args:
        weight: Factor on the distance.
        share: Anchor sequences of a step ÷ samples of its batch; at least one sequence is taken.
        temperature: Divides the logits of both models; the KL is then multiplied by its square.
        sequences: Number of sequences to choose from.
        sequence_length: Tokens of a sequence.
        corpus: Where the text comes from (its training split); ``null`` to sample it from the base model.
        top: Keep the base's predictions for so many likeliest tokens only, all others together as one; ``null`` keeps
            all of the vocabulary.
        objective: What the distance is added to.

    Source: ours.
    """

    def __init__(
        self,
        weight: float = 1.0,
        share: float = 0.5,
        temperature: float = 1.0,
        sequences: int = 96,
        sequence_length: int = 128,
        corpus: Corpus | None = None,
        top: int | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.weight, self.share, self.temperature, self.top = weight, share, temperature, top
        self.sequences, self.sequence_length, self.corpus = sequences, sequence_length, corpus
        self.objective = objective or Plain()
        self.needs, self.offers = Objective.needs | self.objective.needs, self.objective.offers
        self.extra_samples = share + self.objective.extra_samples

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the numbers, the corpus or the other objective."""
        problems = check_at_least(key, 1, sequences=self.sequences, top=self.top)
        problems += check_at_least(key, 2, sequence_length=self.sequence_length)
        positive = {"weight": self.weight, "share": self.share, "temperature": self.temperature}
        problems += [Problem(f"{key}.{name}", v, "give a number above 0") for name, v in positive.items() if not v > 0]
        problems += self.corpus.check(f"{key}.corpus.init_args", facts) if self.corpus else []
        return problems + self.objective.check(f"{key}.objective.init_args", facts)

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> None:
        """Make the text, and note the base model's outputs on it.

        Raises:
            ConfigError: The model cannot write, takes no such text, or its outputs are too large to keep.
        """
        with under("objective.init_args"):
            self.objective.prepare(model, tokenizer, seed)
        self._seed = seed
        self._distance = Predictions(self.temperature, self.top) if predicts_tokens(model) else HiddenStates()
        self._text = self._make_text(model, tokenizer)
        self._check_size(model)
        with evaluation_mode(model):
            parts = [self._distance.outputs(model, part) for part in batches_of(self._text, 16)]
            targets = [self._distance.target(part) for part in parts]
        # Out of inference mode, so that gradients can be computed against them.
        self._targets = {name: torch.cat([target[name].cpu() for target in targets]).clone() for name in targets[0]}

    def setup(self, state: Mapping[str, Tensor], clients: int) -> None:
        """Start the other objective."""
        self.objective.setup(state, clients)

    def send(self, trainable_names: Iterable[str]) -> Mapping[str, Tensor]:
        """Return what the other objective sends."""
        return self.objective.send(trainable_names)

    def local(self, model: nn.Module, task: FitTask, kept: Mapping[str, Tensor]) -> LocalObjective:
        """Return the client's run, with its own choice of sequences."""
        return _Anchored(self, model, task, kept)

    def check_update(self, update: Update) -> None:
        """Have the other objective look at it."""
        self.objective.check_update(update)

    def receive(self, update: Update) -> None:
        """Hand it to the other objective."""
        self.objective.receive(update)

    def step(self) -> None:
        """End the other objective's round."""
        self.objective.step()

    def rename(self, renamed: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
        """Hand it to the other objective."""
        self.objective.rename(renamed, state)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the other objective's tensors; the anchor's own follow from the seed."""
        return self.objective.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue the other objective."""
        self.objective.load_state_dict(state)

    def distance(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Return how far the model is from the base model on some of the sequences, a scalar with gradients."""
        device = next(model.parameters()).device
        text = {name: tensor[rows].to(device) for name, tensor in self._text.items()}
        target = {name: tensor[rows].to(device) for name, tensor in self._targets.items()}
        return self._distance(self._distance.outputs(model, text), target, text["attention_mask"])

    def _make_text(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Batch:
        key, count, length = "corpus", self.sequences, self.sequence_length
        if self.corpus is not None:
            return corpus_text(model, tokenizer, self.corpus, count, length, key)
        tokens = own_text(model, tokenizer, count, length, generator(self._seed, "anchor text"), key)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def _check_size(self, model: PreTrainedModel) -> None:
        tokens, config = self._text["input_ids"].numel(), model.config.get_text_config()
        size = tokens * self._distance.bytes_per_token(config.vocab_size, config.hidden_size)
        if size > CACHE_LIMIT:
            remedy = f"the base's outputs would take {size / 2**30:.1f} GiB: set `top: 64`, or fewer sequences"
            raise ConfigError(Problem("sequences", self.sequences, remedy))


class Predictions:
    """Distance of next-token predictions: KL(base ‖ model) per token, in nats.

    With `top`, the tokens outside the base's likeliest count as one: the KL of these coarser distributions, which is
    never above the whole one (D).
    """

    def __init__(self, temperature: float, top: int | None) -> None:
        self.temperature, self.top = temperature, top

    def bytes_per_token(self, vocabulary: int, hidden: int) -> int:
        """Return what `target` takes for a token."""
        return 2 * vocabulary if self.top is None else 6 * min(self.top, vocabulary)

    def outputs(self, model: nn.Module, text: Batch) -> Tensor:
        """Return logits. Shape ``[b, s, v]``."""
        logits: Tensor = model(**text, **forward_options(model)).logits  # type: ignore[arg-type]
        return logits

    def target(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return the base's log-probabilities in half precision, and of which tokens they are."""
        log_p = (outputs.float() / self.temperature).log_softmax(-1)
        if self.top is None or self.top >= log_p.shape[-1]:
            return {"log_p": log_p.half()}
        values, tokens = log_p.topk(self.top)
        return {"log_p": values.half(), "tokens": tokens.int()}

    def __call__(self, outputs: Tensor, target: Batch, mask: Tensor) -> Tensor:
        """Return the mean over the tokens that `mask` ``[b, s]`` marks."""
        log_q, log_p = (outputs.float() / self.temperature).log_softmax(-1), target["log_p"].float()
        if "tokens" in target:
            log_q = with_rest(log_q.gather(-1, target["tokens"].long()))
            log_p = with_rest(log_p)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)  # [b, s]
        return self.temperature**2 * (divergence * mask).sum() / mask.sum()


class HiddenStates:
    """Distance of last hidden states: squared, over the base's mean square; 1 is as far off as all zeros. Ours."""

    def bytes_per_token(self, vocabulary: int, hidden: int) -> int:
        """Return what `target` takes for a token."""
        return 2 * hidden

    def outputs(self, model: nn.Module, text: Batch) -> Tensor:
        """Return the last hidden states. Shape ``[b, s, h]``."""
        states: Tensor = model.base_model(**text).last_hidden_state  # type: ignore[operator]
        return states

    def target(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return the base's states in half precision."""
        return {"states": outputs.half()}

    def __call__(self, outputs: Tensor, target: Batch, mask: Tensor) -> Tensor:
        """Return the distance over the tokens that `mask` ``[b, s]`` marks."""
        states, kept = target["states"].float(), mask.bool()
        return (outputs.float() - states)[kept].square().mean() / states[kept].square().mean()


class _Anchored(LocalObjective):
    def __init__(self, anchor: Anchor, model: nn.Module, task: FitTask, kept: Mapping[str, Tensor]) -> None:
        self._anchor, self._model = anchor, model
        self._inner = anchor.objective.local(model, task, kept)
        self._generator = generator(anchor._seed, "anchor", *task.purpose)

    def loss(self, loss: Tensor, batch: Batch) -> Tensor:
        count = max(1, round(self._anchor.share * len(next(iter(batch.values())))))
        rows = torch.randint(len(self._anchor._text["input_ids"]), (count,), generator=self._generator)
        distance = self._anchor.distance(self._model, rows)
        return self._inner.loss(loss, batch) + self._anchor.weight * distance

    def correct_gradients(self, learning_rate: float) -> None:
        self._inner.correct_gradients(learning_rate)

    def finish(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        return self._inner.finish()


def with_rest(log_p: Tensor) -> Tensor:
    """Append the log-probability of everything else to those of some tokens. Shape ``[…, k]`` → ``[…, k + 1]``."""
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=1e-6)
    return torch.cat([log_p, rest.log()], -1)
