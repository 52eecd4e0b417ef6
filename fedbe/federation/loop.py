"""FederatedLoop: rounds over client Trainers, with hooks, progress and state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.loggers import Logger
from transformers import PreTrainedModel

from fedbe.aggregation import Averaging, Mean, SampleWeighted, ServerOptimizer
from fedbe.algorithms.base import Algorithm
from fedbe.client.plan import LocalPlan, prepare_model
from fedbe.client.trainer import most_samples
from fedbe.data import Batch
from fedbe.engines.base import Engine
from fedbe.errors import UpdateError
from fedbe.evaluation.tasks import GeneralTask, prepare_tasks
from fedbe.federation import run_state
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.cohort import CohortSampler, cohort_count
from fedbe.federation.hooks import Hooks
from fedbe.federation.identity import Identity
from fedbe.federation.progress import Progress
from fedbe.federation.quorum import Quorum
from fedbe.federation.record import RoundRecord
from fedbe.federation.rollback import roll_back, snapshot
from fedbe.federation.round import RoundLoop
from fedbe.federation.scorer import Scorer, Scores
from fedbe.federation.server import Server
from fedbe.federation.summary import costs, results
from fedbe.federation.view import RunView
from fedbe.modeling.architecture import depth_of
from fedbe.storage.checkpoint import Checkpoint, Checkpoints, fingerprint, understood
from fedbe.storage.metrics_file import MetricsFile
from fedbe.storage.run_folder import RunFolder
from fedbe.traits import Trait


@dataclass
class FederatedLoop:
    """Runs rounds: sample a cohort, allocate, train each client, aggregate, evaluate.

    Reads like a Lightning loop: `run` → (`on_run_start` → while not `done`: `advance` → `on_run_end`).

    Attributes:
        plan: Everything that local training depends on: the one resident model, the data, the clients' optimizer.
        algorithm: What is trained, how updates become the next state, and who talks to whom.
        engine: Where clients train.
        sampler: Which clients take part in a round.
        folder: The run's folder on disk.
        rounds: Number of rounds.
        quorum: How many clients of a round must not fail.
        averaging: How updates are averaged, where it is not the algorithm's own rule.
        server_optimizer: How the mean of the updates moves the global tensors.
        evaluate_every_n_rounds: How often the downstream task is validated; always after the last round.
        general_tasks: What the base model could do before; scored by the retention callback.
        callbacks: Called at every hook, by phase.
        logger: A Lightning logger, or ``None``.
        config: The resolved configuration, for the folder and for loggers.
        progress: How far the run is, and how long it has taken.
        identity: What tells this run from others, known after `setup`.
        server: The global state, and how updates change it.
        round: The round under way.
        scorer: Scores models on the downstream task.
        metrics: `metrics.jsonl`.
        history: The records of completed rounds; the first is round 0, the base model.
        summary: What `summary.json` will hold.
        stop_reason: Why the run ends before its last round; ``None`` if nobody asked for it.
        interrupted: Whether it is to end at the next place from which it can be continued.
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

    progress: Progress = field(default_factory=Progress, init=False)
    identity: Identity = field(init=False)
    server: Server = field(init=False)
    round: RoundLoop = field(init=False)
    scorer: Scorer = field(init=False)
    metrics: MetricsFile = field(init=False)
    history: list[dict[str, Any]] = field(default_factory=list, init=False)
    summary: dict[str, Any] = field(default_factory=dict, init=False)
    stop_reason: str | None = field(default=None, init=False)
    interrupted: bool = field(default=False, init=False)
    _inputs: Batch = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.metrics = MetricsFile(self.folder.metrics)
        self.hooks = Hooks(self.callbacks, RunView(self))
        self.server = Server(self.model, self.algorithm, self.averaging, self.server_optimizer, self.plan.objective)
        self.scorer = Scorer(self.server, self.engine)
        self.round = RoundLoop(
            self.server,
            self.engine,
            self.sampler,
            self.quorum,
            self.hooks,
            self.raise_if_interrupted,
            most_samples=self._most_samples,
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
        self.progress = Progress()
        here = Trait.SHARED_MEMORY in self.engine.offers
        self.identity = Identity(self.config, fingerprint(self.model), plan.data, with_clients=here)
        prepare_tasks(self.general_tasks, self.model, plan.tokenizer, plan.seed)
        # Two samples are enough to compare outputs on, and the logits of a whole batch may be gigabytes.
        inputs = next(iter(plan.data.val_dataloader()))
        self._inputs = {name: x[:2].to(self.model.device) for name, x in inputs.items()}
        strategy.seed = plan.seed
        self.engine.start(plan)
        clients = len(self.engine.client_ids)
        cohort = cohort_count(self.sampler.size, clients, "federation.cohort")
        reports = self.engine.probe(strategy.probed(self.engine.client_ids))
        depth = depth_of(self.model)
        prepare_model(plan, self._inputs, strategy.place(reports, depth))
        self.server.setup(clients, cohort, plan.seed)
        self.restructured(None)

    def on_run_start(self) -> None:
        """Create the run's folder and score the base model as round 0."""
        self.folder.create(self.config)
        self.summary["downstream_base"] = self.scorer.tested(self.plan.data)["downstream"]
        self.round.record = RoundRecord(0, explanation=self.algorithm.strategy.explanation())
        self._score_round()
        self.hooks.call("on_run_start")
        self._write_record()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this run, after `setup`; what the run wrote after it is dropped.

        Raises:
            ConfigError: It is of another configuration, base model or data, or the run's files were changed.
        """
        self.identity.check(checkpoint)
        with understood(checkpoint):
            run_state.load(self, checkpoint)
        Checkpoints(self.folder.checkpoints).supersede_after(checkpoint.path)
        self.round.record = RoundRecord(**self.history[-1])
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
        renamed = self.server.grow(self.record.to_dict(), self._inputs)
        if renamed is not None:
            self.restructured(renamed)
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
        self.summary |= results(self)
        self.hooks.call("on_run_end")
        with self.folder.new_model() as directory:
            report = self.algorithm.export(self.model, directory, self.plan.tokenizer)
        self.summary |= {"model": {"plain": report.plain, "note": report.reason}} | costs(self)
        self.folder.write_summary(self.summary)
        self.hooks.call("on_run_written")

    # --- parts of a round --------------------------------------------------------------------------------------------

    def _most_samples(self, client_id: str) -> float:
        """Return how many samples a client can have seen in a round, by the number that it has announced."""
        announced, plan = self.engine.samples.get(client_id, math.inf), self.plan
        return most_samples(plan.trainer, announced, plan.data.batch_size)

    def _train(self) -> None:
        before = snapshot(self.server, self.scorer)
        self.round.run()
        self.progress.simulated_seconds += self.round.timing.round_seconds
        try:
            new_state = self.server.step()
        except UpdateError as error:  # of all updates together: each by itself was finite
            roll_back(self.server, self.scorer, self.record, before, str(error))
            return
        finally:
            self.record.averaging = self.round.figures()
        self.hooks.call("on_aggregate", new_state)
        self.server.restore(new_state)
        self.scorer.scores = Scores()

    def _score_round(self) -> None:
        downstream = self.scorer.downstream(self.plan.data.val_dataloader())
        personalised = self.scorer.personalised("validation", self.round.experience, self.round.index)
        self.scorer.scores = Scores(downstream, personalised)
        self.record.downstream, self.record.personalised = downstream, personalised

    def restructured(self, renamed: Mapping[str, str] | None) -> None:
        """Have the engine and the strategy look at the prepared model, before round 1 and when its structure changes.

        Args:
            renamed: Old → new name of each parameter whose name has changed; ``None`` before round 1.
        """
        self.engine.prepared(self._inputs, self.server.structure, renamed)
        self.algorithm.strategy.capabilities = self.engine.capabilities

    def _write_record(self) -> None:
        self.record.simulated_seconds = self.progress.simulated_seconds
        self.record.wall_seconds = self.progress.wall_seconds
        self.history.append(self.record.to_dict())
        self.metrics.append(self.history[-1])
        self.hooks.call("on_round_written")

    @property
    def model(self) -> PreTrainedModel:
        """The one resident model."""
        return self.plan.model

    @property
    def record(self) -> RoundRecord:
        """The line of `metrics.jsonl` of the round under way."""
        return self.round.record
