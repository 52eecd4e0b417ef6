"""Clients of a cohort in one pass: the frozen part of the model runs once for several of them."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any, Literal, TypeVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fedbe.client.module import ResidentModule
from fedbe.client.run import LocalRun
from fedbe.client.trainer import CLIPPING, PLACE, STEPS, epoch_batches, fit, local_steps, quiet_trainer
from fedbe.data import Batch
from fedbe.engines.local import LocalEngine
from fedbe.engines.one_pass.forward import OnePass as Pass
from fedbe.engines.one_pass.forward import OnePassError
from fedbe.engines.one_pass.trial import measured, quickest, verify_one_pass
from fedbe.errors import ConfigError, Facts, Problem, check_at_least
from fedbe.messages import FitTask, Outcome, Structure, Update
from fedbe.objectives import LocalObjective
from fedbe.seeding import derive_seed, isolated_rng
from fedbe.traits import ALL, Trait, Traits

_log = logging.getLogger(__name__)
T = TypeVar("T")

_NEEDS: Traits = frozenset({Trait.COPIED_IN_AND_OUT, Trait.SEVERAL_CLIENTS})
_OFFERS: Traits = ALL - {Trait.SINGLE_CLIENT_STEPS}


class OnePass(LocalEngine):
    """Trains several clients at a time in one pass of the resident model; each comes to its own result up to rounding.

    Clients step side by side, each with tensors, optimizer, schedule and gradient clipping of its own, as many steps as
    it would take alone. If anything goes wrong they are trained one by one, so that each has its own outcome. Of the
    time that a pass takes each client is said to have taken its part, by samples. Where a round is continued in its
    middle, others train together than before: its result is the same up to rounding, and not to the bit. It pays for
    small batches of short sequences, see ``fedbe bench cohort``.

    Args:
        clients: How many clients train at a time; ``auto`` for as many as is quickest, measured before round 1, and one
            by one where they cannot train in one pass.

    Source: ours.
    """

    def __init__(self, clients: int | Literal["auto"] = "auto") -> None:
        self.clients = clients
        self._at_once = 1
        if clients not in ("auto", 1):  # or else clients may train one by one
            self.needs, self.offers = _NEEDS, _OFFERS

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what keeps this number of clients from being trained in one pass."""
        if self.clients == "auto":
            return []
        problems = check_at_least(key, 1, clients=self.clients)
        if self.clients > 1:
            reasons = reasons_against(facts.trainer, facts.timeout_seconds)
            problems += [Problem(f"{key}.clients", self.clients, reason) for reason in reasons]
        return problems

    def prepared(self, inputs: Batch, structure: Structure, renamed: Mapping[str, str] | None = None) -> None:
        """Verify that one pass gives the results of single passes, and choose the number of clients in it.

        Raises:
            ConfigError: A number was given, and in this architecture or with these settings it does not.
        """
        super().prepared(inputs, structure, renamed)
        self._at_once = 1
        if self.clients == 1:
            return
        reasons = self._reasons(inputs)
        if self.clients != "auto":
            if reasons:
                raise ConfigError(*(Problem("engine.init_args.clients", self.clients, reason) for reason in reasons))
            self._at_once = min(self.clients, self._most)
        elif not reasons:
            self._at_once = self._quickest()

    def state_dict(self) -> dict[str, Any]:
        """Return how many clients train at a time: another number would come to another rounding."""
        return {"clients_in_one_pass": self._at_once}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with as many as before."""
        self._at_once = state["clients_in_one_pass"]

    def fit(self, tasks: Iterable[FitTask]) -> Iterator[tuple[FitTask, Outcome]]:
        """Yield each task with its outcome; as many are taken as train at a time."""
        remaining = iter(tasks)
        while group := list(islice(remaining, self._at_once)):
            yield from zip(group, self._attempt(group), strict=True)

    def train_clients(self, tasks: Sequence[FitTask]) -> list[Update]:
        """Train clients in one pass and return what each sends."""
        started, index = time.perf_counter(), self.training.look_at_model()
        parameters = index.in_order(name for task in tasks for name in task.trainable_names)
        participants = [self._participant(task, parameters) for task in tasks]
        index.freeze(())
        index.set_training_modes(parameters)
        group = GroupModule(Pass(self.plan.model, list(parameters)), participants, self.plan.trainer)
        options = {name: value for name, value in self.plan.trainer.items() if name in PLACE}
        try:
            # Nothing should draw from the global generator here; whatever does leaves it as it was.
            with isolated_rng(derive_seed(self.plan.seed, "one pass")):
                fit(quiet_trainer({**options, "max_epochs": 1}), group, Steps(participants))
        finally:
            group.let_go()
        seconds, samples = time.perf_counter() - started, sum(p.run.notes.samples for p in participants)
        return [self._update(p, seconds * p.run.notes.samples / max(1, samples)) for p in participants]

    @property
    def _most(self) -> int:
        return self.plan.cohort or len(self.client_ids)

    def _reasons(self, inputs: Batch) -> list[str]:
        """Return what keeps clients from being trained in one pass of the prepared model."""
        plan = self.plan
        reasons = reasons_against(plan.trainer, plan.timeout_seconds)
        for part in (plan.adaptation, plan.topology, plan.objective):
            if _NEEDS - part.offers or part.needs - _OFFERS:
                reasons.append(f"a client with {type(part).__name__} needs the model to itself: give 1")
        return reasons or self._tried(inputs)

    def _tried(self, inputs: Batch) -> list[str]:
        model = self.plan.model
        try:
            verify_one_pass(model, self.plan.adaptation.trainable_names, inputs)
        except OnePassError as error:
            return [f"{type(model).__name__}: {error}: give 1"]
        except Exception as error:  # an unknown architecture may fail in any way
            return [f"{type(model).__name__} fails with {type(error).__name__}: {error}: give 1"]
        return []

    def _quickest(self) -> int:
        try:
            return quickest(measured(self.plan, self._most))
        except Exception as error:  # whatever a client's data does; this is not its round
            _log.warning("Clients are trained one by one: %s: %s", type(error).__name__, error)
            return 1

    def _attempt(self, tasks: Sequence[FitTask]) -> Iterable[Outcome]:
        """Train clients in one pass; if one of them raises, train each by itself."""
        if len(tasks) > 1:
            self._trimming.before_client()
            try:
                return self.train_clients(tasks)
            except Exception as error:  # whatever one client's data does; alone it is that client's own failure
                names = ", ".join(task.client_id for task in tasks)
                _log.warning("Trained one by one: %s (%s: %s)", names, type(error).__name__, error)
        return (self.attempt(task) for task in tasks)

    def _participant(self, task: FitTask, parameters: Mapping[str, nn.Parameter]) -> Participant:
        plan, run = self.plan, self.training.begin(task)
        if type(run.objective) is not LocalObjective:
            raise OnePassError(f"{type(plan.objective).__name__} acts on one client's model")
        tensors: dict[str, Tensor] = {
            name: nn.Parameter(own) if name in run.parameters else own
            for name, own in ((name, parameter.detach().clone()) for name, parameter in parameters.items())
        }
        run.train({name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)})
        batches = self.training.batches(task)
        options = {**plan.trainer} | ({} if task.max_steps is None else {"max_steps": task.max_steps})
        steps, per_epoch = local_steps(options, len(batches)), epoch_batches(options, len(batches))
        if per_epoch == 0:
            raise ValueError(f"client {task.client_id!r} has no batch: trainer.limit_train_batches leaves none")
        epochs = (islice(batches, per_epoch) for _ in count())
        taken = drawn(islice(chain.from_iterable(epochs), steps), derive_seed(plan.seed, "modules", *task.purpose))
        return Participant(run, tensors, taken, steps, *run.optimizer(steps))

    def _update(self, participant: Participant, seconds: float) -> Update:
        """Return what a client sends; `seconds` are its share of the group's time."""
        self.training.index.load(participant.tensors)
        return self.training.finish(participant.run, seconds)


def reasons_against(trainer: Mapping[str, Any], timeout_seconds: float | None) -> list[str]:
    """Return what keeps clients from being trained in one pass, with a remedy.

    Args:
        trainer: The arguments of a client's `L.Trainer`.
        timeout_seconds: How long a client may train.
    """
    reasons = []
    if timeout_seconds is not None:
        reasons.append("clients in one pass have no time of their own: give 1, or leave client_timeout_seconds out")
    given = {name: item.default for name, item in inspect.signature(L.Trainer).parameters.items()}
    followed = CLIPPING | PLACE | STEPS - {"accumulate_grad_batches"}
    for name, value in trainer.items():
        scaled = name == "precision" and str(value).startswith("16")  # one scale of gradients for all clients
        if scaled or (name not in followed and value not in (given[name], [])):
            reasons.append(f"trainer.{name} = {value!r} is for one client at a time: give 1, or leave that out")
    return reasons


@dataclass(frozen=True)
class Participant:
    """One of the clients that train in one pass.

    Attributes:
        run: Its training.
        tensors: Its values of all that some client of the group trains, parameters where it does itself.
        batches: Its batches, one for each of its steps.
        steps: How many local steps it takes.
        optimizer: Over its own parameters.
        schedule: Of its learning rate.
    """

    run: LocalRun
    tensors: Mapping[str, Tensor]
    batches: Iterator[Batch]
    steps: int
    optimizer: Optimizer
    schedule: LambdaLR


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


class GroupModule(ResidentModule):
    """The local training of several clients, step by step in one pass of the shared model.

    Args:
        one_pass: The model's pass over several clients' batches.
        participants: The clients.
        options: The arguments of a client's Trainer; its gradient clipping is done here, client by client.
    """

    def __init__(self, one_pass: Pass, participants: Sequence[Participant], options: Mapping[str, Any]) -> None:
        super().__init__(one_pass.model)
        self.automatic_optimization = False
        self._one_pass, self._participants = one_pass, participants
        self._clip = options.get("gradient_clip_val"), options.get("gradient_clip_algorithm")

    def training_step(self, batches: Mapping[int, Batch], step: int) -> None:
        """Take one local step of each client that has a batch."""
        stepping = [self._participants[index] for index in batches]
        with self._one_pass.installed():
            added = [p.run.added_loss for p in stepping]
            outputs = self._one_pass.outputs([p.tensors for p in stepping], list(batches.values()), added)
        losses = [p.run.loss(o.loss, b) for p, o, b in zip(stepping, outputs, batches.values(), strict=True)]
        # No client's tensors are in another's loss, so that each gets the gradient of its own.
        self.manual_backward(torch.stack(losses).sum())
        for participant in stepping:
            self._step(participant)

    def _step(self, participant: Participant) -> None:
        optimizer = participant.optimizer
        participant.run.before_step(optimizer, lambda: self.clip_gradients(optimizer, *self._clip))
        optimizer.step()
        participant.schedule.step()
        optimizer.zero_grad()

    def configure_optimizers(self) -> list[Optimizer]:
        """Return each client's optimizer."""
        return [participant.optimizer for participant in self._participants]

    def let_go(self) -> None:
        """Free optimizer state and tensors now, and not when the Trainer's reference cycles are collected."""
        for participant in self._participants:
            participant.optimizer.state.clear()
        self._participants = ()


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
