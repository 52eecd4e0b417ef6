"""Expanded blocks: identity blocks between those of a frozen base model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.adaptation.base import Tensors
from fedbe.adaptation.block_units import BlockUnits
from fedbe.data import Batch
from fedbe.errors import ConfigError, Facts, Problem
from fedbe.expansion import Expansion, ExportReport, block_parameter_names, expand_blocks, grow, save_model
from fedbe.expansion.identity import dialled
from fedbe.expansion.placement import check_positions
from fedbe.messages import Structure
from fedbe.modeling.architecture import depth_of


class Blocks(BlockUnits):
    """Inserts identity blocks; they train, and a new task head where there is one, and nothing else moves.

    The structure is ``{"positions": [...]}``, sorted. A block's unit is named after its ordinal, ``block_0`` the
    lowest.

    Args:
        positions: Base blocks above which an expanded block sits (0-based), or a number of blocks to interleave evenly.

    Source: LLaMA-Pro (arXiv 2401.02415).
    """

    def __init__(self, positions: list[int] | int = 2) -> None:
        self.positions = positions
        self._expansion: Expansion | None = None

    @property
    def expansion(self) -> Expansion:
        """What was inserted where; available after `prepare`."""
        if self._expansion is None:
            raise RuntimeError("`expansion` is known after `prepare` has been called")
        return self._expansion

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem when `positions` does not fit the base model."""
        return check_positions(self.positions, facts.depth, f"{key}.positions")

    def prepare(self, model: PreTrainedModel, inputs: Batch, structure: Structure | None = None) -> None:
        """Insert the blocks and verify on `inputs` that no output changed."""
        positions = self.positions if structure is None else list(structure["positions"])
        depth = depth_of(model)
        if problems := check_positions(positions, depth, f"{self.key}.positions"):
            raise ConfigError(*problems)
        self._expansion = expand_blocks(model, positions, inputs=inputs)
        self._name_units(model)

    def structure(self) -> Structure:
        """Return ``{"positions": [...]}``."""
        return {"positions": list(self.expansion.positions)}

    @property
    def dialled_names(self) -> tuple[str, ...]:
        """Exact names of the parameters that decide how much the blocks write: the targets of their identity rule."""
        stack, targets = self.expansion.blocks_path, self.expansion.rule.targets
        paths = [f"{stack}.{index}.{target}" for index in self.expansion.expanded_indices for target in targets]
        # With a dot behind, so that a name lies under the path: `down_proj` is not `down_proj_2`.
        return tuple(name for name in self.state_names if f"{name}.".startswith(tuple(f"{path}." for path in paths)))

    def grow(self, model: PreTrainedModel, structure: Structure, inputs: Batch | None = None) -> Mapping[str, str]:
        """Insert the blocks that the structure has and the model has not, one after another."""
        missing: Counter[int] = Counter(structure["positions"])
        missing.subtract(self.expansion.positions)
        if min(missing.values()) < 0:
            raise ValueError(f"blocks at {list(self.expansion.positions)} cannot become blocks at {structure}")
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for position in sorted(missing.elements()):
            self._expansion, _ = grow(model, self.expansion, position, inputs=inputs)
        self._name_units(model)
        return {names[id(p)]: name for name, p in model.named_parameters() if names.get(id(p), name) != name}

    def dial(self, start: Tensors, state: Tensors, factor: float) -> dict[str, Tensor]:
        """Return the global tensors with what the blocks write scaled: where they start is known, `start` not needed.

        Source: ours; see `IdentityRule`.
        """
        moved, shift = frozenset(self.dialled_names), self.expansion.rule.shift
        return {name: dialled(tensor, shift, factor) if name in moved else tensor for name, tensor in state.items()}

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the expanded model, with `fedbe.json` beside it so that its dial can be turned later."""
        return save_model(model, self.expansion, directory, tokenizer)

    def _labels(self) -> Sequence[str]:
        """Return what the blocks' units are named after, the lowest first."""
        return [str(ordinal) for ordinal in range(len(self.expansion.positions))]

    def _name_units(self, model: PreTrainedModel) -> None:
        names = block_parameter_names(model, self.expansion).values()
        self._set_units(model, dict(zip(self._labels(), names, strict=True)))
