"""FedEx-LoRA: averaged factors, and the error of averaging them added to the base."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fedbe.adaptation.base import Tensors
from fedbe.adaptation.lora_layers import Adapter
from fedbe.aggregation.low_rank import residual
from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.lora.merging import Factors, MergingAdapters, MergingStrategy
from fedbe.algorithms.lora.strategy import Contribution, factor_mean
from fedbe.traits import Trait, Traits


class ResidualStrategy(MergingStrategy):
    """Average the factors, and add the error of averaging them to the base weights."""

    needs: Traits = MergingStrategy.needs | {Trait.EQUAL_SHAPES}

    def change(self, adapter: Adapter, contributions: Sequence[Contribution]) -> Factors:
        """Return the factors of the layer's residual, times s."""
        bs = [part.update.tensors[adapter.b] for part in contributions]
        as_ = [part.update.tensors[adapter.a] for part in contributions]
        left, right = residual(bs, as_, [part.share for part in contributions])
        return self.adapters.scaling(self.adapters.rank) * left, right

    def next_factors(self, state: Tensors, contributions: Sequence[Contribution]) -> dict[str, Tensor]:
        """Return B̄ and Ā of every layer."""
        return factor_mean(contributions, self.adapters.factor_names)


class FedExLoRA(Algorithm):
    """Average A and B, and make it exact with W₀ ← W₀ + s(Σ p_k B_k A_k − B̄Ā).

    Clients go on from (B̄, Ā). The residual has rank (K−1)r at most and travels as factors while these are smaller than
    the weight. All clients have one rank.

    Args:
        rank: Rank of the adapters.
        alpha: An adapter adds alpha/r·BA.
        options: See `LoRA`.

    Source: FedEx-LoRA (arXiv 2410.09432) for the residual and the rank (C); alpha and what travels when are ours (R).
    """

    def __init__(self, rank: int = 4, alpha: float = 8.0, **options: Any) -> None:
        adapters = MergingAdapters(rank, alpha, **options)
        super().__init__(adapters, ResidualStrategy(adapters))
