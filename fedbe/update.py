"""What travels between server and clients, and its size."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class ClientTask:
    """What a client is given for one round.

    Attributes:
        client_id: The client's name in the data module.
        experience: Index of the task of a sequence; 0 in a plain run.
        round_index: 0-based round.
        received: The global tensors it downloads, by exact parameter name.
        trainable_names: The exact parameter names it trains, all of them among `received`.
    """

    client_id: str
    experience: int
    round_index: int
    received: Mapping[str, Tensor]
    trainable_names: tuple[str, ...]


@dataclass(frozen=True)
class Update:
    """What a client sends back: the tensors it trained, and nothing frozen.

    Attributes:
        client_id: The sender.
        tensors: The trained tensors by exact parameter name.
        samples: Number of samples really seen, counted in the training step.
        metrics: Scalars, for example the mean training ``loss`` and the measured ``seconds``.
    """

    client_id: str
    tensors: Mapping[str, Tensor]
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


def payload_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the exact size of tensors on the wire, in bytes, without any envelope."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
