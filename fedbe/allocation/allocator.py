"""Which blocks each client of a cohort trains in a round, and why."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from fedbe.allocation.best_sets import Bools, CohortCosts, Floats, best_sets
from fedbe.allocation.coverage import covering_sets
from fedbe.errors import Facts, Problem

Limit = Literal["time", "memory", "none"]
"""What keeps a client from training all blocks."""


@dataclass(frozen=True)
class ClientAllocation:
    """What one client trains in a round, and why; `dataclasses.asdict` gives plain JSON values.

    Attributes:
        client_id: The client.
        blocks: Names of the blocks it trains, the lowest first.
        value: Their total value to the client.
        time: Seconds that they cost; 0 without a block.
        memory: Bytes that they cost; 0 without a block.
        limit: The budget that keeps it from training all blocks: where both do, the tighter one, or time if they are
            equally tight; ``none`` if it could train all.
        for_coverage: Those of its blocks that are not in its own best set: it trains them because too few others do.
        can_train: Whether it can afford any block at all.
    """

    client_id: str
    blocks: tuple[str, ...]
    value: float
    time: float
    memory: float
    limit: Limit
    for_coverage: tuple[str, ...]
    can_train: bool


@dataclass(frozen=True)
class Allocation:
    """What a cohort trains in a round.

    Attributes:
        chosen: Which client trains which block, ``[K, L]``.
        clients: The same with the reasons, in the order of the clients.
        missing: How many trainers each block misses to the wanted coverage, by name; only blocks that miss any.
    """

    chosen: Bools
    clients: tuple[ClientAllocation, ...]
    missing: dict[str, int]

    @property
    def unable(self) -> tuple[str, ...]:
        """The clients that cannot afford a single block."""
        return tuple(client.client_id for client in self.clients if not client.can_train)


@dataclass(frozen=True)
class Allocator:
    """Gives each client the blocks of the highest total value that it can afford, and each block enough trainers.

    Attributes:
        coverage: How many trainers each block should have in each round, where the budgets allow it. It goes before
            value: a client may get a block that is worth less to it. 0 leaves each client its best set.

    Source: ours; FedBE (arXiv 2506.05977) says only that blocks are chosen from data and capability.
    """

    coverage: int = 1

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem when the coverage is negative."""
        if self.coverage < 0:
            return [Problem(f"{key}.coverage", self.coverage, "give 0 or more trainers for each block")]
        return []

    def allocate(
        self, client_ids: Sequence[str], block_names: Sequence[str], values: Floats, costs: CohortCosts
    ) -> Allocation:
        """Return what each client trains.

        It depends neither on the order of the clients nor on anything random: ties go to higher blocks, which cost
        less, and to clients whose names sort first.

        Args:
            client_ids: The cohort; each name once.
            block_names: The blocks, the lowest first.
            values: What each block is worth to each client, finite and 0 or more, ``[K, L]``; a block worth 0 is
                trained for coverage only.
            costs: The cohort's costs and budgets.

        Raises:
            ValueError: Arrays of wrong shape, values or costs that are negative or not finite, or a name given twice.
        """
        _require_sound(client_ids, block_names, values, costs)
        order = np.array(sorted(range(len(client_ids)), key=lambda row: client_ids[row]), dtype=np.intp)
        sorted_values, sorted_costs = values[order], costs.rows(order)
        own, chosen = np.empty(values.shape, dtype=bool), np.empty(values.shape, dtype=bool)
        own[order] = best = best_sets(sorted_values, sorted_costs)
        chosen[order] = covering_sets(sorted_values, sorted_costs, self.coverage, best)
        missing = np.maximum(self.coverage - chosen.sum(axis=0), 0)
        return Allocation(
            chosen=chosen,
            clients=_explain(client_ids, block_names, values, costs, own, chosen),
            missing={name: int(count) for name, count in zip(block_names, missing, strict=True) if count},
        )


def _explain(
    client_ids: Sequence[str], block_names: Sequence[str], values: Floats, costs: CohortCosts, own: Bools, chosen: Bools
) -> tuple[ClientAllocation, ...]:
    totals = np.where(chosen, values, 0.0).sum(axis=1)
    time, memory = costs.time(chosen), costs.memory(chosen)
    limits, affordable = _limits(values, costs), costs.affordable()
    return tuple(
        ClientAllocation(
            client_id=client_id,
            blocks=_names(block_names, chosen[row]),
            value=float(totals[row]),
            time=float(time[row]),
            memory=float(memory[row]),
            limit=limits[row],
            for_coverage=_names(block_names, chosen[row] & ~own[row]),
            can_train=bool(affordable[row].any()),
        )
        for row, client_id in enumerate(client_ids)
    )


def _names(block_names: Sequence[str], chosen: Bools) -> tuple[str, ...]:
    return tuple(block_names[index] for index in np.flatnonzero(chosen).tolist())


def _limits(values: Floats, costs: CohortCosts) -> list[Limit]:
    """Return which budget keeps each client from all blocks; of two, the one that alone leaves it less value."""
    everything = np.ones(values.shape, dtype=bool)
    over_time = costs.time(everything) > costs.time_budget
    over_memory = costs.memory(everything) > costs.memory_budget
    time_is_tighter = over_time.copy()
    both = np.flatnonzero(over_time & over_memory)
    if len(both):
        some = costs.rows(both)
        time_is_tighter[both] = _best_value(values[both], some.without_memory_limit()) <= _best_value(
            values[both], some.without_time_limit()
        )
    return [
        "none" if not (late or large) else "time" if tighter else "memory"
        for late, large, tighter in zip(over_time, over_memory, time_is_tighter, strict=True)
    ]


def _best_value(values: Floats, costs: CohortCosts) -> Floats:
    total: Floats = np.where(best_sets(values, costs), values, 0.0).sum(axis=1)
    return total


def _require_sound(client_ids: Sequence[str], block_names: Sequence[str], values: Floats, costs: CohortCosts) -> None:
    shape = (len(client_ids), len(block_names))
    if len(set(client_ids)) != len(client_ids) or len(set(block_names)) != len(block_names):
        raise ValueError("each client and each block is named once")
    if not block_names:
        raise ValueError("there is no block to allocate")
    arrays = {"values": values, **{field.name: getattr(costs, field.name) for field in fields(costs)}}
    for name, array in arrays.items():
        wanted = shape[:1] if name.endswith("_budget") else shape
        if array.shape != wanted:
            raise ValueError(f"`{name}` has shape {array.shape}, not {wanted}: clients × blocks")
        if np.isnan(array).any() or (array < 0).any():
            raise ValueError(f"`{name}` has a negative number or one that is none")
        if not name.endswith("_budget") and np.isinf(array).any():
            raise ValueError(f"`{name}` has an infinite number; only budgets may be infinite")
