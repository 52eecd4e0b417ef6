"""Shared prefix: what the frozen blocks below every trained one make of a sequence is computed once for a run."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedbe.data.batch import pad
from fedbe.errors import ConfigError, ExpansionError, Problem
from fedbe.expansion.gate import find_gate, gate_parameter_names
from fedbe.modeling.architecture import find_blocks, innermost
from fedbe.modeling.base_model import forward_options
from fedbe.modeling.freezing import head_parameter_names, stack_parameter_names
from fedbe.modeling.passes import Pass, evaluation_mode, replace, replaced, stop_at
from fedbe.prefix.store import KEY, Store
from fedbe.storage.checkpoint import raw

_BY_TOKEN = ("input_ids", "position_ids", "token_type_ids")
_WHOLE = ("pixel_values",)
_HARMLESS = ("labels", "attention_mask", "return_dict", "logits_to_keep", "use_cache", "cache_position")
_TOLERANCE = 1e-3


class Prefix:
    """Takes the lowest blocks of a model out of its forward passes, wherever their outputs are known.

    Any forward pass of whole sequences takes part, as long as these blocks are the model's lowest: one in which they
    are not, while blocks are tried or after growth, computes everything.

    Args:
        model: The resident model.
        blocks: How many of its lowest blocks.
        store: Where outputs are kept.
    """

    def __init__(self, model: PreTrainedModel, blocks: int, store: Store) -> None:
        self.model, self.store = model, store
        self._stack = find_blocks(model)
        self.blocks: list[nn.Module] = list(self._stack.blocks)[:blocks]
        self._base = innermost(model, self._stack.path)
        self._signature = inspect.signature(self._base.forward)
        self._in_tuple = False
        self._replacement = replace(self._base, self._forward)

    @property
    def figures(self) -> dict[str, float]:
        """How many blocks are left out, and how often their outputs were known."""
        total = self.store.hits + self.store.misses
        share = self.store.hits / total if total else 0.0
        return {"blocks": len(self.blocks), "sequences": total, "known": share, "bytes": self.store.used}

    def state_dict(self) -> dict[str, int]:
        """Return what the figures go on from when a run is continued; outputs are computed again."""
        return self.store.state_dict()

    def tensors(self) -> dict[str, Tensor]:
        """Return the keys of all sequences whose outputs are known."""
        return self.store.tensors()

    def load_state_dict(self, state: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict` and its `tensors`."""
        self.store.load_state_dict(state)
        self.store.load_tensors(tensors)

    def remove(self) -> None:
        """Let the model compute everything again."""
        self._replacement.remove()

    def _forward(self, own: Pass, *arguments: Any, **options: Any) -> Any:
        """Run the innermost model, without the lowest blocks if it can be."""
        given = self._usable(arguments, options)
        if given is None:
            return own(*arguments, **options)
        rows = list(rows_of(given))
        keys = [key_of(row) for row in rows]
        known = [self.store.get(key) for key in keys]
        states = [
            self._compute(own, row, given, key) if state is None else state
            for row, key, state in zip(rows, keys, known, strict=True)
        ]
        batch = padded(states, given)
        output = (batch,) if self._in_tuple else batch
        with ExitStack() as left_out:
            for block in self.blocks:
                left_out.enter_context(replaced(block, lambda *_, **__: output, innermost=True))
            return own(*arguments, **options)

    def _usable(self, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return all arguments of a call by name, or None if it has to compute everything."""
        if any(block.training for block in self.blocks):
            return None
        lowest = zip(self._stack.blocks, self.blocks, strict=False)
        if not all(present is block for present, block in lowest):
            return None
        given = named(self._signature, arguments, options)
        return given if usable(self._base, given) else None

    def _compute(self, own: Pass, row: Mapping[str, Tensor], given: Mapping[str, Any], key: bytes) -> Tensor:
        """Return the outputs of one sequence, and keep them if there is room."""
        alone = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
        # Not in inference mode, whose tensors could not be used in training. Whoever else ends this pass at the same
        # block wants the batch and not one sequence of it, so that this stands below.
        with torch.inference_mode(False), torch.no_grad(), stop_at(self.blocks[-1], innermost=True) as stopped:
            own(**{name: tensor.clone() for name, tensor in row.items()}, **alone)
        self._in_tuple = isinstance(stopped.output, tuple)
        state: Tensor = (stopped.output[0] if self._in_tuple else stopped.output)[0]
        self.store.put(key, state)
        return state


def frozen_blocks(model: PreTrainedModel, changing: Collection[str]) -> int:
    """Return how many of the lowest blocks nothing below or in them changes.

    A token gate looks at the output of a block itself; those above that one are computed.

    Args:
        model: The prepared model.
        changing: Exact names of all parameters that any client trains or the server changes.

    Raises:
        ExpansionError: The model has no one stack of blocks.
    """
    above = {*head_parameter_names(model), *gate_parameter_names(model)}
    blocks = stack_parameter_names(model)
    if set(changing) - above - {name for names in blocks for name in names}:
        return 0
    lowest = next((index for index, names in enumerate(blocks) if set(names) & set(changing)), len(blocks))
    gate = find_gate(model)
    return lowest if gate is None else min(lowest, gate.block + 1)


def reuse_prefix(
    model: PreTrainedModel, changing: Collection[str], store: Store, inputs: Mapping[str, Tensor]
) -> Prefix:
    """Return the reuse of as many blocks as there are below all that changes, tried on a batch.

    Args:
        model: The prepared model.
        changing: Exact names of all parameters that any client trains or the server changes.
        store: Where outputs are kept.
        inputs: A batch, of which the outputs must stay what they were up to rounding.

    Raises:
        ConfigError: There is no such block, or outputs would change.
    """
    try:
        blocks = frozen_blocks(model, changing)
    except ExpansionError as error:
        raise ConfigError(Problem(KEY, type(model).__name__, str(error))) from error
    if blocks == 0:
        remedy = "the lowest part of this model is trained: place blocks higher up, or leave `prefix` out"
        raise ConfigError(Problem(KEY, type(model).__name__, remedy))
    with evaluation_mode(model):
        before = _logits(model, inputs)
        prefix = Prefix(model, blocks, store)
        first, second = _logits(model, inputs), _logits(model, inputs)
    off = max((first - before).abs().max().item(), (second - before).abs().max().item())
    if not off <= _TOLERANCE * max(1.0, before.abs().max().item()):
        prefix.remove()
        remedy = f"outputs would be off by {off:.2g} in this architecture: leave `prefix` out"
        raise ConfigError(Problem(KEY, type(model).__name__, remedy))
    store.hits = store.misses = 0
    return prefix


def named(signature: inspect.Signature, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    if not arguments:
        return dict(options)
    bound = signature.bind(*arguments, **options).arguments
    more = bound.pop("kwargs", {})
    return {**bound, **more}


def usable(base: nn.Module, options: Mapping[str, Any]) -> bool:
    """Whether a base model is called on whole sequences, padded on the right, and only for its last states."""
    given = {name for name, value in options.items() if value is not None and value is not False}
    inputs = given & {*_BY_TOKEN, *_WHOLE}
    if not inputs & {"input_ids", "pixel_values"} or given - inputs - {*_HARMLESS}:
        return False
    caches = options.get("use_cache")
    if caches is None:
        caches = getattr(getattr(base, "config", None), "use_cache", False) and "input_ids" in inputs
    return not caches and mask_is_plain(options.get("attention_mask"))


def mask_is_plain(mask: Any) -> bool:
    """Whether there is no attention mask, or one that leaves out ends of sequences only. Shape ``[b, s]``."""
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask[:, 1:] <= mask[:, :-1]).all())


def rows_of(options: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Yield the inputs of each sequence of a batch, without its padding."""
    whole = {name: options[name] for name in _WHOLE if isinstance(options.get(name), Tensor)}
    by_token = {name: options[name] for name in _BY_TOKEN if isinstance(options.get(name), Tensor)}
    mask = options.get("attention_mask")
    main = "input_ids" if "input_ids" in by_token else "pixel_values"
    for row in range(len({**by_token, **whole}[main])):
        length = None if mask is None else int(mask[row].sum())
        # Positions may be given once for all rows.
        single = {name: value[row if len(value) > 1 else 0][None, :length] for name, value in by_token.items()}
        single |= {name: value[row : row + 1] for name, value in whole.items()}
        yield single if mask is None else {**single, "attention_mask": mask[row : row + 1, :length]}


def key_of(row: Mapping[str, Tensor]) -> bytes:
    """Return a digest of a sequence's inputs, and of the precision that is computed in."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in row.items():
        kind = tensor.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {precision}".encode())
        digest.update(raw(tensor))
    return digest.digest()


def padded(states: Sequence[Tensor], given: Mapping[str, Any]) -> Tensor:
    """Return the sequences' outputs as a batch as long as its inputs, where these are. Shape ``[b, s, h]``."""
    tokens = given.get("input_ids")
    device = next(value.device for value in given.values() if isinstance(value, Tensor))
    return pad([state.to(device) for state in states], length=None if tokens is None else tokens.shape[1])


def _logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits, of which those at padding mean nothing and count as 0."""
    logits: Tensor = model(**inputs, **forward_options(model)).logits.float()
    mask = inputs.get("attention_mask")
    return logits if mask is None or logits.dim() != 3 else logits * mask[:, :, None]
