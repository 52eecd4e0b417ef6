"""Local objectives: what clients minimise, what that takes besides the model's tensors, and what the server adds."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from fedbe.errors import Problem, UpdateError
from fedbe.update import Update, copy_tensors

KEY = "client.objective"


class LocalObjective:
    """The objective during one client's run: it acts on the loss, on the gradients, and when the run ends."""

    def loss(self, loss: Tensor) -> Tensor:
        """Return what is minimised, from the model's own loss on a batch."""
        return loss

    def correct_gradients(self, learning_rate: float) -> None:
        """Change the gradients in place, after clipping and before an optimizer step at this rate."""

    def finish(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return what the client sends besides its tensors, and what it keeps for the next time."""
        return {}, {}


class Objective:
    """Base class: an objective over all rounds, on the server's side; the default is the model's own loss.

    Subclass it in a file of your own and name it by ``class_path`` under ``client.objective``.

    Attributes:
        needs_global_model: Whether it makes no sense where clients do not share one global model.
        needs_lasting_tensors: Whether it makes no sense where the trained tensors start anew in each round.
    """

    needs_global_model = False
    needs_lasting_tensors = False

    def check(self, optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]) -> list[Problem]:
        """Return the mistakes in this configuration, given the clients' optimizer; found before work starts."""
        return []

    def setup(self, state: Mapping[str, Tensor], clients: int) -> None:
        """Start on the server, once, before round 1.

        Args:
            state: The global tensors that clients train, by exact parameter name.
            clients: Number of clients of the run, in whatever cohort.
        """

    def send(self, trainable_names: Iterable[str]) -> Mapping[str, Tensor]:
        """Return what a client that trains these parameters downloads besides."""
        return {}

    def local(
        self,
        model: nn.Module,
        trainable_names: Iterable[str],
        received: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
    ) -> LocalObjective:
        """Return the objective of one client's run; called where the client is, before its first step.

        Args:
            model: The resident model with the client's tensors in it.
            trainable_names: Exact names of the parameters it trains.
            received: What `send` returned.
            kept: What its last run's `LocalObjective.finish` kept; empty at first.
        """
        return LocalObjective()

    def receive(self, update: Update) -> None:
        """Take in what a client sent besides (`Update.extra`); called in the order of the cohort."""

    def step(self) -> None:
        """End a round on the server; until then `send` returns what it returned when the round began."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the server's tensors that it takes to continue a run."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`; called after `setup`."""


class Plain(Objective):
    """The model's own loss, and nothing else."""


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

    def local(
        self,
        model: nn.Module,
        trainable_names: Iterable[str],
        received: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
    ) -> LocalObjective:
        """Return the objective around the values that the parameters have now."""
        return _Proximal(self.mu, model, copy_tensors(model, trainable_names))


class _Proximal(LocalObjective):
    def __init__(self, mu: float, model: nn.Module, start: Mapping[str, Tensor]) -> None:
        self.mu = mu
        self.pairs = [(model.get_parameter(name), tensor) for name, tensor in start.items()]

    def loss(self, loss: Tensor) -> Tensor:
        squares = [(parameter - start).float().square().sum() for parameter, start in self.pairs]
        return loss + self.mu / 2 * torch.stack(squares).sum()


class Scaffold(Objective):
    """Control variates against client drift, for plain SGD.

    A step is y ← y − η(g − c_k + c); after it c_k⁺ = c_k − c + (x − y)/Ση over the steps, which is Sη at a constant
    rate; the server adds Σ(c_k⁺ − c_k)/N over all N clients of the run. g is the gradient after clipping, so that the
    correction itself is never clipped. Per tensor: a client exchanges the control variates of what it trains.

    The server's c travels down and c_k⁺ − c_k up, which doubles the traffic; a client keeps its c_k (float32).

    Source: arXiv 1910.06378, algorithm 1, option II; its server step of 1 is the server optimizer `Mean`, whose mean
    is weighted by samples. The sum of rates in place of Sη is ours.
    """

    needs_global_model = True
    needs_lasting_tensors = True

    def __init__(self) -> None:
        self.clients = 0
        self.control: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    def check(self, optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]) -> list[Problem]:
        """Return a problem unless the clients' optimizer is SGD without momentum or weight decay."""
        key = "client.optimizer"
        try:
            built = optimizer([nn.Parameter(torch.zeros(1))])
        except (TypeError, ValueError) as error:
            return [Problem(key, optimizer, f"cannot be built: {error}")]
        settings = built.defaults
        if isinstance(built, SGD) and not settings["momentum"] and not settings["weight_decay"]:
            return []
        remedy = "SCAFFOLD's rule holds for plain SGD only: give torch.optim.SGD without momentum and weight decay"
        return [Problem(key, f"{type(built).__module__.split('.')[0]}.{type(built).__name__}", remedy)]

    def setup(self, state: Mapping[str, Tensor], clients: int) -> None:
        """Start with c = 0."""
        self.clients = clients
        self.control = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in state.items()}

    def send(self, trainable_names: Iterable[str]) -> Mapping[str, Tensor]:
        """Return c of these parameters."""
        return {name: self.control[name] for name in trainable_names}

    def local(
        self,
        model: nn.Module,
        trainable_names: Iterable[str],
        received: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
    ) -> LocalObjective:
        """Return the client's run with its c_k, which is 0 the first time."""
        own = {name: kept[name] if name in kept else torch.zeros_like(c) for name, c in received.items()}
        return _Controlled(model, received, own, kept)

    def receive(self, update: Update) -> None:
        """Add c_k⁺ − c_k to this round's sum.

        Raises:
            UpdateError: A control variate is not finite, or of no tensor of this run.
        """
        for name, change in update.extra.items():
            if name not in self.control or not torch.isfinite(change).all():
                raise UpdateError(
                    f"client {update.client_id!r} sent a control variate for {name!r} that is not finite "
                    "or of no trained tensor of this run: lower the learning rate or clip gradients"
                )
            self._pending[name] = self._pending[name] + change if name in self._pending else change

    def step(self) -> None:
        """Move c by the round's sum over the number of all clients."""
        for name, total in self._pending.items():
            self.control[name] = self.control[name] + total / self.clients
        self._pending = {}

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
        self.parameters = {name: model.get_parameter(name) for name in server}
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
