"""LoRA methods whose server changes the base weights, and how clients learn of the change."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedbe.adaptation.lora_layers import Adapter
from fedbe.algorithms.lora.base import Contribution, JointLoRA
from fedbe.data import Batch
from fedbe.messages import ClientTask
from fedbe.modeling.tensors import copy_tensors, load_tensors

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Change:
    """How a changed weight came about: `weight` is the base plus left @ right, exactly as computed here."""

    weight: Tensor
    left: Tensor
    right: Tensor


class MergingLoRA(JointLoRA):
    """A method that adds an exact low-rank change to the base weights in each round.

    The changed weights are part of the global state, under their own names; the base weights they started from stay in
    `base`. A client is taken to hold the base alone: it downloads the whole change since then, as factors while they
    are smaller than the weight itself, else as the changed weight, and rebuilds the server's weight to the bit.

    Source: ours, after the stacked download of FLoRA (arXiv 2409.05976) and the residual of FedEx-LoRA (2410.09432).
    """

    changes_base: ClassVar[bool] = True
    base: dict[str, Tensor]

    @abstractmethod
    def change(self, adapter: Adapter, contributions: Sequence[Contribution]) -> Factors:
        """Return left [out, q] and right [q, in], in float32, whose product is added to the layer's weight."""

    @abstractmethod
    def next_factors(self, state: Mapping[str, Tensor], contributions: Sequence[Contribution]) -> dict[str, Tensor]:
        """Return A and B of every layer for the next round."""

    def prepare(self, model: PreTrainedModel, inputs: Batch) -> None:
        """Put in adapters and keep the base weights that will be changed."""
        super().prepare(model, inputs)
        self.base = copy_tensors(model, [adapter.weight for adapter in self.adapters])
        self._changes: dict[str, _Change] = {}

    @property
    def state_names(self) -> tuple[str, ...]:
        """Exact names of what trains, and of the base weights that the server changes."""
        return (*self.trainable_names, *(adapter.weight for adapter in self.adapters))

    def send(self, state: Mapping[str, Tensor], client_id: str) -> Mapping[str, Tensor]:
        """Return what trains, and the change of the base since the start."""
        changes = [self._sent_change(adapter.weight, state[adapter.weight]) for adapter in self.adapters]
        sent = dict(super().send(state, client_id))
        for change in changes:
            sent |= change
        return sent

    def begin(self, model: PreTrainedModel, task: ClientTask) -> None:
        """Rebuild the changed base weights and load the rest."""
        own = {name: tensor for name, tensor in task.received.items() if name in self.trainable_names}
        super().begin(model, replace(task, received=own))
        load_tensors(model, {adapter.weight: self._rebuilt(adapter, task.received) for adapter in self.adapters})

    def combine(self, state: Mapping[str, Tensor], contributions: Sequence[Contribution]) -> dict[str, Tensor]:
        """Return the next factors, and the base weights with the round's change added."""
        weights = {
            adapter.weight: self._changed(adapter, state[adapter.weight], self.change(adapter, contributions))
            for adapter in self.adapters
        }
        return self.next_factors(state, contributions) | weights

    def _changed(self, adapter: Adapter, weight: Tensor, factors: Factors) -> Tensor:
        name, base = adapter.weight, self.base[adapter.weight]
        left, right = (factor.to(base.device, base.dtype) for factor in factors)
        if left.shape[1] == 0:
            return weight
        # Where the history in factors is known, the weight is computed from it, as the clients will do.
        known = self._changes.pop(name, None)
        if known is not None and known.weight is weight:
            left, right = torch.cat([known.left, left], dim=1), torch.cat([known.right, right], dim=0)
            weight = base
        is_whole = weight is base or torch.equal(weight, base)
        new = _plus(weight, left, right, adapter)
        if is_whole and left.numel() + right.numel() < base.numel():
            self._changes[name] = _Change(new, left, right)
        return new

    def _sent_change(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        known = self._changes.get(name)
        if known is not None and known.weight is weight:
            return {f"{name}.left": known.left, f"{name}.right": known.right}
        return {} if torch.equal(weight, self.base[name]) else {name: weight}

    def _rebuilt(self, adapter: Adapter, received: Mapping[str, Tensor]) -> Tensor:
        name = adapter.weight
        if f"{name}.left" in received:
            return _plus(self.base[name], received[f"{name}.left"], received[f"{name}.right"], adapter)
        return received.get(name, self.base[name])


def _plus(weight: Tensor, left: Tensor, right: Tensor, adapter: Adapter) -> Tensor:
    change = adapter.oriented(left.float() @ right.float())
    return (weight.float() + change).to(weight.dtype)
