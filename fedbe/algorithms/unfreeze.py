"""Control for block expansion: blocks that the base model has already are trained, instead of new ones."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.block_expansion import check_positions
from fedbe.data import Batch
from fedbe.errors import ConfigError, Problem
from fedbe.expansion import ExportReport, head_parameter_names, resolve_positions, save_plain, stack_parameter_names


class Unfreeze(Algorithm):
    """Train some of the base model's own blocks, and a new task head where there is one; nothing else moves.

    Args:
        blocks: Which blocks (0-based), or a number: the top blocks of so many equal groups, those above which
            `BlockExpansion` would put as many new ones.

    Source: ours, a control: what it forgets and learns at as many trained parameters as with expanded blocks.
    """

    def __init__(self, blocks: list[int] | int = 2) -> None:
        self.blocks = blocks
        self._units: dict[str, tuple[str, ...]] = {}

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
        self._units = {f"block_{index}": names[index] for index in chosen}
        head = head_parameter_names(model)
        if head:
            self._units["head"] = head

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of the parameters of these blocks, and of a new task head."""
        return tuple(name for names in self._units.values() for name in names)

    def units(self) -> dict[str, tuple[str, ...]]:
        """Return each of the blocks by its index in the model, from the lowest to the highest, and the head."""
        return self._units

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the model as the plain checkpoint that it is."""
        return save_plain(model, directory, tokenizer)
