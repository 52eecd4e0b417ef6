"""Block expansion: every client trains every expanded block, the base stays frozen."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.algorithms.blocks.base import BlockAlgorithm
from fedbe.data import Batch
from fedbe.errors import ConfigError, Problem
from fedbe.expansion import Expansion, ExportReport, block_parameter_names, expand_blocks, save_model
from fedbe.expansion.identity import dialled
from fedbe.expansion.placement import check_positions


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

    @property
    def dialled_names(self) -> tuple[str, ...]:
        """Exact names of the parameters that decide how much the blocks write: the targets of their identity rule."""
        stack, targets = self.expansion.blocks_path, self.expansion.rule.targets
        paths = [f"{stack}.{index}.{target}" for index in self.expansion.expanded_indices for target in targets]
        # With a dot behind, so that a name lies under the path: `down_proj` is not `down_proj_2`.
        return tuple(name for name in self.state_names if f"{name}.".startswith(tuple(f"{path}." for path in paths)))

    def dial(self, start: Mapping[str, Tensor], state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
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
