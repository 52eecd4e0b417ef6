"""Client-level differential privacy: what one client changes is bounded, and noise hides whether it was there."""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fedbe.aggregation.averaging import Averaging, clipped_changes
from fedbe.aggregation.base import Aggregator, check_update
from fedbe.errors import Facts, Problem
from fedbe.messages import Update
from fedbe.seeding import generator
from fedbe.traits import ALL, Trait


class PrivateMean(Averaging):
    """Clip each client's change to a bound, add them up, add Gaussian noise, and divide by the size of a cohort.

    All clients count alike, and the divisor is the same for every tensor, however many trained it: who trained what
    would tell something. Each round notes ``epsilon`` at the given ``delta``: clients are drawn without replacement,
    and neighbouring data sets differ in the data of one client. A round counts by the probability with which a client
    that was there was asked, replacements for failed ones included. ε covers the tensors, and not what clients report
    besides (probes, gradient norms, losses); such allocations are refused. Whoever knows who took part in which round,
    from the seed or from `metrics.jsonl`, is not covered by the drawing: for them count as if every client were in each
    cohort.

    The noise comes from the operating system, so that a run repeated or continued within a round has other noise.

    Args:
        bound: Longest change of a client's tensors, as one vector, by the Euclidean norm.
        noise_multiplier: Standard deviation of the noise ÷ `bound`.
        delta: Probability with which more may be given away; below 1 ÷ number of clients.
        reproducible: Take the noise from the run's seed, for tests: a run can be repeated to the bit, and nobody is
            protected from whoever knows the seed, which stands in `config.yaml`.

    Source: DP-FedAvg (arXiv 1710.06963); the accountant of `dp_accounting`, Rényi, sampling without replacement.
    """

    offers = ALL - {Trait.PLAIN_MEAN, Trait.SERVER_SEES_REPORTS}

    def __init__(
        self, bound: float, noise_multiplier: float = 1.0, delta: float = 1e-5, reproducible: bool = False
    ) -> None:
        self.bound = bound
        self.noise_multiplier = noise_multiplier
        self.delta = delta
        self.reproducible = reproducible
        self._rounds: Counter[tuple[int, int]] = Counter()

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for each number out of range, and for a missing library."""
        positive = {"bound": self.bound, "noise_multiplier": self.noise_multiplier}
        bad = {name: value for name, value in positive.items() if not 0 < value < math.inf}
        problems = [Problem(f"{key}.{name}", value, "give a number above 0") for name, value in bad.items()]
        if not 0 < self.delta < 1:
            problems.append(Problem(f"{key}.delta", self.delta, "give a probability, such as 1e-5"))
        if find_spec("dp_accounting") is None:
            whole = key.removesuffix(".init_args")
            problems.append(Problem(whole, "dp_accounting", "is not installed: pip install 'fedbe[privacy]'"))
        return problems

    def setup(self, clients: int, cohort: int, seed: int) -> None:
        """Note of how many clients how many take part in a round."""
        self._clients, self._cohort, self._seed = clients, cohort, seed
        self._rounds.clear()

    def begin(self, state: Mapping[str, Tensor], round_index: int) -> Aggregator:
        """Return the aggregator of one round, with its own noise."""
        seed = self._seed

        def seeded(name: str, shape: torch.Size) -> Tensor:
            return torch.randn(shape, generator=generator(seed, "privacy noise", round_index, name))

        noise = seeded if self.reproducible else lambda name, shape: system_noise(shape)
        return _NoisySum(state, self.bound, self.bound * self.noise_multiplier, self._cohort, noise)

    def asked(self, clients: int, present: int) -> None:
        """Count a round by the number of clients asked and the number that were there to be asked."""
        self._rounds[(clients, max(clients, present))] += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the rounds so far: clients asked, clients there, and how many such rounds there were."""
        return {"rounds": [[*key, count] for key, count in sorted(self._rounds.items())]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._rounds = Counter({(asked, present): count for asked, present, count in state.get("rounds", [])})

    def figures(self, rounds: int) -> dict[str, float]:
        """Return ε after this number of rounds, and δ; rounds not told of count as a cohort out of all clients."""
        told = Counter(self._rounds)
        told[(self._cohort, self._clients)] += max(0, rounds - told.total())
        return {"epsilon": epsilon(self.noise_multiplier, told, self.delta), "delta": self.delta}


def epsilon(noise_multiplier: float, rounds: Mapping[tuple[int, int], int], delta: float) -> float:
    """Return ε of noisy sums of clipped changes.

    Exchanging a client's data moves such a sum by up to twice the bound.

    Args:
        noise_multiplier: Standard deviation of the noise ÷ bound.
        rounds: (clients asked, clients that were there) → number of such rounds.
        delta: δ.
    """
    from dp_accounting import (  # here: an extra
        GaussianDpEvent,
        NeighboringRelation,
        SampledWithoutReplacementDpEvent,
    )
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    noise = GaussianDpEvent(noise_multiplier / 2)
    for (asked, present), count in rounds.items():
        event = noise if asked >= present else SampledWithoutReplacementDpEvent(present, asked, noise)
        if count:
            accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def system_noise(shape: torch.Size) -> Tensor:
    """Return standard normal noise from the operating system's random numbers: float32, of this shape. Source: ours."""
    count = shape.numel()
    bits = torch.frombuffer(bytearray(os.urandom(8 * count) or b"\0" * 8), dtype=torch.int64)[:count]
    uniform = ((bits & (2**52 - 1)).double() + 0.5) * 2.0**-52
    noise: Tensor = torch.special.ndtri(uniform)
    return noise.float().reshape(shape)


class _NoisySum:
    """The sum of clipped changes with noise, drawn for each tensor by itself: whatever order they stand in."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        bound: float,
        deviation: float,
        cohort: int,
        noise: Callable[[str, torch.Size], Tensor],
    ) -> None:
        self._state, self._bound, self._deviation, self._cohort, self._noise = state, bound, deviation, cohort, noise
        self._sum: dict[str, Tensor] = {}

    def check(self, update: Update) -> None:
        check_update(update, self._state)

    def add(self, update: Update) -> None:
        for name, change in clipped_changes(update, self._state, self._bound).items():
            self._sum[name] = self._sum[name] + change if name in self._sum else change

    def result(self) -> dict[str, Tensor]:
        new = {}
        for name, before in self._state.items():
            noise = self._deviation * self._noise(name, before.shape)
            change = self._sum.get(name, 0) + noise.to(before.device)
            new[name] = (before.float() + change / self._cohort).to(before.dtype)
        return new
