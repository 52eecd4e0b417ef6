"""FederatedLoop: rounds over client Trainers, with hooks, progress and state."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning.pytorch.loggers import Logger
from torch import Tensor
from transformers import PreTrainedModel

from fedbe.aggregation import Averaging, Mean, SampleWeighted, ServerOptimizer
from fedbe.algorithms.base import Algorithm
from fedbe.client.plan import LocalPlan, prepare_model
from fedbe.data import Batch
from fedbe.engines.base import Engine
from fedbe.errors import UpdateError
from fedbe.evaluation.tasks import GeneralTask, prepare_tasks
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.cohort import CohortSampler, cohort_count
from fedbe.federation.hooks import Hooks
from fedbe.federation.quorum import Quorum
from fedbe.federation.record import RoundRecord
from fedbe.federation.rollback import roll_back, snapshot
from fedbe.federation.round import RoundLoop
from fedbe.federation.scorer import Scorer, Scores
from fedbe.federation.server import Server
from fedbe.federation.view import RunView
from fedbe.messages import Split
from fedbe.modeling.families import stated_depth
from fedbe.prefix import Prefix, PrefixReuse, reuse_prefix
from fedbe.storage.checkpoint import (
    FORMAT,
    Checkpoint,
    Checkpoints,
    check_same_base,
    check_same_run,
    checksum,
    fingerprint,
    influential,
    understood,
)
from fedbe.storage.metrics_file import MetricsFile
from fedbe.storage.run_folder import RunFolder
from fedbe.storage.tensor_names import grouped, prefixed
from fedbe.system.machine import peak_rss_bytes, versions
from fedbe.traits import Trait


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
        plan: All that local training depends on: the one resident model, the data, the clients' optimizer.
        algorithm: What is trained, how updates become the next state, and who talks to whom.
        engine: Where clients train.
        sampler: Which clients take part in a round.
        folder: The run's folder on disk.
        rounds: Number of rounds.
        quorum: How many clients of a round must not fail.
        averaging: How updates are averaged, where it is not the algorithm's own rule.
        server_optimizer: How the mean of the updates moves the global tensors.
        evaluate_every_n_rounds: Downstream validation every so many rounds, and always after the last.
        general_tasks: What the base model could do before; scored by the retention callback.
        callbacks: Called at every hook, by phase.
        logger: A Lightning logger, or ``None``.
        config: The resolved configuration, for the folder and for loggers.
        prefix: How much of what frozen blocks compute is kept; ``None`` to compute it each time.
        progress: How far the run is.
        server: The global state, and what becomes of updates.
        round: The round under way.
        scorer: Scores models on the downstream task.
        history: The records of completed rounds; the first is round 0, the base model.
        summary: What `summary.json` will hold.
        stop_reason: Why the run ends before its last round; ``None`` if nobody asked for it.
        interrupted: Whether it is to end at the next place from which it can be continued.
        simulated_seconds: Time that clients working side by side would have taken: each round until the server went
            on. By the clients' simulated devices, or else each client's measured time.
    """

    plan: LocalPlan
    algorithm: Algorithm
    engine: Engine
    sampler: CohortSampler
    folder: RunFolder
    rounds: int
    quorum: Quorum = field(default_factory=Quorum)
    averaging: Averaging = field(default_factory=SampleWeighted)
    server_optimizer: ServerOptimizer = field(default_factory=Mean)
    evaluate_every_n_rounds: int = 1
    general_tasks: Sequence[GeneralTask] = ()
    callbacks: Sequence[FederatedCallback] = ()
    logger: Logger | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    prefix: PrefixReuse | None = None

    progress: Progress = field(default_factory=Progress, init=False)
    server: Server = field(init=False)
    round: RoundLoop = field(init=False)
    scorer: Scorer = field(init=False)
    history: list[dict[str, Any]] = field(default_factory=list, init=False)
    summary: dict[str, Any] = field(default_factory=dict, init=False)
    stop_reason: str | None = field(default=None, init=False)
    interrupted: bool = field(default=False, init=False)
    simulated_seconds: float = field(default=0.0, init=False)
    _prefix: Prefix | None = field(default=None, init=False, repr=False)
    _base: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        self._metrics = MetricsFile(self.folder.metrics)
        self._started = time.perf_counter()
        self._inputs: Batch = {}
        self.hooks = Hooks(self.callbacks, RunView(self))
        self.server = Server(self.model, self.algorithm, self.averaging, self.server_optimizer, self.plan.objective)
        self.scorer = Scorer(self.server, self.engine)
        self.round = RoundLoop(
            self.server, self.engine, self.sampler, self.quorum, self.hooks, self.raise_if_interrupted
        )

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
            self.hooks.call("on_exception", exception)
            raise
        finally:
            self.engine.close()
        return self.summary

    @property
    def done(self) -> bool:
        """Whether the last round has been run, or there is a `stop_reason`."""
        return self.stop_reason is not None or self.progress.completed >= self.rounds

    def stop(self, reason: str) -> None:
        """Ask the loop to end after this round, and say why; the first reason counts."""
        self.stop_reason = self.stop_reason or reason

    def setup(self) -> None:
        """Prepare the general tasks on the base model, then turn it into the resident model."""
        plan, strategy = self.plan, self.algorithm.strategy
        self._base = fingerprint(self.model)
        prepare_tasks(self.general_tasks, self.model, plan.tokenizer, plan.seed)
        # Two samples are enough to compare outputs on, and the logits of a whole batch may be gigabytes.
        inputs = next(iter(plan.data.val_dataloader()))
        self._inputs = {name: x[:2].to(self.model.device) for name, x in inputs.items()}
        strategy.seed = plan.seed
        self.engine.start(plan)
        reports = self.engine.probe(strategy.probed(self.engine.client_ids))
        depth = stated_depth(self.model.config) or 0
        prepare_model(plan, self._inputs, strategy.place(reports, depth))
        clients = len(self.engine.client_ids)
        self.server.setup(clients, cohort_count(self.sampler.size, clients), plan.seed)
        self._prepared(None)

    def on_run_start(self) -> None:
        """Create the run's folder and score the base model on all that is measured, as round 0."""
        self.folder.create(self.config)
        self.summary["downstream_base"] = self.scorer.downstream(self.plan.data.test_dataloader())
        self.record = RoundRecord(0, explanation=self.algorithm.strategy.explanation())
        self._score_round()
        self.hooks.call("on_run_start")
        self._write_record()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this run, after `setup`; what the run wrote after it is dropped.

        Raises:
            ConfigError: It is of another configuration or another base model, or the run's files were changed.
        """
        check_same_run(checkpoint, self.config)
        check_same_base(checkpoint, self._base)
        with understood(checkpoint):
            self.history = self._metrics.rewind(checkpoint.state["metrics"])
            self.load_state_dict(checkpoint.state, checkpoint.tensors)
        Checkpoints(self.folder.checkpoints).supersede_after(checkpoint.path)
        self.record = RoundRecord(**self.history[-1])
        self.scorer.scores = Scores(self.record.downstream, self.record.personalised)
        self.hooks.call("on_run_start")

    def advance(self) -> None:
        """Run one round."""
        self.progress.started += 1
        self.round.begin(self.progress.started)
        self.hooks.call("on_round_start")
        self._train()
        if self.progress.started % self.evaluate_every_n_rounds == 0 or self.progress.started == self.rounds:
            self._score_round()
        self.hooks.call("on_round_end")
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
        self.hooks.call("on_last_round")
        self.summary |= {
            "algorithm": type(self.algorithm).__name__,
            "seed": self.plan.seed,
            "rounds": self.progress.completed,
            "stop_reason": self.stop_reason or f"all {self.rounds} rounds are done",
            "downstream": self.scorer.downstream(self.plan.data.test_dataloader()),
            "personalised": self._personalised("test"),
            "trainable_parameters": sum(tensor.numel() for tensor in self.server.state.values()),
        }
        self.hooks.call("on_run_end")
        with self.folder.new_model() as directory:
            report = self.algorithm.export(self.model, directory, self.plan.tokenizer)
        self.summary |= {
            "model": {"plain": report.plain, "note": report.reason},
            "simulated_seconds": self.simulated_seconds,
            "wall_seconds": self.wall_seconds,
            "evaluation_seconds": self.scorer.seconds,
            "engine": self.engine.state_dict(),
            "prefix": None if self._prefix is None else self._prefix.figures,
            "peak_rss_bytes": peak_rss_bytes(),
            "versions": versions(),
        }
        self.folder.write_summary(self.summary)
        self.hooks.call("on_run_written")

    # --- parts of a round --------------------------------------------------------------------------------------------

    def _train(self) -> None:
        before = snapshot(self.server, self.scorer)
        self.round.run()
        self.simulated_seconds += self.round.timing.round_seconds
        try:
            new_state = self.server.step()
        except UpdateError as error:  # of all updates together: each by itself was finite
            roll_back(self.server, self.scorer, self.record, before, str(error))
            return
        self.hooks.call("on_aggregate", new_state)
        self.server.restore(new_state)
        self.scorer.scores = Scores()

    def _score_round(self) -> None:
        batches = self.plan.data.val_dataloader()
        scores = Scores(self.scorer.downstream(batches), self._personalised("validation"))
        self.scorer.scores = scores
        self.record.downstream, self.record.personalised = scores.downstream, scores.personalised

    def _grow(self) -> None:
        if Trait.FIXED_STRUCTURE in self.algorithm.offers:
            return
        renamed = self.server.grow(self.record.to_dict(), self._inputs)
        if renamed is not None:
            self._prepared(renamed)

    def _prepared(self, renamed: Mapping[str, str] | None) -> None:
        """Have what looks at the prepared model look at it as it is now, before round 1 and after growth."""
        self._reuse_prefix()
        self.engine.prepared(self._inputs, self.server.structure, renamed)
        self.algorithm.strategy.capabilities = self.engine.capabilities

    def _reuse_prefix(self) -> None:
        """Keep what the frozen blocks below all that changes compute."""
        if self._prefix is not None:
            self._prefix.remove()
        store = self.engine.store(self.prefix) if self.prefix is not None else None
        if store is not None:
            adaptation = self.algorithm.adaptation
            changing = {*adaptation.state_names, *adaptation.trainable_names}
            self._prefix = reuse_prefix(self.model, changing, store, self._inputs)

    def _personalised(self, split: Split) -> dict[str, float] | None:
        return self.scorer.personalised(split, self.round.experience, self.round.index)

    def _write_record(self) -> None:
        self.record.simulated_seconds = self.simulated_seconds
        self.record.wall_seconds = self.wall_seconds
        self.history.append(self.record.to_dict())
        self._metrics.append(self.history[-1])
        self.hooks.call("on_round_written")

    # --- what callbacks see and ask for, see `RunView` ----------------------------------------------------------------

    @property
    def model(self) -> PreTrainedModel:
        """The one resident model."""
        return self.plan.model

    @property
    def record(self) -> RoundRecord:
        """The line of `metrics.jsonl` of the round under way."""
        return self.round.record

    @record.setter
    def record(self, record: RoundRecord) -> None:
        self.round.record = record

    @property
    def identity(self) -> str:
        """A digest of the configuration and the base model, which tells this run from others."""
        return checksum({}, json.dumps([influential(self.config), self._base]))

    @property
    def wall_seconds(self) -> float:
        """Seconds that the run has taken, those before it was continued included."""
        return time.perf_counter() - self._started

    # --- state -------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that it takes to continue, by ``owner/…/name``."""
        return prefixed("server", self.server.tensors()) | prefixed("engine", self.engine.tensors(self.server.accepted))

    def state_dict(self) -> dict[str, Any]:
        """Return all but the tensors (`tensors`) that it takes to continue, as plain JSON values."""
        return {
            "format": FORMAT,
            "config": dict(self.config),
            "base": self._base,
            "progress": asdict(self.progress),
            "metrics": self._metrics.position,
            "summary": self.summary,
            "stop_reason": self.stop_reason,
            "simulated_seconds": self.simulated_seconds,
            "wall_seconds": self.wall_seconds,
            "evaluation_seconds": self.scorer.seconds,
            "server": self.server.state_dict(),
            "engine": self.engine.state_dict(),
            "prefix": None if self._prefix is None else self._prefix.state_dict(),
            "logger": None if self.logger is None else self.logger.version,
            "callbacks": self.hooks.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict` and its `tensors`."""
        owned = grouped(tensors)
        self.progress = Progress(**state["progress"])
        self.summary = dict(state["summary"])
        self.stop_reason = state["stop_reason"]
        self.simulated_seconds = float(state["simulated_seconds"])
        self.scorer.seconds = float(state["evaluation_seconds"])
        self._started = time.perf_counter() - state["wall_seconds"]
        renamed = self.server.come_to(state["server"])
        if renamed is not None:
            self._prepared(renamed)
        self.server.load_state_dict(state["server"], owned.get("server", {}))
        self.engine.load_state_dict(state["engine"])
        self.engine.load_tensors(owned.get("engine", {}))
        if self._prefix is not None:
            self._prefix.load_state_dict(state["prefix"])
        self.hooks.load_state_dict(state["callbacks"])
