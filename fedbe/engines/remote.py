"""Clients on other machines: the server's side and the client's side, over any channel that carries bytes."""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Protocol

import torch

from fedbe.allocation.capabilities import Capabilities
from fedbe.client.plan import LocalPlan, prepare_model
from fedbe.data import Batch
from fedbe.engines.base import Engine, failure, one_line
from fedbe.engines.capabilities import simulated_capabilities
from fedbe.engines.in_process import InProcess
from fedbe.errors import ConfigError, MessageError, Problem
from fedbe.messages import (
    Evaluate,
    Evaluation,
    Failure,
    FailureKind,
    Farewell,
    FitTask,
    Greeting,
    Message,
    Outcome,
    Prepare,
    Prepared,
    Probe,
    ProbeReport,
    Structure,
    Update,
    decode,
    encode,
    structure_version,
)
from fedbe.seeding import generator
from fedbe.storage.checkpoint import fingerprint
from fedbe.storage.packed import MOST_BYTES
from fedbe.traits import ALL, Trait, Traits

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 1.0
"""How often it is looked whether those who are waited for are still there."""

Request = Probe | Prepare | FitTask | Evaluate
"""What a client is asked."""

_ANSWERS: Mapping[type, type] = {Probe: ProbeReport, Prepare: Prepared, FitTask: Update, Evaluate: Evaluation}
"""What it answers if nothing fails."""

_OWN_WORDS = tuple(
    f"fedbe.{part}" for part in ("adaptation", "algorithms", "client", "engines", "expansion", "messages")
)
"""Modules whose errors quote names, shapes and settings, and never a client's data."""

_ONE_AT_A_TIME = threading.Lock()
"""Held by the client of this process that computes: torch's global generator is one for all threads."""


class Channel(Protocol):
    """Carries bytes between a server and clients, which go by addresses of the channel's own; its server's end."""

    def present(self) -> Collection[str]:
        """Return the addresses of those who are there."""
        ...

    def send(self, address: str, data: bytes) -> None:
        """Send bytes to a client.

        Raises:
            OSError: It is not there.
        """
        ...

    def receive(self, seconds: float, most_bytes: int) -> tuple[str, bytes] | None:
        """Return what the next client sends, and its address; ``None`` if nothing arrives in time.

        Args:
            seconds: How long to wait.
            most_bytes: Larger messages are dropped before they are taken in.
        """
        ...

    def close(self) -> None:
        """Let go of all connections."""
        ...


class Connection(Protocol):
    """A client's end of a channel."""

    def send(self, data: bytes) -> None:
        """Send bytes to the server."""
        ...

    def receive(self, most_bytes: int) -> bytes | None:
        """Wait for what the server sends; ``None`` if it has gone."""
        ...


def framed(number: int, message: Message) -> bytes:
    """Return a message with the number of its request in front: 0 if nobody has asked."""
    return number.to_bytes(8, "big") + encode(message)


def unframed(data: bytes, most_bytes: int) -> Message:
    """Return the message behind the number.

    Raises:
        MessageError: The bytes are no message.
    """
    return decode(memoryview(data)[8:], most_bytes)


def number_of(data: bytes) -> int:
    """Return the number in front of a message."""
    return int.from_bytes(data[:8], "big")


class RemoteEngine(Engine):
    """Asks clients on other machines, all of a round at the same time.

    Each client says who it is and how many samples it has. It builds its model from its own configuration, and grows it
    when a task says so; what it keeps stays with it. What it sends is not trusted: a message that is too large or
    malformed is the client's failure of that round, as is no answer in time; an answer that comes later is dropped.

    Args:
        channel: Carries the messages.
        clients: The clients' names, in the order in which they are sampled and averaged, or how many to wait for, in
            the order of their names.
        greeting_seconds: How long to wait for all of them at the start.
        answer_seconds: How long a client may take for an answer; ``None`` for as long as it takes.
        most_bytes: Most bytes of an answer.

    Source: ours.
    """

    offers: Traits = ALL - {Trait.SHARED_MEMORY}
    _plan: LocalPlan

    def __init__(
        self,
        channel: Channel,
        clients: int | Sequence[str],
        greeting_seconds: float = 60.0,
        answer_seconds: float | None = None,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.channel, self.clients, self.most_bytes = channel, clients, most_bytes
        self.greeting_seconds, self.answer_seconds = greeting_seconds, answer_seconds
        self._addresses: dict[str, str] = {}
        self._samples: dict[str, int] = {}
        self._numbers = count(1)
        self._base = ""
        self._capabilities: Capabilities | None = None

    def start(self, plan: LocalPlan) -> None:
        """Wait for the clients.

        Raises:
            ConfigError: Not all of them came in time.
        """
        self._plan, self._base, self._capabilities = plan, fingerprint(plan.model), None
        deadline = time.monotonic() + self.greeting_seconds
        while lacking := self._lacking():
            left = deadline - time.monotonic()
            if left <= 0:
                raise ConfigError(Problem("engine.init_args.clients", self.clients, f"did not come in time: {lacking}"))
            self._receive(min(left, _LOOK_SECONDS), {})
        names = sorted(self._samples) if isinstance(self.clients, int) else self.clients
        self._samples = {name: self._samples[name] for name in names}

    @property
    def client_ids(self) -> Sequence[str]:
        """The clients in a fixed order."""
        return list(self._samples)

    @property
    def samples(self) -> Mapping[str, int]:
        """Client → number of its training samples, as it has announced."""
        return self._samples

    def probe(self, client_ids: Sequence[str]) -> list[ProbeReport]:
        """Return what clients report of the base model.

        Raises:
            ConfigError: One of them does not.
        """
        answers = self._ask([Probe(client) for client in client_ids])
        return [answer for answer in self._all_of(answers) if isinstance(answer, ProbeReport)]

    def prepared(self, inputs: Batch, structure: Structure, renamed: Mapping[str, str] | None = None) -> None:
        """Have clients build the adapted model; when its structure changes later, each learns of it with its task.

        What simulated devices can afford is counted on `inputs`, in place of the clients' rows.

        Raises:
            ConfigError: One of them cannot.
        """
        if renamed is None:
            list(self._all_of(self._ask([Prepare(client, structure) for client in self.client_ids])))
        self.reuse_prefix(self._plan, inputs)
        if self._plan.clock is not None:
            step = min(self._plan.data.batch_size, next(iter(self._samples.values())))
            rows = {name: tensor[torch.arange(step) % len(tensor)] for name, tensor in inputs.items()}
            self._capabilities = simulated_capabilities(self._plan, self._samples, rows)

    def fit(self, tasks: Iterable[FitTask]) -> Iterator[tuple[FitTask, Outcome]]:
        """Yield each task with its outcome; all are taken before the first client begins."""
        cohort = list(tasks)
        for task, answer in zip(cohort, self._ask(cohort), strict=True):
            assert isinstance(answer, Update | Failure)
            yield task, answer

    def evaluate(self, requests: Iterable[Evaluate]) -> Iterator[Evaluation]:
        """Yield the score of each client's own model; a client that does not answer is left out."""
        for answer in self._ask(list(requests)):
            if isinstance(answer, Evaluation):
                yield answer
            elif isinstance(answer, Failure):
                _log.warning("Client %r has not scored its model: %s", answer.client_id, answer.reason)

    def available(self, round_index: int) -> Collection[str]:
        """Return the clients that are there, and whose simulated devices are."""
        present, simulated = self.channel.present(), super().available(round_index)
        there = [client for client in self.client_ids if self._addresses[client] in present]
        return [client for client in there if simulated is None or client in simulated]

    @property
    def capabilities(self) -> Capabilities | None:
        """What clients can afford, where their devices are simulated."""
        return self._capabilities

    def close(self) -> None:
        """Tell the clients that the run is over."""
        for client, address in self._addresses.items():
            self._send(address, 0, Farewell(client))
        self.channel.close()

    # --- asking ------------------------------------------------------------------------------------------------------

    def _lacking(self) -> str:
        """Return who has not come yet, in words; nothing if all have."""
        if isinstance(self.clients, int):
            lacking = self.clients - len(self._samples)
            return f"{lacking} of {self.clients}" if lacking > 0 else ""
        return ", ".join(name for name in self.clients if name not in self._samples)

    def _ask(self, requests: Sequence[Request]) -> Iterator[Message]:
        """Yield the answer to each request in their order, or why there is none."""
        pending = {}
        for request in requests:
            asked = _Asked(request, next(self._numbers), self.answer_seconds)
            pending[asked.number] = asked
            address = self._addresses.get(asked.client_id, "")
            if not self._send(address, asked.number, request):
                asked.fail("error", "is not there")
        for asked in list(pending.values()):
            while asked.answer is None:
                self._wait(pending)
            del pending[asked.number]
            yield asked.answer

    def _wait(self, pending: Mapping[int, _Asked]) -> None:
        """Take in the next answer; if none comes, note who has not answered in time or has gone."""
        open_ = [asked for asked in pending.values() if asked.answer is None]
        seconds = min(_LOOK_SECONDS, *(asked.left for asked in open_))
        if self._receive(max(0.0, seconds), pending):
            return
        present = self.channel.present()
        for asked in open_:
            if asked.left <= 0:
                asked.fail("timeout", f"no answer within {self.answer_seconds:g} s")
            elif self._addresses[asked.client_id] not in present:
                asked.fail("error", "has gone")

    def _receive(self, seconds: float, pending: Mapping[int, _Asked]) -> bool:
        """Take in the next message, if one arrives in time; return whether it was an expected answer."""
        received = self.channel.receive(seconds, self.most_bytes)
        if received is None:
            return False
        address, data = received
        number, asked = number_of(data), pending.get(number_of(data))
        expected = asked is not None and asked.answer is None and self._addresses.get(asked.client_id) == address
        try:
            message = unframed(data, self.most_bytes)
        except MessageError as error:
            if asked is not None and expected:
                asked.fail("update", f"sent bytes that are not a message: {error}")
            return expected
        if asked is not None and expected:
            asked.take(message)
        elif isinstance(message, Greeting) and number == 0:
            self._greeted(address, message)
        else:
            _log.warning("Dropped a %s of %s that nobody waits for.", type(message).__name__, address)
        return expected

    def _greeted(self, address: str, greeting: Greeting) -> None:
        """Note where a client is: one that is expected, or that has come back from another address."""
        client, present = greeting.client_id, self.channel.present()
        taken = self._addresses.get(client, address) in present and self._addresses.get(client, address) != address
        if greeting.base != self._base:
            _log.warning("Client %r has another base model, and is left out.", client)
        elif taken or not self._expects(client):
            _log.warning("Client %r is not expected at %s, and is left out.", client, address)
        elif greeting.samples > 0:
            self._addresses[client] = address
            self._samples.setdefault(client, greeting.samples)

    def _expects(self, client: str) -> bool:
        if client in self._samples:
            return True
        return len(self._samples) < self.clients if isinstance(self.clients, int) else client in self.clients

    def _send(self, address: str, number: int, message: Message) -> bool:
        """Send a message; return whether that could be done."""
        try:
            self.channel.send(address, framed(number, message))
        except OSError:
            return False
        return True

    def _all_of(self, answers: Iterable[Message]) -> Iterator[Message]:
        for answer in answers:
            if isinstance(answer, Failure):
                raise ConfigError(Problem("engine", answer.client_id, answer.reason))
            yield answer


class _Asked:
    """A request, and what is answered.

    Args:
        request: What is asked.
        number: Its number.
        seconds: How long the answer may take; ``None`` for as long as it takes.

    Attributes:
        answer: What was answered, or why nothing was; ``None`` as long as it is waited for.
    """

    def __init__(self, request: Request, number: int, seconds: float | None) -> None:
        self.number = number
        self.client_id = client_of(request)
        self._expected = _ANSWERS[type(request)]
        self._deadline = math.inf if seconds is None else time.monotonic() + seconds
        self.answer: Message | None = None

    @property
    def left(self) -> float:
        """Seconds that are left for the answer, less than 0 if it is too late."""
        return self._deadline - time.monotonic()

    def fail(self, kind: FailureKind, reason: str) -> None:
        """Note why it has failed."""
        self.answer = Failure(self.client_id, kind, one_line(reason))

    def take(self, message: Message) -> None:
        """Take in what the client has answered."""
        mine = client_of(message) == self.client_id
        if isinstance(message, Failure) and mine:
            self.answer = replace(message, reason=one_line(message.reason))
        elif isinstance(message, self._expected) and mine:
            self.answer = message
        else:
            self.fail("update", f"sent a {type(message).__name__} where its {self._expected.__name__} is expected")


class RemoteClient:
    """The client's side: holds one client's rows, a model of its own and what the client keeps, and answers.

    Args:
        plan: What it trains, built from the same configuration as the server's: the same base model and seed; its data
            module has been connected to the model.
        client_id: Its name in the data module.
        most_bytes: Most bytes of a request.
    """

    def __init__(self, plan: LocalPlan, client_id: str, most_bytes: int = MOST_BYTES) -> None:
        self.plan = replace(plan, clock=None)  # the server simulates devices
        self.client_id, self.most_bytes = client_id, most_bytes
        self.engine = InProcess()
        self._inputs: Batch | None = None
        self._report: ProbeReport | None = None
        self._base = ""

    def start(self) -> Greeting:
        """Load the client's rows, once, and return who it is; what it keeps lasts from one server to the next."""
        if not self._base:
            self.plan.data.setup_client(self.client_id)
            self.engine.start(self.plan)
            self._base = fingerprint(self.plan.model)
        samples = self.engine.training.samples(self.client_id)
        return Greeting(self.client_id, samples, self._base)

    def serve(self, connection: Connection) -> None:
        """Greet, then answer until the run is over or the server has gone."""
        with _ONE_AT_A_TIME:
            greeting = self.start()
        connection.send(framed(0, greeting))
        while (data := connection.receive(self.most_bytes)) is not None:
            answer = self._answer_to(data)
            if answer is None:
                return
            connection.send(answer)

    def _answer_to(self, data: bytes) -> bytes | None:
        """Return the answer to a request, ``None`` if it says that the run is over; what cannot travel is a failure."""
        number = number_of(data)
        try:
            message = unframed(data, self.most_bytes)
            if isinstance(message, Farewell):
                return None
            with _ONE_AT_A_TIME:
                answer = self.answer(message)
            return framed(number, answer)
        except MessageError as error:
            return framed(number, self._failure(error))

    def answer(self, message: Message) -> Message:
        """Return the answer to a request; whatever is raised is a failure."""
        try:
            if client_of(message) != self.client_id:
                raise MessageError(f"{type(message).__name__} is for {client_of(message)!r}, not {self.client_id!r}")
            if isinstance(message, Probe):
                return self._probe()
            if isinstance(message, Prepare):
                self._come_to(message.structure)
                return Prepared(self.client_id, structure_version(message.structure))
            if isinstance(message, FitTask):
                self._come_to(message.structure)
                return self.engine.train(message)
            if isinstance(message, Evaluate):
                self._come_to(message.task.structure)
                return next(iter(list(self.engine.evaluate([message]))))
            raise MessageError(f"{type(message).__name__} is nothing that a client is asked")
        except Exception as error:  # whatever the client's data, model or callbacks do
            _log.warning("Client %r could not do what it was asked.", self.client_id, exc_info=error)
            self._leave()
            return self._failure(error)

    def _probe(self) -> ProbeReport:
        """Return what the client reports of the base model, which is there until the adapted model is built."""
        if self._report is None:
            if self._inputs is not None:
                raise MessageError("the base model is there no longer: start the client afresh")
            self._report = self.engine.probe([self.client_id])[0]
        return self._report

    def _leave(self) -> None:
        """Leave nothing of a task that has failed in the model."""
        self.plan.model.zero_grad(set_to_none=True)
        if self._inputs is not None:
            self.plan.adaptation.leave(self.plan.model)

    def _come_to(self, structure: Structure) -> None:
        """Build the adapted model, or grow it, if it is not of this structure; what the client keeps is renamed."""
        plan = self.plan
        if self._inputs is None:
            inputs = self._first_rows()
            prepare_model(plan, inputs, structure)
            self.engine.prepared(inputs, structure)
            self._inputs = inputs
        elif structure_version(plan.adaptation.structure()) != structure_version(structure):
            renamed = plan.adaptation.grow(plan.model, structure, self._inputs)
            plan.adaptation.hold(plan.model)
            self.engine.prepared(self._inputs, structure, renamed)

    def _first_rows(self) -> Batch:
        """Return two of the client's samples, on which the outputs of the model must stay what they were."""
        batches = self.plan.data.client_dataloader(self.client_id, generator(self.plan.seed, "inputs", self.client_id))
        return {name: rows[:2].to(self.plan.model.device) for name, rows in next(iter(batches)).items()}

    def _failure(self, error: Exception) -> Failure:
        structure = {} if self._inputs is None else self.plan.adaptation.structure()
        return discreet(failure(self.client_id, error, structure_version(structure)), error)


def discreet(failure: Failure, error: Exception) -> Failure:
    """Return a failure as the server may know it: an error that others raise may quote a client's data.

    Args:
        failure: With all that the error says.
        error: What the client has raised.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = str(frames[-1].f_globals.get("__name__")) if frames else ""
    if any(module.startswith(own) for own in _OWN_WORDS):
        return failure
    where = f" in {module}, line {frames[-1].f_lineno}" if frames else ""
    return replace(failure, reason=f"{type(error).__name__}{where}: the client's own log says more")


def client_of(message: Message) -> str:
    """Return which client a message is for or from."""
    return message.task.client_id if isinstance(message, Evaluate) else message.client_id
