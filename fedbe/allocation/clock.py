"""The simulated clock: how long a round takes, who is late, and what is done about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, inf
from typing import Literal

from fedbe.allocation.profiles import Fleet
from fedbe.errors import Facts, Problem

Late = Literal["wait", "drop", "partial"]
# Whoever takes as many steps as fit may be a rounding error behind.
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class RoundTime:
    """How a round went by the simulated clock.

    Attributes:
        seconds: How long the server waited.
        late: The clients whose updates it did not wait for, in the order of the cohort.
    """

    seconds: float
    late: tuple[str, ...] = ()


@dataclass(frozen=True)
class SimulatedClock:
    """The time that a round would take if clients worked side by side on devices of their own.

    Attributes:
        fleet: The clients' devices.
        late: ``wait`` for the slowest client; ``drop`` whoever is not done by the deadline; ``partial``: a client takes
            as many local steps as fit, and is dropped if not even one does.
        deadline_seconds: When a round ends under ``drop`` and ``partial``; ``wait`` ignores it.
    """

    fleet: Fleet
    late: Late = "wait"
    deadline_seconds: float | None = None

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this section, the fleet's among them."""
        problems = self.fleet.check(f"{key}.fleet.init_args", facts)
        if self.late != "wait" and self.deadline_seconds is None:
            problems.append(Problem(f"{key}.deadline_seconds", None, f"late: {self.late} needs a deadline in seconds"))
        if self.deadline_seconds is not None and not 0 < self.deadline_seconds < inf:
            problems.append(Problem(f"{key}.deadline_seconds", self.deadline_seconds, "give seconds above 0"))
        return problems

    def round(self, seconds_by_client: Mapping[str, float]) -> RoundTime:
        """Return how long a round takes in which each client of the cohort takes so many seconds."""
        return round_time(seconds_by_client, None if self.late == "wait" else self.deadline_seconds)


def round_time(seconds_by_client: Mapping[str, float], deadline_seconds: float | None = None) -> RoundTime:
    """Return how long a round takes, and who is late.

    Args:
        seconds_by_client: How long each client of the cohort takes; infinite for one that cannot.
        deadline_seconds: When the server stops waiting; ``None``: never. It goes on at once when all are done.

    Source: ours.
    """
    slowest = max(seconds_by_client.values(), default=0.0)
    if deadline_seconds is None or slowest <= deadline_seconds:
        return RoundTime(slowest)
    late = tuple(client for client, taken in seconds_by_client.items() if taken > deadline_seconds * _ROUNDING)
    return RoundTime(deadline_seconds, late)


def steps_within(deadline_seconds: float, transfer_seconds: float, step_seconds: float, steps: int) -> int:
    """Return how many of `steps` local steps end by the deadline, from 0 to all: time = transfer + n × step.

    Source: ours.
    """
    left = deadline_seconds - transfer_seconds
    if left < step_seconds:
        return 0
    fitting = steps if steps * step_seconds <= left else floor(left / step_seconds)
    return fitting if transfer_seconds + fitting * step_seconds <= deadline_seconds else fitting - 1
