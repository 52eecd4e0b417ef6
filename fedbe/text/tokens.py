"""Token ids of text, and what a model's tokenizer and configuration say of them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedbe.errors import ConfigError, Problem
from fedbe.modeling.families import family_of


def tokenise(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | None], at_a_time: int = 256
) -> Iterator[list[int]]:
    """Yield the token ids of each text, without special tokens and however long; none for ``None``."""
    for start in range(0, len(texts), at_a_time):
        batch = [text or "" for text in texts[start : start + at_a_time]]
        yield from tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


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
    """Return the most tokens that a model takes; None where its configuration does not say."""
    return token_limit(model.config)


def token_limit(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model of this configuration has positions for; None where it does not say."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    return positions - (config.pad_token_id or 0) - 1 if family_of(config).positions_after_padding else positions


def evenly_spread(count: int, most: int | None) -> Tensor:
    """Return at most `most` of `count` indices, evenly spread over all of them."""
    if most is None or most >= count:
        return torch.arange(count)
    return (torch.arange(most) * count) // most
