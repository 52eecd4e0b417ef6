"""FedIT: every client trains the same adapters, the server averages A and B by themselves."""

from typing import Any

from fedbe.algorithms.lora.base import LoRA


class FedIT(LoRA):
    """Average A and B separately: A ← Σ p_k A_k, B ← Σ p_k B_k.

    B̄Ā is not Σ p_k B_k A_k: the cross terms B_i A_j come in. All clients have one rank.

    Args:
        rank: Rank of the adapters.
        alpha: An adapter adds alpha/r·BA.
        dropout: Rate of the dropout before A, in training.
        options: See `LoRA`.

    Source: FedIT (arXiv 2305.05644), rule and defaults (C).
    """

    def __init__(self, rank: int = 16, alpha: float = 16.0, dropout: float = 0.05, **options: Any) -> None:
        super().__init__(rank, alpha, dropout, **options)
