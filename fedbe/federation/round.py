"""One round: who takes part, what comes of each client, and the next global tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from fedbe.aggregation import Aggregator, check_extra
from fedbe.allocation.timing import RoundTiming
from fedbe.errors import QuorumError, UpdateError
from fedbe.messages import ClientTask, Failure, Outcome, Update

if TYPE_CHECKING:
    from fedbe.federation.loop import FederatedLoop

_NAMED = 10


@dataclass
class Round:
    """Trains a cohort and aggregates what comes of it; clients that fail are left out, others may replace them.

    Attributes:
        loop: The loop, whose state is that at the start of the round; `loop.record` is filled in.
        allocation: Client → units that it trains.
        aggregator: Takes in the updates.
        timing: How long it takes.
        trained: Names of the tensors that a client sent.
        begun: How many clients have begun.
        failures: Those of them that failed.
    """

    loop: FederatedLoop
    allocation: Mapping[str, tuple[str, ...]]
    aggregator: Aggregator
    timing: RoundTiming
    trained: set[str] = field(default_factory=set)
    begun: int = 0
    failures: list[Failure] = field(default_factory=list)

    def run(self) -> dict[str, Tensor]:
        """Train the clients and return what the aggregator makes of their updates.

        Raises:
            QuorumError: Too many clients failed, and others must not or cannot take their place.
        """
        cohort = self.allocation
        self._train(cohort)
        needed = self.loop.quorum.needed(self.begun)
        while (lacking := needed - (self.begun - len(self.failures))) > 0:
            self._train(self._others(lacking, len(cohort)))
        self.loop.record |= {"client_seconds": self.timing.seconds, "late": self.timing.late}
        return self.aggregator.result()

    def _train(self, allocation: Mapping[str, tuple[str, ...]]) -> None:
        for task, outcome in self._outcomes(self._tasks(allocation)):
            failure = self._take(task, outcome)
            if failure is not None:
                self.failures.append(failure)
                self.loop.record["failures"].append(failure.record)
                self.loop.call("on_client_failure", task, failure)
            del task, outcome  # or their tensors would be in memory while the next client trains

    def _tasks(self, allocation: Mapping[str, tuple[str, ...]]) -> Iterator[ClientTask]:
        loop = self.loop
        for client_id, units in allocation.items():
            task = loop.task(client_id, units)
            if loop.capabilities is not None:
                task = replace(task, max_steps=loop.capabilities.max_steps(task))
                if lacking := loop.capabilities.lacking_memory(task):
                    loop.record["lacking_memory"][client_id] = lacking
            if not units or task.max_steps == 0:
                loop.record["idle"].append(client_id)
                continue
            self.begun += 1
            loop.call("on_client_start", task)
            yield task

    def _outcomes(self, tasks: Iterator[ClientTask]) -> Iterator[tuple[ClientTask, Outcome]]:
        """Yield what comes of each client: first what an interrupted run has kept of this round, then new work."""
        kept = self.loop.kept_outcomes
        if kept is None:
            yield from self.loop.engine.train(tasks)
            return
        for task in tasks:
            known = kept.load(task)
            if known is not None:
                yield task, known
                continue
            for trained, outcome in self.loop.engine.train(itertools.chain([task], tasks)):
                kept.save(trained, outcome)
                yield trained, outcome
                self.loop.raise_if_interrupted()

    def _take(self, task: ClientTask, outcome: Outcome) -> Failure | None:
        """Take in an update, whole or not at all; return why not."""
        loop = self.loop
        for callback in loop.callbacks:
            if isinstance(outcome, Update):
                outcome = callback.on_client_update(loop, task, outcome) or outcome
        if isinstance(outcome, Failure):
            return outcome
        update = outcome
        loop.call("on_client_end", task, update)
        try:
            if not self.timing.in_time(task, update):
                return None
            check_extra(update)
            self.aggregator.add(update)
            loop.algorithm.observe(task, update)
            loop.objective.receive(update)
        except UpdateError as error:
            return Failure(task.client_id, "update", str(error), error)
        loop.keep(update)
        self.trained.update(update.tensors)
        return None

    def _others(self, count: int, most: int) -> Mapping[str, tuple[str, ...]]:
        """Return the allocation of clients that take the place of those which failed.

        Raises:
            QuorumError: The quorum says to stop, there is nobody left, or `most` have been tried already.
        """
        loop, record = self.loop, self.loop.record
        count = min(count, 2 * most - len(record["cohort"]))
        others = loop.others(record["cohort"], count) if loop.quorum.below == "replace" and count > 0 else []
        if not others:
            raise QuorumError(self._message()) from self.failures[-1].error
        allocation = loop.algorithm.allocate(others, loop.round_index)
        record["cohort"] += others
        record["allocation"] |= {client_id: list(names) for client_id, names in allocation.items()}
        return allocation

    def _message(self) -> str:
        number, failed = self.loop.progress.started, len(self.failures)
        reasons = "".join(f"\n  - {failure.client_id}: {failure.reason}" for failure in self.failures[:_NAMED])
        more = f"\n  and {failed - _NAMED} more" if failed > _NAMED else ""
        return f"round {number} has no quorum, {failed} of {self.begun} clients failed:{reasons}{more}"
