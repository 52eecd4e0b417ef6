"""LoRA: adapters that all clients train and the server averages; the preset that the other methods vary."""

from typing import Literal

from fedbe.adaptation.adapters import Adapters, Ranks
from fedbe.adaptation.lora_layers import Targets
from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.lora.strategy import FactorStrategy


class LoRA(Algorithm):
    """Train adapters s·BA beside frozen linear layers, and a new task head where there is one; clients are averaged.

    The resident model holds adapters of the largest rank. A client of rank r_k uses the first r_k rows of A and columns
    of B, trains with s = alpha/r_k, and only these travel; its tail is zero in both
    factors, gets no gradient, and is cut.

    Args:
        rank: Rank of the adapters, r.
        alpha: An adapter adds alpha/r·BA.
        dropout: Rate of the dropout before A, in training.
        target_modules: ``all-linear`` or ``attention`` layers of the blocks, or the last parts of their names; ``null``
            for what `peft` has for the architecture.
        ranks: Ranks per client, for methods that allow them: by client name (the others have `rank`), or a list from
            which each client has one, by a hash of its name.
        export: ``merged`` into a plain checkpoint, or a `peft` ``adapter``.
        first_block: The lowest block (from 0) whose layers are adapted; 1 leaves the block that a gate sees as it is.

    Source: LoRA (arXiv 2106.09685).
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: Targets = "all-linear",
        ranks: Ranks = None,
        export: Literal["merged", "adapter"] = "merged",
        first_block: int = 0,
    ) -> None:
        adapters = Adapters(rank, alpha, dropout, target_modules, ranks, export, first_block)
        super().__init__(adapters, FactorStrategy(adapters))
