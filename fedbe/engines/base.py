"""What the loop asks of the place where clients run."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from fedbe.errors import ClientTimeoutError
from fedbe.expansion.probe import ProbeReport
from fedbe.prefix import PrefixReuse, Store
from fedbe.update import ClientTask, Failure, FailureKind, Outcome


class Engine(Protocol):
    """Trains the clients of a cohort, in whatever place and number at a time."""

    def train(self, tasks: Iterable[ClientTask]) -> Iterator[tuple[ClientTask, Outcome]]:
        """Yield each task with what came of it, in the order of `tasks` however the clients were run.

        A client that raises, takes too long or runs out of memory is a `Failure` and ends nothing but its own round.

        Args:
            tasks: One for each client of the cohort, taken from the iterable only when its client begins.
        """
        ...

    def store(self, reuse: PrefixReuse) -> Store:
        """Return an empty store for what frozen blocks compute, which clients share wherever they run."""
        ...

    def probe(self, client_id: str) -> ProbeReport:
        """Return what a client reports of the base model (`Algorithm.probe`)."""
        ...


def failure(client_id: str, error: Exception) -> Failure:
    """Return what the loop is told of a client that raised."""
    kind: FailureKind = "error"
    if isinstance(error, ClientTimeoutError):
        kind = "timeout"
    elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        kind = "memory"
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return Failure(client_id, kind, reason, error)
