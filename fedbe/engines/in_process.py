"""Clients in this process, one after another, on the one resident model."""

import copy
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import lightning as L
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from fedbe.algorithms.base import Algorithm
from fedbe.client.module import ClientModule, OptimizerFactory
from fedbe.client.schedule import Schedule
from fedbe.client.trainer import QUIET
from fedbe.data import FederatedDataModule
from fedbe.engines.base import failure
from fedbe.expansion.probe import ProbeReport
from fedbe.messages import ClientTask, Outcome, Update
from fedbe.objectives import Objective
from fedbe.prefix.store import PrefixReuse, Store
from fedbe.seeding import derive_seed, generator, isolated_rng
from fedbe.system.machine import Trimming


@dataclass
class InProcessEngine:
    """Trains clients one at a time: a client's tensors are copied in, trained with a new `L.Trainer`, and copied out.

    Attributes:
        model: The one resident model.
        algorithm: How a client starts from what it received, and what it sends.
        data: Where a client's batches come from.
        optimizer: Builds each client's optimizer; its state lasts for one round.
        schedule: The learning-rate schedule.
        rounds: Number of rounds, for schedules that span the run.
        trainer: Arguments of each client's `L.Trainer`, copied for each: no callback's state passes between clients.
        seed: The run's seed; each client has its own generator derived from it, the experience, the round and its name.
        objective: What clients minimise.
        timeout_seconds: How long a client may train, looked at before each step; ``None`` for as long as it takes.
    """

    model: PreTrainedModel
    algorithm: Algorithm
    data: FederatedDataModule
    optimizer: OptimizerFactory
    schedule: Schedule
    rounds: int
    trainer: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    objective: Objective = field(default_factory=Objective)
    timeout_seconds: float | None = None
    _trimming: Trimming = field(default_factory=Trimming, init=False, repr=False, compare=False)

    def train(self, tasks: Iterable[ClientTask]) -> Iterator[tuple[ClientTask, Outcome]]:
        """Yield each task with what came of it."""
        for task in tasks:
            yield task, self.attempt(task)

    def attempt(self, task: ClientTask) -> Outcome:
        """Train one client; what it raises is its own failure, and leaves no gradient behind."""
        self._trimming.before_client()
        try:
            return self.train_client(task)
        except Exception as error:  # whatever a client's data, model or callbacks do
            self.model.zero_grad(set_to_none=True)
            return failure(task.client_id, error)

    def train_client(self, task: ClientTask) -> Update:
        """Train one client and return what it sends."""
        started = time.perf_counter()
        self.algorithm.begin(self.model, task)
        objective = self.objective.local(self.model, task)
        client = ClientModule(
            self.model,
            task.trainable_names,
            self.optimizer,
            partial(self._schedule, task.round_index),  # not the task: its tensors would live as long as the module
            objective,
            self.algorithm.watched(task.trainable_names),
            self.timeout_seconds,
            self.algorithm.added_loss(self.model, task),
        )
        options = copy.deepcopy(dict(self.trainer)) | ({} if task.max_steps is None else {"max_steps": task.max_steps})
        with self.own_randomness(task):
            fit(L.Trainer(**QUIET, **options), client, self.batches(task))
        metrics = {"seconds": time.perf_counter() - started, **client.notes.metrics}
        extra, objective_kept = objective.finish()
        sent, kept = self.algorithm.finish(self.model, task)
        return Update(task.client_id, sent, client.notes.samples, metrics, kept, extra, objective_kept)

    def store(self, reuse: PrefixReuse) -> Store:
        """Return an empty store for what frozen blocks compute."""
        return reuse.store()

    def _schedule(self, round_index: int, optimizer: Optimizer, steps: int) -> LambdaLR:
        return self.schedule.build(optimizer, round_index, self.rounds, steps)

    def probe(self, client_id: str) -> ProbeReport:
        """Return what a client reports of the base model, weighted by all of its samples."""
        batches = self.data.client_dataloader(client_id, generator(self.seed, "probe batches", client_id))
        report = self.algorithm.probe(self.model, client_id, iter(batches))
        return replace(report, samples=len(cast(Sized, self.data.client_dataset(client_id))))

    def batches(self, task: ClientTask) -> DataLoader[Any]:
        """Return the client's batches in the order of this round."""
        return self.data.client_dataloader(task.client_id, generator(self.seed, "batches", *task.purpose))

    def own_randomness(self, task: ClientTask) -> AbstractContextManager[None]:
        """Return the context in which dropout and the like draw from the client's own seed."""
        return isolated_rng(derive_seed(self.seed, "modules", *task.purpose))


def fit(trainer: L.Trainer, client: L.LightningModule, batches: Iterable[Any]) -> None:
    """Train clients; Ctrl-C is an interrupt of the run, where Lightning would exit the process and say nothing.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(client, batches)
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from None
        raise
