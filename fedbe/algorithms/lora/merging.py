"""LoRA methods whose server changes the base weights, and how clients learn of the change."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedbe.adaptation.adapters import Adapters
from fedbe.adaptation.base import Tensors
from fedbe.adaptation.lora_layers import Adapter
from fedbe.aggregation import Aggregator
from fedbe.algorithms.lora.strategy import Contribution, JointStrategy
from fedbe.data import Batch
from fedbe.messages import FitTask, Structure
from fedbe.modeling.tensors import copy_tensors
from fedbe.traits import ALL, Trait, Traits

Factors = tuple[Tensor, Tensor]


class MergingAdapters(Adapters):
    """Adapters beside base weights that the server changes.

    The changed weights are part of the global state, under their own names; the base weights they started from stay in
    `base`. A client is taken to hold the base alone, and rebuilds the server's weights from what it receives.

    Attributes:
        base: The base weights by exact name; available after `prepare`.
    """

    offers: Traits = ALL - {Trait.UNCHANGED_BASE}
    base: Mapping[str, Tensor]

    def prepare(self, model: PreTrainedModel, inputs: Batch, structure: Structure | None = None) -> None:
        """Put in adapters and keep the base weights that will be changed."""
        super().prepare(model, inputs, structure)
        self.base = copy_tensors(model, self.weight_names)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Exact names of the trainable parameters, and of the base weights that the server changes."""
        return (*self.trainable_names, *self.weight_names)

    def begin(self, model: PreTrainedModel, task: FitTask, kept: Tensors) -> None:
        """Rebuild the changed base weights and load the rest."""
        weights = {adapter.weight: self._rebuilt(adapter, task.received) for adapter in self.adapters}
        super().begin(model, replace(task, received={**task.received, **weights}), kept)

    def _rebuilt(self, adapter: Adapter, received: Tensors) -> Tensor:
        name = adapter.weight
        if f"{name}.left" in received:
            return changed(self.base[name], received[f"{name}.left"], received[f"{name}.right"], adapter)
        return received.get(name, self.base[name])


@dataclass(frozen=True)
class _Change:
    """How a changed weight came about: `weight` is the base plus left @ right, exactly as computed here."""

    weight: Tensor
    left: Tensor
    right: Tensor


class MergingStrategy(JointStrategy):
    """A server that adds an exact low-rank change to the base weights in each round.

    A client downloads the whole change since the start of the run, as factors while they are smaller than the weight
    itself, else as the changed weight, and rebuilds the server's weight to the bit.

    The factors belong to one value of the weight. Those of the round before are kept until the next one begins, so that
    a round that is taken back finds its own; for any other value there are none, and the weight itself is sent.

    Args:
        adapters: Adapters beside weights that change.

    Source: ours, after the stacked download of FLoRA (arXiv 2409.05976) and the residual of FedEx-LoRA (2410.09432).
    """

    def __init__(self, adapters: MergingAdapters) -> None:
        super().__init__(adapters)
        self._merging = adapters
        self._changes: dict[str, list[_Change]] = {}

    @abstractmethod
    def change(self, adapter: Adapter, contributions: Sequence[Contribution]) -> Factors:
        """Return left [out, q] and right [q, in], in float32, whose product is added to the layer's weight."""

    @abstractmethod
    def next_factors(self, state: Tensors, contributions: Sequence[Contribution]) -> dict[str, Tensor]:
        """Return A and B of every layer for the next round."""

    def send(self, state: Tensors, client_id: str) -> Tensors:
        """Return the trainable parameters, and the change of the base since the start."""
        sent = dict(super().send(state, client_id))
        for name in self.adapters.weight_names:
            sent |= self._sent_change(name, state[name])
        return sent

    def aggregator(self, state: Tensors) -> Aggregator:
        """Return the round's aggregator; how other weights than those of `state` came about is forgotten."""
        known = {name: self._known(name, state[name]) for name in self.adapters.weight_names}
        self._changes = {name: [change] for name, change in known.items() if change is not None}
        return super().aggregator(state)

    def combine(self, state: Tensors, contributions: Sequence[Contribution]) -> dict[str, Tensor]:
        """Return the next factors, and the base weights with the round's change added."""
        weights = {
            adapter.weight: self._changed(adapter, state[adapter.weight], self.change(adapter, contributions))
            for adapter in self.adapters.adapters
        }
        return self.next_factors(state, contributions) | weights

    def tensors(self) -> dict[str, Tensor]:
        """Return the factors of which the changed weights are made, under ``weight/number/side``."""
        return {
            f"{name}/{number}/{side}": tensor
            for name, changes in self._changes.items()
            for number, change in enumerate(changes)
            for side, tensor in (("left", change.left), ("right", change.right))
        }

    def load_tensors(self, tensors: Tensors, state: Tensors) -> None:
        """Continue with those factors that make the weights of `state`, to the bit."""
        self._changes = {}
        for adapter in self.adapters.adapters:
            name = adapter.weight
            numbers = [key.split("/")[1] for key in tensors if key.startswith(f"{name}/") and key.endswith("/left")]
            for number in sorted(numbers):
                sides = (tensors[f"{name}/{number}/{side}"] for side in ("left", "right"))
                left, right = (side.to(self._merging.base[name].device) for side in sides)
                if _same(changed(self._merging.base[name], left, right, adapter), state[name]):
                    self._changes.setdefault(name, [_Change(state[name], left, right)])

    def _changed(self, adapter: Adapter, weight: Tensor, factors: Factors) -> Tensor:
        name, base = adapter.weight, self._merging.base[adapter.weight]
        left, right = (factor.to(base.device, base.dtype) for factor in factors)
        if left.shape[1] == 0:
            return weight
        # Where the history in factors is known, the weight is computed from it, as the clients will do.
        known = self._known(name, weight)
        if known is not None:
            left, right = torch.cat([known.left, left], dim=1), torch.cat([known.right, right], dim=0)
            weight = base
        is_whole = _same(weight, base)
        new = changed(weight, left, right, adapter)
        before = [] if known is None else [known]
        fits = is_whole and left.numel() + right.numel() < base.numel()
        self._changes[name] = [_Change(new, left, right), *before] if fits else before
        return new

    def _sent_change(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        known = self._known(name, weight)
        if known is not None:
            return {f"{name}.left": known.left, f"{name}.right": known.right}
        return {} if _same(weight, self._merging.base[name]) else {name: weight}

    def _known(self, name: str, weight: Tensor) -> _Change | None:
        changes = self._changes.get(name, [])
        # The very tensor first: a round may have changed nothing.
        ordered = sorted(changes, key=lambda change: change.weight is not weight)
        return next((change for change in ordered if _same(change.weight, weight)), None)


def changed(weight: Tensor, left: Tensor, right: Tensor, adapter: Adapter) -> Tensor:
    """Return a weight plus left [out, q] times right [q, in], computed in float32, of the weight's type and device."""
    left, right = (factor.to(weight.device).float() for factor in (left, right))
    return (weight.float() + adapter.oriented(left @ right)).to(weight.dtype)


def _same(first: Tensor, second: Tensor) -> bool:
    return first is second or torch.equal(first, second.to(first.device))
