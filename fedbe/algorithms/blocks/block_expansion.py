"""Block expansion: every client trains every expanded block, the base stays frozen."""

from fedbe.adaptation.blocks import Blocks
from fedbe.algorithms.base import Algorithm


class BlockExpansion(Algorithm):
    """Insert identity blocks and train them, and a new task head where there is one; nothing else moves.

    Args:
        positions: Base blocks above which an expanded block sits (0-based), or a number of blocks to interleave evenly.

    Source: LLaMA-Pro (arXiv 2401.02415) for the blocks; their federated mean is ours after FedBE (arXiv 2506.05977).
    """

    def __init__(self, positions: list[int] | int = 2) -> None:
        super().__init__(Blocks(positions))
