"""Base class of engines whose clients train on the one resident model of this process, or of its forks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from fedbe.allocation.capabilities import Capabilities
from fedbe.client.memory import ClientMemory, Kept
from fedbe.client.plan import LocalPlan
from fedbe.client.training import LocalTraining
from fedbe.data import Batch
from fedbe.engines.base import Engine, failure
from fedbe.engines.capabilities import simulated_capabilities
from fedbe.evaluation.downstream import evaluate_downstream
from fedbe.messages import Evaluate, Evaluation, FitTask, Outcome, ProbeReport, Structure, Update
from fedbe.modeling.tensors import copy_tensors, load_tensors
from fedbe.seeding import generator
from fedbe.storage.tensor_names import grouped, prefixed
from fedbe.system.machine import Trimming


class LocalEngine(Engine):
    """Everything but how the clients of a cohort are brought to train: `fit` is what a subclass adds.

    Attributes:
        training: How a client trains, available after `start`.
        processes: How many processes share what frozen blocks compute.
    """

    training: LocalTraining
    processes: int = 1

    def start(self, plan: LocalPlan) -> None:
        """Learn what clients train; the clients are those of the data module."""
        self.training = LocalTraining(plan, ClientMemory())
        plan.adaptation.seed, plan.adaptation.tokenizer = plan.seed, plan.tokenizer
        self.prefix = None
        self._samples: dict[str, int] | None = None
        self._capabilities: Capabilities | None = None
        self._trimming = Trimming()

    @property
    def plan(self) -> LocalPlan:
        """What clients train."""
        return self.training.plan

    @property
    def memory(self) -> ClientMemory:
        """What clients keep."""
        return self.training.memory

    @property
    def client_ids(self) -> Sequence[str]:
        """The clients of the data module."""
        return self.plan.data.client_ids

    @property
    def samples(self) -> Mapping[str, int]:
        """Client → length of its training set."""
        if self._samples is None:
            self._samples = {client: self.training.samples(client) for client in self.client_ids}
        return self._samples

    def probe(self, client_ids: Sequence[str]) -> list[ProbeReport]:
        """Return what clients report of the base model."""
        return [self.training.probe(client) for client in client_ids]

    def prepared(self, inputs: Batch, structure: Structure, renamed: Mapping[str, str] | None = None) -> None:
        """Follow the model's structure: which blocks are frozen, names of what clients keep, what clients can afford.

        Raises:
            ConfigError: What frozen blocks compute is to be reused, and cannot be in this model.
        """
        self.reuse_prefix(self.plan, inputs, self.processes)
        if renamed:
            self.memory.rename(renamed)
        if self.plan.clock is not None:
            own = generator(self.plan.seed, "cost model")
            rows = next(iter(self.plan.data.client_dataloader(self.client_ids[0], own)))
            self._capabilities = simulated_capabilities(self.plan, self.samples, rows)

    def train(self, task: FitTask) -> Update:
        """Train one client."""
        self._trimming.before_client()
        return self.training.train(task)

    def attempt(self, task: FitTask) -> Outcome:
        """Train one client; what it raises is its own failure, and leaves no gradient behind."""
        try:
            return self.train(task)
        except Exception as error:  # whatever a client's data, model or callbacks do
            self.plan.model.zero_grad(set_to_none=True)
            self.plan.adaptation.leave(self.plan.model)
            return failure(task.client_id, error, self.training.structure)

    def evaluate(self, requests: Iterable[Evaluate]) -> Iterator[Evaluation]:
        """Yield the score of each client's own model, then put the resident model back as it was."""
        adaptation = self.plan.adaptation
        before = copy_tensors(self.plan.model, dict.fromkeys([*adaptation.trainable_names, *adaptation.state_names]))
        try:
            for request in requests:
                yield self._score(request)
        finally:
            load_tensors(self.plan.model, before)

    def _score(self, request: Evaluate) -> Evaluation:
        plan, task = self.plan, request.task
        kept = self.memory.get(task.client_id, task.resumes)
        plan.topology.begin(plan.model, plan.adaptation, task, kept.tensors)
        loader = plan.data.client_val_dataloader if request.split == "validation" else plan.data.client_test_dataloader
        score = evaluate_downstream(plan.model, loader(task.client_id))
        return Evaluation(task.client_id, score.accuracy, score.loss, score.items, self.training.structure)

    @property
    def capabilities(self) -> Capabilities | None:
        """What clients can afford, where their devices are simulated."""
        return self._capabilities

    def peek(self, task: FitTask, names: Collection[str]) -> dict[str, Tensor]:
        """Return what a client keeps to itself after a task, of these names."""
        kept = self.memory.get(task.client_id, task.round_index).tensors
        return {name: tensor for name, tensor in kept.items() if name in names}

    def kept(self, task: FitTask) -> dict[str, Tensor]:
        """Return what a client kept in a task, by ``part/name``."""
        kept = self.memory.get(task.client_id, task.round_index)
        return prefixed("tensors", kept.tensors) | prefixed("objective", kept.objective)

    def restore_kept(self, task: FitTask, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `kept` returned."""
        parts = grouped(tensors)
        kept = Kept(parts.get("tensors", {}), parts.get("objective", {}))
        self.memory.put(task.client_id, task.round_index, kept, task.resumes)

    def tensors(self, accepted: Mapping[str, int]) -> dict[str, Tensor]:
        """Return what clients keep, as far as they will go on from it."""
        return self.memory.tensors(accepted)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `tensors`."""
        self.memory.load_tensors(tensors)
