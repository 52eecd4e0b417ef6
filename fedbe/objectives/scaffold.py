"""SCAFFOLD: control variates against client drift."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD

from fedbe.errors import Facts, Problem, UpdateError
from fedbe.messages import FitTask, Update
from fedbe.modeling.tensors import copy_tensors, parameters_of
from fedbe.objectives.base import LocalObjective, Objective
from fedbe.traits import Trait, Traits


class Scaffold(Objective):
    """Control variates against client drift, for plain SGD.

    A step is y ← y − η(g − c_k + c); after it c_k⁺ = c_k − c + (x − y)/Ση over the steps, which is Sη at a constant
    rate; the server adds Σ(c_k⁺ − c_k)/N over all N clients of the run. g is the gradient after clipping, so that the
    correction itself is never clipped. Per tensor: a client exchanges the control variates of what it trains.

    The server's c travels down and c_k⁺ − c_k up, which doubles the traffic; a client keeps its c_k (float32).

    Source: arXiv 1910.06378, algorithm 1, option II; its server step of 1 is the server optimizer `Mean`, whose mean
    is weighted by samples. The sum of rates in place of Sη is ours.
    """

    needs: Traits = Objective.needs | {Trait.GLOBAL_MODEL, Trait.LASTING_TENSORS, Trait.SERVER_SEES_REPORTS}

    def __init__(self) -> None:
        self.clients = 0
        self.control: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem unless the clients' optimizer is SGD without momentum or weight decay."""
        if facts.optimizer is None:
            return []
        place = "client.optimizer"
        try:
            built = facts.optimizer([nn.Parameter(torch.zeros(1))])
        except (TypeError, ValueError) as error:
            return [Problem(place, facts.optimizer, f"cannot be built: {error}")]
        settings = built.defaults
        if isinstance(built, SGD) and not settings["momentum"] and not settings["weight_decay"]:
            return []
        remedy = "SCAFFOLD's rule holds for plain SGD only: give torch.optim.SGD without momentum and weight decay"
        return [Problem(place, f"{type(built).__module__.split('.')[0]}.{type(built).__name__}", remedy)]

    def setup(self, state: Mapping[str, Tensor], clients: int) -> None:
        """Start with c = 0."""
        self.clients = clients
        self.control = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in state.items()}

    def send(self, trainable_names: Iterable[str]) -> Mapping[str, Tensor]:
        """Return c of these parameters."""
        return {name: self.control[name] for name in trainable_names}

    def local(self, model: nn.Module, task: FitTask, kept: Mapping[str, Tensor]) -> LocalObjective:
        """Return the client's run with its c_k, which is 0 the first time."""
        server = task.extra
        own = {name: kept[name] if name in kept else torch.zeros_like(c) for name, c in server.items()}
        return _Controlled(model, server, own, kept)

    def check_update(self, update: Update) -> None:
        """Refuse a change of a control variate that is not finite, of another shape, or of no tensor of this run.

        Raises:
            UpdateError: There is one.
        """
        for name, change in update.extra.items():
            known = self.control.get(name)
            if known is None or known.shape != change.shape or not torch.isfinite(change).all():
                raise UpdateError(
                    f"client {update.client_id!r} sent a control variate for {name!r} that is not finite "
                    "or of no trained tensor of this run: lower the learning rate or clip gradients"
                )

    def receive(self, update: Update) -> None:
        """Add c_k⁺ − c_k to this round's sum."""
        for name, change in update.extra.items():
            self._pending[name] = self._pending[name] + change if name in self._pending else change

    def step(self) -> None:
        """Move c by the round's sum over the number of all clients."""
        for name, total in self._pending.items():
            self.control[name] = self.control[name] + total / self.clients
        self._pending = {}

    def rename(self, renamed: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
        """Keep c under the new names, and start with 0 for new parameters."""
        known = {renamed.get(name, name): control for name, control in self.control.items()}
        self.control = {
            name: known.get(name, torch.zeros_like(tensor, dtype=torch.float32)) for name, tensor in state.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return c by parameter name."""
        return dict(self.control)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`."""
        self.control = dict(state)


class _Controlled(LocalObjective):
    def __init__(
        self, model: nn.Module, server: Mapping[str, Tensor], own: Mapping[str, Tensor], kept: Mapping[str, Tensor]
    ) -> None:
        self.parameters = parameters_of(model, server)
        self.start = copy_tensors(model, server)
        self.server, self.own, self.kept = server, own, kept
        # c − c_k as one tensor: where both are equal the gradient stays what it is, to the bit.
        self.corrections = {name: server[name] - own[name] for name in server}
        self.rates = 0.0

    def correct_gradients(self, learning_rate: float) -> None:
        self.rates += learning_rate
        for name, parameter in self.parameters.items():
            correction = self.corrections[name].to(parameter.dtype)
            parameter.grad = correction.clone() if parameter.grad is None else parameter.grad.add_(correction)

    def finish(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        if not self.rates:
            return {}, self.kept
        sent, kept = {}, dict(self.kept)
        for name, parameter in self.parameters.items():
            mean_step = (self.start[name] - parameter.detach()).float() / self.rates
            kept[name] = self.own[name] - self.server[name] + mean_step
            sent[name] = kept[name] - self.own[name]
        return sent, kept
