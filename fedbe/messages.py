"""What travels between server and clients: all of a message travels, and nothing else does.

One codec (`encode`, `decode`) turns each message into bytes: a JSON header and the raw tensors, as safetensors. Kept
outcomes, forked workers and remote clients use it alike. Nothing in it is ever executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from fedbe.errors import MessageError
from fedbe.storage.packed import MOST_BYTES, pack, unpack

Structure = Mapping[str, Any]
"""What it takes to build the same model elsewhere, as plain JSON values: positions of blocks, growth so far."""


def structure_version(structure: Structure) -> str:
    """Return a short digest that tells one structure of a model from another."""
    text = json.dumps(structure, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class FitTask:
    """What a client is given for one round.

    Attributes:
        client_id: The client's name in the data module.
        experience: Index of the task of a sequence; 0 in a plain run.
        round_index: 0-based round.
        received: The tensors it downloads, by exact parameter name.
        trainable_names: The exact parameter names it trains.
        extra: What it downloads besides for its local objective, for example control variates.
        structure: The model's structure that the names belong to; a client whose model has another one grows it first.
        resumes: The round whose kept tensors the client goes on from; ``None`` if no update of it was accepted yet.
        max_steps: Most local steps it may take; ``None`` for as many as the trainer's options say.
    """

    client_id: str
    experience: int
    round_index: int
    received: Mapping[str, Tensor]
    trainable_names: tuple[str, ...]
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    structure: Structure = field(default_factory=dict)
    resumes: int | None = None
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
        extra: What it sends besides for its local objective.
        structure: `structure_version` of the model it was trained in.
    """

    client_id: str
    tensors: Mapping[str, Tensor]
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    structure: str = ""

    @property
    def bytes_up(self) -> int:
        """What the client uploads, in bytes."""
        return payload_bytes([*self.tensors.values(), *self.extra.values()])


FailureKind = Literal["error", "timeout", "memory", "update"]


@dataclass(frozen=True)
class Failure:
    """Why a client has failed in a round.

    Attributes:
        client_id: The client.
        kind: ``error``, ``timeout`` or ``memory`` while it trained, ``update`` if what it sent cannot be used.
        reason: What happened, one line.
        structure: `structure_version` of the client's model.
    """

    client_id: str
    kind: FailureKind
    reason: str
    structure: str = ""

    @property
    def record(self) -> dict[str, str]:
        """What `metrics.jsonl` says of it."""
        return {"client": self.client_id, "kind": self.kind, "reason": self.reason}


Outcome = Update | Failure
"""The result of a client's round."""


@dataclass(frozen=True)
class ProbeReport:
    """What a client that probed reports of the base model: a few numbers per position, and no data.

    Attributes:
        client_id: The sender.
        scores: For each position the norm of the mean gradient of an identity block's zeroed parameters there.
        samples: What the client weighs in a mean over clients: the number of its samples.
        sketch: For each position the same random projection of that gradient at every client; None if not asked for.
        labels: How often the client has each label, which tells something about its data; None if not asked for.
        structure: `structure_version` of the model it was measured on, the base model: that of ``{}``.
    """

    client_id: str
    scores: tuple[float, ...]
    samples: int
    sketch: tuple[tuple[float, ...], ...] | None = None
    labels: tuple[int, ...] | None = None
    structure: str = structure_version({})


Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Evaluate:
    """A client is asked to score its own model: what it receives together with what it keeps.

    Attributes:
        task: What its model is made of; nothing is trained.
        split: On which of its data.
    """

    task: FitTask
    split: Split


@dataclass(frozen=True)
class Evaluation:
    """A client's score of its own model.

    Attributes:
        client_id: The client.
        accuracy: In [0, 1].
        loss: In nats per label.
        items: Number of labels that were scored.
        structure: `structure_version` of the client's model.
    """

    client_id: str
    accuracy: float
    loss: float
    items: int
    structure: str = ""


@dataclass(frozen=True)
class Greeting:
    """A client on another machine says that it is there.

    Attributes:
        client_id: Its name.
        samples: Number of its training samples.
        base: `fingerprint` of its base model, which must be the server's own.
    """

    client_id: str
    samples: int
    base: str


@dataclass(frozen=True)
class Probe:
    """A client is asked for a `ProbeReport`."""

    client_id: str


@dataclass(frozen=True)
class Prepare:
    """A client is asked to build the adapted model.

    Attributes:
        client_id: The client.
        structure: The model's structure.
    """

    client_id: str
    structure: Structure


@dataclass(frozen=True)
class Prepared:
    """A client has built the adapted model.

    Attributes:
        client_id: The client.
        structure: `structure_version` of its model.
    """

    client_id: str
    structure: str


@dataclass(frozen=True)
class Farewell:
    """A client is told that the run is over."""

    client_id: str


Message = (
    FitTask | Update | Failure | ProbeReport | Evaluate | Evaluation | Greeting | Probe | Prepare | Prepared | Farewell
)


def payload_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the exact size of tensors on the wire, in bytes, without any envelope."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def encode(message: Message) -> bytes:
    """Return a message as bytes, see `fedbe.storage.packed`.

    Raises:
        MessageError: It holds what cannot travel.
    """
    if type(message) not in _FIELDS:
        raise MessageError(f"{type(message).__name__} is no message")
    fields, tensors = _taken_apart(message)
    return pack({"message": type(message).__name__, **fields}, tensors)


def decode(data: bytes | bytearray | memoryview, most_bytes: int = MOST_BYTES) -> Message:
    """Return the message that `encode` turned into these bytes; tensors are on the CPU, equal to the bit.

    Only that it is a message is checked, not what it says.

    Args:
        data: The bytes, from whoever sent them.
        most_bytes: How many there may be.

    Raises:
        MessageError: They are no message.
    """
    fields, tensors = unpack(data, most_bytes)
    kind = fields.pop("message", None) if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise MessageError(f"no message of a kind that is known: {str(kind)[:40]!r}")
    message: Message = _put_together(_KINDS[kind], fields, tensors)
    if tensors:
        raise MessageError(f"a {kind} with tensors of no part of it: {next(iter(tensors))!r}")
    return message


@dataclass(frozen=True)
class _Reader:
    """How a field of a message is read.

    Attributes:
        what: What it must be, in words.
        fits: Whether a JSON value is that.
        read: Makes the field's value of it.
    """

    what: str
    fits: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda value: value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (_is_whole(value) and abs(value) < 2**63)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _or_none(reader: _Reader) -> _Reader:
    return _Reader(
        f"{reader.what} or null",
        lambda value: value is None or reader.fits(value),
        lambda value: None if value is None else reader.read(value),
    )


def _numbers(values: list[float]) -> tuple[float, ...]:
    return tuple(map(float, values))


_TEXT = _Reader("a text", _is_text)
_WHOLE = _Reader("a whole number", _is_whole)
_NUMBER = _Reader("a number", _is_number, float)
_NAMES = _Reader("a list of names", _list_of(_is_text), tuple)
_NUMBERS = _Reader("a list of numbers", _list_of(_is_number), _numbers)
_COUNTS = _Reader("a list of whole numbers", _list_of(_is_whole), tuple)
_ROWS = _Reader("lists of numbers", _list_of(_list_of(_is_number)), lambda rows: tuple(map(_numbers, rows)))
_OBJECT = _Reader("an object", lambda value: isinstance(value, dict))
_METRICS = _Reader(
    "an object of numbers",
    lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    lambda value: {name: float(number) for name, number in value.items()},
)
_KIND_OF_FAILURE = _Reader("a kind of failure", lambda value: value in get_args(FailureKind))
_SPLIT = _Reader("a split", lambda value: value in get_args(Split))

_FIELDS: Mapping[type, Mapping[str, _Reader | type]] = {
    FitTask: {
        "client_id": _TEXT,
        "experience": _WHOLE,
        "round_index": _WHOLE,
        "received": Tensor,
        "trainable_names": _NAMES,
        "extra": Tensor,
        "structure": _OBJECT,
        "resumes": _or_none(_WHOLE),
        "max_steps": _or_none(_WHOLE),
    },
    Update: {
        "client_id": _TEXT,
        "tensors": Tensor,
        "samples": _WHOLE,
        "metrics": _METRICS,
        "extra": Tensor,
        "structure": _TEXT,
    },
    Failure: {"client_id": _TEXT, "kind": _KIND_OF_FAILURE, "reason": _TEXT, "structure": _TEXT},
    ProbeReport: {
        "client_id": _TEXT,
        "scores": _NUMBERS,
        "samples": _WHOLE,
        "sketch": _or_none(_ROWS),
        "labels": _or_none(_COUNTS),
        "structure": _TEXT,
    },
    Evaluate: {"task": FitTask, "split": _SPLIT},
    Evaluation: {"client_id": _TEXT, "accuracy": _NUMBER, "loss": _NUMBER, "items": _WHOLE, "structure": _TEXT},
    Greeting: {"client_id": _TEXT, "samples": _WHOLE, "base": _TEXT},
    Probe: {"client_id": _TEXT},
    Prepare: {"client_id": _TEXT, "structure": _OBJECT},
    Prepared: {"client_id": _TEXT, "structure": _TEXT},
    Farewell: {"client_id": _TEXT},
}
"""The fields of each message: how they are read, `Tensor` for tensors by name, or the class of a message within it."""

_KINDS = {kind.__name__: kind for kind in _FIELDS}


def _taken_apart(message: Message) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields of a message as JSON values, and its tensors by ``field/name``."""
    fields: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, reader in _FIELDS[type(message)].items():
        value = getattr(message, name)
        if reader is Tensor:
            tensors |= _prefixed(name, value)
        elif isinstance(reader, type):
            fields[name], within = _taken_apart(value)
            tensors |= within
        else:
            fields[name] = value
    return fields, tensors


def _prefixed(field_name: str, tensors: Any) -> dict[str, Tensor]:
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise MessageError(f"`{field_name}` holds no tensors by name")
    return {f"{field_name}/{name}": tensor for name, tensor in tensors.items()}


def _put_together(kind: type, fields: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a message of its fields; takes its tensors out of `tensors`."""
    readers = _FIELDS[kind]
    expected = {name for name, reader in readers.items() if reader is not Tensor}
    if not isinstance(fields, dict) or fields.keys() != expected:
        raise MessageError(f"a {kind.__name__} that has not the fields {', '.join(sorted(expected))}")
    values: dict[str, Any] = {}
    for name, reader in readers.items():
        if reader is Tensor:
            keys = [key for key in tensors if key.startswith(f"{name}/")]
            values[name] = {key.removeprefix(f"{name}/"): tensors.pop(key) for key in keys}
        elif isinstance(reader, _Reader):
            values[name] = _read(f"{kind.__name__}.{name}", reader, fields[name])
        else:
            values[name] = _put_together(reader, fields[name], tensors)
    return kind(**values)


def _read(name: str, reader: _Reader, value: Any) -> Any:
    if not reader.fits(value):
        raise MessageError(f"{name} is {str(value)[:80]!r} and not {reader.what}")
    return reader.read(value)
