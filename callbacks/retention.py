"""What the model keeps of its general ability."""

import warnings
from dataclasses import asdict
from typing import Any

from fedbe.errors import Facts, Problem, check_at_least
from fedbe.evaluation import TaskScore, delta_ce, retention
from fedbe.federation.callback import FederatedCallback, Phase
from fedbe.federation.view import RunView


class RetentionCallback(FederatedCallback):
    """Scores the general tasks: the base model once, then every n rounds, and the final model.

    Without general tasks it does nothing.

    Args:
        every_n_rounds: Rounds from one scoring to the next; the last round is always scored.
    """

    phase = Phase.MEASURE

    def __init__(self, every_n_rounds: int = 1) -> None:
        self.every_n_rounds = every_n_rounds

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the number."""
        return check_at_least(key, 1, every_n_rounds=self.every_n_rounds)

    def on_run_start(self, run: RunView) -> None:
        """Score the base model, unless an earlier part of this run did."""
        if not run.general_tasks or run.history:
            return
        base = _scores(run)
        _note(run, base, base)
        for name, score in base.items():
            if score.score <= 0:
                warnings.warn(f"The base model scores 0 on {name!r}: its retention is undefined.", stacklevel=2)

    def on_round_end(self, run: RunView) -> None:
        """Score the model as it is now, when its turn has come."""
        number = run.record.round
        if run.general_tasks and (number % self.every_n_rounds == 0 or number == run.rounds):
            _note(run, _base(run), _scores(run))

    def on_run_end(self, run: RunView) -> None:
        """Score the final model, which need not be the last round's."""
        if not run.general_tasks:
            run.summarise(general=None, retention=None, delta_ce=None)
            return
        measured = _measured(_base(run), _scores(run))
        general = {"base": run.history[0]["general"], "final": measured.pop("general")}
        run.summarise(general=general, **measured)


def _scores(run: RunView) -> dict[str, TaskScore]:
    with run.evaluating():
        return {task.name: task.evaluate(run.model) for task in run.general_tasks}


def _base(run: RunView) -> dict[str, TaskScore]:
    return {name: TaskScore(**values) for name, values in run.history[0]["general"].items()}


def _note(run: RunView, base: dict[str, TaskScore], now: dict[str, TaskScore]) -> None:
    measured = _measured(base, now)
    run.record.general = measured["general"]
    run.record.retention, run.record.delta_ce = measured["retention"], measured["delta_ce"]


def _measured(base: dict[str, TaskScore], now: dict[str, TaskScore]) -> dict[str, Any]:
    return {
        "general": {name: asdict(score) for name, score in now.items()},
        "retention": retention(base, now) or None,
        "delta_ce": delta_ce(base, now) or None,
    }
