"""One round: who takes part, each client's outcome, and the updates that the server takes in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedbe.allocation.timing import RoundTiming
from fedbe.engines.base import Engine
from fedbe.errors import QuorumError, UpdateError
from fedbe.federation.cohort import CohortSampler
from fedbe.federation.hooks import Hooks
from fedbe.federation.kept_outcomes import KeptOutcomes
from fedbe.federation.quorum import Quorum
from fedbe.federation.record import RoundRecord
from fedbe.federation.server import Server
from fedbe.federation.validation import check_form
from fedbe.messages import Failure, FitTask, Outcome, Update

_NAMED = 10


@dataclass
class RoundLoop:
    """Trains a cohort and has the server aggregate; clients that fail are left out, others may replace them.

    Attributes:
        server: Sends tasks and takes updates in.
        engine: Where clients train.
        sampler: Which clients take part.
        quorum: How many of them must not fail.
        hooks: The run's callbacks.
        pause: Called after each client whose outcome is on disk; ends the run there if that was asked for.
        experience: Index of the task of a sequence.
        record: The line of `metrics.jsonl` of the round under way.
        timing: How long the round takes.
        most_samples: Client → how many samples it can have seen in a round, by the number that it has announced.
        kept_outcomes: Where what clients have sent is kept until the round is done; ``None`` for nowhere.
    """

    server: Server
    engine: Engine
    sampler: CohortSampler
    quorum: Quorum
    hooks: Hooks
    pause: Callable[[], None]
    experience: int = 0
    record: RoundRecord = field(default_factory=lambda: RoundRecord(0))
    timing: RoundTiming = field(default_factory=lambda: RoundTiming(None))
    kept_outcomes: KeptOutcomes | None = None
    most_samples: Callable[[str], float] = lambda client_id: math.inf
    _begun: int = field(default=0, repr=False)
    _present: int = field(default=0, repr=False)
    _capped: int = field(default=0, repr=False)
    _failures: list[Failure] = field(default_factory=list, repr=False)

    @property
    def index(self) -> int:
        """0-based index of the round."""
        return self.record.round - 1

    def begin(self, number: int) -> None:
        """Draw the cohort and allocate; the record says who is to train what."""
        self._begun, self._failures = 0, []
        self.timing = RoundTiming(self.engine.capabilities)
        available = self.engine.available(number - 1)
        cohort = self.sampler.sample(self.engine.client_ids, self.experience, number - 1, available)
        self._present = len(self.engine.client_ids if available is None else available)
        self._capped = 0
        self.record = RoundRecord(number, self.experience)
        self._allocate(cohort)
        self.record.explanation = self.server.algorithm.strategy.explanation()
        self.server.begin_round(self.index)

    def run(self) -> None:
        """Train the clients and have the server take in their updates.

        Raises:
            QuorumError: Too many clients failed, and others must not or cannot take their place.
        """
        allocation, most = dict(self.record.allocation), len(self.record.cohort)
        self._train(allocation)
        needed = self.quorum.needed(self._begun)
        while (lacking := needed - (self._begun - len(self._failures))) > 0:
            self._train(self._others(lacking, most))
        self.record.client_seconds, self.record.late = self.timing.seconds, self.timing.late
        self.server.averaging.asked(len(self.record.cohort), self._present)

    def figures(self) -> dict[str, float]:
        """Return what the averaging of the round's updates has to say, for its record."""
        capped = {"capped_samples": self._capped} if self._capped else {}
        return self.server.averaging.figures(self.record.round) | capped

    def _allocate(self, cohort: list[str]) -> Mapping[str, list[str]]:
        units = self.server.algorithm.strategy.allocate(cohort, self.index)
        allocation = {client: list(names) for client, names in units.items()}
        self.record.cohort += list(allocation)
        self.record.allocation |= allocation
        return allocation

    def _train(self, allocation: Mapping[str, list[str]]) -> None:
        for task, outcome in self._outcomes(self._tasks(allocation)):
            failure = self._take(task, outcome)
            if failure is not None:
                self._failures.append(failure)
                self.record.failures.append(failure.record)
                self.hooks.call("on_client_failure", task, failure)
            del task, outcome  # or their tensors would be in memory while the next client trains

    def _tasks(self, allocation: Mapping[str, list[str]]) -> Iterator[FitTask]:
        capabilities = self.timing.capabilities
        for client_id, units in allocation.items():
            task = self.server.task(client_id, self.experience, self.index, units)
            if capabilities is not None:
                task = replace(task, max_steps=capabilities.max_steps(task))
                if lacking := capabilities.lacking_memory(task):
                    self.record.lacking_memory[client_id] = lacking
            if not units or task.max_steps == 0:
                self.record.idle.append(client_id)
                continue
            self._begun += 1
            self.hooks.call("on_client_start", task)
            yield task

    def _outcomes(self, tasks: Iterator[FitTask]) -> Iterator[tuple[FitTask, Outcome]]:
        """Yield each client's outcome: first those that an interrupted run has kept of this round, then new ones."""
        kept = self.kept_outcomes
        if kept is None:
            yield from self.engine.fit(tasks)
            return
        for task in tasks:
            known = kept.load(task)
            if known is not None:
                outcome, own = known
                self.engine.restore_kept(task, own)
                yield task, outcome
                continue
            for trained, outcome in self.engine.fit(itertools.chain([task], tasks)):
                kept.save(trained, outcome, self.engine.kept(trained))
                yield trained, outcome
                self.pause()

    def _take(self, task: FitTask, outcome: Outcome) -> Failure | None:
        """Take in an update, whole or not at all; return why not."""
        try:
            if not isinstance(outcome, Failure):
                check_form(task, outcome)
            sent, outcome = outcome, self.hooks.replaced(task, outcome)
            if isinstance(outcome, Failure):
                return outcome
            if outcome is not sent:
                check_form(task, outcome)
            outcome = self._capped_samples(task, outcome)
            if self.timing.in_time(task, outcome):
                self.server.receive(task, outcome, self._peeked(task))
        except UpdateError as error:
            return Failure(task.client_id, "update", str(error))
        self.hooks.call("on_client_end", task, outcome)
        return None

    def _capped_samples(self, task: FitTask, update: Update) -> Update:
        """Return the update with no more samples than the client can have seen: they are its weight in the average."""
        most = self.most_samples(task.client_id)
        if update.samples <= most:
            return update
        self._capped += 1
        return replace(update, samples=int(most))

    def _peeked(self, task: FitTask) -> dict[str, Tensor]:
        names = self.server.algorithm.strategy.peeked_names
        return self.engine.peek(task, names) if names else {}

    def _others(self, count: int, most: int) -> Mapping[str, list[str]]:
        """Return the allocation of clients that take the place of those which failed.

        Raises:
            QuorumError: The quorum says to stop, there is nobody left, or `most` have been tried already.
        """
        count = min(count, 2 * most - len(self.record.cohort))
        replace_them = self.quorum.below == "replace" and count > 0
        others = self._next(count) if replace_them else []
        if not others:
            raise QuorumError(self._message())
        return self._allocate(others)

    def _next(self, count: int) -> list[str]:
        available = self.engine.available(self.index)
        clients = self.engine.client_ids
        return self.sampler.others(count, self.record.cohort, clients, self.experience, self.index, available)

    def _message(self) -> str:
        failed = len(self._failures)
        reasons = "".join(f"\n  - {failure.client_id}: {failure.reason}" for failure in self._failures[:_NAMED])
        more = f"\n  and {failed - _NAMED} more" if failed > _NAMED else ""
        return f"round {self.record.round} has no quorum, {failed} of {self._begun} clients failed:{reasons}{more}"
