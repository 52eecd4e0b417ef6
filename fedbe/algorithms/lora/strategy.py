"""The server's side of LoRA methods: what is sent at a client's rank, and rounds over the factors of all clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbe.adaptation.adapters import Adapters
from fedbe.adaptation.base import Tensors
from fedbe.aggregation import Aggregator, HolderMean, check_update
from fedbe.algorithms.base import Strategy
from fedbe.errors import Facts, Problem, UpdateError
from fedbe.messages import Update
from fedbe.traits import Trait, Traits


class FactorStrategy(Strategy):
    """Send each client the factors at its rank, and all else whole; A and B are averaged by themselves.

    The adapters may be one part of several that are trained: what is not theirs, such as a gate or a task head, is sent
    and averaged by samples in every LoRA method.

    Args:
        adapters: The adapters that the method is about.
    """

    needs: Traits = frozenset({Trait.EQUAL_SHAPES})

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self.adaptation = adapters

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem where ranks per client are given and factors of one shape are needed."""
        if Trait.EQUAL_SHAPES not in self.needs - self.adapters.offers:
            return []
        remedy = "the factors are averaged, which needs equal shapes: give one `rank`, or use FLoRA"
        return [Problem(f"{key}.ranks", self.adapters.ranks, remedy)]

    def rank_of(self, client_id: str) -> int:
        """Return the rank at which a client is sent factors."""
        return self.adapters.rank_of(client_id)

    @property
    def other_names(self) -> tuple[str, ...]:
        """Exact names of the global tensors that are no factors and no adapted weights: a task head, a gate."""
        own = {*self.adapters.factor_names, *self.adapters.weight_names}
        return tuple(name for name in self.adaptation.state_names if name not in own)

    def others(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return those of the tensors that are named in `other_names`."""
        return {name: tensors[name] for name in self.other_names if name in tensors}

    def send(self, state: Tensors, client_id: str) -> Tensors:
        """Return the factors cut to the client's rank, and the rest."""
        factors = {name: state[name] for name in self.adapters.factor_names if name in state}
        return self.adapters.cut(factors, self.rank_of(client_id)) | self.others(state)


@dataclass(frozen=True)
class Contribution:
    """One client's part in a round.

    Attributes:
        update: What it sent.
        rank: Its rank.
        share: p_k, its part of the round's samples; the parts sum to 1.
    """

    update: Update
    rank: int
    share: float


class JointStrategy(FactorStrategy, ABC):
    """A server that needs the factors of all clients of a round at once."""

    needs: Traits = frozenset({Trait.PLAIN_MEAN})

    def ranks_from(self, client_id: str) -> tuple[int, ...]:
        """Return the ranks that a client's factors may have when they come back; by default as they were sent."""
        return (self.rank_of(client_id),)

    def aggregator(self, state: Tensors) -> Aggregator:
        """Return an aggregator that keeps the round's factors, and averages the rest by samples."""
        return FactorRound(self, state)

    @abstractmethod
    def combine(self, state: Tensors, contributions: Sequence[Contribution]) -> dict[str, Tensor]:
        """Return the tensors of the next state that the factors decide; the others keep what they are."""


class FactorRound:
    """Collects the factors of a round, of any ranks, and takes the sample-weighted mean of all else.

    Args:
        strategy: What the factors mean.
        state: The global tensors at the start of the round.
    """

    def __init__(self, strategy: JointStrategy, state: Mapping[str, Tensor]) -> None:
        self._strategy, self._state = strategy, state
        self._names = frozenset(strategy.adapters.factor_names)
        self._rest = HolderMean(strategy.others(state))
        self._updates: list[Update] = []

    def check(self, update: Update) -> None:
        """Refuse an update whose factors are not one whole set of a rank that the client may have.

        An update without any tensor passes, and changes nothing.

        Raises:
            UpdateError: A factor is missing or of another rank, or see `check_update`.
        """
        if not update.tensors:
            return
        adapters, who = self._strategy.adapters, f"client {update.client_id!r}"
        if missing := [name for name in adapters.factor_names if name not in update.tensors]:
            raise UpdateError(f"{who} did not send {missing[0]!r}, which its other factors are of no use without")
        name = adapters.adapters[0].a
        sent, known = update.tensors[name], self._strategy.ranks_from(update.client_id)
        rank = len(sent) if sent.ndim else 0
        if rank not in known:
            expected = " or ".join(map(str, known))
            raise UpdateError(f"{who} sent {name!r} of rank {rank}, expected {expected}")
        factors = {name: self._state[name] for name in adapters.factor_names}
        check_update(update, adapters.cut(factors, rank) | self._strategy.others(self._state))

    def add(self, update: Update) -> None:
        """Take in one update that `check` has let pass."""
        if not update.tensors:
            return
        rest = {name: tensor for name, tensor in update.tensors.items() if name not in self._names}
        self._rest.add(replace(update, tensors=rest))
        self._updates.append(update)

    def result(self) -> dict[str, Tensor]:
        """Return the next global tensors."""
        if not self._updates:
            return dict(self._state)
        total = sum(update.samples for update in self._updates)
        first = self._strategy.adapters.adapters[0].a
        contributions = [Contribution(u, len(u.tensors[first]), u.samples / total) for u in self._updates]
        with torch.no_grad():
            return dict(self._state) | self._rest.result() | self._strategy.combine(self._state, contributions)


def factor_mean(contributions: Sequence[Contribution], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the sample-weighted means of tensors that all contributions hold in one shape."""
    mean = HolderMean({name: contributions[0].update.tensors[name] for name in names})
    for part in contributions:
        mean.add(replace(part.update, tensors={name: part.update.tensors[name] for name in names}))
    return mean.result()
