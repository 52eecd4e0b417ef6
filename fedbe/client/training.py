"""Local training, described once for all engines: how a client begins, where its steps come from, how it finishes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sized
from contextlib import AbstractContextManager
from dataclasses import replace
from operator import is_
from typing import Any, cast

from torch import nn
from torch.utils.data import DataLoader

from fedbe.client.memory import ClientMemory, Kept
from fedbe.client.module import ClientModule
from fedbe.client.plan import LocalPlan
from fedbe.client.run import LocalRun
from fedbe.client.trainer import Trainers, fit
from fedbe.messages import FitTask, ProbeReport, Update, structure_version
from fedbe.modeling.index import ModelIndex
from fedbe.seeding import derive_seed, generator, isolated_rng


class LocalTraining:
    """Trains clients on the resident model: tensors are copied in, trained, and copied out.

    Args:
        plan: All that it depends on.
        memory: Where clients keep what they keep.

    Attributes:
        trainers: Makes each client's Trainer.
    """

    def __init__(self, plan: LocalPlan, memory: ClientMemory) -> None:
        self.plan, self.memory = plan, memory
        self.trainers = Trainers(plan.trainer)
        self._index: ModelIndex | None = None
        self._objects: list[object] = []

    @property
    def index(self) -> ModelIndex:
        """The index of the model as it was when the last client began."""
        return self._index or self.look_at_model()

    @property
    def structure(self) -> str:
        """The version of the model's structure."""
        return structure_version(self.plan.adaptation.structure())

    def samples(self, client_id: str) -> int:
        """Return the number of a client's training samples."""
        return len(cast(Sized, self.plan.data.client_dataset(client_id)))

    def probe(self, client_id: str) -> ProbeReport:
        """Return what a client reports of the base model, weighted by all of its samples."""
        plan = self.plan
        batches = plan.data.client_dataloader(client_id, generator(plan.seed, "probe batches", client_id))
        report = plan.adaptation.probe(plan.model, client_id, iter(batches))
        return replace(report, samples=self.samples(client_id))

    def train(self, task: FitTask) -> Update:
        """Train one client with a Trainer of its own, and return what it sends."""
        started = time.perf_counter()
        run = self.begin(task)
        self.index.train_only(task.trainable_names)
        module = ClientModule.of(run)
        try:
            with self.own_randomness(task):
                fit(self.trainers.new(task.max_steps), module, self.batches(task))
        finally:
            module.let_go()
        return self.finish(run, time.perf_counter() - started)

    def get_ready(self, max_steps: Iterable[int | None]) -> None:
        """Make now what each forked process would make for itself.

        Args:
            max_steps: Those of the tasks to come.
        """
        self.look_at_model().in_order(())
        for steps in max_steps:
            self.trainers.template(steps)

    def begin(self, task: FitTask) -> LocalRun:
        """Load what a client starts from into the model, and return its training."""
        plan, kept = self.plan, self.memory.get(task.client_id, task.resumes)
        plan.topology.begin(plan.model, plan.adaptation, task, kept.tensors)
        return LocalRun(plan, task, kept, self.look_at_model().in_order(task.trainable_names))

    def finish(self, run: LocalRun, seconds: float) -> Update:
        """Return what a client sends, and keep what it keeps; the trained tensors are in the model.

        Args:
            run: Its training, with all of its steps taken.
            seconds: How long it took.
        """
        plan, task = self.plan, run.task
        extra, objective_kept = run.objective.finish()
        sent, kept = plan.topology.finish(plan.model, plan.adaptation, task, run.kept.tensors)
        self.memory.put(task.client_id, task.round_index, Kept(kept, objective_kept), task.resumes)
        metrics = {"seconds": seconds, **run.notes.metrics}
        return Update(task.client_id, sent, run.notes.samples, metrics, extra, self.structure)

    def batches(self, task: FitTask) -> DataLoader[Any]:
        """Return the client's batches in the order of this round."""
        return self.plan.data.client_dataloader(task.client_id, generator(self.plan.seed, "batches", *task.purpose))

    def look_at_model(self) -> ModelIndex:
        """Return the index of the model: a new one if a module or a parameter is another object than before."""
        objects = objects_of(self.plan.model)
        if self._index is None or not same_objects(objects, self._objects):
            self._index, self._objects = ModelIndex(self.plan.model), objects
        return self._index

    def own_randomness(self, task: FitTask) -> AbstractContextManager[None]:
        """Return the context in which dropout and the like draw from the client's own seed."""
        return isolated_rng(derive_seed(self.plan.seed, "modules", *task.purpose))


def objects_of(model: nn.Module) -> list[object]:
    """Return all modules and parameters of a model in a fixed order; hundreds take less than a tenth millisecond."""
    found: list[object] = []
    open_: list[nn.Module] = [model]
    while open_:
        module = open_.pop()
        found.append(module)
        found.extend(module._parameters.values())
        open_.extend(child for child in module._modules.values() if child is not None)
    return found


def same_objects(first: list[object], second: list[object]) -> bool:
    """Return whether two lists hold the same objects in the same order."""
    return len(first) == len(second) and all(map(is_, first, second))
