"""FlexLoRA: the server forms the mean change and hands each client its best approximation of the client's rank."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fedbe.adaptation.adapters import Adapters
from fedbe.adaptation.base import Tensors
from fedbe.aggregation.low_rank import live_factors, stack, truncated_svd
from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.lora.strategy import Contribution, JointStrategy


class TruncationStrategy(JointStrategy):
    """Form the mean change, and send each client its best approximation of the client's rank.

    Args:
        adapters: Plain adapters, of any ranks.
    """

    def send(self, state: Tensors, client_id: str) -> Tensors:
        """Return the top r of the factors, B scaled for the client's s, and the rest."""
        adapters, rank = self.adapters, self.rank_of(client_id)
        ratio = adapters.scaling(adapters.max_rank) / adapters.scaling(rank)
        sent = dict(super().send(state, client_id))
        if ratio == 1:
            return sent
        return sent | {adapter.b: sent[adapter.b] * ratio for adapter in adapters.adapters}

    def combine(self, state: Tensors, contributions: Sequence[Contribution]) -> dict[str, Tensor]:
        """Return the factors of the best approximation of the mean change, layer by layer."""
        rank = self.adapters.max_rank
        scaling = self.adapters.scaling(rank)
        weights = [part.share * self.adapters.scaling(part.rank) for part in contributions]
        factors: dict[str, Tensor] = {}
        for adapter in self.adapters.adapters:
            bs = [part.update.tensors[adapter.b] for part in contributions]
            as_ = [part.update.tensors[adapter.a] for part in contributions]
            u, sigma, vt = truncated_svd(*stack(bs, as_, weights), rank)
            b, a = live_factors(u * (sigma / scaling), vt, sigma, state[adapter.a])
            factors |= {adapter.b: b, adapter.a: a}
        return factors


class FlexLoRA(Algorithm):
    """Take ΔW = Σ p_k s_k B_k A_k, and give a client of rank r the top r of its SVD: B = UΣ/s, A = Vᵀ.

    The global model is the approximation of the largest rank among the clients; a smaller client's is part of it,
    with B rescaled from the one s to the other. Singular values of zero leave A's row as it was, with B = 0.

    Args:
        rank: Rank of the clients that `ranks` does not name.
        alpha: An adapter of rank r adds alpha/r·BA.
        dropout: Rate of the dropout before A, in training.
        options: See `LoRA`.

    Source: FlexLoRA (arXiv 2402.11505) (C); keeping the largest client rank and no more is ours (R).
    """

    def __init__(self, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, **options: Any) -> None:
        adapters = Adapters(rank, alpha, dropout, **options)
        super().__init__(adapters, TruncationStrategy(adapters))
