"""FederatedLoop: rounds over client Trainers, with hooks, progress and state."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from fedbe.aggregation import Aggregator, Averaging, Mean, SampleWeighted, ServerOptimizer
from fedbe.algorithms.base import Algorithm
from fedbe.allocation import Capabilities
from fedbe.allocation.timing import RoundTiming
from fedbe.data import Batch, FederatedDataModule
from fedbe.engines.base import Engine, PreparedEngine
from fedbe.evaluation.downstream import evaluate_downstream
from fedbe.evaluation.personalised import summarise_clients
from fedbe.evaluation.tasks import GeneralTask
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.cohort import CohortSampler, cohort_count
from fedbe.federation.quorum import Quorum
from fedbe.federation.round import Round
from fedbe.messages import ClientTask, Update
from fedbe.modeling.tensors import copy_tensors, load_tensors
from fedbe.objectives import Objective
from fedbe.prefix.reuse import Prefix, reuse_prefix
from fedbe.prefix.store import PrefixReuse
from fedbe.storage.checkpoint import Checkpoint, check_same_base, check_same_run, checksum, fingerprint, influential
from fedbe.storage.kept_outcomes import KeptOutcomes
from fedbe.storage.metrics_file import MetricsFile
from fedbe.storage.run_folder import RunFolder
from fedbe.system.machine import peak_rss_bytes, versions


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
        quorum: How many clients of a round must not fail.
        averaging: How updates are averaged, where it is not the algorithm's own rule.
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
        stop_reason: Why the run ends before its last round; ``None`` if nobody asked for it.
        interrupted: Whether it is to end at the next place from which it can be continued.
        kept_outcomes: Where to keep what clients of the round under way have sent; ``None`` for nowhere.
        prefix: How much of what frozen blocks compute is kept; ``None`` to compute it each time.
        measure: Counts, on the prepared model, what clients can afford; ``None`` where their devices are not simulated.
        capabilities: What `measure` returned.
        evaluation_seconds: How much of the run's time went into scoring, on the downstream task and on general ones.
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
    averaging: Averaging = field(default_factory=SampleWeighted)
    server_optimizer: ServerOptimizer = field(default_factory=Mean)
    objective: Objective = field(default_factory=Objective)
    quorum: Quorum = field(default_factory=Quorum)
    evaluate_every_n_rounds: int = 1
    general_tasks: Sequence[GeneralTask] = ()
    callbacks: Sequence[FederatedCallback] = ()
    logger: Logger | None = None
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    prefix: PrefixReuse | None = None
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
    interrupted: bool = False
    kept_outcomes: KeptOutcomes | None = None
    simulated_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    capabilities: Capabilities | None = None
    _inputs: Batch = field(default_factory=dict, repr=False)
    _prefix: Prefix | None = field(default=None, repr=False)
    _base: str = field(default="", repr=False)
    _metrics: MetricsFile = field(init=False, repr=False)
    _started: float = field(default_factory=time.perf_counter, repr=False)

    def __post_init__(self) -> None:
        self._metrics = MetricsFile(self.folder.metrics)

    def run(self, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
        """Run all rounds, or those that are left, and return the summary.

        Args:
            checkpoint: Where to go on; ``None`` to begin.

        Raises:
            ConfigError: The checkpoint is of another run, or the run's folder is taken or in use.
            QuorumError: Too many clients of a round failed.
            KeyboardInterrupt: `interrupted` was set; the run can be continued.
        """
        self._started = time.perf_counter()
        try:
            self.setup()
            with self.folder.in_use():
                if checkpoint is None:
                    self.on_run_start()
                else:
                    self.resume(checkpoint)
                while not self.done:
                    self.advance()
                self.on_run_end()
        except BaseException as exception:
            self.call("on_exception", exception)
            raise
        return self.summary

    @property
    def done(self) -> bool:
        """Whether the last round has been run, or there is a `stop_reason`."""
        return self.stop_reason is not None or self.progress.completed >= self.rounds

    def stop(self, reason: str) -> None:
        """Ask the loop to end after this round, and say why; the first reason counts."""
        self.stop_reason = self.stop_reason or reason

    @property
    def identity(self) -> str:
        """A digest of the configuration and the base model, which tells this run from others."""
        return checksum({}, json.dumps([influential(self.config), self._base]))

    @property
    def round_index(self) -> int:
        """0-based index of the round under way."""
        return self.progress.started - 1

    def setup(self) -> None:
        """Prepare the general tasks on the base model, then turn it into the resident model."""
        self._base = fingerprint(self.model)
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
        self._reuse_prefix()
        self._prepare_engine()
        clients = len(self.data.client_ids)
        self.averaging.setup(clients, cohort_count(self.sampler.size, clients), self.seed)
        self._measure_capabilities()

    def on_run_start(self) -> None:
        """Create the run's folder and score the base model on all that is measured, as round 0."""
        self.folder.create(self.config)
        self.summary["downstream_base"] = self._downstream(self.data.test_dataloader())
        self.record = self._new_record(0, {})
        self._score_round()
        self.call("on_run_start")
        self._write_record()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this run, after `setup`; what the run wrote after it is dropped.

        Raises:
            ConfigError: It is of another configuration or another base model, or the run's files were changed.
        """
        check_same_run(checkpoint, self.config)
        check_same_base(checkpoint, self._base)
        self.history = self._metrics.rewind(checkpoint.state["metrics"])
        self.load_state_dict(checkpoint.state)
        self.load_tensors(checkpoint.tensors)
        self.record = self.history[-1]
        self.call("on_run_start")

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
        self._write_record()
        self.raise_if_interrupted()

    def raise_if_interrupted(self) -> None:
        """End the run where it can be continued, if that was asked for.

        Raises:
            KeyboardInterrupt: It was.
        """
        if self.interrupted and not self.done:
            raise KeyboardInterrupt

    def on_run_end(self) -> None:
        """Score the final model on the test data, and write the summary and the checkpoint."""
        self.call("on_last_round")
        self.summary |= {
            "algorithm": type(self.algorithm).__name__,
            "seed": self.seed,
            "rounds": self.progress.completed,
            "stop_reason": self.stop_reason or f"all {self.rounds} rounds are done",
            "downstream": self._downstream(self.data.test_dataloader()),
            "personalised": self._personalised(self.data.client_test_dataloader),
            "trainable_parameters": sum(tensor.numel() for tensor in self.state.values()),
        }
        self.call("on_run_end")
        with self.folder.new_model() as directory:
            report = self.algorithm.export(self.model, directory, self.tokenizer)
        self.summary |= {
            "model": {"plain": report.plain, "note": report.reason},
            "simulated_seconds": self.simulated_seconds,
            "wall_seconds": self.wall_seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "engine": self._engine_state,
            "prefix": None if self._prefix is None else self._prefix.figures,
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
            "config": dict(self.config),
            "base": self._base,
            "experience": self.experience,
            "progress": asdict(self.progress),
            "metrics": self._metrics.position,
            "summary": self.summary,
            "stop_reason": self.stop_reason,
            "simulated_seconds": self.simulated_seconds,
            "wall_seconds": self.wall_seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "algorithm": self.algorithm.state_dict(),
            "engine": self._engine_state,
            "logger": None if self.logger is None else self.logger.version,
            "callbacks": [callback.state_dict() for callback in self.callbacks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; its tensors come through `load_tensors`."""
        self.experience = state["experience"]
        self.progress = Progress(**state["progress"])
        self.summary = dict(state["summary"])
        self.stop_reason = state["stop_reason"]
        self.simulated_seconds = state["simulated_seconds"]
        self.evaluation_seconds = state["evaluation_seconds"]
        self._started = time.perf_counter() - state["wall_seconds"]
        self.algorithm.load_state_dict(state["algorithm"])
        self._measure_capabilities()
        if isinstance(self.engine, PreparedEngine):
            self.engine.load_state_dict(state["engine"])
        for callback, callback_state in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(callback_state)

    @property
    def wall_seconds(self) -> float:
        """Seconds that the run has taken, those before it was continued included."""
        return time.perf_counter() - self._started

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count what happens inside as scoring, in `evaluation_seconds`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.evaluation_seconds += time.perf_counter() - started

    def call(self, hook: str, *arguments: Any) -> None:
        """Call one hook on every callback, in order."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)

    def _measure_capabilities(self) -> None:
        """Count on the model as it is now what clients can afford, where their devices are simulated."""
        if self.measure is not None:
            self.capabilities = self.algorithm.capabilities = self.measure(self)

    def _cohort(self) -> list[str]:
        return self.sampler.sample(self.data.client_ids, self.experience, self.round_index, self._available())

    def others(self, cohort: Sequence[str], count: int) -> list[str]:
        """Return up to `count` clients that could take the place of some of this round's cohort."""
        clients = self.data.client_ids
        return self.sampler.others(count, cohort, clients, self.experience, self.round_index, self._available())

    def _available(self) -> Collection[str] | None:
        if self.capabilities is None:
            return None
        return self.capabilities.available(self.data.client_ids, self.round_index)

    def _train(self, allocation: Mapping[str, tuple[str, ...]]) -> None:
        now = Round(self, allocation, self._aggregator(), RoundTiming(self.capabilities))
        mean = now.run()
        self.record["averaging"] = self.averaging.figures(self.progress.started)
        self.simulated_seconds += now.timing.round_seconds
        new_state = self.server_optimizer.step(self.state, mean, now.trained)
        self.objective.step()
        self.call("on_aggregate", new_state)
        self.restore(new_state)

    def _reuse_prefix(self) -> None:
        """Keep what the frozen blocks below all that changes compute; begin anew after growth."""
        if self._prefix is not None:
            self._prefix.remove()
        if self.prefix is not None:
            changing = {*self.algorithm.state_names, *self.algorithm.trainable_names}
            self._prefix = reuse_prefix(self.model, changing, self.engine.store(self.prefix), self._inputs)

    @property
    def _engine_state(self) -> dict[str, Any]:
        return self.engine.state_dict() if isinstance(self.engine, PreparedEngine) else {}

    def _prepare_engine(self) -> None:
        if isinstance(self.engine, PreparedEngine):
            self.engine.setup(self._inputs)

    def _aggregator(self) -> Aggregator:
        if self.averaging.exact:
            return self.algorithm.aggregator(self.state)
        return self.averaging.begin(self.state, self.round_index)

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
        self._reuse_prefix()
        self._prepare_engine()
        self._measure_capabilities()

    def _trained_state(self) -> dict[str, Tensor]:
        trained = set(self.algorithm.trainable_names)
        return {name: tensor for name, tensor in self.state.items() if name in trained}

    def keep(self, update: Update) -> None:
        """Remember what a client keeps to itself."""
        if update.kept:
            self.kept[update.client_id] = update.kept
        if update.objective_kept:
            self.objective_kept[update.client_id] = update.objective_kept

    def task(self, client_id: str, units: Collection[str]) -> ClientTask:
        """Return what a client is given in this round to train these units."""
        names = self.algorithm.units()
        trainable = tuple(name for unit in units for name in names[unit])
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
            "averaging": {},
            "rolled_back": None,
        }

    def _write_record(self) -> None:
        self.record["simulated_seconds"] = self.simulated_seconds
        self.record["wall_seconds"] = self.wall_seconds
        self.history.append(self.record)
        self._metrics.append(self.record)
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
        with self.evaluating():
            for client_id in self.data.client_ids:
                self.algorithm.begin(self.model, self.task(client_id, self.algorithm.units()))
                scores.append(evaluate_downstream(self.model, batches(client_id)))
        load_tensors(self.model, before)
        return summarise_clients(scores)

    def _downstream(self, batches: DataLoader[Any]) -> dict[str, float]:
        with self.evaluating():
            score = evaluate_downstream(self.model, batches)
        return {"accuracy": score.accuracy, "loss": score.loss}
