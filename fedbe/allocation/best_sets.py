"""The best set of blocks that one client can afford, for many clients at once."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Rows = NDArray[np.intp]

ENUMERATED_BLOCKS = 12
"""Up to so many blocks of unequal cost, all sets are tried; above it the choice is greedy."""

_TIE = 1e-12
"""Values that differ by less than this share are equal: they may be sums of the same numbers in another order."""


@dataclass(frozen=True)
class CohortCosts:
    """What sets of blocks cost each client, and what each client has; K clients, L blocks, the lowest block first.

    A set S costs ``low[k, lowest(S)] + Σ_{j∈S} train[k, j]``, in time and in memory: the gradient must reach the lowest
    block of S, whatever else is trained, so that part depends on the lowest block only. The empty set costs nothing.

    Attributes:
        time_low: Seconds that it takes to reach each block, ``[K, L]``.
        time_train: Seconds that each trained block adds, ``[K, L]``.
        memory_low: Bytes that it takes to reach each block, ``[K, L]``.
        memory_train: Bytes that each trained block adds, ``[K, L]``.
        time_budget: Seconds that each client has, ``[K]``; infinite where there is no deadline.
        memory_budget: Bytes that each client has, ``[K]``; infinite where unlimited.
    """

    time_low: Floats
    time_train: Floats
    memory_low: Floats
    memory_train: Floats
    time_budget: Floats
    memory_budget: Floats

    def rows(self, index: Rows) -> CohortCosts:
        """Return the costs of some clients."""
        return CohortCosts(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def without_memory_limit(self) -> CohortCosts:
        """Return the same costs with time as the only limit."""
        return replace(self, memory_budget=np.full_like(self.memory_budget, np.inf))

    def without_time_limit(self) -> CohortCosts:
        """Return the same costs with memory as the only limit."""
        return replace(self, time_budget=np.full_like(self.time_budget, np.inf))

    def time(self, chosen: Bools) -> Floats:
        """Return the seconds of one set for each client, ``[K]``."""
        return _cost(self.time_low, self.time_train, chosen)

    def memory(self, chosen: Bools) -> Floats:
        """Return the bytes of one set for each client, ``[K]``."""
        return _cost(self.memory_low, self.memory_train, chosen)

    def affordable(self) -> Bools:
        """Return which blocks each client could train if it trained no other, ``[K, L]``."""
        return self.capacity() >= 1

    def equal_blocks(self) -> bool:
        """Return whether each client's blocks add the same time and the same memory."""
        return all(np.all(np.ptp(c, axis=1) <= _TIE * c.max(axis=1)) for c in (self.time_train, self.memory_train))

    def capacity(self) -> NDArray[np.int64]:
        """Return how many blocks fit when each one in turn is the lowest and all cost what it does, ``[K, L]``."""
        count = np.zeros(self.time_low.shape, dtype=np.int64)
        for number in range(1, self.time_low.shape[1] + 1):
            in_time = self.time_low + number * self.time_train <= self.time_budget[:, None]
            in_memory = self.memory_low + number * self.memory_train <= self.memory_budget[:, None]
            count += in_time & in_memory
        return count

    def affordable_sets(self) -> Bools:
        """Return which of the sets of `subsets` each client can afford, ``[K, 2^L]``."""
        sets = subsets(self.time_low.shape[1])
        lowest = sets.argmax(axis=1)
        in_time = self.time_low[:, lowest] + self.time_train @ sets.T <= self.time_budget[:, None]
        in_memory = self.memory_low[:, lowest] + self.memory_train @ sets.T <= self.memory_budget[:, None]
        fits: Bools = in_time & in_memory
        fits[:, 0] = True  # the empty set comes first
        return fits


def _cost(fixed: Floats, block: Floats, chosen: Bools) -> Floats:
    reached = np.take_along_axis(fixed, chosen.argmax(axis=1)[:, None], axis=1)[:, 0]
    cost: Floats = np.where(chosen.any(axis=1), reached + np.where(chosen, block, 0.0).sum(axis=1), 0.0)
    return cost


@lru_cache(maxsize=4)
def subsets(blocks: int) -> Bools:
    """Return all sets of so many blocks, ``[2^L, L]``: fewer blocks first, then those of higher blocks."""
    codes = np.arange(2**blocks)
    sets = (codes[:, None] >> np.arange(blocks)[::-1]) & 1 == 1  # the lowest block is the highest bit
    ordered: Bools = sets[np.lexsort((codes, sets.sum(axis=1)))]
    return ordered


def best_sets(values: Floats, costs: CohortCosts) -> Bools:
    """Return for each client the affordable set of the highest total value, ``[K, L]``.

    Exact when each client's blocks cost the same, and for up to `ENUMERATED_BLOCKS` blocks of unequal cost. For more
    blocks of unequal cost it is a heuristic: for each lowest block, those above it by value per share of the budgets,
    skipping what does not fit. Among equal values the higher blocks win, which cost less; a block without value is
    left out.

    Args:
        values: What each block is worth to each client, 0 or more, ``[K, L]``.
        costs: The clients' costs and budgets.

    Source: ours.
    """
    if costs.equal_blocks():
        return _by_count(values, costs.capacity())
    if values.shape[1] <= ENUMERATED_BLOCKS:
        return _by_enumeration(values, costs)
    return _by_density(values, costs)


def _by_count(values: Floats, capacity: NDArray[np.int64]) -> Bools:
    """Return the best sets when blocks cost the same: each lowest block with the most valuable ones above it."""
    order = _descending(values)
    ordered = np.take_along_axis(values, order, axis=1)
    best = _Best(values, order)
    for lowest in reversed(range(values.shape[1])):
        above = (order > lowest) & (ordered > 0)
        taken = above & (above.cumsum(axis=1, dtype=np.int16) < capacity[:, lowest, None])
        best.offer(lowest, capacity[:, lowest] >= 1, taken, np.einsum("kl,kl->k", taken, ordered))
    return best.sets()


def _by_density(values: Floats, costs: CohortCosts) -> Bools:
    """Return good sets when blocks cost differently: each lowest block, then greedily by value per share of budgets."""
    time_share = costs.time_train / costs.time_budget.clip(min=1e-9)[:, None]
    memory_share = costs.memory_train / costs.memory_budget.clip(min=1e-9)[:, None]
    share = time_share + memory_share
    order = _descending(values / np.maximum(share, np.finfo(float).tiny))
    ordered, time, memory = (
        np.take_along_axis(x, order, axis=1) for x in (values, costs.time_train, costs.memory_train)
    )
    best = _Best(values, order)
    for lowest in reversed(range(values.shape[1])):
        time_left = costs.time_budget - costs.time_low[:, lowest] - costs.time_train[:, lowest]
        memory_left = costs.memory_budget - costs.memory_low[:, lowest] - costs.memory_train[:, lowest]
        fits = (time_left >= 0) & (memory_left >= 0)
        taken = (order > lowest) & (ordered > 0)
        for rank in range(values.shape[1]):
            taken[:, rank] &= (time[:, rank] <= time_left) & (memory[:, rank] <= memory_left)
            time_left = time_left - taken[:, rank] * time[:, rank]
            memory_left = memory_left - taken[:, rank] * memory[:, rank]
        best.offer(lowest, fits, taken, np.einsum("kl,kl->k", taken, ordered))
    return best.sets()


def _by_enumeration(values: Floats, costs: CohortCosts, rows_at_once: int = 1024) -> Bools:
    """Return the best of all sets."""
    sets = subsets(values.shape[1])
    chosen = np.zeros(values.shape, dtype=bool)
    for start in range(0, len(values), rows_at_once):
        rows = np.arange(start, min(start + rows_at_once, len(values)))
        totals = np.where(costs.rows(rows).affordable_sets(), values[rows] @ sets.T, -np.inf)
        near = totals >= totals.max(axis=1, keepdims=True) * (1 - _TIE)
        chosen[rows] = sets[near.argmax(axis=1)]
    return chosen


def _descending(values: Floats) -> Rows:
    """Return the blocks of each client from the highest value to the lowest; of equal values the higher block first."""
    order: Rows = values.shape[1] - 1 - np.argsort(-values[:, ::-1], axis=1, kind="stable")
    return order


class _Best:
    """The best set found so far for each client, while lowest blocks are offered from the top down."""

    def __init__(self, values: Floats, order: Rows) -> None:
        self._values, self._order = values, order
        self._total = np.zeros(len(values))
        self._lowest = np.full(len(values), -1)
        self._taken = np.zeros(values.shape, dtype=bool)

    def offer(self, lowest: int, fits: Bools, taken: Bools, value_above: Floats) -> None:
        """Take this lowest block, with the blocks above it that are marked in order, where that is worth more."""
        total = self._values[:, lowest] + value_above
        better = fits & (total > self._total * (1 + _TIE))
        self._total[better] = total[better]
        self._lowest[better] = lowest
        self._taken[better] = taken[better]

    def sets(self) -> Bools:
        """Return the best sets, ``[K, L]``."""
        chosen = np.zeros(self._values.shape, dtype=bool)
        np.put_along_axis(chosen, self._order, self._taken, axis=1)
        found = self._lowest >= 0
        chosen[found, self._lowest[found]] = True
        return chosen
