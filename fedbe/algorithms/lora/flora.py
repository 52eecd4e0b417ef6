"""FLoRA: the server stacks the adapters of all clients and merges them; every round starts new adapters."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fedbe.adaptation.base import Tensors
from fedbe.adaptation.lora_layers import Adapter
from fedbe.aggregation.low_rank import cut, stack
from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.lora.merging import Factors, MergingAdapters, MergingStrategy
from fedbe.algorithms.lora.strategy import Contribution
from fedbe.messages import FitTask
from fedbe.traits import Trait, Traits


class RestartingAdapters(MergingAdapters):
    """Adapters that a client starts new in each round, from the run's seed and the round: they need not travel."""

    offers: Traits = MergingAdapters.offers - {Trait.LASTING_TENSORS}

    def begin(self, model: PreTrainedModel, task: FitTask, kept: Tensors) -> None:
        """Rebuild the changed base and start adapters of the client's rank."""
        rank = self.rank_of(task.client_id)
        new: dict[str, Tensor] = {}
        for adapter in self.adapters:
            b = model.get_parameter(adapter.b)
            new[adapter.a] = cut(self.start(model, adapter, task.round_index), rank, 0)
            new[adapter.b] = b.new_zeros(len(b), rank)
        super().begin(model, replace(task, received={**task.received, **new}), kept)


class StackingStrategy(MergingStrategy):
    """Merge the product of the clients' stacked factors; no factor is sent to a client.

    Args:
        adapters: Those that clients start new in each round.
    """

    def __init__(self, adapters: RestartingAdapters) -> None:
        super().__init__(adapters)

    def send(self, state: Tensors, client_id: str) -> Tensors:
        """Return the change of the base since the start, and what is not the adapters'."""
        factors = frozenset(self.adapters.factor_names)
        return {name: tensor for name, tensor in super().send(state, client_id).items() if name not in factors}

    def change(self, adapter: Adapter, contributions: Sequence[Contribution]) -> Factors:
        """Return the stacked factors of the layer, weighted with p_k s_k."""
        bs = [part.update.tensors[adapter.b] for part in contributions]
        as_ = [part.update.tensors[adapter.a] for part in contributions]
        return stack(bs, as_, [part.share * self.adapters.scaling(part.rank) for part in contributions])

    def next_factors(self, state: Tensors, contributions: Sequence[Contribution]) -> dict[str, Tensor]:
        """Return nothing: the global adapters stay as they started, with B = 0."""
        return {}


class FLoRA(Algorithm):
    """Merge Σ p_k s_k B_k A_k into the base, exactly and for any ranks, and start new adapters in each round.

    The sum is the product of the stacked factors, B = [B_1 … B_K] and A = [p_1 s_1 A_1; …]. New adapters are drawn
    from the run's seed and the round and need not travel; their B is 0, so that the global model is the merged base.

    Args:
        rank: Rank of the adapters.
        alpha: An adapter of rank r adds alpha/r·BA.
        options: See `LoRA`.

    Source: FLoRA (arXiv 2409.05976) (C); the shared draw of new adapters is ours (R).
    """

    def __init__(self, rank: int = 16, alpha: float = 32.0, **options: Any) -> None:
        adapters = RestartingAdapters(rank, alpha, **options)
        super().__init__(adapters, StackingStrategy(adapters))
