"""FedProx: clients stay near the global model."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedbe.data import Batch
from fedbe.errors import Problem
from fedbe.messages import ClientTask
from fedbe.modeling.tensors import copy_tensors
from fedbe.objectives.base import KEY, LocalObjective, Objective


class FedProx(Objective):
    """The model's loss + (μ/2)‖w − w_g‖², over the trained parameters w and their values w_g as received.

    Args:
        mu: μ, at least 0.

    Source: arXiv 1812.06127, equation 2; the norm is squared.
    """

    needs_global_model = True

    def __init__(self, mu: float = 0.01) -> None:
        self.mu = mu

    def check(self, optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]) -> list[Problem]:
        """Return a problem when μ is negative."""
        return [] if self.mu >= 0 else [Problem(f"{KEY}.init_args.mu", self.mu, "give 0 or more")]

    def local(self, model: nn.Module, task: ClientTask) -> LocalObjective:
        """Return the objective around the values that the parameters have now."""
        return _Proximal(self.mu, model, copy_tensors(model, task.trainable_names))


class _Proximal(LocalObjective):
    def __init__(self, mu: float, model: nn.Module, start: Mapping[str, Tensor]) -> None:
        self.mu = mu
        self.pairs = [(model.get_parameter(name), tensor) for name, tensor in start.items()]

    def loss(self, loss: Tensor, batch: Batch) -> Tensor:
        squares = [(parameter - start).float().square().sum() for parameter, start in self.pairs]
        return loss + self.mu / 2 * torch.stack(squares).sum()
