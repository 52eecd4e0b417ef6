"""Control for block expansion: blocks that the base model has already are trained, instead of new ones."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.algorithms.blocks.base import BlockAlgorithm
from fedbe.data import Batch
from fedbe.errors import ConfigError, Problem
from fedbe.expansion import ExportReport, resolve_positions, save_plain, stack_parameter_names
from fedbe.expansion.placement import check_positions


class Unfreeze(BlockAlgorithm):
    """Train some of the base model's own blocks, and a new task head where there is one; nothing else moves.

    Args:
        blocks: Which blocks (0-based), or a number: the top blocks of so many equal groups, those above which
            `BlockExpansion` would put as many new ones.

    Source: ours, a control: what it forgets and learns at as many trained parameters as with expanded blocks.
    """

    def __init__(self, blocks: list[int] | int = 2) -> None:
        self.blocks = blocks

    def check(self, depth: int, key: str = "algorithm") -> list[Problem]:
        """Return a problem when `blocks` does not fit a base model of `depth` blocks."""
        return check_positions(self.blocks, depth, f"{key}.init_args.blocks")

    def prepare(self, model: PreTrainedModel, inputs: Batch) -> None:
        """Note the names of the blocks' parameters; the model stays what it is."""
        names = stack_parameter_names(model)
        problems = self.check(len(names))
        if problems:
            raise ConfigError(*problems)
        chosen = dict.fromkeys(resolve_positions(self.blocks, len(names)))
        self._set_units(model, {index: names[index] for index in chosen})

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the model as the plain checkpoint that it is."""
        return save_plain(model, directory, tokenizer)
