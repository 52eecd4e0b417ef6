"""The sections `client` and `federation` of a run's configuration."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.optim import Optimizer

from fedbe.aggregation import Averaging, Mean, SampleWeighted, ServerOptimizer
from fedbe.client.plan import OptimizerFactory
from fedbe.client.schedule import Schedule
from fedbe.errors import ConfigError, Facts, Problem
from fedbe.federation.cohort import cohort_count
from fedbe.federation.quorum import Quorum
from fedbe.objectives import Objective, Plain


def default_optimizer(parameters: Iterable[torch.nn.Parameter]) -> Optimizer:
    """Return AdamW without weight decay at a rate of 1e-3."""
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


@dataclass
class Client:
    """How each client trains; what `L.Trainer` offers stands under ``trainer``.

    Attributes:
        optimizer: A `torch.optim` class by ``class_path``; a new one for each client and round.
        schedule: The learning-rate schedule.
        objective: What clients minimise: a class of `fedbe.objectives` by ``class_path``.
    """

    optimizer: OptimizerFactory = default_optimizer
    schedule: Schedule = field(default_factory=Schedule)
    objective: Objective = field(default_factory=Plain)

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this section; the optimizer is built once to see whether it can be."""
        problems = self.schedule.check(f"{key}.schedule", facts)
        try:
            self.optimizer([torch.nn.Parameter(torch.zeros(1))])
        except (TypeError, ValueError) as error:
            arguments = getattr(self.optimizer, "keywords", {})
            given = {name: value for name, value in arguments.items() if f"{value}" in str(error)} or arguments
            return [*problems, Problem(f"{key}.optimizer", given, f"cannot be built: {error}")]
        return problems + self.objective.check(f"{key}.objective.init_args", facts)


@dataclass
class Rounds:
    """The rounds: the section `federation`.

    Attributes:
        rounds: Number of rounds.
        cohort: Clients in a round: ``all``, a fraction (0.5) or a number (5).
        evaluate_every_n_rounds: Validate downstream every n rounds, and after the last.
        averaging: How updates are averaged: a class of `fedbe.aggregation`, for clients that may be wrong or hostile
            or that are to stay private.
        server_optimizer: How the mean of the updates moves the global model: a class of `fedbe.aggregation`.
        quorum: How many clients of a round must not fail, and what happens if more do.
        client_timeout_seconds: A client that is not done by then, looked at before each of its steps, has failed;
            ``null`` to wait.
    """

    rounds: int = 20
    cohort: int | float | Literal["all"] = "all"
    evaluate_every_n_rounds: int = 1
    averaging: Averaging = field(default_factory=SampleWeighted)
    server_optimizer: ServerOptimizer = field(default_factory=Mean)
    quorum: Quorum = field(default_factory=Quorum)
    client_timeout_seconds: float | None = None

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this section that do not depend on the data."""
        problems = self.server_optimizer.check(f"{key}.server_optimizer.init_args", facts)
        problems += self.quorum.check(f"{key}.quorum", facts)
        problems += self.averaging.check(f"{key}.averaging.init_args", facts)
        timeout = self.client_timeout_seconds
        if timeout is not None and not timeout > 0:
            problems.append(Problem(f"{key}.client_timeout_seconds", timeout, "give seconds above 0"))
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
