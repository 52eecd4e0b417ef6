"""Control for block expansion: blocks that the base model has already are trained, instead of new ones."""

from fedbe.adaptation.existing_blocks import ExistingBlocks
from fedbe.algorithms.base import Algorithm


class Unfreeze(Algorithm):
    """Train some of the base model's own blocks, and a new task head where there is one; nothing else moves.

    Args:
        blocks: Which blocks (0-based); or a number n, for the top block of each of n equal groups, above which
            `BlockExpansion` would put its n new ones.

    Source: ours, a control: what it forgets and learns at as many trained parameters as with expanded blocks.
    """

    def __init__(self, blocks: list[int] | int = 2) -> None:
        super().__init__(ExistingBlocks(blocks))
