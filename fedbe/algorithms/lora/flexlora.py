"""FlexLoRA: the server forms the mean change and hands each client its best approximation of the client's rank."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from fedbe.aggregation.low_rank import live_factors, stack, truncated_svd
from fedbe.algorithms.lora.base import Contribution, JointLoRA


class FlexLoRA(JointLoRA):
    """Take ΔW = Σ p_k s_k B_k A_k, and give a client of rank r the top r of its SVD: B = UΣ/s, A = Vᵀ.

    The global model is the approximation of the largest rank among the clients; a smaller client's is part of it,
    with B rescaled from the one s to the other. Singular values of zero leave A's row as it was, with B = 0.

    Source: FlexLoRA (arXiv 2402.11505) (C); keeping the largest client rank and no more is ours (R).
    """

    mixed_ranks: ClassVar[bool] = True

    def send(self, state: Mapping[str, Tensor], client_id: str) -> Mapping[str, Tensor]:
        """Return the top r of the factors, B scaled for the client's s, and the head."""
        rank = self.rank_of(client_id)
        ratio = self.scaling(self.max_rank) / self.scaling(rank)
        sent = dict(super().send(state, client_id))
        if ratio == 1:
            return sent
        return sent | {adapter.b: sent[adapter.b] * ratio for adapter in self.adapters}

    def combine(self, state: Mapping[str, Tensor], contributions: Sequence[Contribution]) -> dict[str, Tensor]:
        """Return the factors of the best approximation of the mean change, layer by layer."""
        scaling = self.scaling(self.max_rank)
        weights = [part.share * self.scaling(part.rank) for part in contributions]
        factors: dict[str, Tensor] = {}
        for adapter in self.adapters:
            bs = [part.update.tensors[adapter.b] for part in contributions]
            as_ = [part.update.tensors[adapter.a] for part in contributions]
            u, sigma, vt = truncated_svd(*stack(bs, as_, weights), self.max_rank)
            b, a = live_factors(u * (sigma / scaling), vt, sigma, state[adapter.a])
            factors |= {adapter.b: b, adapter.a: a}
        return factors
