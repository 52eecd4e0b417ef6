"""Inserting expanded blocks into a model, taking them out again, and the object that describes them."""

import copy
import math
import operator
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedbe.data import Batch
from fedbe.errors import ExpansionError
from fedbe.expansion.identity import (
    IdentityRule,
    candidate_rules,
    dialled,
    make_identity,
    others_moved,
    target_parameters,
)
from fedbe.modeling.architecture import (
    BlockStack,
    all_configs,
    arrange,
    find_blocks,
    refuse_positions,
    stack_config_of,
)
from fedbe.modeling.verification import difference, observe, probe_inputs


@dataclass(frozen=True)
class Expansion:
    """Which blocks were inserted into which model, small enough for a JSON file.

    Attributes:
        model_type: The ``model_type`` of the base model's (text) configuration.
        blocks_path: Path of the list of blocks, for example ``model.layers``.
        base_depth: The number of blocks of the base model.
        positions: The base block (from 0) directly above which each expanded block sits, sorted; several blocks
            may share a position.
        rule: How an expanded block starts as the identity.
    """

    model_type: str
    blocks_path: str
    base_depth: int
    positions: tuple[int, ...]
    rule: IdentityRule

    @property
    def depth(self) -> int:
        """The number of blocks of the expanded model."""
        return self.base_depth + len(self.positions)

    @property
    def expanded_indices(self) -> tuple[int, ...]:
        """The indices of the expanded blocks in the new stack, bottom first."""
        return tuple(position + 1 + ordinal for ordinal, position in enumerate(self.positions))

    @property
    def source_indices(self) -> tuple[int, ...]:
        """The index in the new stack of the base block that each expanded block was copied from."""
        return tuple(position + bisect_left(self.positions, position) for position in self.positions)

    @property
    def position_map(self) -> tuple[int, ...]:
        """For each block of the new stack the base block that it is, or that it was copied from."""
        return tuple(sorted((*range(self.base_depth), *self.positions)))

    def apply(self, model: PreTrainedModel) -> None:
        """Insert the same blocks, the identity at first, into a fresh base model, in place.

        Raises:
            ExpansionError: If the model is not the base model described here.
        """
        stack = self._stack(model, self.base_depth)
        configs = {id(config): config for config in all_configs(model)}
        expanded = set(self.expanded_indices)
        base = list(stack.blocks)
        blocks = [
            # Configurations stay shared: a copy would miss later changes, the kind of attention for example.
            copy.deepcopy(base[source], dict(configs)) if index in expanded else base[source]
            for index, source in enumerate(self.position_map)
        ]
        for index in self.expanded_indices:
            make_identity(self.rule, blocks[index])
        arrange(stack, blocks, self.position_map)

    def blocks(self, model: PreTrainedModel) -> list[nn.Module]:
        """Return the expanded blocks of an expanded model, bottom first.

        Raises:
            ExpansionError: If the model was not expanded like this.
        """
        stack = self._stack(model, self.depth)
        return [stack.blocks[index] for index in self.expanded_indices]

    def to_dict(self) -> dict[str, object]:
        """Return a dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "Expansion":
        """Return the expansion that `to_dict` described, straight or by way of JSON.

        Raises:
            ExpansionError: If the dictionary has other keys or impossible values.
        """
        try:
            fields: dict[str, Any] = dict(values)
            rule = {**fields["rule"], "targets": tuple(fields["rule"]["targets"])}
            fields |= {"rule": IdentityRule(**rule), "positions": tuple(fields["positions"])}
            expansion = cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ExpansionError(f"`expansion` = {values!r} describes no expansion: {error}.") from error
        return replace(expansion, positions=resolve_positions(expansion.positions, expansion.base_depth))

    def _stack(self, model: PreTrainedModel, depth: int) -> BlockStack:
        model_type = stack_config_of(model).model_type
        if model_type != self.model_type:
            raise ExpansionError(f"The expansion is of a {self.model_type} model, not of {model_type}.")
        stack = BlockStack(model, self.blocks_path, self.model_type)
        try:
            found = stack.depth
        except AttributeError as error:
            raise ExpansionError(f"{type(model).__name__} has no `{self.blocks_path}`.") from error
        if found != depth:
            raise ExpansionError(f"`{self.blocks_path}` has {found} blocks, the expansion needs {depth}.")
        return stack


def expand_blocks(
    model: PreTrainedModel,
    positions: Sequence[int] | int,
    *,
    inputs: Mapping[str, Tensor] | None = None,
) -> Expansion:
    """Insert blocks that are the identity into a model, in place, and verify that its outputs stay the same.

    Args:
        model: A model with one stack of like blocks.
        positions: Base blocks (from 0), a copy is inserted above each; or a number of blocks to interleave evenly,
            each above the top block of as many groups.
        inputs: What the outputs are compared on; random tokens (with padding) or pixels if left out.

    Raises:
        ExpansionError: If ``positions`` are impossible or the outputs change; the model is then what it was.

    Source: LLaMA-Pro (arXiv 2401.02415); verification and the rules beyond pre-norm models ours.
    """
    stack = find_blocks(model)
    chosen = resolve_positions(positions, stack.depth)
    refuse_positions(stack, chosen)
    batches, before = outputs(model, inputs)
    failures = []
    for rule in candidate_rules(stack.model_type, list(stack.blocks)):
        expansion = Expansion(stack.model_type, stack.path, stack.depth, chosen, rule)
        reason = _attempt(model, expansion, batches, before)
        if reason is None:
            return expansion
        failures.append(f"{rule.kind} ({', '.join(rule.targets)}): {reason}")
    reasons = "; ".join(failures)
    raise ExpansionError(f"{type(model).__name__} cannot be expanded with unchanged outputs: {reasons}.")


def outputs(model: PreTrainedModel, inputs: Mapping[str, Tensor] | None) -> tuple[list[Batch], list[Tensor]]:
    """Return what a model's outputs are compared on, and its outputs.

    Args:
        model: The model as it is.
        inputs: Inputs to compare on; random ones if left out.

    Raises:
        ExpansionError: If it does not take random inputs.
    """
    if inputs is not None:
        return [dict(inputs)], observe(model, [inputs])
    try:
        batches = probe_inputs(model)
        return batches, observe(model, batches)
    except ExpansionError:
        raise
    # An unknown architecture may fail in any way.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ExpansionError(
            f"{type(model).__name__} cannot be verified on random inputs: give `inputs` ({reason})."
        ) from error


def _attempt(
    model: PreTrainedModel, expansion: Expansion, batches: Sequence[Mapping[str, Tensor]], before: list[Tensor]
) -> str | None:
    """Insert blocks and return why they are not the identity, the model being what it was then; or None."""
    try:
        expansion.apply(model)
    except ExpansionError as error:
        return str(error)
    stack = find_blocks(model).blocks
    sources = [stack[index] for index in expansion.source_indices]
    reason = identity_failure(model, expansion.rule, (expansion.blocks(model), sources), batches, before)
    if reason is not None:
        remove_blocks(model, expansion)
    return reason


def resolve_positions(positions: Sequence[int] | int, depth: int) -> tuple[int, ...]:
    """Return sorted positions; a number n is spread over n groups of blocks, above the top block of each.

    Args:
        positions: Base blocks from 0 to ``depth`` - 1, or a number from 1 to ``depth``.
        depth: The number of blocks of the base model.

    Raises:
        ExpansionError: If ``positions`` lie outside of this range, are empty, or no whole numbers.

    Source: LLaMA-Pro (arXiv 2401.02415, section 3.2) for equal groups.
    """
    if isinstance(positions, Sequence) and not isinstance(positions, str):
        chosen = sorted(_whole(position, positions) for position in positions)
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < depth:
            raise _position_error(positions, f"give at least one block, each from 0 to {depth - 1}")
        return tuple(chosen)
    number = _whole(positions, positions)
    if not 1 <= number <= depth:
        raise _position_error(positions, f"a number of blocks to interleave must lie from 1 to {depth}")
    return tuple((group + 1) * depth // number - 1 for group in range(number))


def remove_blocks(model: PreTrainedModel, expansion: Expansion) -> None:
    """Take the expanded blocks out of a model, in place: what is left is the base model.

    Raises:
        ExpansionError: If the model was not expanded like this.
    """
    stack = expansion._stack(model, expansion.depth)
    expanded = set(expansion.expanded_indices)
    kept = [index for index in range(expansion.depth) if index not in expanded]
    arrange(stack, [stack.blocks[index] for index in kept], kept)


@contextmanager
def without_blocks(model: PreTrainedModel, expansion: Expansion) -> Iterator[PreTrainedModel]:
    """Yield the base model itself, at no extra weights: the expanded blocks are left out meanwhile.

    Raises:
        ExpansionError: If the model was not expanded like this.
    """
    stack = expansion._stack(model, expansion.depth)
    blocks, expanded = list(stack.blocks), set(expansion.expanded_indices)
    remove_blocks(model, expansion)
    try:
        yield model
    finally:
        # The blocks that were out kept their indices, the others were renumbered.
        labels = [i if i in expanded else base for i, base in enumerate(expansion.position_map)]
        arrange(stack, blocks, expansion.position_map, labels)


def scale_blocks(model: PreTrainedModel, expansion: Expansion, dial: float) -> None:
    """Multiply what the expanded blocks write by a factor, in place; 0 gives exactly the base model's outputs.

    Args:
        model: The expanded model.
        expansion: What was inserted.
        dial: The factor, finite and at least 0; 1 changes nothing.

    Raises:
        ExpansionError: If ``dial`` is out of range or the model was not expanded like this.
    """
    check_dial(dial)
    with torch.no_grad():
        for block in expansion.blocks(model):
            for parameter in target_parameters(expansion.rule, block):
                parameter.copy_(dialled(parameter, expansion.rule.shift, dial))


def check_dial(dial: float) -> None:
    """Check that a dial is a finite number of at least 0.

    Raises:
        ExpansionError: If it is not.
    """
    if isinstance(dial, bool) or not isinstance(dial, (int, float)) or not math.isfinite(dial) or dial < 0:
        raise ExpansionError(f"`dial` = {dial!r}: give a finite number of at least 0; 1 changes nothing.")


def failure(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], before: list[Tensor]) -> str | None:
    """Return how a model's outputs differ from those before, or how it fails to give any; None if they are equal."""
    try:
        return difference(before, observe(model, batches))
    # An unknown architecture may fail in any way; the caller restores the model and reports it.
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def identity_failure(
    model: PreTrainedModel,
    rule: IdentityRule,
    copied: tuple[Sequence[nn.Module], Sequence[nn.Module]],
    batches: Sequence[Mapping[str, Tensor]],
    before: list[Tensor],
) -> str | None:
    """Return why new blocks change a model's outputs, or would once they have learned; None if they do not.

    Args:
        model: The model with the blocks.
        rule: How they start as the identity.
        copied: The new blocks, and for each the block that it was copied from.
        batches: What the outputs are compared on.
        before: The outputs without the blocks.
    """
    if reason := failure(model, batches, before):
        return reason
    with others_moved(rule, *copied):
        reason = failure(model, batches, before)
    return reason and f"{reason} as soon as other parameters of the new blocks move"


def _whole(value: object, positions: object) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise _position_error(positions, "give whole numbers, or one number of blocks to interleave")


def _position_error(positions: object, remedy: str) -> ExpansionError:
    return ExpansionError(f"`positions` = {positions!r}: {remedy}.")
