"""A classifier's head: which output is which class, and what else of the configuration its training depends on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedbe.data import IGNORED
from fedbe.modeling.families import family_of
from fedbe.modeling.freezing import head_parameter_names

SINGLE_LABEL: Literal["single_label_classification"] = "single_label_classification"
_UNNAMED = re.compile(r"LABEL_\d+")


def stated_classes(config: PretrainedConfig) -> list[str] | None:
    """Return the names of a head's classes in the order of its outputs; ``None`` where they are only numbered."""
    stated: Mapping[Any, str] = config.id2label or {}
    names = [str(stated.get(index, f"LABEL_{index}")) for index in range(config.num_labels or 0)]
    return None if all(_UNNAMED.fullmatch(name) for name in names) else names


def in_head_order(config: PretrainedConfig | None, names: Sequence[str]) -> list[str]:
    """Return class names in the order of the model's outputs if its head has exactly these classes, else as given.

    Upper and lower case are one where that leaves all names different.
    """
    stated = (config and stated_classes(config)) or []
    for form in (str, str.casefold):
        places = {form(name): place for place, name in enumerate(stated)}
        if len(places) == len(names) and places.keys() == {form(name) for name in names}:
            return sorted(names, key=lambda name: places[form(name)])
    return list(names)


def set_classes(config: PretrainedConfig, classes: int | Sequence[str]) -> bool:
    """Make a configuration that of a classifier which tells one of these classes, and say whether its head is new.

    Args:
        config: The base model's configuration; changed in place.
        classes: Names in the order of the outputs, or how many there are where they have none.

    Returns:
        False if the checkpoint's head is kept: it is for these classes in this order, or for as many where either side
        only numbers them.
    """
    count = classes if isinstance(classes, int) else len(classes)
    kept = config.num_labels == count and config.problem_type in (None, SINGLE_LABEL)
    stated = stated_classes(config)
    config.problem_type = SINGLE_LABEL
    config.num_labels = count
    if isinstance(classes, int):
        return not kept
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    numbered = stated is None or list(classes) == [str(index) for index in range(count)]
    same = numbered or list(map(str.casefold, stated or ())) == list(map(str.casefold, classes))
    return not (kept and same)


def renew_head(model: PreTrainedModel) -> None:
    """Redraw the last projection of a classifier's head: normal, of the model's own deviation, without bias."""
    names, deviation = set(head_parameter_names(model)), getattr(model.config, "initializer_range", 0.02)
    for name, module in model.named_modules():
        last = isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
        if last and f"{name}.weight" in names:
            nn.init.normal_(module.weight, std=deviation)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def weigh_classes(model: PreTrainedModel, weights: Sequence[float]) -> RemovableHandle:
    """Have a classifier's own loss be the mean over the samples of the class's weight times the cross-entropy.

    The weights are not divided by their sum in the batch, so that batches of one step can be added up. Source: ours.

    Args:
        model: Changed until the handle is removed; its outputs stay what they are but for ``loss``.
        weights: What a sample of each class weighs, by the class's number.
    """
    by_class = torch.tensor(weights)

    def weighted(_: nn.Module, __: Any, given: Mapping[str, Any], output: Any) -> Any:
        if (labels := given.get("labels")) is not None:
            logits = output.logits.float()
            losses = cross_entropy(logits, labels, by_class.to(logits.device), reduction="none")
            output.loss = losses.sum() / (labels != IGNORED).sum()
        return output

    return model.register_forward_hook(weighted, with_kwargs=True)


def agree_on_padding(tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig) -> None:
    """Have tokenizer and configuration of a text classifier name the same padding, at the right; both are changed.

    A decoder's head reads the last token that is not padding, which it knows by the configuration's id alone. It is the
    tokenizer's padding token, or else its end token; of a model that counts positions from behind its padding id, it is
    that of the configuration.
    """
    if tokenizer is None:
        return
    text = config.get_text_config()
    own = getattr(text, "pad_token_id", None)
    candidates = [tokenizer.pad_token_id, tokenizer.eos_token_id, own, 0]
    if family_of(config).positions_after_padding:
        candidates.insert(0, own)
    size = getattr(text, "vocab_size", None) or len(tokenizer)
    chosen = next(token for token in candidates if isinstance(token, int) and 0 <= token < size)
    set_padding(config, chosen, classifier=True)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id != chosen and chosen in tokenizer.all_special_ids:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)


def set_padding(config: PretrainedConfig, pad_token_id: int | None, classifier: bool) -> None:
    """Write a padding id into a configuration, and into that of its text part.

    Args:
        config: Changed in place.
        pad_token_id: What batches are padded with; ``None`` if that is not known.
        classifier: Whether to do so where it names one already, unless positions are counted from behind that.
    """
    text = config.get_text_config()
    named = getattr(text, "pad_token_id", None) is not None
    if pad_token_id is None or (named and (not classifier or family_of(config).positions_after_padding)):
        return
    for part in (config, text):
        part.pad_token_id = pad_token_id
