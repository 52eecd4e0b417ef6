"""The sections of a run's configuration."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

from fedbe.aggregation import Averaging, Mean, SampleWeighted, ServerOptimizer
from fedbe.algorithms import Algorithm, BlockExpansion
from fedbe.allocation import SimulatedClock
from fedbe.callback import FederatedCallback
from fedbe.client import OptimizerFactory, Schedule
from fedbe.cohort import cohort_count
from fedbe.data import FederatedDataModule
from fedbe.engines.cohort import check_one_pass
from fedbe.engines.forked import check_workers
from fedbe.errors import ConfigError, Problem
from fedbe.evaluation.tasks import GeneralTask, check_tasks
from fedbe.models import BaseModel
from fedbe.objectives import Objective, Plain
from fedbe.prefix import PrefixReuse
from fedbe.quorum import Quorum
from fedbe.records import metric_paths
from fedbe.storage.checkpoint import LAST, Checkpoint, Checkpoints, read_checkpoint
from fedbe.storage.run_folder import RunFolder
from fedbe.trainer import check_trainer, trainer_options


def default_optimizer(parameters: Iterable[torch.nn.Parameter]) -> Optimizer:
    """Return AdamW without weight decay at a rate of 1e-3."""
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


@dataclass
class Client:
    """How each client trains; what `L.Trainer` offers stands under ``trainer``.

    Attributes:
        optimizer: A `torch.optim` class by ``class_path``; built anew for each client and round.
        schedule: The learning-rate schedule.
        objective: What clients minimise: a class of `fedbe.objectives` by ``class_path``.
    """

    optimizer: OptimizerFactory = default_optimizer
    schedule: Schedule = field(default_factory=Schedule)
    objective: Objective = field(default_factory=Plain)

    def check(self, key: str = "client") -> list[Problem]:
        """Return the mistakes in this section; the optimizer is built once to see whether it can be."""
        problems = self.schedule.check(f"{key}.schedule")
        try:
            self.optimizer([torch.nn.Parameter(torch.zeros(1))])
        except (TypeError, ValueError) as error:
            arguments = getattr(self.optimizer, "keywords", {})
            given = {name: value for name, value in arguments.items() if f"{value}" in str(error)} or arguments
            return [*problems, Problem(f"{key}.optimizer", given, f"cannot be built: {error}")]
        return problems + self.objective.check(self.optimizer)


@dataclass
class Federation:
    """The rounds.

    Attributes:
        rounds: Number of rounds.
        cohort: Clients in a round: ``all``, a fraction (0.5) or a number (5).
        evaluate_every_n_rounds: Downstream validation every so many rounds, and after the last.
        averaging: How updates are averaged: a class of `fedbe.aggregation`, for clients that may be wrong or hostile
            or that are to stay private.
        server_optimizer: How the mean of the updates moves the global model: a class of `fedbe.aggregation`.
        quorum: How many clients of a round must not fail, and what happens if more do.
        client_timeout_seconds: A client that is not done by then, looked at before each of its steps, has failed;
            ``null`` to wait.
        workers: Processes in which clients train side by side, on the CPU, with one thread each and the frozen weights
            in memory once; 1 to train them in this process, one after another.
        clients_in_one_pass: How many clients train at a time, the frozen part of the model run once for all of them;
            each comes to its own result up to rounding. ``auto`` for as many as is quickest, measured before round 1.
            It pays for small batches of short sequences, see ``fedbe bench cohort``; 1 for one by one.
    """

    rounds: int = 20
    cohort: int | float | Literal["all"] = "all"
    evaluate_every_n_rounds: int = 1
    averaging: Averaging = field(default_factory=SampleWeighted)
    server_optimizer: ServerOptimizer = field(default_factory=Mean)
    quorum: Quorum = field(default_factory=Quorum)
    client_timeout_seconds: float | None = None
    workers: int = 1
    clients_in_one_pass: int | Literal["auto"] = 1

    def check(self, key: str = "federation") -> list[Problem]:
        """Return the mistakes in this section that do not depend on the data."""
        problems = self.server_optimizer.check(f"{key}.server_optimizer") + self.quorum.check(f"{key}.quorum")
        problems += [*self.averaging.check(f"{key}.averaging"), *check_workers(self.workers, f"{key}.workers")]
        if self.client_timeout_seconds is not None and not self.client_timeout_seconds > 0:
            problems.append(
                Problem(f"{key}.client_timeout_seconds", self.client_timeout_seconds, "give seconds above 0")
            )
        at_once = self.clients_in_one_pass
        too_few = at_once != "auto" and at_once < 1
        if too_few or (at_once != 1 and self.workers > 1):
            remedy = "give 1 or more clients, or `auto`" if too_few else "clients of `workers` train alone: give 1"
            problems.append(Problem(f"{key}.clients_in_one_pass", at_once, remedy))
        counts = {"rounds": self.rounds, "evaluate_every_n_rounds": self.evaluate_every_n_rounds}
        problems += [Problem(f"{key}.{name}", value, "give 1 or more") for name, value in counts.items() if value < 1]
        if self.cohort != "all" and (self.cohort <= 0 or (isinstance(self.cohort, float) and self.cohort > 1)):
            remedy = "give `all`, a fraction in (0, 1], or a whole number of clients, 1 or more"
            problems.append(Problem(f"{key}.cohort", self.cohort, remedy))
        return problems

    def check_cohort(self, clients: int, key: str = "federation") -> list[Problem]:
        """Return a problem when the cohort does not fit this number of clients."""
        try:
            cohort_count(self.cohort, clients, f"{key}.cohort")
        except ConfigError as error:
            return list(error.problems)
        return []


@dataclass
class RunConfig:
    """One run, but for the clients' `L.Trainer`.

    Attributes:
        data: Who has which data: a ready module of `fedbe.datamodules` or one of your own.
        name: Name of the run; names its folder and its W&B run.
        output: The run's folder, which must not exist; ``null`` for ``runs/<name>``, numbered when that is taken.
        seed: Everything random in the run follows from it.
        model: The base model.
        algorithm: What is trained and how it is averaged.
        client: How each client trains.
        federation: Rounds and cohorts.
        general_tasks: What the base model could do, scored before and after to see what was kept.
        callbacks: Added to the standard ones; one of a standard class takes that one's place.
        trainer: Arguments of each client's `L.Trainer`; loggers, checkpoints and progress bars are the run's.
        prefix: Keep what the frozen blocks below all that is trained compute of each sequence; ``null`` to compute it
            each time.
        clock: The clients' simulated devices and the time they take; ``null`` to take each client's measured time.
        logger: ``wandb`` (offline unless a key is present), ``csv``, ``tensorboard``, ``none``, or a Lightning logger.
        ckpt_path: Continue a run: ``last`` for the newest checkpoint of the run of this name or in `output`, or the
            path of one; ``null`` to begin. With ``last`` and no checkpoint yet, the run begins.
    """

    data: FederatedDataModule
    name: str = "run"
    output: Path | None = None
    seed: int = 0
    model: BaseModel = field(default_factory=BaseModel)
    algorithm: Algorithm = field(default_factory=BlockExpansion)
    client: Client = field(default_factory=Client)
    federation: Federation = field(default_factory=Federation)
    general_tasks: Sequence[GeneralTask] = ()
    callbacks: Sequence[FederatedCallback] = ()
    trainer: Mapping[str, Any] = field(default_factory=dict)
    prefix: PrefixReuse | None = None
    clock: SimulatedClock | None = None
    logger: Literal["wandb", "csv", "tensorboard", "none"] | Logger = "wandb"
    ckpt_path: str | None = None

    @property
    def folder(self) -> Path:
        """Where the run goes, or where the one is that is continued."""
        if self.ckpt_path not in (None, LAST):
            return Path(str(self.ckpt_path)).parent.parent
        if self.output is not None:
            return self.output
        latest = RunFolder.latest(Path("runs"), self.name) if self.ckpt_path == LAST else None
        return latest or RunFolder.next_free(Path("runs"), self.name)

    def checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint to continue from, if there is one.

        Raises:
            ConfigError: It cannot be used; the one before it is offered.
        """
        if self.ckpt_path is None:
            return None
        if self.ckpt_path != LAST:
            return read_checkpoint(Path(self.ckpt_path))
        newest = next(Checkpoints(RunFolder(self.folder).checkpoints).newest_first(), None)
        return None if newest is None else read_checkpoint(newest)

    def check(self) -> list[Problem]:
        """Return all mistakes that can be seen before the weights are loaded and data is encoded."""
        return check_sections(vars(self))


def check_data(data: FederatedDataModule, model: BaseModel | None, seed: int) -> list[Problem]:
    """Give the data module its tokenizer, if the model can be read, and return its mistakes."""
    problems = []
    if model is not None:
        try:
            data.connect(model.processor, model.config, seed)
        except ConfigError as error:
            problems = list(error.problems)
    known = {problem.key for problem in problems}
    problems += [problem for problem in data.check("data") if problem.key not in known]
    if model is None or problems:
        return problems
    classes, wants = data.num_labels, model.task.endswith("classification")
    if wants != (classes is not None):
        remedy = f"the data has {'no' if classes is None else classes} classes: choose the task that fits it"
        return [Problem("model.task", model.task, remedy)]
    return []


def check_combination(algorithm: Algorithm, client: Client, federation: Federation) -> list[Problem]:
    """Return why this algorithm makes no sense with this local objective or this server optimizer."""
    objective, server, name = client.objective, federation.server_optimizer, type(algorithm).__name__
    alone = "nothing is aggregated" if not algorithm.aggregates else "clients keep tensors of their own"
    restarts = f"{name} starts its tensors anew in every round, which leaves nothing to carry over"
    problems = []
    if objective.needs_global_model and (algorithm.personalised or not algorithm.aggregates):
        remedy = f"it needs one global model, and with {name} {alone}: give fedbe.objectives.Plain"
        problems.append(Problem("client.objective", type(objective).__name__, remedy))
    elif objective.needs_lasting_tensors and algorithm.restarts:
        remedy = f"{restarts}: give fedbe.objectives.Plain or FedProx"
        problems.append(Problem("client.objective", type(objective).__name__, remedy))
    if not isinstance(server, Mean) and (algorithm.restarts or not algorithm.aggregates):
        remedy = f"{restarts if algorithm.restarts else f'with {name} {alone}'}: give fedbe.aggregation.Mean"
        problems.append(Problem("federation.server_optimizer", type(server).__name__, remedy))
    return problems + check_averaging(algorithm, objective, federation.averaging)


def check_averaging(algorithm: Algorithm, objective: Objective, averaging: Averaging) -> list[Problem]:
    """Return why updates of this algorithm cannot be averaged by this rule."""
    key, value, name = "federation.averaging", type(averaging).__name__, type(algorithm).__name__
    problems = []
    if not averaging.exact and (algorithm.own_average or not algorithm.aggregates):
        does = "has a rule of its own for what clients send" if algorithm.aggregates else "aggregates nothing"
        problems.append(Problem(key, value, f"{name} {does}: give fedbe.aggregation.SampleWeighted"))
    if not averaging.covers_reports and algorithm.reports:
        problems.append(Problem(key, value, f"does not cover what clients report to {name}: {algorithm.reports}"))
    if not averaging.covers_reports and objective.needs_lasting_tensors:
        remedy = f"does not cover what clients send for {type(objective).__name__}: give fedbe.objectives.Plain"
        problems.append(Problem(key, value, remedy))
    return problems


def check_pooling(algorithm: Algorithm, federation: Federation, options: Mapping[str, Any]) -> list[Problem]:
    """Return a problem when a pooled run would not take as many steps as a cohort."""
    counted = options.get("max_steps", -1) > 0
    whole_epochs = federation.cohort == "all" and not {"max_time", "limit_train_batches"} & options.keys()
    if not algorithm.pooled or counted or whole_epochs:
        return []
    remedy = f"{type(algorithm).__name__} takes as many steps as a cohort does: say how many each client takes"
    return [Problem("trainer.max_steps", options.get("max_steps"), remedy)]


def check_cohort_engine(
    algorithm: Algorithm, client: Client, federation: Federation, options: Mapping[str, Any]
) -> list[Problem]:
    """Return why clients cannot be trained in one pass, where a number of them is given."""
    number = federation.clients_in_one_pass
    if number in ("auto", 1):
        return []
    return check_one_pass(number, algorithm, client.objective, options, federation.client_timeout_seconds)


def check_clock(clock: SimulatedClock | None, options: Mapping[str, Any], key: str = "clock") -> list[Problem]:
    """Return the mistakes in the simulated clock, and what keeps it from knowing how long a client trains."""
    if clock is None:
        return []
    problems = clock.check(key)
    if "max_time" in options:
        remedy = "simulated devices take a number of steps, not a time: give max_steps or max_epochs"
        problems.append(Problem("trainer.max_time", options["max_time"], remedy))
    return problems


def check_sections(sections: Mapping[str, Any]) -> list[Problem]:
    """Return the mistakes in the sections of a `RunConfig` that are there; ``data`` may be missing.

    Args:
        sections: The attributes of a `RunConfig` by name.
    """
    model: BaseModel = sections["model"]
    client: Client = sections["client"]
    problems = model.check()
    if not problems:
        problems += sections["algorithm"].check(model.depth)
    if "data" in sections:
        problems += check_data(sections["data"], model if not problems else None, sections["seed"])
    problems += [*client.check(), *sections["federation"].check()]
    problems += check_combination(sections["algorithm"], client, sections["federation"])
    options = trainer_options(sections["trainer"])
    problems += check_trainer(options, model.dtype, client.schedule.name)
    problems += check_clock(sections["clock"], options)
    problems += sections["prefix"].check() if sections["prefix"] else []
    problems += check_cohort_engine(sections["algorithm"], client, sections["federation"], options)
    problems += check_pooling(sections["algorithm"], sections["federation"], options)
    problems += check_tasks(sections["general_tasks"], "general_tasks")
    metrics = metric_paths([task.name for task in sections["general_tasks"]])
    for index, callback in enumerate(sections["callbacks"]):
        problems += callback.check(f"callbacks[{index}].init_args", metrics)
        if callback.restores_rounds and sections["algorithm"].grows:
            remedy = "goes back to an earlier round, which a model that grows cannot: leave the plateau out, or this"
            problems.append(Problem(f"callbacks[{index}]", type(callback).__name__, remedy))
    if sections["logger"] == "tensorboard" and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        problems.append(Problem("logger", "tensorboard", "is not installed: pip install 'fedbe[tensorboard]'"))
    begins = sections["output"] and not sections.get("ckpt_path")
    folder_problem = RunFolder.problem(sections["output"]) if begins else None
    return problems + ([folder_problem] if folder_problem else [])
