"""Which clients take part in a round."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fedbe.errors import ConfigError, Problem
from fedbe.seeding import generator


@dataclass(frozen=True)
class CohortSampler:
    """Draws the cohort of each round without replacement, a pure function of the seed and the round.

    Attributes:
        size: ``"all"``, a fraction of the clients (a float in (0, 1]; rounded up), or a fixed number (an int).
        seed: The run's seed.
    """

    size: int | float | Literal["all"]
    seed: int

    def sample(
        self, client_ids: Sequence[str], experience: int, round_index: int, available: Collection[str] | None = None
    ) -> list[str]:
        """Return the cohort in the order of `client_ids`, so that aggregation sums in a fixed order.

        Args:
            client_ids: All clients of the run.
            experience: Index of the task of a sequence.
            round_index: 0-based round.
            available: Those that are there, ``None`` for all; if they are too few, all of them are taken.

        Raises:
            ConfigError: `size` is outside its range or larger than the number of clients.
        """
        count = cohort_count(self.size, len(client_ids))
        return self._first(count, client_ids, experience, round_index, available, ())

    def others(
        self,
        count: int,
        cohort: Collection[str],
        client_ids: Sequence[str],
        experience: int,
        round_index: int,
        available: Collection[str] | None = None,
    ) -> list[str]:
        """Return up to `count` clients to take the place of some in `cohort`: those who come next in the same draw."""
        return self._first(count, client_ids, experience, round_index, available, cohort)

    def _first(
        self,
        count: int,
        client_ids: Sequence[str],
        experience: int,
        round_index: int,
        available: Collection[str] | None,
        without: Collection[str],
    ) -> list[str]:
        draw = torch.randperm(len(client_ids), generator=generator(self.seed, "cohort", experience, round_index))
        there = [
            index
            for index in draw.tolist()
            if (available is None or client_ids[index] in available) and client_ids[index] not in without
        ]
        return [client_ids[index] for index in sorted(there[:count])]


def cohort_count(size: int | float | Literal["all"], clients: int, key: str = "cohort") -> int:
    """Return how many of `clients` take part in a round.

    Raises:
        ConfigError: `size` is outside its range or larger than the number of clients.
    """
    if size == "all":
        return clients
    if isinstance(size, float):
        if not 0 < size <= 1:
            raise ConfigError(Problem(key, size, "a fraction lies in (0, 1]; write an integer for a number of clients"))
        return max(1, math.ceil(round(size * clients, 9)))
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= clients:
        remedy = f"give `all`, a fraction in (0, 1], or a number from 1 to {clients}, the number of clients"
        raise ConfigError(Problem(key, size, remedy))
    return size
