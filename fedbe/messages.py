"""What travels between server and clients, its size, and how tensors get into and out of the resident model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class ClientTask:
    """What a client is given for one round.

    Attributes:
        client_id: The client's name in the data module.
        experience: Index of the task of a sequence; 0 in a plain run.
        round_index: 0-based round.
        received: The tensors it downloads, by exact parameter name.
        trainable_names: The exact parameter names it trains.
        kept: What it kept to itself when it took part before; empty at first. Does not travel.
        extra: What it downloads besides for its local objective, for example control variates.
        objective_kept: What its local objective kept when it took part before. Does not travel.
        max_steps: Most local steps it may take; ``None`` for as many as the trainer's options say.
    """

    client_id: str
    experience: int
    round_index: int
    received: Mapping[str, Tensor]
    trainable_names: tuple[str, ...]
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    objective_kept: Mapping[str, Tensor] = field(default_factory=dict)
    max_steps: int | None = None

    @property
    def bytes_down(self) -> int:
        """What the client downloads, in bytes."""
        return payload_bytes([*self.received.values(), *self.extra.values()])

    @property
    def purpose(self) -> tuple[str | int, ...]:
        """What this client's random numbers of this round are derived from, beside the seed."""
        return "client", self.experience, self.round_index, self.client_id


@dataclass(frozen=True)
class Update:
    """What a client sends back: the tensors it trained, and nothing frozen.

    Attributes:
        client_id: The sender.
        tensors: The trained tensors by exact parameter name.
        samples: Number of samples really seen, counted in the training step.
        metrics: Scalars: the mean training ``loss``, ``first_loss`` and ``last_loss``, the measured ``seconds``, and
            ``gradient_norm/<unit>`` where the algorithm asks for it.
        kept: What the client keeps to itself for the next time. Does not travel.
        extra: What it sends besides for its local objective.
        objective_kept: What its local objective keeps for the next time. Does not travel.
    """

    client_id: str
    tensors: Mapping[str, Tensor]
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    objective_kept: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def bytes_up(self) -> int:
        """What the client uploads, in bytes."""
        return payload_bytes([*self.tensors.values(), *self.extra.values()])


FailureKind = Literal["error", "timeout", "memory", "update"]


@dataclass(frozen=True)
class Failure:
    """Why nothing came of a client's round.

    Attributes:
        client_id: The client.
        kind: ``error``, ``timeout`` or ``memory`` while it trained, ``update`` if what it sent cannot be used.
        reason: What happened, one line.
        error: The exception, where there is one in this process.
    """

    client_id: str
    kind: FailureKind
    reason: str
    error: Exception | None = field(default=None, compare=False, repr=False)

    @property
    def record(self) -> dict[str, str]:
        """What `metrics.jsonl` says of it."""
        return {"client": self.client_id, "kind": self.kind, "reason": self.reason}


Outcome = Update | Failure
"""What comes of a client's round."""


def payload_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the exact size of tensors on the wire, in bytes, without any envelope."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
