"""FederatedLoop: rounds over client Trainers, with hooks, progress and state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from fedbe.aggregation import Mean, ServerOptimizer
from fedbe.algorithms.base import Algorithm
from fedbe.allocation import Capabilities
from fedbe.callback import FederatedCallback
from fedbe.cohort import CohortSampler
from fedbe.data import Batch, FederatedDataModule
from fedbe.engines.base import Engine
from fedbe.errors import UpdateError
from fedbe.evaluation.downstream import evaluate_downstream
from fedbe.evaluation.personalised import summarise_clients
from fedbe.evaluation.tasks import GeneralTask
from fedbe.machine import peak_rss_bytes, versions
from fedbe.objectives import Objective
from fedbe.run_folder import RunFolder
from fedbe.timing import RoundTiming
from fedbe.update import ClientTask, Update, copy_tensors, load_tensors


@dataclass
class Progress:
    """How far the run is: counts of rounds begun and rounds whose result is in place.

    Attributes:
        started: Rounds begun.
        completed: Rounds aggregated, evaluated and written.
    """

    started: int = 0
    completed: int = 0


@dataclass
class FederatedLoop:
    """Runs rounds: sample a cohort, allocate, train each client, aggregate, evaluate.

    Reads like a Lightning loop: `run` → (`on_run_start` → while not `done`: `advance` → `on_run_end`).

    Attributes:
        model: The one resident model; its base weights never change.
        tokenizer: The base model's tokenizer or image processor.
        algorithm: What is trained and how updates become the next state.
        data: Train data per client, validation and test data.
        engine: Where clients train.
        sampler: Which clients take part in a round.
        folder: The run's folder on disk.
        rounds: Number of rounds.
        server_optimizer: How the mean of the updates moves the global tensors.
        objective: What clients minimise, here its part on the server; the engine has the same object.
        evaluate_every_n_rounds: Downstream validation every so many rounds, and always after the last.
        general_tasks: What the base model could do before; scored by the retention callback.
        callbacks: Called in this order at every hook.
        logger: A Lightning logger, or ``None``.
        seed: The run's seed.
        config: The resolved configuration, for the folder and for loggers.
        state: The global tensors by exact parameter name.
        kept: What each client keeps to itself between its rounds, by its name.
        objective_kept: What each client's local objective keeps, by the client's name.
        record: The line of `metrics.jsonl` that the round under way is writing.
        history: The records of completed rounds; the first is round 0, the base model.
        summary: What `summary.json` will hold.
        stop_reason: Why the run ended; ``None`` while it goes on.
        measure: Counts, on the prepared model, what clients can afford; ``None`` where their devices are not simulated.
        capabilities: What `measure` returned.
        simulated_seconds: Time that clients working side by side would have taken: each round until the server went
            on. By the clients' simulated devices, or else each client's measured time.
    """

    model: PreTrainedModel
    tokenizer: Any
    algorithm: Algorithm
    data: FederatedDataModule
    engine: Engine
    sampler: CohortSampler
    folder: RunFolder
    rounds: int
    server_optimizer: ServerOptimizer = field(default_factory=Mean)
    objective: Objective = field(default_factory=Objective)
    evaluate_every_n_rounds: int = 1
    general_tasks: Sequence[GeneralTask] = ()
    callbacks: Sequence[FederatedCallback] = ()
    logger: Logger | None = None
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    measure: Callable[[FederatedLoop], Capabilities] | None = None

    experience: int = 0
    progress: Progress = field(default_factory=Progress)
    state: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    objective_kept: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    stop_reason: str | None = None
    simulated_seconds: float = 0.0
    capabilities: Capabilities | None = None
    _inputs: Batch = field(default_factory=dict, repr=False)
    _started: float = field(default_factory=time.perf_counter, repr=False)

    def run(self) -> dict[str, Any]:
        """Run all rounds and return the summary.

        Raises:
            UpdateError: A client sent nothing usable.
        """
        self._started = time.perf_counter()
        try:
            self.setup()
            self.on_run_start()
            while not self.done:
                self.advance()
            self.on_run_end()
        except BaseException as exception:
            self.call("on_exception", exception)
            raise
        return self.summary

    @property
    def done(self) -> bool:
        """Whether the last round has been run; `stop_reason` says why it was the last."""
        return self.stop_reason is not None

    def stop(self, reason: str) -> None:
        """Ask the loop to end after this round, and say why; the first reason counts."""
        self.stop_reason = self.stop_reason or reason

    @property
    def round_index(self) -> int:
        """0-based index of the round under way."""
        return self.progress.started - 1

    def setup(self) -> None:
        """Prepare the general tasks on the base model, then turn it into the resident model."""
        for task in self.general_tasks:
            task.prepare(self.model, self.tokenizer, self.seed)
        self.objective.prepare(self.model, self.tokenizer, self.seed)
        # Two samples are enough to compare outputs on, and the logits of a whole batch may be gigabytes.
        inputs = next(iter(self.data.val_dataloader()))
        self._inputs = {name: x[:2].to(self.model.device) for name, x in inputs.items()}
        self.algorithm.seed, self.algorithm.tokenizer = self.seed, self.tokenizer
        probed = self.algorithm.probed(self.data.client_ids)
        self.algorithm.place([self.engine.probe(client_id) for client_id in probed])
        self.algorithm.prepare(self.model, self._inputs)
        self.state = copy_tensors(self.model, self.algorithm.state_names)
        self.objective.setup(self._trained_state(), len(self.data.client_ids))
        self._measure_capabilities()

    def on_run_start(self) -> None:
        """Create the run's folder and score the base model on all that is measured, as round 0."""
        self.folder.create(self.config)
        self.summary["downstream_base"] = self._downstream(self.data.test_dataloader())
        self.record = self._new_record(0, {})
        self._score_round()
        self.call("on_run_start")
        self._write_record()

    def advance(self) -> None:
        """Run one round."""
        self.progress.started += 1
        allocation = self.algorithm.allocate(self._cohort(), self.round_index)
        self.record = self._new_record(self.progress.started, allocation)
        self.call("on_round_start")
        self._train(allocation)
        if self.progress.started % self.evaluate_every_n_rounds == 0 or self.progress.started == self.rounds:
            self._score_round()
        self.call("on_round_end")
        self._grow()
        self.progress.completed += 1
        if self.progress.completed >= self.rounds:
            self.stop(f"all {self.rounds} rounds are done")
        self._write_record()

    def on_run_end(self) -> None:
        """Score the final model on the test data, and write the summary and the checkpoint."""
        self.call("on_last_round")
        self.summary |= {
            "algorithm": type(self.algorithm).__name__,
            "seed": self.seed,
            "rounds": self.progress.completed,
            "stop_reason": self.stop_reason,
            "downstream": self._downstream(self.data.test_dataloader()),
            "personalised": self._personalised(self.data.client_test_dataloader),
            "trainable_parameters": sum(tensor.numel() for tensor in self.state.values()),
        }
        self.call("on_run_end")
        report = self.algorithm.export(self.model, self.folder.model, self.tokenizer)
        self.summary |= {
            "model": {"plain": report.plain, "note": report.reason},
            "simulated_seconds": self.simulated_seconds,
            "wall_seconds": self.wall_seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            "versions": versions(),
        }
        self.folder.write_summary(self.summary)
        self.call("on_run_written")

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Make these the global tensors, in `state` and in the model.

        Raises:
            ValueError: They are not this model's: it has grown since.
        """
        if state.keys() != set(self.algorithm.state_names):
            raise ValueError("these tensors are of a model with other blocks: a run that grows cannot go back to them")
        self.state = dict(state)
        load_tensors(self.model, self.state)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that it takes to continue: the global ones by name, the others by ``owner/…/name``."""
        return {
            **self.state,
            **{f"server_optimizer/{name}": t for name, t in self.server_optimizer.state_dict().items()},
            **{f"objective/{name}": t for name, t in self.objective.state_dict().items()},
            **{f"kept/{who}/{name}": t for who, kept in self.kept.items() for name, t in kept.items()},
            **{
                f"objective_kept/{who}/{name}": t
                for who, kept in self.objective_kept.items()
                for name, t in kept.items()
            },
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `tensors`; called after `setup`."""
        owned: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            owner, _, name = key.rpartition("/")
            owned.setdefault(owner, {})[name] = tensor
        self.server_optimizer.load_state_dict(owned.pop("server_optimizer", {}))
        self.objective.load_state_dict(owned.pop("objective", {}))
        self.restore(owned.pop("", {}))
        for owner, named in owned.items():
            kind, _, client_id = owner.partition("/")
            (self.kept if kind == "kept" else self.objective_kept)[client_id] = named

    def state_dict(self) -> dict[str, Any]:
        """Return all but the tensors (`tensors`) that it takes to continue, as plain JSON values."""
        return {
            "experience": self.experience,
            "progress": asdict(self.progress),
            "history": self.history,
            "summary": self.summary,
            "stop_reason": self.stop_reason,
            "simulated_seconds": self.simulated_seconds,
            "algorithm": self.algorithm.state_dict(),
            "callbacks": [callback.state_dict() for callback in self.callbacks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; its tensors come through `load_tensors`."""
        self.experience = state["experience"]
        self.progress = Progress(**state["progress"])
        self.history = list(state["history"])
        self.summary = dict(state["summary"])
        self.stop_reason = state["stop_reason"]
        self.simulated_seconds = state["simulated_seconds"]
        self.algorithm.load_state_dict(state["algorithm"])
        self._measure_capabilities()
        for callback, callback_state in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(callback_state)

    @property
    def wall_seconds(self) -> float:
        """Seconds since `run` began."""
        return time.perf_counter() - self._started

    def call(self, hook: str, *arguments: Any) -> None:
        """Call one hook on every callback, in order."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)

    def _measure_capabilities(self) -> None:
        """Count on the model as it is now what clients can afford, where their devices are simulated."""
        if self.measure is not None:
            self.capabilities = self.algorithm.capabilities = self.measure(self)

    def _cohort(self) -> list[str]:
        clients = self.data.client_ids
        there = None if self.capabilities is None else self.capabilities.available(clients, self.round_index)
        return self.sampler.sample(clients, self.experience, self.round_index, there)

    def _train(self, allocation: Mapping[str, tuple[str, ...]]) -> None:
        aggregator = self.algorithm.aggregator(self.state)
        timing, trained = RoundTiming(self.capabilities), set[str]()
        for task, update in self.engine.train(self._tasks(allocation)):
            self.call("on_client_end", task, update)
            if not update.tensors and not update.kept:
                raise UpdateError(f"client {update.client_id!r} neither sent nor kept a tensor")
            if not timing.in_time(task, update):
                continue
            aggregator.add(update)
            self.algorithm.observe(task, update)
            self.objective.receive(update)
            self._keep(update)
            trained.update(update.tensors)
        self.record |= {"client_seconds": timing.seconds, "late": timing.late}
        self.simulated_seconds += timing.round_seconds
        new_state = self.server_optimizer.step(self.state, aggregator.result(), trained)
        self.objective.step()
        self.call("on_aggregate", new_state)
        self.restore(new_state)

    def _grow(self) -> None:
        """Let the algorithm change the model's structure; whatever names its tensors follows."""
        renamed = self.algorithm.grow(self.model, self._inputs, self.record)
        if renamed is None:
            return
        state = {renamed.get(name, name): tensor for name, tensor in self.state.items()}
        new = copy_tensors(self.model, set(self.algorithm.state_names) - state.keys())
        self.state = {name: (state | new)[name] for name in self.algorithm.state_names}
        for owned in (self.kept, self.objective_kept):
            owned.update({who: {renamed.get(n, n): t for n, t in kept.items()} for who, kept in owned.items()})
        self.server_optimizer.rename(renamed)
        self.objective.rename(renamed, self._trained_state())
        self._measure_capabilities()

    def _trained_state(self) -> dict[str, Tensor]:
        trained = set(self.algorithm.trainable_names)
        return {name: tensor for name, tensor in self.state.items() if name in trained}

    def _keep(self, update: Update) -> None:
        if update.kept:
            self.kept[update.client_id] = update.kept
        if update.objective_kept:
            self.objective_kept[update.client_id] = update.objective_kept

    def _tasks(self, allocation: Mapping[str, tuple[str, ...]]) -> Iterator[ClientTask]:
        units = self.algorithm.units()
        for client_id, names in allocation.items():
            task = self._task(client_id, tuple(name for unit in names for name in units[unit]))
            if self.capabilities is not None:
                task = replace(task, max_steps=self.capabilities.max_steps(task))
                if lacking := self.capabilities.lacking_memory(task):
                    self.record["lacking_memory"][client_id] = lacking
            if not names or task.max_steps == 0:
                self.record["idle"].append(client_id)
                continue
            self.call("on_client_start", task)
            yield task

    def _task(self, client_id: str, trainable: tuple[str, ...]) -> ClientTask:
        return ClientTask(
            client_id,
            self.experience,
            self.round_index,
            self.algorithm.send(self.state, client_id),
            trainable,
            self.kept.get(client_id, {}),
            self.objective.send(trainable),
            self.objective_kept.get(client_id, {}),
        )

    def _new_record(self, round_number: int, allocation: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
        return {
            "round": round_number,
            "experience": self.experience,
            "downstream": None,
            "personalised": None,
            "general": None,
            "retention": None,
            "delta_ce": None,
            "bytes": {"up": 0, "down": 0},
            "simulated_seconds": None,
            "wall_seconds": None,
            "cohort": list(allocation),
            "allocation": {client_id: list(names) for client_id, names in allocation.items()},
            "explanation": self.algorithm.explanation(),
            "client_seconds": {},
            "idle": [],
            "late": [],
            "lacking_memory": {},
            "failures": [],
        }

    def _write_record(self) -> None:
        self.record["simulated_seconds"] = self.simulated_seconds
        self.record["wall_seconds"] = self.wall_seconds
        self.history.append(self.record)
        self.folder.append_metrics(self.record)
        self.call("on_round_written")

    def _score_round(self) -> None:
        self.record["downstream"] = self._downstream(self.data.val_dataloader())
        self.record["personalised"] = self._personalised(self.data.client_val_dataloader)

    def _personalised(self, batches: Callable[[str], DataLoader[Any]]) -> dict[str, float] | None:
        """Score each client's own model, then put the resident model back as it was."""
        if not self.algorithm.personalised:
            return None
        names = self.algorithm.trainable_names
        before = copy_tensors(self.model, {*names, *self.algorithm.state_names})
        scores = []
        for client_id in self.data.client_ids:
            self.algorithm.begin(self.model, self._task(client_id, names))
            scores.append(evaluate_downstream(self.model, batches(client_id)))
        load_tensors(self.model, before)
        return summarise_clients(scores)

    def _downstream(self, batches: DataLoader[Any]) -> dict[str, float]:
        score = evaluate_downstream(self.model, batches)
        return {"accuracy": score.accuracy, "loss": score.loss}
