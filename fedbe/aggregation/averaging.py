"""How the tensors of several clients become one: the sample-weighted mean, or what withstands wrong clients."""

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedbe.aggregation.base import Aggregator, check_update
from fedbe.aggregation.mean import HolderMean
from fedbe.errors import Facts, Problem
from fedbe.messages import Update
from fedbe.traits import ALL, Part, Trait, Traits


class Averaging(Part):
    """Base class: how a round's updates are averaged, per tensor over its holders; by default weighted by samples.

    Subclass it in a file of your own and name it by ``class_path`` under ``federation.averaging``. Algorithms with a
    rule of their own for what clients send, such as FLoRA, take `SampleWeighted` only.
    """

    needs: Traits = frozenset({Trait.AGGREGATION})
    offers: Traits = ALL - {Trait.PLAIN_MEAN}

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this configuration, found before work starts; see `Facts`."""
        return []

    def setup(self, clients: int, cohort: int, seed: int) -> None:
        """Learn the number of clients, how many of them make a cohort, and the run's seed; once, before round 1."""

    def begin(self, state: Mapping[str, Tensor], round_index: int) -> Aggregator:
        """Return the aggregator of one round, starting from the global tensors `state`."""
        return HolderMean(state)

    def asked(self, clients: int, present: int) -> None:
        """Learn how many clients a round has asked, replacements included, and how many were there to be asked."""

    def figures(self, rounds: int) -> dict[str, float]:
        """Return what is worth noting after this number of rounds, for `metrics.jsonl`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what it takes to continue, as plain JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""


class SampleWeighted(Averaging):
    """The mean weighted by samples. Source: FedAvg (arXiv 1602.05629)."""

    needs = frozenset()
    offers = ALL


class NormClipping(Averaging):
    """The sample-weighted mean of updates that are no longer than a bound: a longer one is scaled down to it.

    Args:
        bound: Longest change of a client's tensors, as one vector, by the Euclidean norm.

    Source: arXiv 1911.07963.
    """

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for a bound that is not positive."""
        if math.isfinite(self.bound) and self.bound > 0:
            return []
        return [Problem(f"{key}.bound", self.bound, "give a norm above 0")]

    def begin(self, state: Mapping[str, Tensor], round_index: int) -> Aggregator:
        """Return the mean of clipped updates."""
        return _ClippedMean(state, self.bound)


class Collected(Averaging):
    """Base class of rules that need all updates of a round at once; they take the memory of a cohort's updates.

    A tensor with fewer holders than the rule needs to withstand anybody is averaged all the same; how many such tensors
    a round had stands under ``averaging.unprotected_tensors`` in `metrics.jsonl`.
    """

    needs = frozenset({Trait.AGGREGATION, Trait.SERVER_SEES_UPDATES})
    _unprotected = 0

    @property
    def least_holders(self) -> int:
        """How many clients must send a tensor for the rule to withstand one of them."""
        return 1

    def figures(self, rounds: int) -> dict[str, float]:
        """Return how many tensors of the last round had too few holders, where there were any."""
        return {"unprotected_tensors": self._unprotected} if self._unprotected else {}

    def unite(self, updates: Sequence[Update], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the next global tensors, by `combine` tensor by tensor."""
        return {name: self._united(name, tensor, updates) for name, tensor in state.items()}

    def _united(self, name: str, before: Tensor, updates: Sequence[Update]) -> Tensor:
        holders = [update for update in updates if name in update.tensors]
        if not holders:
            return before
        values = torch.stack([update.tensors[name].detach().float().flatten() for update in holders])
        weights = torch.tensor([update.samples for update in holders])
        return self.combine(values, weights).reshape(before.shape).to(before.dtype)

    def note(self, updates: Sequence[Update]) -> None:
        """Count the tensors that too few clients have sent."""
        holders = Counter(name for update in updates for name in update.tensors)
        self._unprotected = sum(count < self.least_holders for count in holders.values())

    def begin(self, state: Mapping[str, Tensor], round_index: int) -> Aggregator:
        """Return an aggregator that collects."""
        return _Collector(self, state)

    @abstractmethod
    def combine(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return one vector from those of a tensor's holders.

        Args:
            values: What each holder sent, flat, float32. Shape ``[k, n]``.
            weights: Their numbers of samples. Shape ``[k]``.
        """


class CoordinateMedian(Collected):
    """The median of each coordinate; of an even number the mean of the two in the middle. Samples do not count.

    Source: arXiv 1803.01498.
    """

    @property
    def least_holders(self) -> int:
        """Three: the median of two is their mean."""
        return 3

    def combine(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return the medians."""
        return trimmed_mean(values, (len(values) - 1) // 2)


class TrimmedMean(Collected):
    """The mean of each coordinate without its largest and its smallest values. Samples do not count.

    Args:
        share: Share of the holders to leave out at either end, rounded down, in [0, ½).

    Source: arXiv 1803.01498.
    """

    def __init__(self, share: float = 0.2) -> None:
        self.share = share

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for a share out of range."""
        if 0 <= self.share < 0.5:
            return []
        return [Problem(f"{key}.share", self.share, "give a share from 0 to below 0.5")]

    @property
    def least_holders(self) -> int:
        """As many as it takes to leave one out at either end."""
        return math.ceil(round(1 / self.share, 9)) if self.share else 1

    def combine(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return the trimmed means."""
        return trimmed_mean(values, int(round(self.share * len(values), 9)))


class Krum(Collected):
    """The clients whose change is nearest to those of the others: one of them (Krum), or the mean of several.

    A client's change is one vector over all tensors of the round, 0 where it trained none (the latter ours). Its score
    is the sum of its squared distances to its k − f − 2 nearest others, at least one; lowest is best. The rule's
    guarantee is for k ≥ 2f + 3 clients, each of which trains everything.

    Args:
        malicious: f: how many clients of a round may be hostile.
        take: How many of the best to average, weighted by samples; more than 1 is Multi-Krum.

    Source: arXiv 1703.02757.
    """

    def __init__(self, malicious: int = 1, take: int = 1) -> None:
        self.malicious = malicious
        self.take = take

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for each number out of range."""
        least = {"malicious": (self.malicious, 0), "take": (self.take, 1)}
        return [
            Problem(f"{key}.{name}", value, f"give {minimum} or more")
            for name, (value, minimum) in least.items()
            if value < minimum
        ]

    @property
    def least_holders(self) -> int:
        """2f + 3."""
        return 2 * self.malicious + 3

    def unite(self, updates: Sequence[Update], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the best clients; those that none of them trained keep their value."""
        best = self.best(updates, state)
        return {name: self._united(name, tensor, best) for name, tensor in state.items()}

    def best(self, updates: Sequence[Update], state: Mapping[str, Tensor]) -> Sequence[Update]:
        """Return the updates with the best scores, in the order of the cohort; of equal ones the first is better."""
        squares: Tensor | float = 0.0
        for name, before in state.items():
            changes = [update.tensors.get(name, before).detach().float().flatten() for update in updates]
            if any(name in update.tensors for update in updates):
                squares = squares + squared_distances(torch.stack(changes))
        if not isinstance(squares, Tensor):
            return updates
        order = krum_scores(squares, self.malicious).argsort(stable=True)
        return [updates[index] for index in sorted(order[: self.take].tolist())]

    def combine(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return the mean, weighted by samples."""
        return weights.float() / weights.sum() @ values


def trimmed_mean(values: Tensor, count: int) -> Tensor:
    """Return the mean over rows without the `count` largest and smallest values of each column. Shape ``[n]``."""
    kept = values.sort(dim=0).values[count : len(values) - count]
    return kept.mean(0)


def squared_distances(values: Tensor) -> Tensor:
    """Return the squared Euclidean distances between rows. Shape ``[k, k]``."""
    return torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").square()


def krum_scores(squares: Tensor, malicious: int) -> Tensor:
    """Return each client's sum of squared distances to its nearest others. Shape ``[k]``.

    Args:
        squares: Squared distances between clients. Shape ``[k, k]``.
        malicious: f of the rule.
    """
    count = len(squares)
    nearest = min(max(1, count - malicious - 2), count - 1)
    others = squares.clone().fill_diagonal_(math.inf)
    return others.sort(dim=1).values[:, :nearest].sum(1)


def clipped_changes(update: Update, state: Mapping[str, Tensor], bound: float) -> dict[str, Tensor]:
    """Return an update's changes, float32; as one vector over all tensors they are scaled down to the norm `bound`."""
    changes, factor = _clipping(update, state, bound)
    return {name: factor * change for name, change in changes.items()}


def clip_update(update: Update, state: Mapping[str, Tensor], bound: float) -> Update:
    """Return the update with its change, as one vector over all of its tensors, scaled down to the norm `bound`."""
    changes, factor = _clipping(update, state, bound)
    if factor == 1:
        return update
    clipped = {name: (state[name].float() + factor * c).to(state[name].dtype) for name, c in changes.items()}
    return replace(update, tensors=clipped)


def _clipping(update: Update, state: Mapping[str, Tensor], bound: float) -> tuple[dict[str, Tensor], float]:
    """Return an update's changes, float32, and the factor, at most 1, that brings them to the norm `bound`."""
    changes = {name: tensor.float() - state[name].float() for name, tensor in update.tensors.items()}
    norm = torch.nn.utils.get_total_norm(changes.values()).item() if changes else 0.0
    return changes, 1.0 if norm <= bound else bound / norm


class _ClippedMean(HolderMean):
    def __init__(self, state: Mapping[str, Tensor], bound: float) -> None:
        super().__init__(state)
        self._bound = bound

    def add(self, update: Update) -> None:
        super().add(clip_update(update, self._state, self._bound))


class _Collector:
    def __init__(self, rule: Collected, state: Mapping[str, Tensor]) -> None:
        self._rule, self._state = rule, state
        self._updates: list[Update] = []

    def check(self, update: Update) -> None:
        check_update(update, self._state)

    def add(self, update: Update) -> None:
        self._updates.append(update)

    def result(self) -> dict[str, Tensor]:
        self._rule.note(self._updates)
        return self._rule.unite(self._updates, self._state)
