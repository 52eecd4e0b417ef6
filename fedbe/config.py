"""The sections of a run's configuration."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

from fedbe.algorithms import Algorithm, BlockExpansion
from fedbe.callback import FederatedCallback
from fedbe.client import OptimizerFactory, Schedule
from fedbe.cohort import cohort_count
from fedbe.data import FederatedDataModule
from fedbe.errors import ConfigError, Problem
from fedbe.evaluation.tasks import GeneralTask, check_tasks
from fedbe.models import BaseModel
from fedbe.records import metric_paths
from fedbe.run_folder import RunFolder
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
    """

    optimizer: OptimizerFactory = default_optimizer
    schedule: Schedule = field(default_factory=Schedule)

    def check(self, key: str = "client") -> list[Problem]:
        """Return the mistakes in this section; the optimizer is built once to see whether it can be."""
        problems = self.schedule.check(f"{key}.schedule")
        try:
            self.optimizer([torch.nn.Parameter(torch.zeros(1))])
        except (TypeError, ValueError) as error:
            arguments = getattr(self.optimizer, "keywords", {})
            given = {name: value for name, value in arguments.items() if f"{value}" in str(error)} or arguments
            problems.append(Problem(f"{key}.optimizer", given, f"cannot be built: {error}"))
        return problems


@dataclass
class Federation:
    """The rounds.

    Attributes:
        rounds: Number of rounds.
        cohort: Clients in a round: ``all``, a fraction (0.5) or a number (5).
        evaluate_every_n_rounds: Downstream validation every so many rounds, and after the last.
    """

    rounds: int = 20
    cohort: int | float | Literal["all"] = "all"
    evaluate_every_n_rounds: int = 1

    def check(self, key: str = "federation") -> list[Problem]:
        """Return the mistakes in this section that do not depend on the data."""
        counts = {"rounds": self.rounds, "evaluate_every_n_rounds": self.evaluate_every_n_rounds}
        problems = [Problem(f"{key}.{name}", value, "give 1 or more") for name, value in counts.items() if value < 1]
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
        logger: ``wandb`` (offline unless a key is present), ``csv``, ``tensorboard``, ``none``, or a Lightning logger.
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
    logger: Literal["wandb", "csv", "tensorboard", "none"] | Logger = "wandb"

    @property
    def folder(self) -> Path:
        """Where the run goes."""
        return self.output or RunFolder.next_free(Path("runs"), self.name)

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
    problems += check_trainer(trainer_options(sections["trainer"]), model.dtype, client.schedule.name)
    problems += check_tasks(sections["general_tasks"], "general_tasks")
    metrics = metric_paths([task.name for task in sections["general_tasks"]])
    for index, callback in enumerate(sections["callbacks"]):
        problems += callback.check(f"callbacks[{index}].init_args", metrics)
    if sections["logger"] == "tensorboard" and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        problems.append(Problem("logger", "tensorboard", "is not installed: pip install 'fedbe[tensorboard]'"))
    folder_problem = sections["output"] and RunFolder.problem(sections["output"])
    return problems + ([folder_problem] if folder_problem else [])
