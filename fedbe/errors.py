"""The errors that `fedbe` raises, and the list in which configuration problems are collected."""

from dataclasses import dataclass


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


class ExpansionError(FedBEError):
    """Raised when a model cannot be expanded so that its outputs stay what they were; the message says why."""


class UpdateError(FedBEError):
    """Raised when a client's update cannot enter an average; the message names the client and the tensor."""


class ClientTimeoutError(FedBEError):
    """Raised in a client's training when it has taken longer than it may."""


class QuorumError(FedBEError):
    """Raised when too few clients of a round came through; the message names each that failed."""


def check_at_least(key: str, minimum: float, **values: float | None) -> list[Problem]:
    """Return a problem for each value below `minimum`; ``None`` is no value."""
    return [
        Problem(f"{key}.{name}", value, f"must be at least {minimum}.")
        for name, value in values.items()
        if value is not None and value < minimum
    ]
