"""Growth: one more block when the downstream score has stopped rising, at no change of what the model computes."""

import copy
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fedbe.errors import ExpansionError, Facts, Problem
from fedbe.expansion.expand import Expansion, identity_failure, outputs, resolve_positions
from fedbe.expansion.gate import refuse_gate
from fedbe.expansion.identity import IdentityRule, make_identity
from fedbe.modeling.architecture import all_configs, arrange, find_blocks, refuse_positions


@dataclass
class Plateau:
    """Notices when a score has stopped rising; then it starts counting again, so that a change has time to show.

    Attributes:
        patience: This many scores in a row without a gain are a plateau.
        min_gain: A score more than this above the best before it is a gain; in the score's unit.

    Source: ours.
    """

    patience: int = 3
    min_gain: float = 0.002
    _best: float = field(default=-math.inf, init=False, repr=False)
    _without_gain: int = field(default=0, init=False, repr=False)

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for each number outside its range."""
        problems = []
        if self.patience < 1:
            problems.append(Problem(f"{key}.patience", self.patience, "give 1 or more scores"))
        if not 0 <= self.min_gain < math.inf:
            problems.append(Problem(f"{key}.min_gain", self.min_gain, "give a finite number, 0 or more"))
        return problems

    def update(self, score: float) -> bool:
        """Take in the next score and return whether the scores are on a plateau; one that is NaN is no gain."""
        if score > self._best + self.min_gain:
            self._best, self._without_gain = score, 0
            return False
        self._without_gain = (self._without_gain + 1) % self.patience
        return self._without_gain == 0

    def state_dict(self) -> dict[str, float | int | None]:
        """Return what it takes to continue, as plain JSON values."""
        return {"best": self._best if math.isfinite(self._best) else None, "without_gain": self._without_gain}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._best = -math.inf if state["best"] is None else state["best"]
        self._without_gain = state["without_gain"]


def grow(
    model: PreTrainedModel, expansion: Expansion, position: int, *, inputs: Mapping[str, Tensor] | None = None
) -> tuple[Expansion, dict[str, str]]:
    """Insert one more identity block into an expanded model, in place, and verify that its outputs stay the same.

    The new block is a copy of the base block at its position, as frozen as that one; the blocks there are stay the
    objects they were, trained or not. At a position that has a block already the new one goes on top.

    Args:
        model: The expanded model.
        expansion: What was inserted so far.
        position: The base block (from 0) above which the new block goes.
        inputs: What the outputs are compared on; random tokens (with padding) or pixels if left out.

    Returns:
        The larger expansion, and for each parameter whose name has shifted the old name with the new one. Old and new
        names overlap: rename all at once. Among the expanded blocks the new one has the ordinal
        ``bisect_right(expansion.positions, position)``; those from there on move up by one.

    Raises:
        ExpansionError: If there is no such position, the model was not expanded like this, or the outputs change; the
            model is then what it was.

    Source: ours.
    """
    refuse_gate(model, "the new block")
    expansion.blocks(model)
    (position,) = resolve_positions([position], expansion.base_depth)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    stack = find_blocks(model)
    refuse_positions(stack, [position])
    batches, before = outputs(model, inputs)
    blocks, count = list(stack.blocks), expansion.depth
    copied = position + bisect_left(expansion.positions, position)
    index = position + 1 + bisect_right(expansion.positions, position)
    block = _identity_copy(model, blocks[copied], expansion.rule)
    arrange(stack, [*blocks[:index], block, *blocks[index:]], [*range(index), copied, *range(index, count)])
    if reason := identity_failure(model, expansion.rule, ([block], [blocks[copied]]), batches, before):
        arrange(stack, blocks, [*range(index), *range(index + 1, count + 1)])
        raise ExpansionError(f"{type(model).__name__} cannot be given one more block above block {position}: {reason}.")
    renamed = {names[id(p)]: name for name, p in model.named_parameters() if names.get(id(p), name) != name}
    return replace(expansion, positions=tuple(sorted((*expansion.positions, position)))), renamed


def _identity_copy(model: PreTrainedModel, block: nn.Module, rule: IdentityRule) -> nn.Module:
    """Return a copy of a block, made the identity, that shares the model's configurations."""
    configs: dict[int, object] = {id(config): config for config in all_configs(model)}
    twin = copy.deepcopy(block, configs)
    make_identity(rule, twin)
    return twin
