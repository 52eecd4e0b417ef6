"""FFA-LoRA: A is frozen and the same for all, so that averaging B is exact and half as much travels."""

from typing import Any

from fedbe.adaptation.adapters import Adapters
from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.lora.strategy import FactorStrategy


class FrozenAAdapters(Adapters):
    """Adapters whose A stays as it was drawn from the run's seed, which server and clients share."""

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of all B, and of a new task head."""
        return (*(adapter.b for adapter in self.adapters), *self.head_names)


class FFALoRA(Algorithm):
    """Freeze A where it starts and train B alone: B ← Σ p_k B_k, so that B̄A = Σ p_k B_k A.

    A is drawn from the run's seed, which server and clients share: it never travels. All clients have one rank.

    Args:
        rank: Rank of the adapters.
        alpha: An adapter adds alpha/r·BA.
        dropout: Rate of the dropout before A, in training.
        options: See `LoRA`.

    Source: FFA-LoRA (arXiv 2403.12313) (C).
    """

    def __init__(self, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, **options: Any) -> None:
        adapters = FrozenAAdapters(rank, alpha, dropout, **options)
        super().__init__(adapters, FactorStrategy(adapters))
