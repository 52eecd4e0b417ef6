"""Shared prefix: what the frozen blocks below all that is trained make of a sequence is computed once for a run."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedbe.errors import ConfigError, ExpansionError, Problem
from fedbe.expansion import head_parameter_names, stack_parameter_names
from fedbe.expansion.gate import find_gate, gate_parameter_names
from fedbe.modeling.architecture import find_blocks
from fedbe.modeling.base_model import forward_options
from fedbe.modeling.passes import evaluation_mode
from fedbe.prefix.store import KEY, Store
from fedbe.storage.checkpoint import raw

_BY_TOKEN = ("input_ids", "position_ids", "token_type_ids")
_WHOLE = ("pixel_values",)
_HARMLESS = ("labels", "attention_mask", "return_dict", "logits_to_keep", "use_cache", "cache_position")
_TOLERANCE = 1e-3


class Prefix:
    """Takes the lowest blocks of a model out of its forward passes, wherever their outputs are known.

    Args:
        model: The resident model; any forward pass of whole sequences takes part.
        blocks: How many of its lowest blocks.
        store: Where outputs are kept.
    """

    def __init__(self, model: PreTrainedModel, blocks: int, store: Store) -> None:
        self.model, self.store = model, store
        stack = find_blocks(model)
        self.blocks: list[nn.Module] = list(stack.blocks)[:blocks]
        self._in_tuple = False
        self._filling = False
        base = innermost(model, stack.path)
        self._hooks = [
            base.register_forward_pre_hook(self._before, with_kwargs=True),
            base.register_forward_hook(self._after, always_call=True),
        ]

    @property
    def figures(self) -> dict[str, float]:
        """How many blocks are left out, and how often their outputs were known."""
        total = self.store.hits + self.store.misses
        share = self.store.hits / total if total else 0.0
        return {"blocks": len(self.blocks), "sequences": total, "known": share, "bytes": self.store.used}

    def remove(self) -> None:
        """Let the model compute everything again."""
        self._after()
        for hook in self._hooks:
            hook.remove()

    def _before(self, base: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self._filling or any(block.training for block in self.blocks):
            return
        options = named(base, arguments, options)
        if not usable(base, options):
            return
        rows = list(rows_of(options))
        keys = [key_of(row) for row in rows]
        known = [self.store.get(key) for key in keys]
        states = [
            self._compute(base, row, options, key) if state is None else state
            for row, key, state in zip(rows, keys, known, strict=True)
        ]
        self._install(padded(states, options))

    def _compute(self, base: nn.Module, row: Mapping[str, Tensor], options: Mapping[str, Any], key: bytes) -> Tensor:
        """Return the outputs of one sequence, and keep them if there is room."""
        kept: list[Tensor] = []

        def stop(block: nn.Module, inputs: object, output: Any) -> None:
            self._in_tuple = isinstance(output, tuple)
            kept.append(output[0] if self._in_tuple else output)
            raise _Done

        hook = self.blocks[-1].register_forward_hook(stop)
        self._filling = True
        alone = {name: value for name, value in options.items() if not isinstance(value, Tensor)}
        try:
            # Not in inference mode, whose tensors could not be used in training.
            with torch.inference_mode(False), torch.no_grad():
                base(**{name: tensor.clone() for name, tensor in row.items()}, **alone)
        except _Done:
            pass
        finally:
            self._filling = False
            hook.remove()
        state = kept[0][0]
        self.store.put(key, state)
        return state

    def _install(self, states: Tensor) -> None:
        output = (states,) if self._in_tuple else states
        for block in self.blocks:
            block.forward = _constant(output)

    def _after(self, *_: object) -> None:
        if not self._filling:
            for block in self.blocks:
                block.__dict__.pop("forward", None)


class _Done(Exception):
    """Ends a forward pass of which the rest is not needed."""


def _constant(output: object) -> Callable[..., object]:
    return lambda *arguments, **options: output


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


def innermost(model: PreTrainedModel, path: str) -> nn.Module:
    """Return the model that holds the blocks: the innermost one around them that is called with a batch's inputs."""
    parents = path.split(".")
    around = [model.get_submodule(".".join(parents[:depth])) for depth in range(len(parents))]
    inputs = {"input_ids", "pixel_values"}
    return [module for module in around if inputs & inspect.signature(module.forward).parameters.keys()][-1]


def named(base: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    if not arguments:
        return dict(options)
    bound = inspect.signature(base.forward).bind(*arguments, **options).arguments
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


def padded(states: Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
    """Return the sequences' outputs as a batch as long as its inputs. Shape ``[b, s, h]``."""
    tokens = options.get("input_ids")
    device = next(value.device for value in options.values() if isinstance(value, Tensor))
    length = max(len(state) for state in states) if tokens is None else tokens.shape[1]
    batch = states[0].new_zeros(len(states), length, states[0].shape[-1], device=device)
    for row, state in enumerate(states):
        batch[row, : len(state)] = state.to(device)
    return batch


def _logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits, of which those at padding mean nothing and count as 0."""
    logits: Tensor = model(**inputs, **forward_options(model)).logits.float()
    mask = inputs.get("attention_mask")
    return logits if mask is None or logits.dim() != 3 else logits * mask[:, :, None]
