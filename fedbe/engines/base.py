"""What the loop asks of the place where clients run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedbe.allocation.capabilities import Capabilities
from fedbe.client.plan import LocalPlan
from fedbe.data import Batch
from fedbe.errors import ClientTimeoutError, Facts, Problem
from fedbe.messages import Evaluate, Evaluation, Failure, FailureKind, FitTask, Outcome, ProbeReport, Structure
from fedbe.prefix import Prefix, reuse_prefix
from fedbe.traits import Part


class Engine(Part, ABC):
    """Base class of the places where clients run: in this process, in forked ones, on other machines.

    Name one by ``class_path`` under ``engine:``, or subclass it in a file of your own. The loop calls `start` first,
    then `probe`, then `prepared` when the model is adapted, then `fit` and `evaluate` round by round; `prepared` again
    when the model's structure has changed; `close` at the end, however the run ends.

    Attributes:
        prefix: The reuse of what frozen blocks compute in this process, from `prepared` on; ``None`` for none.
    """

    prefix: Prefix | None = None

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this configuration, found before work starts; see `Facts`."""
        return []

    @abstractmethod
    def start(self, plan: LocalPlan) -> None:
        """Learn what clients train, and meet them: from now on `client_ids` and `samples` are known."""

    @property
    @abstractmethod
    def client_ids(self) -> Sequence[str]:
        """The clients' names, in a fixed order."""

    @property
    @abstractmethod
    def samples(self) -> Mapping[str, int]:
        """Client → number of its training samples, as it has announced."""

    @abstractmethod
    def probe(self, client_ids: Sequence[str]) -> list[ProbeReport]:
        """Return what clients report of the base model (`Adaptation.probe`), in this order."""

    def prepared(self, inputs: Batch, structure: Structure, renamed: Mapping[str, str] | None = None) -> None:
        """Look at the adapted model; called once before round 1, and again when its structure has changed.

        Args:
            inputs: A real batch.
            structure: The model's structure now.
            renamed: Old → new name of each parameter whose name has changed; ``None`` the first time.

        Raises:
            ConfigError: Its clients cannot be trained here.
        """

    def reuse_prefix(self, plan: LocalPlan, inputs: Batch, processes: int = 1) -> None:
        """Keep what the frozen blocks below every block that changes compute, where the plan says so.

        Raises:
            ConfigError: That cannot be done in this model.
        """
        if self.prefix is not None:
            self.prefix.remove()
        if plan.prefix is not None:
            changing = {*plan.adaptation.state_names, *plan.adaptation.trainable_names}
            self.prefix = reuse_prefix(plan.model, changing, plan.prefix.store(processes), inputs)

    @abstractmethod
    def fit(self, tasks: Iterable[FitTask]) -> Iterator[tuple[FitTask, Outcome]]:
        """Yield each task with its outcome, in the order of `tasks` however the clients were run.

        A client that raises, takes too long or runs out of memory is a `Failure` and ends nothing but its own round.

        Args:
            tasks: One for each client of the cohort. An engine that trains one client at a time takes each from the
                iterable when that client begins; one that trains several may take as many ahead.
        """

    @abstractmethod
    def evaluate(self, requests: Iterable[Evaluate]) -> Iterator[Evaluation]:
        """Yield the score of each client's own model, in the order of `requests`; models are as before afterwards.

        A client on another machine that does not answer is left out.
        """

    def available(self, round_index: int) -> Collection[str] | None:
        """Return the clients that are there in a round; ``None`` for all."""
        capabilities = self.capabilities
        return None if capabilities is None else capabilities.available(self.client_ids, round_index)

    @property
    def capabilities(self) -> Capabilities | None:
        """What clients can afford of the model as it is now; ``None`` where nothing is known of their devices."""
        return None

    def peek(self, task: FitTask, names: Collection[str]) -> dict[str, Tensor]:
        """Return what a client keeps to itself after a task, of these names: nothing, but in a simulation."""
        return {}

    def kept(self, task: FitTask) -> dict[str, Tensor]:
        """Return what a client kept in a task, for whoever stores outcomes of a round under way."""
        return {}

    def restore_kept(self, task: FitTask, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `kept` returned, in a run that is continued within a round."""

    def tensors(self, accepted: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the tensors that it takes to continue, by name.

        Args:
            accepted: Client → the round of its last accepted update.
        """
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `tensors`; called after `prepared`."""

    def state_dict(self) -> dict[str, Any]:
        """Return what it takes to continue to the same result besides tensors, as plain JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; called after `prepared`."""

    def close(self) -> None:
        """Let go of processes and connections; called at the end of a run, however it ends."""


def failure(client_id: str, error: Exception, structure: str = "") -> Failure:
    """Return what the loop is told of a client that raised."""
    kind: FailureKind = "error"
    if isinstance(error, ClientTimeoutError):
        kind = "timeout"
    elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        kind = "memory"
    return Failure(client_id, kind, one_line(f"{type(error).__name__}: {error}"), structure)


def one_line(text: str, most: int = 2000) -> str:
    """Return a text in one line of limited length, as `Failure.reason` is."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} …"
