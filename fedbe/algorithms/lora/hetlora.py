"""HetLoRA: ranks per client by zero-padding, weighting by the size of the change, and pruning of ranks not needed."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedbe.adaptation.adapters import Adapters
from fedbe.adaptation.base import Tensors
from fedbe.adaptation.lora_layers import Adapter, received_rank
from fedbe.aggregation.low_rank import product_norm
from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.lora.strategy import Contribution, JointStrategy
from fedbe.errors import Facts, Problem
from fedbe.messages import FitTask, Update
from fedbe.modeling.tensors import parameters_of


class PruningAdapters(Adapters):
    """Adapters whose last ranks a client keeps small, and gives up when they have become smaller in its round.

    Args:
        rank: Rank of the clients that `ranks` does not name.
        alpha: An adapter adds alpha/r·BA with the largest rank r.
        decay: The part of its ranks that a client keeps when it prunes; 1 for no pruning.
        penalty: λ, the weight of the tail in the local loss.
        options: See `LoRA`.
    """

    def __init__(
        self, rank: int = 8, alpha: float = 16.0, decay: float = 0.99, penalty: float = 0.01, **options: Any
    ) -> None:
        super().__init__(rank, alpha, **options)
        self.decay, self.penalty = decay, penalty

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in these arguments."""
        problems = super().check(key, facts)
        if not 0 < self.decay <= 1:
            problems.append(Problem(f"{key}.decay", self.decay, "a part kept lies in (0, 1]"))
        if self.penalty < 0:
            problems.append(Problem(f"{key}.penalty", self.penalty, "give 0 or more"))
        return problems

    def scaling(self, rank: int) -> float:
        """Return the one s of all ranks: alpha/r of the largest."""
        return self.alpha / self.max_rank

    def pruned(self, rank: int) -> int:
        """Return the rank that is left of `rank` when a client gives up its tail."""
        return max(1, math.floor(self.decay * rank))

    def added_loss(self, model: PreTrainedModel, task: FitTask) -> Callable[[], Tensor] | None:
        """Return what computes the penalty on the tail; nothing for a client that has received no factors."""
        end = received_rank(self.adapters, task.received)
        if self.penalty == 0 or end is None or self.pruned(end) == end:
            return None
        start, factors = self.pruned(end), parameters_of(model, self.factor_names)
        return lambda: self.penalty * tail_size(factors, self.adapters, start, end)

    def finish(self, model: PreTrainedModel, task: FitTask, kept: Tensors) -> tuple[Tensors, Tensors]:
        """Return the trained factors, without the tail if it has shrunk."""
        sent, own = super().finish(model, task, kept)
        end = self._rank_in(task)
        start = self.pruned(end)
        before = tail_size(task.received, self.adapters, start, end)
        shrunk = start < end and bool(tail_size(sent, self.adapters, start, end) < before)
        return (self.cut(sent, start) if shrunk else sent), own


class SizeWeightedStrategy(JointStrategy):
    """Average padded factors by the size of the clients' changes, and note who has pruned.

    Args:
        adapters: Those that clients prune.
    """

    def __init__(self, adapters: PruningAdapters) -> None:
        super().__init__(adapters)
        self._pruning = adapters
        self._pruned: dict[str, int] = {}

    def rank_of(self, client_id: str) -> int:
        """Return a client's rank after the pruning so far."""
        return self._pruned.get(client_id, super().rank_of(client_id))

    def ranks_from(self, client_id: str) -> tuple[int, ...]:
        """Return a client's rank, and what is left of it when the client has pruned."""
        rank = self.rank_of(client_id)
        return tuple(dict.fromkeys((rank, self._pruning.pruned(rank))))

    def observe(self, task: FitTask, update: Update) -> None:
        """Note the rank of a client that has pruned."""
        rank = received_rank(self.adapters.adapters, update.tensors)
        if rank is not None and rank < self.rank_of(update.client_id):
            self._pruned[update.client_id] = rank

    def combine(self, state: Tensors, contributions: Sequence[Contribution]) -> dict[str, Tensor]:
        """Return the padded factors averaged by the size of the clients' changes."""
        parts = [self.adapters.pad(part.update.tensors) for part in contributions]
        sizes = [change_size(tensors, self.adapters.adapters) for tensors in parts]
        total = sum(sizes)
        weights = [size / total for size in sizes] if total > 0 else [part.share for part in contributions]
        return {
            name: torch.stack([w * p[name].double() for w, p in zip(weights, parts, strict=True)])
            .sum(0)
            .to(state[name].dtype)
            for name in self.adapters.factor_names
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the ranks of clients that have pruned."""
        return {"pruned": dict(self._pruned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the ranks of a `state_dict`."""
        self._pruned = dict(state["pruned"])


class HetLoRA(Algorithm):
    """Pad factors with zeros, average them with weights ∝ ‖B_k A_k‖_F, and cut them to each client's rank.

    A client adds λ Σ ‖B_tail‖‖A_tail‖ to its loss, the tail being the ranks from ⌊decay·r⌋ up, and gives them up for
    good if their product has become smaller in its round. One weight per client spans all layers. All ranks share the
    s of the largest, since padding keeps a client's change only then. A task head is averaged by samples.

    Args:
        rank: Rank of the clients that `ranks` does not name.
        alpha: An adapter adds alpha/r·BA with the largest rank r.
        decay: The part of its ranks that a client keeps when it prunes; 1 for no pruning.
        penalty: λ, the weight of the tail in the local loss.
        options: See `LoRA`.

    Source: HetLoRA (arXiv 2401.06432) for padding, weights, penalty and their defaults (C); when a client prunes, the
    shared s and one weight across layers are our reading (R).
    """

    def __init__(
        self, rank: int = 8, alpha: float = 16.0, decay: float = 0.99, penalty: float = 0.01, **options: Any
    ) -> None:
        adapters = PruningAdapters(rank, alpha, decay, penalty, **options)
        super().__init__(adapters, SizeWeightedStrategy(adapters))


def change_size(tensors: Mapping[str, Tensor], adapters: Sequence[Adapter]) -> float:
    """Return ‖BA‖_F over all layers together."""
    return math.hypot(*(product_norm(tensors[adapter.b], tensors[adapter.a]) for adapter in adapters))


def tail_size(tensors: Mapping[str, Tensor], adapters: Sequence[Adapter], start: int, end: int) -> Tensor:
    """Return Σ ‖B[:, start:end]‖_F ‖A[start:end]‖_F over the layers."""
    pairs = ((tensors[adapter.b][:, start:end], tensors[adapter.a][start:end]) for adapter in adapters)
    return torch.stack([b.norm() * a.norm() for b, a in pairs]).sum()
