"""FedSA-LoRA: A is shared, B is the client's own."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedbe.aggregation import Aggregator, HolderMean
from fedbe.algorithms.lora.base import LoRA
from fedbe.messages import ClientTask, Update
from fedbe.modeling.tensors import load_tensors


class FedSALoRA(LoRA):
    """Average A alone, A ← Σ p_k A_k; each client keeps its B from one of its rounds to the next.

    Personalised: a client's model is (Ā, B_k). There is no single global model; the one that is evaluated and exported
    is (Ā, mean of the last cohort's B_k by samples), which the simulation can see and a server could not: no B is
    ever sent, and a client that takes part for the first time starts with B = 0. All clients have one rank. A task
    head is shared like A.

    Source: FedSA-LoRA (arXiv 2410.01463) (C); the model evaluated as the global one is ours (R).
    """

    personalised = True
    own_average = True

    @property
    def own_names(self) -> frozenset[str]:
        """Exact names of what stays with the client: all B."""
        return frozenset(adapter.b for adapter in self.adapters)

    def send(self, state: Mapping[str, Tensor], client_id: str) -> Mapping[str, Tensor]:
        """Return every A, and the head."""
        return {name: tensor for name, tensor in super().send(state, client_id).items() if name not in self.own_names}

    def begin(self, model: PreTrainedModel, task: ClientTask) -> None:
        """Load what is shared, and the client's own B, zero at first."""
        super().begin(model, task)
        for name in self.own_names:
            own = task.kept.get(name)
            load_tensors(model, {name: torch.zeros_like(model.get_parameter(name)) if own is None else own})

    def finish(self, model: PreTrainedModel, task: ClientTask) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return every A and the head, and keep every B."""
        trained, _ = super().finish(model, task)
        kept = {name: tensor for name, tensor in trained.items() if name in self.own_names}
        return {name: tensor for name, tensor in trained.items() if name not in kept}, kept

    def aggregator(self, state: Mapping[str, Tensor]) -> Aggregator:
        """Return the mean of what is sent, which also notes the mean of what is kept, to evaluate it."""
        return _MeanWithOwn(state)


class _MeanWithOwn(HolderMean):
    def add(self, update: Update) -> None:
        super().add(replace(update, tensors={**update.tensors, **update.kept}))
