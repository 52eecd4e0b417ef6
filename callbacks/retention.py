"""What the model keeps of its general ability."""

import warnings
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from fedbe.errors import Problem, check_at_least
from fedbe.evaluation import TaskScore, delta_ce, retention
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.loop import FederatedLoop


class RetentionCallback(FederatedCallback):
    """Scores the general tasks: the base model once, then every n rounds, and the final model.

    Without general tasks it does nothing.

    Args:
        every_n_rounds: Rounds from one scoring to the next; the last round is always scored.
    """

    def __init__(self, every_n_rounds: int = 1) -> None:
        self.every_n_rounds = every_n_rounds

    def check(self, key: str, metrics: Collection[str] = ()) -> list[Problem]:
        """Return what is wrong with the number."""
        return check_at_least(key, 1, every_n_rounds=self.every_n_rounds)

    def on_run_start(self, loop: FederatedLoop) -> None:
        """Score the base model, unless an earlier part of this run did."""
        if not loop.general_tasks or loop.history:
            return
        base = _scores(loop)
        loop.record |= _measured(base, base)
        for name, score in base.items():
            if score.score <= 0:
                warnings.warn(f"The base model scores 0 on {name!r}: its retention is undefined.", stacklevel=2)

    def on_round_end(self, loop: FederatedLoop) -> None:
        """Score the model as it is now, when its turn has come."""
        number = loop.record["round"]
        if loop.general_tasks and (number % self.every_n_rounds == 0 or number == loop.rounds):
            loop.record |= _measured(_base(loop), _scores(loop))

    def on_run_end(self, loop: FederatedLoop) -> None:
        """Score the final model, which need not be the last round's."""
        loop.summary |= {"general": None, "retention": None, "delta_ce": None}
        if loop.general_tasks:
            measured = _measured(_base(loop), _scores(loop))
            general = {"base": loop.history[0]["general"], "final": measured.pop("general")}
            loop.summary |= {"general": general, **measured}


def _scores(loop: FederatedLoop) -> dict[str, TaskScore]:
    with loop.evaluating():
        return {task.name: task.evaluate(loop.model) for task in loop.general_tasks}


def _base(loop: FederatedLoop) -> dict[str, TaskScore]:
    return {name: TaskScore(**values) for name, values in loop.history[0]["general"].items()}


def _measured(base: dict[str, TaskScore], now: dict[str, TaskScore]) -> dict[str, Any]:
    return {
        "general": {name: asdict(score) for name, score in now.items()},
        "retention": retention(base, now) or None,
        "delta_ce": delta_ce(base, now) or None,
    }
