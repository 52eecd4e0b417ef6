"""HetLoRA: ranks per client by zero-padding, weighting by the size of the change, and pruning of ranks not needed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fedbe.adaptation.lora_layers import Adapter, received_rank
from fedbe.aggregation.low_rank import product_norm
from fedbe.algorithms.lora.base import Contribution, JointLoRA
from fedbe.errors import Problem
from fedbe.messages import ClientTask


class HetLoRA(JointLoRA):
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

    mixed_ranks: ClassVar[bool] = True

    def __init__(
        self, rank: int = 8, alpha: float = 16.0, decay: float = 0.99, penalty: float = 0.01, **options: Any
    ) -> None:
        super().__init__(rank, alpha, **options)
        self.decay, self.penalty = decay, penalty
        self._pruned: dict[str, int] = {}
        self._hook: RemovableHandle | None = None

    def check(self, depth: int, key: str = "algorithm") -> list[Problem]:
        """Return the mistakes in these arguments."""
        problems = super().check(depth, key)
        if not 0 < self.decay <= 1:
            problems.append(Problem(f"{key}.init_args.decay", self.decay, "a part kept lies in (0, 1]"))
        if self.penalty < 0:
            problems.append(Problem(f"{key}.init_args.penalty", self.penalty, "give 0 or more"))
        return problems

    def rank_of(self, client_id: str) -> int:
        """Return a client's rank after the pruning so far."""
        return self._pruned.get(client_id, super().rank_of(client_id))

    def scaling(self, rank: int) -> float:
        """Return the one s of all ranks: alpha/r of the largest."""
        return self.alpha / self.max_rank

    def state_dict(self) -> dict[str, Any]:
        """Return the ranks of clients that have pruned."""
        return {"pruned": dict(self._pruned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the ranks of a `state_dict`."""
        self._pruned = dict(state["pruned"])

    def begin(self, model: PreTrainedModel, task: ClientTask) -> None:
        """Load the client's factors, and add the tail's size to the loss that the model returns."""
        super().begin(model, task)
        self._remove_hook()
        start, end = self._tail(task)
        if self.penalty == 0 or start == end:
            return

        def add_penalty(module: nn.Module, arguments: Any, output: Any) -> None:
            if torch.is_grad_enabled() and output.loss is not None:
                factors = {name: module.get_parameter(name) for name in self.factor_names}
                output.loss = output.loss + self.penalty * tail_size(factors, self.adapters, start, end)

        self._hook = model.register_forward_hook(add_penalty)

    def finish(self, model: PreTrainedModel, task: ClientTask) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return the trained factors, without the tail if it has shrunk."""
        self._remove_hook()
        sent, kept = super().finish(model, task)
        start, end = self._tail(task)
        before = tail_size(task.received, self.adapters, start, end)
        shrunk = start < end and bool(tail_size(sent, self.adapters, start, end) < before)
        return (self.cut(sent, start) if shrunk else sent), kept

    def combine(self, state: Mapping[str, Tensor], contributions: Sequence[Contribution]) -> dict[str, Tensor]:
        """Return the padded factors averaged by the size of the clients' changes, and note the ranks."""
        parts = [self.pad(part.update.tensors) for part in contributions]
        sizes = [change_size(tensors, self.adapters) for tensors in parts]
        total = sum(sizes)
        weights = [size / total for size in sizes] if total > 0 else [part.share for part in contributions]
        for part in contributions:
            if part.rank < self.rank_of(part.update.client_id):
                self._pruned[part.update.client_id] = part.rank
        return {
            name: torch.stack([w * p[name].double() for w, p in zip(weights, parts, strict=True)])
            .sum(0)
            .to(state[name].dtype)
            for name in self.factor_names
        }

    def _tail(self, task: ClientTask) -> tuple[int, int]:
        rank = received_rank(self.adapters, task.received) or self.rank_of(task.client_id)
        return max(1, math.floor(self.decay * rank)), rank

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def change_size(tensors: Mapping[str, Tensor], adapters: Sequence[Adapter]) -> float:
    """Return ‖BA‖_F over all layers together."""
    return math.hypot(*(product_norm(tensors[adapter.b], tensors[adapter.a]) for adapter in adapters))


def tail_size(tensors: Mapping[str, Tensor], adapters: Sequence[Adapter], start: int, end: int) -> Tensor:
    """Return Σ ‖B[:, start:end]‖_F ‖A[start:end]‖_F over the layers."""
    pairs = ((tensors[adapter.b][:, start:end], tensors[adapter.a][start:end]) for adapter in adapters)
    return torch.stack([b.norm() * a.norm() for b, a in pairs]).sum()
