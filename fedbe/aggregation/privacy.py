"""Client-level differential privacy: what one client changes is bounded, and noise hides whether it was there."""

from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

from fedbe.aggregation.averaging import Averaging, clip_update
from fedbe.aggregation.base import Aggregator, check_update
from fedbe.errors import Facts, Problem
from fedbe.messages import Update
from fedbe.seeding import generator
from fedbe.traits import ALL, Trait


class PrivateMean(Averaging):
    """Clip each client's change to a bound, add them up, add Gaussian noise, and divide by the size of a cohort.

    All clients count alike, and the divisor is the same for every tensor, however many trained it: who trained what
    would tell something. Each round notes ``epsilon`` at the given ``delta``: the cohort is a fixed number of clients
    drawn without replacement, and neighbouring data sets differ in the data of one client. It covers the tensors,
    and not what clients report besides (probes, gradient norms, losses); such allocations are refused. The noise comes
    from the run's seed, so that a run can be repeated: who knows the seed can take it off again.

    Args:
        bound: Longest change of a client's tensors, as one vector, by the Euclidean norm.
        noise_multiplier: Standard deviation of the noise ÷ `bound`.
        delta: Probability with which more may be given away; below 1 ÷ number of clients.

    Source: DP-FedAvg (arXiv 1710.06963); the accountant of `dp_accounting`, Rényi, sampling without replacement.
    """

    offers = ALL - {Trait.PLAIN_MEAN, Trait.SERVER_SEES_REPORTS}

    def __init__(self, bound: float, noise_multiplier: float = 1.0, delta: float = 1e-5) -> None:
        self.bound = bound
        self.noise_multiplier = noise_multiplier
        self.delta = delta

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for each number out of range, and for a missing library."""
        positive = {"bound": self.bound, "noise_multiplier": self.noise_multiplier}
        problems = [Problem(f"{key}.{name}", v, "give a number above 0") for name, v in positive.items() if not v > 0]
        if not 0 < self.delta < 1:
            problems.append(Problem(f"{key}.delta", self.delta, "give a probability, such as 1e-5"))
        if find_spec("dp_accounting") is None:
            whole = key.removesuffix(".init_args")
            problems.append(Problem(whole, "dp_accounting", "is not installed: pip install 'fedbe[privacy]'"))
        return problems

    def setup(self, clients: int, cohort: int, seed: int) -> None:
        """Note of how many clients how many take part in a round."""
        self._clients, self._cohort, self._seed = clients, cohort, seed

    def begin(self, state: Mapping[str, Tensor], round_index: int) -> Aggregator:
        """Return the aggregator of one round, with its own noise."""
        deviation = self.bound * self.noise_multiplier
        return _NoisySum(state, self.bound, deviation, self._cohort, (self._seed, "privacy noise", round_index))

    def figures(self, rounds: int) -> dict[str, float]:
        """Return ε after so many rounds, and δ."""
        return {"epsilon": self.epsilon(rounds), "delta": self.delta}

    def epsilon(self, rounds: int) -> float:
        """Return ε after so many rounds.

        Exchanging a client's data moves a sum of clipped changes by up to twice the bound.
        """
        from dp_accounting import (  # here: an extra
            GaussianDpEvent,
            NeighboringRelation,
            SampledWithoutReplacementDpEvent,
        )
        from dp_accounting.rdp import RdpAccountant

        accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
        noise = GaussianDpEvent(self.noise_multiplier / 2)
        event = SampledWithoutReplacementDpEvent(self._clients, self._cohort, noise)
        accountant.compose(noise if self._cohort == self._clients else event, rounds)
        return float(accountant.get_epsilon(self.delta))


class _NoisySum:
    """The sum of clipped changes with noise, a generator of its own for each tensor: whatever order they stand in."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        bound: float,
        deviation: float,
        cohort: int,
        noise: tuple[int, str, int],
    ) -> None:
        self._state, self._bound, self._deviation, self._cohort, self._noise = state, bound, deviation, cohort, noise
        self._sum: dict[str, Tensor] = {}

    def check(self, update: Update) -> None:
        check_update(update, self._state)

    def add(self, update: Update) -> None:
        for name, tensor in clip_update(update, self._state, self._bound).tensors.items():
            change = tensor.float() - self._state[name].float()
            self._sum[name] = self._sum[name] + change if name in self._sum else change

    def result(self) -> dict[str, Tensor]:
        new = {}
        for name, before in self._state.items():
            chance = generator(*self._noise, name)
            noise = self._deviation * torch.randn(before.shape, generator=chance)
            change = self._sum.get(name, 0) + noise.to(before.device)
            new[name] = (before.float() + change / self._cohort).to(before.dtype)
        return new
