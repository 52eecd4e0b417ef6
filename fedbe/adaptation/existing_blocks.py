"""Blocks that the base model has already: the control for expanded ones."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.adaptation.block_units import BlockUnits
from fedbe.data import Batch
from fedbe.errors import ConfigError, Facts, Problem
from fedbe.expansion import ExportReport, resolve_positions, save_plain, stack_parameter_names
from fedbe.expansion.placement import check_positions
from fedbe.messages import Structure
from fedbe.traits import ALL, Trait, Traits


class ExistingBlocks(BlockUnits):
    """Some of the base model's own blocks train, and a new task head where there is one; nothing else moves.

    A block's unit is named after its index in the base model.

    Args:
        blocks: Which blocks (0-based); or a number n, for the top block of each of n equal groups, where `Blocks` would
            put as many new ones.
    """

    offers: Traits = ALL - {Trait.UNCHANGED_BASE}

    def __init__(self, blocks: list[int] | int = 2) -> None:
        self.blocks = blocks

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem when `blocks` does not fit the base model."""
        return check_positions(self.blocks, facts.depth, f"{key}.blocks")

    def prepare(self, model: PreTrainedModel, inputs: Batch, structure: Structure | None = None) -> None:
        """Note the names of the blocks' parameters; the model stays what it is."""
        names = stack_parameter_names(model)
        if problems := self.check(self.key, Facts(depth=len(names))):
            raise ConfigError(*problems)
        chosen = dict.fromkeys(resolve_positions(self.blocks, len(names)))
        self._set_units(model, {str(index): names[index] for index in chosen})

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the model as the plain checkpoint that it is."""
        return save_plain(model, directory, tokenizer)
