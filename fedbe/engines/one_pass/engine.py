"""Clients of a cohort in one pass: the frozen part of the model runs once for several of them."""

import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import Any, Literal, TypeVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fedbe.algorithms.base import Algorithm
from fedbe.client.module import ResidentModule, StepNotes
from fedbe.client.trainer import QUIET, epoch_batches, local_steps
from fedbe.data import Batch
from fedbe.engines.in_process import InProcessEngine, fit
from fedbe.engines.one_pass.forward import OnePass, OnePassError
from fedbe.engines.one_pass.trial import measured, quickest, verify_one_pass
from fedbe.errors import ConfigError, Problem
from fedbe.expansion import freeze, set_training_modes
from fedbe.expansion.probe import ProbeReport
from fedbe.messages import ClientTask, Outcome, Update
from fedbe.modeling.tensors import copy_tensors, load_tensors
from fedbe.objectives import Objective, Plain
from fedbe.prefix.store import PrefixReuse, Store
from fedbe.seeding import derive_seed, isolated_rng
from fedbe.system.machine import Trimming

_log = logging.getLogger(__name__)
T = TypeVar("T")

KEY = "federation.clients_in_one_pass"

_OWN_OPTIONS = frozenset(
    {"max_steps", "max_epochs", "limit_train_batches", "gradient_clip_val", "gradient_clip_algorithm"}
)
"""Arguments of a client's Trainer that are followed client by client."""

_SHARED_OPTIONS = frozenset(
    {"accelerator", "devices", "precision", "deterministic", "benchmark", "detect_anomaly", "default_root_dir"}
)
"""Arguments that the one Trainer of several clients takes as they are."""


def check_one_pass(
    number: int | str,
    algorithm: Algorithm,
    objective: Objective,
    options: Mapping[str, Any],
    timeout_seconds: float | None,
) -> list[Problem]:
    """Return what keeps clients from being trained in one pass.

    Args:
        number: How many are to be.
        algorithm: What is trained.
        objective: What clients minimise.
        options: The arguments of a client's `L.Trainer`.
        timeout_seconds: How long a client may train.
    """
    reasons = []
    if not algorithm.shares_passes:
        reasons.append(f"a client of {type(algorithm).__name__} needs the model to itself: give 1")
    if type(objective) not in (Objective, Plain):
        reasons.append(f"{type(objective).__name__} acts on one client's model: give 1, or fedbe.objectives.Plain")
    if timeout_seconds is not None:
        reasons.append("clients in one pass have no time of their own: give 1, or leave client_timeout_seconds out")
    given = {name: item.default for name, item in inspect.signature(L.Trainer).parameters.items()}
    for name, value in options.items():
        scaled = name == "precision" and str(value).startswith("16")  # one scale of gradients for all clients
        if scaled or (name not in _OWN_OPTIONS | _SHARED_OPTIONS and value not in (given[name], [])):
            reasons.append(f"trainer.{name} = {value!r} is for one client at a time: give 1, or leave that out")
    return [Problem(KEY, number, reason) for reason in reasons]


@dataclass
class CohortEngine:
    """Trains several clients at a time in one pass of the resident model; each comes to its own result up to rounding.

    Clients step side by side, each with tensors, optimizer, schedule and gradient clipping of its own, as many steps as
    it would take alone. If anything goes wrong they are trained one by one, so that each has its own outcome. Of the
    time that a pass takes each client is said to have taken its part, by samples. Where a round is continued in its
    middle, others train together than before: its result is the same up to rounding, and not to the bit.

    Attributes:
        clients: What trains a client by itself.
        number: How many clients train at a time; ``auto`` for as many as is quickest, which `setup` measures.
        most: Clients in a cohort.

    Source: ours.
    """

    clients: InProcessEngine
    number: int | Literal["auto"]
    most: int
    _at_once: int = field(default=1, init=False)
    _trimming: Trimming = field(default_factory=Trimming, init=False, repr=False, compare=False)

    def setup(self, inputs: Batch) -> None:
        """Verify that one pass comes to what single passes come to, and choose how many clients it is for.

        Raises:
            ConfigError: A number was given, and in this architecture or with these settings it does not.
        """
        problems = self._problems(inputs)
        if self.number != "auto":
            if problems:
                raise ConfigError(*problems)
            self._at_once = min(self.number, self.most)
            return
        try:
            self._at_once = 1 if problems else quickest(measured(self.clients, self.most))
        except Exception as error:  # whatever a client's data does; this is not its round
            _log.warning("Clients are trained one by one: %s: %s", type(error).__name__, error)
            self._at_once = 1

    def state_dict(self) -> dict[str, Any]:
        """Return how many clients train at a time: another number would come to another rounding."""
        return {"clients_in_one_pass": self._at_once}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with as many as before."""
        self._at_once = state["clients_in_one_pass"]

    def _problems(self, inputs: Batch) -> list[Problem]:
        engine = self.clients
        settings = engine.algorithm, engine.objective, engine.trainer, engine.timeout_seconds
        if problems := check_one_pass(self.number, *settings):
            return problems
        kind = type(engine.model).__name__
        try:
            verify_one_pass(engine.model, engine.algorithm.trainable_names, inputs)
        except OnePassError as error:
            return [Problem(KEY, self.number, f"{kind}: {error}: give 1")]
        except Exception as error:  # an unknown architecture may fail in any way
            return [Problem(KEY, self.number, f"{kind} fails with {type(error).__name__}: {error}: give 1")]
        return []

    def store(self, reuse: PrefixReuse) -> Store:
        """Return an empty store for what frozen blocks compute."""
        return self.clients.store(reuse)

    def probe(self, client_id: str) -> ProbeReport:
        """Return what a client reports of the base model."""
        return self.clients.probe(client_id)

    def train(self, tasks: Iterable[ClientTask]) -> Iterator[tuple[ClientTask, Outcome]]:
        """Yield each task with what came of it."""
        remaining = iter(tasks)
        while group := list(islice(remaining, self._at_once)):
            yield from zip(group, self._attempt(group), strict=True)

    def _attempt(self, tasks: Sequence[ClientTask]) -> Iterable[Outcome]:
        """Train clients in one pass; if one of them raises, train each by itself."""
        if len(tasks) > 1:
            self._trimming.before_client()
            try:
                return self.train_clients(tasks)
            except Exception as error:  # whatever one client's data does; alone it is that client's own failure
                names = ", ".join(task.client_id for task in tasks)
                _log.warning("Trained one by one: %s (%s: %s)", names, type(error).__name__, error)
        return (self.clients.attempt(task) for task in tasks)

    def train_clients(self, tasks: Sequence[ClientTask]) -> list[Update]:
        """Train clients in one pass and return what each sends."""
        engine, started = self.clients, time.perf_counter()
        trained = {name for task in tasks for name in task.trainable_names}
        names = [name for name, _ in engine.model.named_parameters() if name in trained]
        participants = [self._participant(task, names) for task in tasks]
        group = CohortModule(OnePass(engine.model, names), names, participants, engine.trainer)
        options = {name: value for name, value in engine.trainer.items() if name in _SHARED_OPTIONS}
        # Nothing should draw from the global generator here; whatever does leaves it as it was.
        with isolated_rng(derive_seed(engine.seed, "one pass")):
            fit(L.Trainer(**QUIET, **options, max_epochs=1), group, Steps(participants))
        seconds, samples = time.perf_counter() - started, sum(p.notes.samples for p in participants)
        return [self._update(p, seconds * p.notes.samples / max(1, samples)) for p in participants]

    def _participant(self, task: ClientTask, names: Iterable[str]) -> "Participant":
        engine, model = self.clients, self.clients.model
        engine.algorithm.begin(model, task)
        tensors: dict[str, Tensor] = copy_tensors(model, names)
        own = set(task.trainable_names)
        tensors = {name: nn.Parameter(tensor) if name in own else tensor for name, tensor in tensors.items()}
        batches = engine.batches(task)
        options = {**engine.trainer} | ({} if task.max_steps is None else {"max_steps": task.max_steps})
        steps = local_steps(options, len(batches))
        per_epoch = epoch_batches(options, len(batches))
        if per_epoch == 0:
            raise ValueError(f"client {task.client_id!r} has no batch: trainer.limit_train_batches leaves none")
        epochs = (islice(batches, per_epoch) for _ in count())
        taken = drawn(islice(chain.from_iterable(epochs), steps), derive_seed(engine.seed, "modules", *task.purpose))
        optimizer = engine.optimizer([tensor for tensor in tensors.values() if isinstance(tensor, nn.Parameter)])
        schedule = engine.schedule.build(optimizer, task.round_index, engine.rounds, steps)
        watched = engine.algorithm.watched(task.trainable_names)
        notes = StepNotes({unit: [tensors[name] for name in watched[unit]] for unit in watched})
        added_loss = engine.algorithm.added_loss(model, task)
        return Participant(task, tensors, taken, steps, optimizer, schedule, notes, added_loss)

    def _update(self, participant: "Participant", seconds: float) -> Update:
        """Return what a client sends; `seconds` are its share of the group's time."""
        task, model, notes = participant.task, self.clients.model, participant.notes
        load_tensors(model, participant.tensors)
        sent, kept = self.clients.algorithm.finish(model, task)
        return Update(task.client_id, sent, notes.samples, {"seconds": seconds, **notes.metrics}, kept)


@dataclass(frozen=True)
class Participant:
    """One of the clients that train in one pass.

    Attributes:
        task: What it was given.
        tensors: Its values of all that some client of the group trains, parameters where it does itself.
        batches: Its batches, one for each of its steps.
        steps: How many local steps it takes.
        optimizer: Over its own parameters.
        schedule: Of its learning rate.
        notes: What is noted of its steps.
        added_loss: What its algorithm adds to the model's own loss after each forward pass.
    """

    task: ClientTask
    tensors: Mapping[str, Tensor]
    batches: Iterator[Batch]
    steps: int
    optimizer: Optimizer
    schedule: LambdaLR
    notes: StepNotes
    added_loss: Callable[[], Tensor] | None


@dataclass(frozen=True)
class Steps:
    """The batches of several clients side by side: at each step one of each client that is not done, by its index.

    Attributes:
        participants: The clients.
    """

    participants: Sequence[Participant]

    def __len__(self) -> int:
        return max(participant.steps for participant in self.participants)

    def __iter__(self) -> Iterator[dict[int, Batch]]:
        for step in range(len(self)):
            yield {index: next(p.batches) for index, p in enumerate(self.participants) if step < p.steps}


class CohortModule(ResidentModule):
    """The local training of several clients, step by step in one pass of the shared model.

    Args:
        one_pass: The model's pass over several clients' batches.
        names: Exact names of all parameters that some client trains.
        participants: The clients.
        options: The arguments of a client's Trainer; its gradient clipping is done here, client by client.
    """

    def __init__(
        self,
        one_pass: OnePass,
        names: Sequence[str],
        participants: Sequence[Participant],
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = one_pass.model
        self._one_pass, self._participants = one_pass, participants
        self._clip = options.get("gradient_clip_val"), options.get("gradient_clip_algorithm")
        freeze(self.model, ())
        set_training_modes(one_pass.model, names)

    def training_step(self, batches: Mapping[int, Batch], step: int) -> None:
        """Take one local step of each client that has a batch."""
        stepping = [self._participants[index] for index in batches]
        with self._one_pass.installed():
            added = [p.added_loss for p in stepping]
            outputs = self._one_pass.outputs([p.tensors for p in stepping], list(batches.values()), added)
        for participant, output, batch in zip(stepping, outputs, batches.values(), strict=True):
            participant.notes.loss(output.loss, batch)
        # No client's tensors are in another's loss, so that each gets the gradient of its own.
        self.manual_backward(torch.stack([output.loss for output in outputs]).sum())
        for participant in stepping:
            participant.notes.gradients()
            self.clip_gradients(participant.optimizer, *self._clip)
            participant.optimizer.step()
            participant.schedule.step()
            participant.optimizer.zero_grad()

    def configure_optimizers(self) -> list[Optimizer]:
        """Return each client's optimizer."""
        return [participant.optimizer for participant in self._participants]

    def on_fit_end(self) -> None:
        """Free optimizer state now, and not when the Trainer's reference cycles are collected."""
        for participant in self._participants:
            participant.optimizer.state.clear()


def drawn(items: Iterator[T], seed: int) -> Iterator[T]:
    """Yield from an iterator to which torch's global generator is one of its own, seeded with `seed`."""
    with isolated_rng(seed):
        state = torch.get_rng_state()
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            item = next(items, None)
            state = torch.get_rng_state()
        if item is None:
            return
        yield item
