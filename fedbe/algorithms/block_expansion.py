"""Block expansion: every client trains every expanded block, the base stays frozen."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.algorithms.blocks import BlockAlgorithm
from fedbe.data import Batch
from fedbe.errors import ConfigError, Problem
from fedbe.expansion import (
    Expansion,
    ExportReport,
    block_parameter_names,
    expand_blocks,
    save_model,
)


class BlockExpansion(BlockAlgorithm):
    """Insert identity blocks and train them, and a new task head where there is one; nothing else moves.

    Args:
        positions: Base blocks above which an expanded block sits (0-based), or a number of blocks to interleave evenly.

    Source: LLaMA-Pro (arXiv 2401.02415) for the blocks; their federated mean is ours after FedBE (arXiv 2506.05977).
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

    def check(self, depth: int, key: str = "algorithm") -> list[Problem]:
        """Return a problem when `positions` does not fit a base model of `depth` blocks."""
        return check_positions(self.positions, depth, f"{key}.init_args.positions")

    def prepare(self, model: PreTrainedModel, inputs: Batch) -> None:
        """Insert the blocks and verify on `inputs` that no output changed."""
        problems = self.check(model.config.get_text_config().num_hidden_layers)
        if problems:
            raise ConfigError(*problems)
        self._expansion = expand_blocks(model, self.positions, inputs=inputs)
        self._set_units(model, block_parameter_names(model, self.expansion))

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the expanded model, with `fedbe.json` beside it so that its dial can be turned later."""
        return save_model(model, self.expansion, directory, tokenizer)


def check_positions(positions: list[int] | int, depth: int, key: str) -> list[Problem]:
    """Return a problem when these blocks, or so many, are not among `depth` blocks."""
    if isinstance(positions, int):
        if 1 <= positions <= depth:
            return []
        return [Problem(key, positions, f"a number of blocks lies between 1 and the depth, {depth}")]
    if positions and all(0 <= position < depth for position in positions):
        return []
    remedy = f"give at least one block, each from 0 to {depth - 1}: the base model has {depth} blocks"
    return [Problem(key, positions, remedy)]
