"""One pass of the resident model over the batches of several clients: what is frozen runs once, the rest per client."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from fedbe.data import Batch
from fedbe.expansion.gate import find_gate
from fedbe.modeling.architecture import find_blocks
from fedbe.modeling.base_model import forward_options
from fedbe.modeling.checkpointing import CheckpointedForward
from fedbe.prefix.reuse import innermost

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


class OnePassError(Exception):
    """Clients' batches cannot be computed on in one pass."""


@dataclass(frozen=True)
class Section:
    """One client's part of a pass.

    Attributes:
        tensors: Its values of all that some client of the pass trains, by exact parameter name.
        rows: Where its samples are in the concatenated batch.
    """

    tensors: Mapping[str, Tensor]
    rows: slice


class OnePass:
    """Runs the resident model on the batches of several clients at once.

    The innermost model, with the blocks, runs once over all rows. In it each unit, a module that has what some client
    trains, runs client by client, on that client's rows and with its tensors. Then all that is around it (the output
    layer, a task head, the loss) runs client by client on the client's own batch: the loss is the model's own.

    Args:
        model: The resident model.
        names: Exact names of all parameters that clients train.

    Raises:
        OnePassError: The model has no frozen part that clients could share, or checkpoints gradients.

    Source: ours.
    """

    def __init__(self, model: PreTrainedModel, names: Collection[str]) -> None:
        self.model = model
        base = innermost(model, find_blocks(model).path)
        self._path = next(path for path, module in model.named_modules() if module is base)
        trained = {id(model.get_parameter(name)) for name in names}
        if not self._path or {id(parameter) for parameter in base.parameters()} <= trained:
            raise OnePassError("clients have no frozen part of the model in common")
        if any(isinstance(vars(module).get("forward"), CheckpointedForward) for module in model.modules()):
            raise OnePassError("gradient checkpointing computes blocks again when other tensors have taken their place")
        self.sections: Sequence[Section] = ()
        self._gate = find_gate(model)
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        self._units = {
            path: _Unit(self, model.get_submodule(path), named, trained) for path in _unit_paths(model, trained)
        }

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the units run client by client inside the block."""
        with ExitStack() as stack:
            for path, unit in self._units.items():
                stack.enter_context(_swapped(self.model, path, unit))
            yield

    def outputs(
        self,
        tensors: Sequence[Mapping[str, Tensor]],
        batches: Sequence[Batch],
        added_losses: Sequence[Callable[[], Tensor] | None] = (),
    ) -> list[Any]:
        """Return the model's output on each client's batch with the client's tensors; the units must be installed.

        Args:
            tensors: Of each client, as in `Section`.
            batches: Of each client, in the same order.
            added_losses: Of each client, called after its forward pass and added to its loss; nothing if left out.

        Raises:
            OnePassError: The batches do not go together.
        """
        counts = [len(next(iter(batch.values()))) for batch in batches]
        ends = torch.tensor(counts).cumsum(0).tolist()
        sections = [Section(t, slice(end - n, end)) for t, end, n in zip(tensors, ends, counts, strict=True)]
        self.sections = sections
        states = self._states(concatenated(batches))
        outputs = []
        seen = None if self._gate is None else self._gate.hidden
        for section, batch, added in zip(sections, batches, added_losses or [None] * len(batches), strict=True):
            self.sections = [section]
            with _swapped(
                self.model, self._path, _Replay(tree_map(partial(cut, section.rows, ends[-1], batch), states))
            ):
                outputs.append(self.model(**batch, **forward_options(self.model)))
            if self._gate is not None:
                self._gate.look_at(cut(section.rows, ends[-1], batch, seen), batch.get("attention_mask"))
            if added is not None:
                outputs[-1].loss = outputs[-1].loss + added()
        return outputs

    def _states(self, joined: Batch) -> Any:
        """Return what the innermost model gives, called as the whole model calls it."""
        with _swapped(self.model, self._path, _Stop(self.model.get_submodule(self._path))):
            try:
                self.model(**joined, **forward_options(self.model))
            except _Done as done:
                return done.output
        raise OnePassError(f"{type(self.model).__name__} does not call `{self._path}`")


class _Unit(nn.Module):
    """Stands in for a module and its hooks, and runs it client by client.

    Args:
        owner: Whose sections count.
        module: The module.
        named: Exact names of the model's parameters, by identity.
        trained: Identities of those that some client trains.
    """

    def __init__(self, owner: OnePass, module: nn.Module, named: Mapping[int, str], trained: Collection[int]) -> None:
        super().__init__()
        self.module = module
        self._owner = owner
        parameters = module.named_parameters(remove_duplicate=False)
        self._names = {path: named[id(parameter)] for path, parameter in parameters if id(parameter) in trained}

    def __getattr__(self, name: str) -> Any:
        """Return what the module around asks of the module itself, as its kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Run each client's rows with its tensors, and return the outputs as one."""
        sections = self._owner.sections
        outputs = []
        for section in sections:
            given: Any = arguments, options
            if len(sections) > 1:
                given = tree_map(partial(part, section.rows, sections[-1].rows.stop), given)
            tensors = {path: section.tensors[name] for path, name in self._names.items()}
            outputs.append(functional_call(self.module, tensors, *given, tie_weights=False))
        return tree_map(_joined, *outputs) if len(sections) > 1 else outputs[0]


class _Stop(nn.Module):
    """Runs the innermost model and ends the forward pass there."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Run it.

        Raises:
            _Done: Always.
        """
        raise _Done(self.base(*arguments, **options))


class _Replay(nn.Module):
    """Gives what the innermost model has given before."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Return it."""
        return self.output


class _Done(Exception):
    """Ends a forward pass of which the rest is not needed."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


@contextmanager
def _swapped(model: nn.Module, path: str, stand_in: nn.Module) -> Iterator[None]:
    """Let a module stand in for the one of this path inside the block."""
    parent, _, name = path.rpartition(".")
    modules = model.get_submodule(parent)._modules
    own = modules[name]
    modules[name] = stand_in
    try:
        yield
    finally:
        modules[name] = own


def _unit_paths(module: nn.Module, trained: Set[int], prefix: str = "") -> Iterator[str]:
    """Yield the paths of the largest modules of which all parameters train, and of those that own one that does."""
    for name, child in module.named_children():
        inside = {id(parameter) for parameter in child.parameters()}
        owned = {id(parameter) for parameter in child.parameters(recurse=False)}
        whole = inside <= trained and not isinstance(child, _CONTAINERS)
        if inside & trained and (whole or owned & trained):
            yield prefix + name
        elif inside & trained:
            yield from _unit_paths(child, trained, f"{prefix}{name}.")


def concatenated(batches: Sequence[Batch]) -> Batch:
    """Return several clients' inputs as one batch, without labels, padded at the right to the longest sequence.

    Padding is masked. Where positions are given and no mask, as for packed documents, it is a further document with
    positions from 0, which nothing attends to.

    Args:
        batches: Inputs by name, the same names in all but for ``attention_mask``.

    Raises:
        OnePassError: They do not go together.
    """
    inputs = [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches]
    masked = ["attention_mask" in given for given in inputs]
    if any({*given, "attention_mask"} != {*inputs[0], "attention_mask"} for given in inputs):
        raise OnePassError("clients' batches have different inputs")
    if "input_ids" in inputs[0]:
        lengths = [given["input_ids"].shape[1] for given in inputs]
        packed = "position_ids" in inputs[0]
        if packed and any(masked) and not all(masked):
            raise OnePassError(
                "some clients' batches have a mask and others do not, which says how documents are packed"
            )
        if any(masked) or (len(set(lengths)) > 1 and not packed):
            inputs = [{"attention_mask": torch.ones_like(given["input_ids"]), **given} for given in inputs]
        inputs = [padded(given, max(lengths)) for given in inputs]
    return {name: torch.cat([given[name] for given in inputs]) for name in inputs[0]}


def padded(inputs: Batch, longest: int) -> Batch:
    """Return token sequences padded at the right to a length, positions counting from 0 there."""
    length = inputs["input_ids"].shape[1]
    more = longest - length
    by_token = {name for name, tensor in inputs.items() if tensor.ndim == 2 and tensor.shape[1] == length}
    result = {name: pad(tensor, (0, more)) if name in by_token else tensor for name, tensor in inputs.items()}
    if "position_ids" in by_token:
        result["position_ids"][:, length:] = torch.arange(more)
    return result


def part(rows: slice, total: int, value: Any) -> Any:
    """Return one client's part of an argument: of a tensor whose first dimension counts rows, these rows.

    That is one of two or more dimensions whose first is the number of rows, or a multiple as where heads or tokens are
    counted too, row by row; others are the same for all. `fedbe.engines.one_pass_trial` tries
    whether anything else looks like that.
    """
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[0] % total:
        return value
    each = value.shape[0] // total
    return value[rows.start * each : rows.stop * each]


def cut(rows: slice, total: int, batch: Batch, value: Any) -> Any:
    """Return one client's part of an output: its rows, without the padding that its own batch does not have."""
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != total:
        return value
    own = value[rows]
    return own[:, : batch["input_ids"].shape[1]] if "input_ids" in batch and value.ndim > 2 else own


def _joined(first: Any, *others: Any) -> Any:
    return torch.cat([first, *others]) if isinstance(first, Tensor) else first
