"""Who trains what, so that each block has enough trainers at the least loss of value."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedbe.allocation.best_sets import ENUMERATED_BLOCKS, Bools, CohortCosts, Floats, Rows, best_sets, subsets

EXACT_WORK = 10**8
"""Up to so many steps (clients × sets of blocks × what may still be missing) the joint problem is solved exactly."""

SEARCH_WORK = 5 * 10**7
"""After about so many steps the search goes on only where it can fill a block directly."""

_CANDIDATES = 200


def covering_sets(values: Floats, costs: CohortCosts, coverage: int, own: Bools) -> Bools:
    """Return a set of blocks for each client so that each block has `coverage` trainers where the budgets allow it.

    Of all assignments within the budgets, those with the fewest missing trainers, Σ_j max(0, coverage − trainers_j),
    are wanted, and of these the one of the highest total value. Solved exactly by `cover_exactly` where that is small
    (`EXACT_WORK`: for a coverage of 1, 8 blocks and 1,500 clients, or 11 blocks and 23 clients; for a coverage of 2,
    8 blocks and 59 clients), and by the heuristic `cover_by_search` otherwise. Ties go by the order of the clients.

    Args:
        values: What each block is worth to each client, 0 or more, ``[K, L]``.
        costs: The clients' costs and budgets.
        coverage: How many trainers each block should have; 0 gives each client its best set.
        own: Each client's best set, ``[K, L]``.

    Source: ours.
    """
    demand = np.minimum(coverage, costs.affordable().sum(axis=0))
    if (own.sum(axis=0) >= demand).all():
        return own
    if _exact_work(len(values), demand) <= EXACT_WORK:
        return cover_exactly(values, costs, demand)
    return cover_by_search(values, costs, demand, own)


def _exact_work(clients: int, demand: NDArray[np.int64]) -> float:
    blocks = len(demand)
    if blocks > ENUMERATED_BLOCKS:
        return np.inf
    return float(max(clients, 16) * 2**blocks * np.prod(demand + 1.0))


def cover_exactly(values: Floats, costs: CohortCosts, demand: NDArray[np.int64]) -> Bools:
    """Return the assignment with the fewest missing trainers and, among those, of the highest value.

    Dynamic programming over the clients: the state is how many trainers each block still misses. The work is
    K · 2^L · Π(demand + 1).

    Args:
        values: What each block is worth to each client, ``[K, L]``.
        costs: The clients' costs and budgets.
        demand: How many trainers each block should have, ``[L]``.

    Source: ours.
    """
    sets = subsets(len(demand))
    stride = np.cumprod(np.append(1, demand[:-1] + 1))
    missing = np.arange(np.prod(demand + 1))[:, None] // stride % (demand + 1)  # [states, L]
    after = np.arange(len(missing)) - sets.astype(np.int64) @ ((missing > 0) * stride).T  # [sets, states]
    ahead = -(1.0 + values.sum()) * missing.sum(axis=1)
    affordable = costs.affordable_sets()
    choice = np.empty((len(values), len(missing)), dtype=np.int16)
    for client in reversed(range(len(values))):
        open_sets = np.flatnonzero(affordable[client])
        total = (sets[open_sets] @ values[client])[:, None] + ahead[after[open_sets]]
        choice[client] = open_sets[total.argmax(axis=0)]
        ahead = total.max(axis=0)
    state = len(missing) - 1
    chosen = np.zeros(values.shape, dtype=bool)
    for client in range(len(values)):
        chosen[client] = sets[choice[client, state]]
        state = after[choice[client, state], state]
    return chosen


def cover_by_search(values: Floats, costs: CohortCosts, demand: NDArray[np.int64], own: Bools) -> Bools:
    """Return an assignment with few missing trainers and little loss of value, found by local search.

    From each client's best set, blocks are filled from the lowest up, since few clients reach low. Into a block that
    misses trainers goes the client that loses the least by it; a client that is itself needed elsewhere hands that
    block over to another first, and so on along a chain. Last, blocks are handed over where that raises the value.

    A heuristic: it never breaks a budget, but may miss a trainer that a joint search would find, or lose more value
    than it must. Measured on random problems of 5 to 8 clients and 4 to 6 blocks that need covering: a trainer missed
    in about 1 % of them; elsewhere 0.5 % of the value lost on average, a quarter at worst.

    Args:
        values: What each block is worth to each client, ``[K, L]``.
        costs: The clients' costs and budgets.
        demand: How many trainers each block should have, ``[L]``.
        own: Each client's best set, ``[K, L]``.

    Source: ours; the chains are those of bipartite matching, where they are exact.
    """
    search = _Search(values, costs, demand, own.copy())
    while True:
        filled = sum(search.fill(block) for block in range(len(demand)))
        if not search.hand_over(own) and not filled:
            break
    return search.chosen


@dataclass
class _Search:
    """An assignment under improvement, with what it takes to undo a step.

    Attributes:
        values: What each block is worth to each client.
        costs: The clients' costs and budgets.
        demand: How many trainers each block should have.
        chosen: The assignment.
    """

    values: Floats
    costs: CohortCosts
    demand: NDArray[np.int64]
    chosen: Bools
    _log: list[tuple[int, Bools]] = field(default_factory=list)
    _work: int = 0

    def __post_init__(self) -> None:
        self.counts = self.chosen.sum(axis=0)
        self._affordable = self.costs.affordable()
        self._bonus = 1.0 + float(self.values.sum(axis=1).max(initial=0.0))

    @property
    def covered(self) -> int:
        """How many of the wanted trainers there are."""
        return int(np.minimum(self.counts, self.demand).sum())

    @property
    def exhausted(self) -> bool:
        """Whether the search has worked enough."""
        return self._work > SEARCH_WORK

    def fill(self, block: int) -> bool:
        """Give a block the trainers that it misses, as far as possible; return whether it got any."""
        before = self.covered
        while self.counts[block] < self.demand[block]:
            if not self._fill_directly(block) and not self._fill_by_chain(block, frozenset(), set()):
                break
        return self.covered > before

    def hand_over(self, own: Bools) -> bool:
        """Let clients give up blocks that others can take at a smaller loss; return whether that raised the value."""
        moved = False
        for client in np.flatnonzero((self.chosen != own).any(axis=1)).tolist():
            if self.exhausted:
                break
            moved |= self._try(client, own[client])
            for block in np.flatnonzero(self.chosen[client] & (self.counts <= self.demand)).tolist():
                for wanted in (self.chosen[client].copy(), np.ones_like(self.chosen[client])):
                    moved |= self._try(client, self._without(client, block, wanted))
        return moved

    def _without(self, client: int, block: int, wanted: Bools) -> Bools:
        """Return the best set without a block for a client that takes the wanted blocks wherever it is needed."""
        rows = np.array([client])
        weights = np.where(wanted, self._weights(rows), self.values[rows])
        weights[:, block] = 0.0
        best: Bools = self._best_sets(rows, weights)[0]
        return best

    def _try(self, client: int, blocks: Bools) -> bool:
        """Give a client other blocks, fill what it leaves, and undo it all unless that raised the value."""
        mark, covered, value = len(self._log), self.covered, self._value()
        left = self.chosen[client] & ~blocks
        self._set(client, blocks)
        for block in np.flatnonzero(left & (self.counts < self.demand)):
            self._fill_by_chain(int(block), frozenset([int(client)]), set())
        if self.covered >= covered and self._value() > value * (1 + 1e-12):
            return True
        self._undo(mark)
        return False

    def _fill_directly(self, block: int) -> bool:
        """Let clients take the block that need not give up a block for which they are needed, cheapest first."""
        rows = self._candidates(block, frozenset())
        replies = self._replies(rows, block, np.zeros((len(rows), len(self.demand)), dtype=bool))
        before = self.covered
        for index in np.argsort(self._losses(rows, replies), kind="stable"):
            if self.counts[block] >= self.demand[block]:
                break
            broken = self.chosen[rows[index]] & ~replies[index] & (self.counts <= self.demand)
            if replies[index, block] and not broken.any():
                self._set(rows[index], replies[index])
        return self.covered > before

    def _fill_by_chain(self, block: int, busy: frozenset[int], failed: set[int]) -> bool:
        """Let a client take the block, and others in turn what that one gives up; undo it if no trainer is gained.

        Args:
            block: Misses a trainer.
            busy: Clients that have changed in this chain.
            failed: Blocks for which this search found no trainer; added to.
        """
        if self.exhausted:
            return False
        rows, released = self._ways_to_take(block, busy)
        replies = self._replies(rows, block, released)
        broken = self.chosen[rows] & ~replies & (self.counts <= self.demand)
        before, mark = self.covered, len(self._log)
        for index in np.lexsort((self._losses(rows, replies), broken.sum(axis=1))):
            if not replies[index, block]:
                continue
            self._set(rows[index], replies[index])
            for given_up in np.flatnonzero(broken[index]):
                if int(given_up) not in failed and self.counts[given_up] < self.demand[given_up]:
                    self._fill_by_chain(int(given_up), busy | {int(rows[index])}, failed)
            if self.covered > before:
                return True
            self._undo(mark)
        failed.add(block)
        return False

    def _ways_to_take(self, block: int, busy: frozenset[int]) -> tuple[Rows, Bools]:
        """Return clients that could take the block: each as it likes, and once for each block that it could release."""
        rows = self._candidates(block, busy)
        client, release = np.nonzero(self.chosen[rows] & (self.counts <= self.demand))
        released = np.zeros((len(rows) + len(client), len(self.demand)), dtype=bool)
        released[np.arange(len(rows), len(released)), release] = True
        return np.append(rows, rows[client]), released

    def _candidates(self, block: int, busy: frozenset[int]) -> Rows:
        """Return clients that could take the block; where they are many, those that seem to lose the least."""
        open_to = self._affordable[:, block] & ~self.chosen[:, block]
        open_to[list(busy)] = False
        rows = np.flatnonzero(open_to)
        limit = _CANDIDATES + 4 * int(self.demand[block])
        if len(rows) <= limit:
            return rows
        loss = self._estimated_losses(rows, block)
        return np.sort(rows[np.argsort(loss, kind="stable")[:limit]])

    def _estimated_losses(self, rows: Rows, block: int) -> Floats:
        """Return what clients seem to lose by a block: of their value the share by which it overruns a budget."""
        wider = self.chosen[rows].copy()
        wider[:, block] = True
        costs = self.costs.rows(rows)
        overrun = np.maximum(costs.time(wider) / costs.time_budget, costs.memory(wider) / costs.memory_budget) - 1
        value = np.where(self.chosen[rows], self.values[rows], 0.0).sum(axis=1)
        estimate: Floats = np.maximum(overrun, 0.0) * value - self.values[rows, block]
        return estimate

    def _weights(self, rows: Rows) -> Floats:
        """Return what blocks are worth to clients now: a trainer that is missing without them outweighs any value."""
        others = self.counts - self.chosen[rows]
        weights: Floats = self.values[rows] + self._bonus * (others < self.demand)
        return weights

    def _replies(self, rows: Rows, block: int, released: Bools) -> Bools:
        """Return the sets that clients would take with this block in them, and without the released ones."""
        weights = np.where(released, 0.0, self._weights(rows))
        weights[:, block] += self._bonus * len(self.demand)
        return self._best_sets(rows, weights)

    def _best_sets(self, rows: Rows, weights: Floats) -> Bools:
        self._work += (len(rows) + 50) * weights.shape[1] ** 2
        return best_sets(weights, self.costs.rows(rows))

    def _losses(self, rows: Rows, replies: Bools) -> Floats:
        loss: Floats = (self.values[rows] * (self.chosen[rows].astype(float) - replies)).sum(axis=1)
        return loss

    def _value(self) -> float:
        return float(self.values[self.chosen].sum())

    def _set(self, client: int, blocks: Bools) -> None:
        self._log.append((int(client), self.chosen[client].copy()))
        self.counts += blocks.astype(np.int64) - self.chosen[client]
        self.chosen[client] = blocks

    def _undo(self, mark: int) -> None:
        while len(self._log) > mark:
            client, blocks = self._log.pop()
            self.counts += blocks.astype(np.int64) - self.chosen[client]
            self.chosen[client] = blocks
