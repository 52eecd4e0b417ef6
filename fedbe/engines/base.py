"""What the loop asks of the place where clients run."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from fedbe.data import Batch
from fedbe.errors import ClientTimeoutError
from fedbe.expansion.probe import ProbeReport
from fedbe.messages import ClientTask, Failure, FailureKind, Outcome
from fedbe.prefix.store import PrefixReuse, Store


class Engine(Protocol):
    """Trains the clients of a cohort, in whatever place and number at a time."""

    def train(self, tasks: Iterable[ClientTask]) -> Iterator[tuple[ClientTask, Outcome]]:
        """Yield each task with what came of it, in the order of `tasks` however the clients were run.

        A client that raises, takes too long or runs out of memory is a `Failure` and ends nothing but its own round.

        Args:
            tasks: One for each client of the cohort. An engine that trains one client at a time takes each from the
                iterable when that client begins; one that trains several may take as many ahead.
        """
        ...

    def store(self, reuse: PrefixReuse) -> Store:
        """Return an empty store for what frozen blocks compute, which clients share wherever they run."""
        ...

    def probe(self, client_id: str) -> ProbeReport:
        """Return what a client reports of the base model (`Algorithm.probe`)."""
        ...


@runtime_checkable
class PreparedEngine(Engine, Protocol):
    """An engine that looks at the prepared model before round 1, and knows something that it takes to continue."""

    def setup(self, inputs: Batch) -> None:
        """Look at the model as it is now; called again when its structure has changed.

        Args:
            inputs: A real batch.

        Raises:
            ConfigError: Its clients cannot be trained here.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what it takes to continue to the same result, as plain JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; called after `setup`."""
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
