"""Server optimizers: how the mean of a round's updates moves the global tensors."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fedbe.errors import Facts, Problem
from fedbe.traits import Part, Trait, Traits


class ServerOptimizer(Part):
    """Base class: what a step does with the mean of the updates; the default takes the mean as it is.

    Subclass it in a file of your own and name it by ``class_path`` under ``federation.server_optimizer``.
    """

    needs: Traits = frozenset({Trait.AGGREGATION, Trait.LASTING_TENSORS})

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this configuration, found before work starts; see `Facts`."""
        return []

    def step(
        self, state: Mapping[str, Tensor], mean: Mapping[str, Tensor], trained: Collection[str]
    ) -> dict[str, Tensor]:
        """Return the next global tensors.

        Args:
            state: The global tensors at the start of the round.
            mean: What the round's aggregator gave, of the same names, shapes and types.
            trained: Names that at least one client sent; the others are taken from `mean` as they are.
        """
        return dict(mean)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that it takes to continue a run, by name."""
        return {}

    def rename(self, renamed: Mapping[str, str]) -> None:
        """Follow parameters that have new names, old → new."""
        return None

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`."""


class Mean(ServerOptimizer):
    """The mean replaces the global tensors, to the bit. Source: FedAvg (arXiv 1602.05629)."""

    needs = frozenset()


class _WithMoments(ServerOptimizer, ABC):
    """Moves each trained float tensor by its D = mean − global; moments are float32, one set for each tensor."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.moments: dict[str, dict[str, Tensor]] = {}

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for each number outside its range."""
        return _positive(key, learning_rate=self.learning_rate)

    def step(
        self, state: Mapping[str, Tensor], mean: Mapping[str, Tensor], trained: Collection[str]
    ) -> dict[str, Tensor]:
        """Return the next global tensors; one that nobody trained keeps its value and its moments."""
        new = dict(mean)
        for name in trained:
            if name in state and state[name].is_floating_point():
                old = state[name].float()
                change, self.moments[name] = self.change(mean[name].float() - old, self.moments.get(name, {}))
                new[name] = (old + change).to(state[name].dtype)
        return new

    @abstractmethod
    def change(self, difference: Tensor, moments: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return by how much a tensor moves, and its next moments.

        Args:
            difference: D of this round, float32.
            moments: The tensor's moments by name; empty at its first step.
        """

    def rename(self, renamed: Mapping[str, str]) -> None:
        """Keep each parameter's moments under its new name."""
        self.moments = {renamed.get(name, name): moments for name, moments in self.moments.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moments, named ``<moment>:<parameter>``."""
        return {f"{kind}:{name}": t for name, moments in self.moments.items() for kind, t in moments.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`."""
        self.moments = {}
        for key, tensor in state.items():
            kind, _, name = key.partition(":")
            self.moments.setdefault(name, {})[kind] = tensor


class FedAvgM(_WithMoments):
    """Server momentum: m ← βm + D, w ← w + ηm.

    m is a sum of the updates, as in SGD with momentum on −D, and not their mean, as in the adaptive rules below: D
    comes in without a factor 1 − β. The mean's form is the same rule with the rate η(1 − β). An update that stays the
    same moves the model by ηD/(1 − β) a round in the end, at the defaults ten times as far as `Mean` does.

    Args:
        momentum: β, in [0, 1).
        learning_rate: η, positive.

    Source: arXiv 1909.06335, where FedAvgM comes from: v ← βv + Δw, w ← w − v, with Δw = −D and η = 1. In arXiv
    2003.00295 it is algorithm 1 with SGD with momentum for the server's optimizer; the form with 1 − β₁ stands in its
    algorithm 2, that of the adaptive rules. Public code (Flower) has the sum too.
    """

    def __init__(self, momentum: float = 0.9, learning_rate: float = 1.0) -> None:
        super().__init__(learning_rate)
        self.momentum = momentum

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for each number outside its range."""
        return super().check(key, facts) + _below_one(key, momentum=self.momentum)

    def change(self, difference: Tensor, moments: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ηm and m."""
        m = self.momentum * moments["m"] + difference if moments else difference
        return self.learning_rate * m, {"m": m}


class FedAdagrad(_WithMoments):
    """Adaptive server step: m ← β₁m + (1 − β₁)D, v ← v + D², w ← w + ηm/(√v + τ).

    m starts at 0 and v at τ²; there is no bias correction.

    Args:
        learning_rate: η, positive.
        beta_1: Decay of m, in [0, 1).
        tau: τ, positive: how little adaptive the step is.

    Source: arXiv 2003.00295, algorithm 2.
    """

    def __init__(self, learning_rate: float = 0.01, beta_1: float = 0.0, tau: float = 1e-3) -> None:
        super().__init__(learning_rate)
        self.beta_1 = beta_1
        self.tau = tau

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for each number outside its range."""
        return [*super().check(key, facts), *_below_one(key, beta_1=self.beta_1), *_positive(key, tau=self.tau)]

    def change(self, difference: Tensor, moments: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ηm/(√v + τ), and m and v."""
        m = moments["m"] if moments else torch.zeros_like(difference)
        v = moments["v"] if moments else torch.full_like(difference, self.tau**2)
        m = self.beta_1 * m + (1 - self.beta_1) * difference
        v = self.second_moment(v, difference.square())
        return self.learning_rate * m / (v.sqrt() + self.tau), {"m": m, "v": v}

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the next v from the last and D², the square of the update itself and not of its momentum."""
        return v + square


class FedAdam(FedAdagrad):
    """Adaptive server step: m ← β₁m + (1 − β₁)D, v ← β₂v + (1 − β₂)D², w ← w + ηm/(√v + τ).

    m starts at 0 and v at τ²; there is no bias correction.

    Args:
        learning_rate: η, positive.
        beta_1: Decay of m, in [0, 1).
        beta_2: Decay of v, in [0, 1).
        tau: τ, positive: how little adaptive the step is.

    Source: arXiv 2003.00295, algorithm 2.
    """

    def __init__(
        self, learning_rate: float = 0.01, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3
    ) -> None:
        super().__init__(learning_rate, beta_1, tau)
        self.beta_2 = beta_2

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for each number outside its range."""
        return super().check(key, facts) + _below_one(key, beta_2=self.beta_2)

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the decaying mean of D²."""
        return self.beta_2 * v + (1 - self.beta_2) * square


class FedYogi(FedAdam):
    """FedAdam with v ← v − (1 − β₂)D² sign(v − D²), so that v does not forget quickly; arguments as there.

    Source: arXiv 2003.00295, algorithm 2.
    """

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return v, moved by at most (1 − β₂)D² towards D²."""
        return v - (1 - self.beta_2) * square * torch.sign(v - square)


def _positive(key: str, **values: float) -> list[Problem]:
    return [Problem(f"{key}.{name}", value, "give a number above 0") for name, value in values.items() if not value > 0]


def _below_one(key: str, **values: float) -> list[Problem]:
    remedy = "give a number from 0 to below 1"
    return [Problem(f"{key}.{name}", value, remedy) for name, value in values.items() if not 0 <= value < 1]
