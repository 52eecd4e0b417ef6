"""FedSA-LoRA: A is shared, B is the client's own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedbe.adaptation.adapters import Adapters
from fedbe.adaptation.base import Tensors
from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.lora.strategy import FactorStrategy
from fedbe.errors import UpdateError
from fedbe.messages import FitTask, Update
from fedbe.traits import ALL, Trait, Traits


class OwnBAdapters(Adapters):
    """Adapters whose B stays with the client, from one of its rounds to the next; it starts at zero."""

    offers: Traits = ALL - {Trait.GLOBAL_MODEL}

    @property
    def own_names(self) -> frozenset[str]:
        """Exact names of what stays with the client: all B."""
        return frozenset(adapter.b for adapter in self.adapters)

    def begin(self, model: PreTrainedModel, task: FitTask, kept: Tensors) -> None:
        """Load what is shared, and the client's own B, zero at first."""
        own = {name: _own(model, name, kept) for name in self.own_names}
        super().begin(model, replace(task, received={**task.received, **own}), kept)

    def finish(self, model: PreTrainedModel, task: FitTask, kept: Tensors) -> tuple[Tensors, Tensors]:
        """Return every A and the head, and keep every B."""
        trained, _ = super().finish(model, task, kept)
        own = {name: tensor for name, tensor in trained.items() if name in self.own_names}
        return {name: tensor for name, tensor in trained.items() if name not in own}, own


class SharedAStrategy(FactorStrategy):
    """Send and average every A; no B is sent by anyone.

    A simulation looks at the B's that clients keep, and the global state has their mean by samples. Where they cannot
    be seen, because clients are on other machines, the global B stays where it started, at zero.

    Args:
        adapters: Those whose B stays with the client.
    """

    needs: Traits = FactorStrategy.needs | {Trait.PLAIN_MEAN}

    def __init__(self, adapters: OwnBAdapters) -> None:
        super().__init__(adapters)
        self._own_b = adapters

    @property
    def peeked_names(self) -> frozenset[str]:
        """Names of every B."""
        return self._own_b.own_names

    def send(self, state: Tensors, client_id: str) -> Tensors:
        """Return every A, and the rest."""
        return {
            name: tensor for name, tensor in super().send(state, client_id).items() if name not in self.peeked_names
        }

    def check_report(self, task: FitTask, update: Update) -> None:
        """Refuse an update that holds a B: it is the client's own.

        Raises:
            UpdateError: It does.
        """
        if sent := [name for name in update.tensors if name in self.peeked_names]:
            raise UpdateError(f"client {update.client_id!r} sent {sent[0]!r}, which stays with the client")


class FedSALoRA(Algorithm):
    """Average A alone, A ← Σ p_k A_k; each client keeps its B from one of its rounds to the next.

    Personalised: a client's model is (Ā, B_k). There is no single global model; the one that is evaluated and exported
    is (Ā, mean of the last cohort's B_k by samples), which the simulation can see and a server could not: no B is
    ever sent, and a client that takes part for the first time starts with B = 0. With clients on other machines that
    model is (Ā, 0), which computes what the base model does. All clients have one rank. A task head is shared like A.

    Args:
        rank: Rank of the adapters.
        alpha: An adapter adds alpha/r·BA.
        dropout: Rate of the dropout before A, in training.
        options: See `LoRA`.

    Source: FedSA-LoRA (arXiv 2410.01463) (C); the model evaluated as the global one is ours (R).
    """

    def __init__(self, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, **options: Any) -> None:
        adapters = OwnBAdapters(rank, alpha, dropout, **options)
        super().__init__(adapters, SharedAStrategy(adapters))


def _own(model: PreTrainedModel, name: str, kept: Mapping[str, Tensor]) -> Tensor:
    return kept[name] if name in kept else torch.zeros_like(model.get_parameter(name), requires_grad=False)
