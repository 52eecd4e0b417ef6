"""What the loop asks of the place where clients run."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from fedbe.expansion.probe import ProbeReport
from fedbe.update import ClientTask, Update


class Engine(Protocol):
    """Trains the clients of a cohort, in whatever place and number at a time."""

    def train(self, tasks: Iterable[ClientTask]) -> Iterator[tuple[ClientTask, Update]]:
        """Yield each task with its update, in the order of `tasks` however the clients were run.

        Args:
            tasks: One for each client of the cohort, taken from the iterable only when its client begins.
        """
        ...

    def probe(self, client_id: str) -> ProbeReport:
        """Return what a client reports of the base model (`Algorithm.probe`)."""
        ...
