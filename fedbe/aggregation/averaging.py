"""How the tensors of several clients become one: the sample-weighted mean, or what withstands wrong clients."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

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

    def figures(self, rounds: int) -> dict[str, float]:
        """Return what is worth noting after so many rounds, for `metrics.jsonl`."""
        return {}


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
    """Base class of rules that need all updates of a round at once; they take the memory of a cohort's updates."""

    needs = frozenset({Trait.AGGREGATION, Trait.SERVER_SEES_UPDATES})

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

    def combine(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return the trimmed means."""
        return trimmed_mean(values, int(round(self.share * len(values), 9)))


class Krum(Collected):
    """The holders whose tensor is nearest to those of the others: one of them (Krum), or the mean of several.

    A holder's score is the sum of its squared distances to its k − f − 2 nearest others, at least one; lowest is best.

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

    def combine(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return the mean of the holders with the best scores; of two equal ones the first is better."""
        scores = krum_scores(values, self.malicious)
        best = scores.argsort(stable=True)[: self.take].sort().values
        share = weights[best].float() / weights[best].sum()
        return share @ values[best]


def trimmed_mean(values: Tensor, count: int) -> Tensor:
    """Return the mean over rows without the `count` largest and smallest values of each column. Shape ``[n]``."""
    kept = values.sort(dim=0).values[count : len(values) - count]
    return kept.mean(0)


def krum_scores(values: Tensor, malicious: int) -> Tensor:
    """Return each row's sum of squared distances to its nearest others. Shape ``[k]``.

    Args:
        values: Shape ``[k, n]``.
        malicious: f of the rule.
    """
    nearest = max(1, len(values) - malicious - 2)
    distances = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").square()
    distances.fill_diagonal_(math.inf)
    return distances.sort(dim=1).values[:, : min(nearest, len(values) - 1)].sum(1)


def clip_update(update: Update, state: Mapping[str, Tensor], bound: float) -> Update:
    """Return the update with its change, as one vector over all of its tensors, scaled down to the norm `bound`."""
    changes = {name: tensor.float() - state[name].float() for name, tensor in update.tensors.items()}
    norm = torch.nn.utils.get_total_norm(changes.values()).item() if changes else 0.0
    if norm <= bound:
        return update
    factor = bound / norm
    clipped = {name: (state[name].float() + factor * c).to(state[name].dtype) for name, c in changes.items()}
    return replace(update, tensors=clipped)


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
        return {name: self._combined(name, tensor) for name, tensor in self._state.items()}

    def _combined(self, name: str, before: Tensor) -> Tensor:
        holders: Sequence[Update] = [update for update in self._updates if name in update.tensors]
        if not holders:
            return before
        values = torch.stack([update.tensors[name].detach().float().flatten() for update in holders])
        weights = torch.tensor([update.samples for update in holders])
        return self._rule.combine(values, weights).reshape(before.shape).to(before.dtype)
