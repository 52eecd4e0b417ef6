"""One pass of the resident model over the batches of several clients: what is frozen runs once, the rest per client."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from fedbe.data.batch import Batch, lengthen
from fedbe.expansion.gate import find_gate
from fedbe.modeling.architecture import find_blocks, innermost
from fedbe.modeling.base_model import forward_options
from fedbe.modeling.checkpointing import checkpoints_gradients
from fedbe.modeling.passes import Pass, replaced, stop_at
from fedbe.modeling.tensors import parameters_of

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

    The innermost model, with the blocks, runs once over all rows. In it each unit, a module with parameters that some
    client trains, runs client by client, on that client's rows and with its tensors. Then what is around it (the output
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
        self._stack = find_blocks(model)
        self._base = innermost(model, self._stack.path)
        trained = {id(parameter) for parameter in parameters_of(model, names).values()}
        if self._base is model or {id(parameter) for parameter in self._base.parameters()} <= trained:
            raise OnePassError("clients have no frozen part of the model in common")
        self._refuse_checkpointing(model.modules())
        self.sections: Sequence[Section] = ()
        self._gate = find_gate(model)
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        self._units = [_Unit(self, module, named, trained) for module in dict.fromkeys(_units(model, trained))]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the units run client by client inside the block; a pass that is not of `outputs` is the model's own.

        Raises:
            OnePassError: The model has come to checkpoint gradients.
        """
        self._refuse_checkpointing(self._stack.blocks)
        with ExitStack() as stack:
            for unit in self._units:
                stack.enter_context(replaced(unit.module, unit.run, with_hooks=True))
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
        try:
            return self._outputs(sections, batches, added_losses or [None] * len(batches))
        finally:
            self.sections = ()

    def _outputs(
        self,
        sections: Sequence[Section],
        batches: Sequence[Batch],
        added_losses: Sequence[Callable[[], Tensor] | None],
    ) -> list[Any]:
        states, total = self._states(concatenated(batches)), sections[-1].rows.stop
        outputs = []
        seen = None if self._gate is None else self._gate.hidden
        for section, batch, added in zip(sections, batches, added_losses, strict=True):
            self.sections = [section]
            own = tree_map(partial(cut, section.rows, total, batch), states)
            with replaced(self._base, partial(_replay, own), with_hooks=True):
                outputs.append(self.model(**batch, **forward_options(self.model)))
            if self._gate is not None:
                self._gate.look_at(cut(section.rows, total, batch, seen), batch.get("attention_mask"))
            if added is not None:
                outputs[-1].loss = outputs[-1].loss + added()
        return outputs

    @staticmethod
    def _refuse_checkpointing(modules: Iterable[nn.Module]) -> None:
        if checkpoints_gradients(modules):
            raise OnePassError("gradient checkpointing computes blocks again when other tensors have taken their place")

    def _states(self, joined: Batch) -> Any:
        """Return what the innermost model gives, called as the whole model calls it."""
        with stop_at(self._base, with_hooks=True) as stopped:
            self.model(**joined, **forward_options(self.model))
        if not stopped.reached:
            raise OnePassError(f"{type(self.model).__name__} does not call its {type(self._base).__name__}")
        return stopped.output


class _Unit(nn.Module):
    """Runs a module and its hooks client by client.

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
        parameters = self.named_parameters(remove_duplicate=False)
        self._names = {path: named[id(parameter)] for path, parameter in parameters if id(parameter) in trained}

    def run(self, own: Pass, *arguments: Any, **options: Any) -> Any:
        """Run each client's rows with its tensors, and return the outputs as one."""
        sections = self._owner.sections
        if not sections:
            return own(*arguments, **options)
        outputs = []
        for section in sections:
            given: Any = arguments, options
            if len(sections) > 1:
                given = tree_map(partial(part, section.rows, sections[-1].rows.stop), given)
            tensors = {path: section.tensors[name] for path, name in self._names.items()}
            outputs.append(functional_call(self, tensors, (own, *given[0]), given[1], tie_weights=False))
        return tree_map(_joined, *outputs) if len(sections) > 1 else outputs[0]

    def forward(self, own: Pass, *arguments: Any, **options: Any) -> Any:
        """Run the module itself, with whatever tensors are in it."""
        return own(*arguments, **options)


def _replay(output: Any, *_: Any, **__: Any) -> Any:
    return output


def _units(module: nn.Module, trained: Set[int]) -> Iterator[nn.Module]:
    """Yield the largest modules of which all parameters train, and those that own one that does."""
    for child in module.children():
        inside = {id(parameter) for parameter in child.parameters()}
        owned = {id(parameter) for parameter in child.parameters(recurse=False)}
        whole = inside <= trained and not isinstance(child, _CONTAINERS)
        if inside & trained and (whole or owned & trained):
            yield child
        elif inside & trained:
            yield from _units(child, trained)


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
        inputs = [lengthen(given, max(lengths)) for given in inputs]
    return {name: torch.cat([given[name] for given in inputs]) for name in inputs[0]}


def part(rows: slice, total: int, value: Any) -> Any:
    """Return one client's part of an argument: of a tensor whose first dimension counts rows, these rows.

    That is one of two or more dimensions whose first is the number of rows, or a multiple as where heads or tokens are
    counted too, row by row; others are the same for all.
    `fedbe.engines.one_pass.trial` tries whether anything else looks like that.
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
