"""How many clients a round needs."""

import math
from dataclasses import dataclass
from typing import Literal

from fedbe.errors import Facts, Problem


@dataclass(frozen=True)
class Quorum:
    """What becomes of a round in which clients fail.

    Attributes:
        least: Share (0.5) or number (3) of the clients which begin a round that must not fail.
        below: What happens when more fail: ``replace``: others train in their place, those who come next in the draw
            of the cohort, at most as many as the cohort has; ``stop``: the run ends there, to be continued later.
    """

    least: int | float = 0.5
    below: Literal["replace", "stop"] = "replace"

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the number."""
        whole = isinstance(self.least, int) and not isinstance(self.least, bool) and self.least >= 1
        if whole or (isinstance(self.least, float) and 0 < self.least <= 1):
            return []
        remedy = "give a share in (0, 1], or a whole number of clients, 1 or more"
        return [Problem(f"{key}.least", self.least, remedy)]

    def needed(self, begun: int) -> int:
        """Return how many of the clients that begin must not fail."""
        if isinstance(self.least, float):
            return math.ceil(round(self.least * begun, 9))
        return min(self.least, begun)
