"""Token ids of text, and what a model's tokenizer and configuration say of them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedbe.errors import ConfigError, Problem


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens and however long."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def begin_token(tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig) -> int:
    """Return the token that starts a document: the begin token, or the end token of models that have no other.

    Raises:
        ConfigError: The base model has neither.
    """
    for source in (tokenizer, config):
        for attribute in ("bos_token_id", "eos_token_id"):
            token = getattr(source, attribute, None)
            if isinstance(token, int):
                return token
    remedy = "the base model's tokenizer has neither begin nor end token to start text with; give it one."
    raise ConfigError(Problem("model", config.model_type, remedy))


def maximum_length(model: PreTrainedModel) -> int | None:
    """Return the most tokens that a model takes, where its config says so."""
    length = getattr(model.config, "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def evenly_spread(count: int, most: int | None) -> Tensor:
    """Return at most `most` of `count` indices, evenly spread over all of them."""
    if most is None or most >= count:
        return torch.arange(count)
    return (torch.arange(most) * count) // most
