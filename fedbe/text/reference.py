"""Text of no client's task, on which a model is held to the base model: what the base writes itself, or a corpus."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.corpora import Corpus
from fedbe.data import Batch
from fedbe.errors import ConfigError, Problem
from fedbe.text.packing import pack
from fedbe.text.sampling import sample_sequences
from fedbe.text.tokens import begin_token, evenly_spread, maximum_length, tokenise


def predicts_tokens(model: nn.Module) -> bool:
    """Whether a model predicts tokens: it has an output layer over its vocabulary."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    return output is not None


def own_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    count: int,
    length: int,
    chance: torch.Generator,
    key: str,
) -> Tensor:
    """Return token ids that the model writes, a begin token first, shape ``[count, length]`` or as long as it takes.

    Args:
        model: The base model.
        tokenizer: Its tokenizer, if there is one.
        count: Number of sequences.
        length: Tokens of a sequence, cut to what the model takes.
        chance: The only source of chance.
        key: Where a corpus could be named instead.

    Raises:
        ConfigError: The model does not predict tokens.
    """
    if not predicts_tokens(model):
        raise ConfigError(Problem(key, None, f"{type(model).__name__} cannot write text of its own: name a corpus"))
    length = min(length, maximum_length(model) or length)
    return sample_sequences(model, begin_token(tokenizer, model.config), count, length, chance)


def corpus_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    corpus: Corpus,
    count: int,
    length: int,
    key: str,
) -> Batch:
    """Return ``input_ids`` and ``attention_mask`` of at most `count` sequences, spread evenly over the training split.

    Documents are packed for a model that predicts tokens, and stand in a row each, cut and padded, for others.

    Raises:
        ConfigError: There is no tokenizer, or no text.
    """
    texts = [text for text in corpus.load("train")["text"] if str(text or "").strip()]
    if tokenizer is None or not texts:
        lacks = "the base model has no tokenizer" if tokenizer is None else "has no text to train on"
        raise ConfigError(Problem(key, type(corpus).__name__, lacks))
    length = min(length, maximum_length(model) or length)
    if predicts_tokens(model):
        tokens, labels = pack(tokenise(tokenizer, texts), begin_token(tokenizer, model.config), length)
        text = {"input_ids": tokens, "attention_mask": (labels >= 0).long()}
    else:
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        text = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    kept = evenly_spread(len(text["input_ids"]), count)
    return {name: tensor[kept] for name, tensor in text.items()}


def batches_of(text: Batch, size: int) -> list[Batch]:
    """Return the rows of some tensors in batches of at most `size`."""
    count = len(text["input_ids"])
    return [{name: t[start : start + size] for name, t in text.items()} for start in range(0, count, size)]
