"""FedProx: clients stay near the global model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedbe.data import Batch
from fedbe.errors import Facts, Problem
from fedbe.messages import FitTask
from fedbe.modeling.tensors import copy_tensors, parameters_of
from fedbe.objectives.base import LocalObjective, Objective
from fedbe.traits import Trait, Traits


class FedProx(Objective):
    """The model's loss + (μ/2)‖w − w_g‖², over the trained parameters w and their values w_g as received.

    Args:
        mu: μ, at least 0.

    Source: arXiv 1812.06127, equation 2; the norm is squared.
    """

    needs: Traits = Objective.needs | {Trait.GLOBAL_MODEL}

    def __init__(self, mu: float = 0.01) -> None:
        self.mu = mu

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem when μ is negative."""
        return [] if self.mu >= 0 else [Problem(f"{key}.mu", self.mu, "give 0 or more")]

    def local(self, model: nn.Module, task: FitTask, kept: Mapping[str, Tensor]) -> LocalObjective:
        """Return the objective around the values that the parameters have now."""
        return _Proximal(self.mu, model, copy_tensors(model, task.trainable_names))


class _Proximal(LocalObjective):
    def __init__(self, mu: float, model: nn.Module, start: Mapping[str, Tensor]) -> None:
        self.mu = mu
        self.pairs = [(parameter, start[name]) for name, parameter in parameters_of(model, start).items()]

    def loss(self, loss: Tensor, batch: Batch) -> Tensor:
        squares = [(parameter - start).float().square().sum() for parameter, start in self.pairs]
        return loss + self.mu / 2 * torch.stack(squares).sum()
