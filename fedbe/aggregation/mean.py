"""The sample-weighted mean over the clients that trained a tensor, one update in memory at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedbe.aggregation.base import check_update
from fedbe.messages import Update


class HolderMean:
    """Streaming mean of updates, per tensor over its holders, weighted by samples, in float32.

    θ_j ← Σ_{k∈H_j} n_k θ_jk / Σ_{k∈H_j} n_k over the holders H_j of tensor j; a tensor without holders keeps its value.
    The mean is updated in place, m += (n/N)(θ − m), so that one client's update and equal updates come out to the bit.

    Args:
        state: The global tensors at the start of the round, by exact name.

    Source: FedAvg (arXiv 1602.05629) restricted to holders; the restriction is our reading of FedBE.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self._mean: dict[str, Tensor] = {}
        self._weight: dict[str, int] = {}

    def check(self, update: Update) -> None:
        """Refuse an update that must not enter the mean.

        Raises:
            UpdateError: See `check_update`.
        """
        check_update(update, self._state)

    def add(self, update: Update) -> None:
        """Take in one update that was checked, in the order of the cohort: floating-point sums depend on order."""
        for name, tensor in update.tensors.items():
            weight = self._weight[name] = self._weight.get(name, 0) + update.samples
            if name in self._mean:
                self._mean[name].lerp_(tensor.detach().float(), update.samples / weight)
            else:
                self._mean[name] = tensor.detach().to(torch.float32, copy=True)

    def result(self) -> dict[str, Tensor]:
        """Return the next global tensors, of the same names, shapes and types as the state."""
        return {
            name: self._mean[name].to(tensor.dtype) if name in self._mean else tensor
            for name, tensor in self._state.items()
        }
