"""The errors that `fedbe` raises, and how mistakes in a configuration are found and reported."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class FedBEError(Exception):
    """Base class of the errors that `fedbe` raises on purpose."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration.

    Attributes:
        key: Dotted key, for example ``data.init_args.sequence_length``.
        value: What was given.
        remedy: What is wrong and what to write instead, one sentence.
    """

    key: str
    value: object
    remedy: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value!r}: {self.remedy}"


class ConfigError(FedBEError):
    """Raised before work starts when a configuration cannot run; it carries every problem found.

    Args:
        problems: The mistakes; at least one.
    """

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


@dataclass(frozen=True)
class Facts:
    """What is known of a run when its configuration is checked, before work starts.

    Every class that a configuration names has ``check(key, facts)``, which returns its mistakes. The key is the dotted
    key of the object's arguments in the configuration, so that ``f"{key}.name"`` is that of an argument: it ends in
    ``.init_args`` for a class named by ``class_path``. An object that has another one for an argument checks it, too,
    under ``f"{key}.name.init_args"``.

    Attributes:
        depth: Blocks of the base model; 0 where it is not known.
        metrics: Paths of the metrics that the run records, for example ``downstream/accuracy``.
        dataset: The training split, a `datasets.Dataset`, that a partitioner is to divide; ``None`` elsewhere.
        optimizer: Builds the clients' optimizer from parameters.
        trainer: Arguments of each client's `L.Trainer`.
        timeout_seconds: How long a client may train; ``None`` for as long as it takes.
    """

    depth: int = 0
    metrics: Collection[str] = ()
    dataset: Any = None
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    timeout_seconds: float | None = None


NO_FACTS = Facts()
"""Nothing is known of the run."""


@contextmanager
def under(key: str) -> Iterator[None]:
    """Report the problems raised inside under `key`: what raises them knows its own arguments and not where it stands.

    Args:
        key: Dotted key of the arguments, for example ``general_tasks[0].init_args``.
    """
    try:
        yield
    except ConfigError as error:
        found = (Problem(f"{key}.{problem.key}", problem.value, problem.remedy) for problem in error.problems)
        raise ConfigError(*found) from error


class ExpansionError(FedBEError):
    """Raised when a model cannot be expanded so that its outputs stay what they were; the message says why."""


class UpdateError(FedBEError):
    """Raised when a client's update cannot enter an average; the message names the client and the tensor."""


class MessageError(FedBEError):
    """Raised when bytes are no message, or a message holds what cannot travel; the message says what."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: whoever manages the machine ends the run, which is what Ctrl-C is from whoever sits at it."""


class ClientTimeoutError(FedBEError):
    """Raised in a client's training when it has taken longer than it may."""


class StorageError(FedBEError):
    """Raised when something cannot be written: a full disk, a read-only folder; what was written before is intact."""


class QuorumError(FedBEError):
    """Raised when too few clients of a round came through; the message names each that failed."""


def check_at_least(key: str, minimum: float, **values: float | None) -> list[Problem]:
    """Return a problem for each value below `minimum`; ``None`` is no value."""
    return [
        Problem(f"{key}.{name}", value, f"must be at least {minimum}.")
        for name, value in values.items()
        if value is not None and value < minimum
    ]
