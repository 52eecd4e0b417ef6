"""FLoRA: the server stacks the adapters of all clients and merges them; every round starts new adapters."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from fedbe.adaptation.lora_layers import Adapter
from fedbe.aggregation.low_rank import cut, pad, stack
from fedbe.algorithms.lora.base import Contribution
from fedbe.algorithms.lora.merging import Factors, MergingLoRA
from fedbe.messages import ClientTask
from fedbe.modeling.tensors import load_tensors


class FLoRA(MergingLoRA):
    """Merge Σ p_k s_k B_k A_k into the base, exactly and for any ranks, and start adapters anew.

    The sum is the product of the stacked factors, B = [B_1 … B_K] and A = [p_1 s_1 A_1; …]. New adapters are drawn
    from the run's seed and the round and need not travel; their B is 0, so that the global model is the merged base.

    Args:
        rank: Rank of the adapters.
        alpha: An adapter of rank r adds alpha/r·BA.
        options: See `LoRA`.

    Source: FLoRA (arXiv 2409.05976) (C); the shared draw of new adapters is ours (R).
    """

    mixed_ranks: ClassVar[bool] = True
    restarts = True

    def __init__(self, rank: int = 16, alpha: float = 32.0, **options: Any) -> None:
        super().__init__(rank, alpha, **options)

    def send(self, state: Mapping[str, Tensor], client_id: str) -> Mapping[str, Tensor]:
        """Return the head, and the change of the base since the start; adapters start anew where the client is."""
        factors = frozenset(self.factor_names)
        return {name: tensor for name, tensor in super().send(state, client_id).items() if name not in factors}

    def begin(self, model: PreTrainedModel, task: ClientTask) -> None:
        """Rebuild the changed base and start adapters of the client's rank."""
        super().begin(model, task)
        rank = self.rank_of(task.client_id)
        for adapter in self.adapters:
            a = cut(self.start(model, adapter, task.round_index), rank, 0)
            load_tensors(model, {adapter.a: pad(a, self.max_rank, 0)})
            model.get_parameter(adapter.b).data.zero_()

    def change(self, adapter: Adapter, contributions: Sequence[Contribution]) -> Factors:
        """Return the stacked factors of the layer, weighted with p_k s_k."""
        bs = [part.update.tensors[adapter.b] for part in contributions]
        as_ = [part.update.tensors[adapter.a] for part in contributions]
        return stack(bs, as_, [part.share * self.scaling(part.rank) for part in contributions])

    def next_factors(self, state: Mapping[str, Tensor], contributions: Sequence[Contribution]) -> dict[str, Tensor]:
        """Return nothing: the global adapters stay as they started, with B = 0."""
        return {}
