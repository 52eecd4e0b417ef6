"""Whether a model keeps packed documents apart by their positions alone: found out by trying it."""

import json
import logging
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fedbe.modeling.passes import Pass, evaluation_mode, replaced
from fedbe.seeding import isolated_rng

_log = logging.getLogger(__name__)
_FIRST = 3
"""Tokens of the first of the two documents of a trial."""
_IDS = [list(range(2, 10))]
_POSITIONS = [[0, 1, 2, 0, 1, 2, 3, 4]]
_VOCABULARY = 16
_LARGE = 100_000_000
"""Parameters above which a model is tried with one block of each kind in place of all of its blocks."""


def family_separates_documents(config: PretrainedConfig | None) -> bool:
    """Return whether models of this configuration keep documents apart when positions restart at each.

    They do so only when called without a key-value cache: with ``use_cache=False``. A model with random weights is
    built and tried (see `separates_documents`), with one block of each kind where all would be large. Nothing is
    claimed of a configuration that no causal language model can be built from.
    """
    if config is None:
        return False
    text = config.get_text_config()
    return _tried(type(text), text.to_json_string(use_diff=False))  # type: ignore[arg-type]


def separates_documents(model: PreTrainedModel, tolerance: float = 1e-4) -> bool:
    """Return whether this very model computes the same for a document packed after another as for it alone.

    No output of the second document may have a gradient by the first one's embeddings, which is exact in any
    precision; and the logits of both must be those that they have alone.

    Args:
        model: A causal language model, in float32; it is left in the mode it was in.
        tolerance: Largest difference of logits that counts as equal.
    """
    ids, positions = (torch.tensor(rows, device=model.device) for rows in (_IDS, _POSITIONS))
    ids %= model.config.get_text_config().vocab_size
    with evaluation_mode(model, inference=False):
        with torch.enable_grad():
            embedded, packed = _embedded_and_logits(model, ids, positions)
            (gradient,) = torch.autograd.grad(packed[:, _FIRST:].square().sum(), embedded)
        with torch.no_grad():
            alone = [model(input_ids=part, use_cache=False).logits for part in (ids[:, :_FIRST], ids[:, _FIRST:])]
    crosses = bool(gradient[:, :_FIRST].any())
    return not crosses and torch.allclose(packed, torch.cat(alone, dim=1), atol=tolerance, rtol=tolerance)


def _embedded_and_logits(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the tokens are embedded as, and the logits, which can be derived by it."""
    kept: list[Tensor] = []

    def keep(own: Pass, *arguments: Any, **options: Any) -> Tensor:
        output: Tensor = own(*arguments, **options)
        kept.append(output if output.requires_grad else output.requires_grad_())
        return output

    with replaced(model.get_input_embeddings(), keep):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return kept[0], logits


@lru_cache(maxsize=32)
def _tried(kind: type[PretrainedConfig], text: str) -> bool:
    """Return what a trial of the configuration that `text` holds as JSON finds; ``False`` if none can be made."""
    values = {**json.loads(text), **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))}
    values |= {_key(kind, "vocab_size"): _VOCABULARY, "dtype": "float32"}
    values.pop("quantization_config", None)
    try:
        with isolated_rng(0):
            if _parameters(kind.from_dict(deepcopy(values))) > _LARGE:
                values = _with_a_block_of_each_kind(values, _key(kind, "num_hidden_layers"))
            return separates_documents(_model(kind.from_dict(values)).requires_grad_(False))
    except Exception as error:  # whatever the code of a family that nobody has tried here may raise
        _log.debug("Nothing is claimed of a %s, which cannot be tried: %r", kind.__name__, error)
        return False


def _model(config: PretrainedConfig) -> PreTrainedModel:
    options = {"dtype": torch.float32, "trust_remote_code": False}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)  # type: ignore[no-untyped-call]
    return model


def _parameters(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _model(config).parameters())


def _with_a_block_of_each_kind(values: dict[str, Any], depth_key: str) -> dict[str, Any]:
    """Return a configuration's values for one block of each kind; blocks are of one kind if all lists agree on them."""
    depth = values[depth_key]
    lists = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == depth}
    kinds = {str([value[block] for value in lists.values()]): block for block in reversed(range(depth))}
    blocks = sorted(kinds.values())
    shorter = {name: [value[block] for block in blocks] for name, value in lists.items()}
    return {**values, **shorter, depth_key: len(blocks)}


def _key(kind: type[PretrainedConfig], name: str) -> str:
    return str(kind.attribute_map.get(name, name))
