"""When a run has learned enough, and which round's model it keeps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedbe.errors import Facts, Problem, StorageError, check_at_least
from fedbe.federation.callback import FederatedCallback, Phase
from fedbe.federation.record import Mode, better, check_monitor, metric_value
from fedbe.federation.view import RunView
from fedbe.storage.checkpoint import BEST, load_tensors, save_tensors
from fedbe.storage.files import explained
from fedbe.system.notice import say
from fedbe.traits import Trait, Traits


def without_improvement(values: Sequence[float], mode: Mode, min_delta: float = 0.0) -> int:
    """Return how many values have come since the best one, the first counting as best to begin with.

    Args:
        values: A metric in the order it was measured; not empty.
        mode: Whether more or less is better.
        min_delta: A value is a new best only if it is better by more than this.
    """
    best = 0
    for index, value in enumerate(values):
        if better(value, values[best], mode, min_delta):
            best = index
    return len(values) - 1 - best


class EarlyStopping(FederatedCallback):
    """Ends the run when a metric no longer improves, reaches a target, or is no number any more.

    It looks at the written history, so that a continued run stops where an uninterrupted one does.

    Args:
        monitor: Path of a metric in `metrics.jsonl`, for example ``downstream/accuracy`` or ``retention/mean``, or the
            name of one that another callback logs.
        mode: ``max`` if more is better, ``min`` if less is.
        patience: Measurements without improvement after which to stop; ``None`` for no limit.
        min_delta: Least change that counts as an improvement.
        target: Value at which to stop; ``None`` for none.
    """

    phase = Phase.DECIDE

    def __init__(
        self,
        monitor: str = "downstream/accuracy",
        mode: Mode = "max",
        patience: int | None = 5,
        min_delta: float = 0.0,
        target: float | None = None,
    ) -> None:
        self.monitor = monitor
        self.mode = mode
        self.patience = patience
        self.min_delta = min_delta
        self.target = target

    @property
    def state_key(self) -> str:
        """Its arguments: several may be in one run."""
        return f"{super().state_key} {vars(self)}"

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the metric's name or the numbers."""
        return [
            *check_monitor(key, self.monitor, self.mode, facts.metrics),
            *check_at_least(key, 1, patience=self.patience),
            *check_at_least(key, 0, min_delta=self.min_delta),
        ]

    def on_round_written(self, run: RunView) -> None:
        """Stop the run if there is a reason to.

        Raises:
            ConfigError: There is no such metric.
        """
        if metric_value(run.history[-1], self.monitor) is None:
            return
        measured = [metric_value(record, self.monitor) for record in run.history]
        reason = self._reason([value for value in measured if value is not None])
        if reason is not None:
            run.stop(reason)

    def _reason(self, values: Sequence[float]) -> str | None:
        last = values[-1]
        if not math.isfinite(last):
            return f"{self.monitor} is {last}"
        if self.target is not None and not better(self.target, last, self.mode):
            return f"{self.monitor} is {last:.4g}, the target was {self.target:.4g}"
        if self.patience is not None and without_improvement(values, self.mode, self.min_delta) >= self.patience:
            best = (max if self.mode == "max" else min)(values)
            return f"{self.monitor} has not improved on {best:.4g} in {self.patience} measurements"
        return None


class KeepBest(FederatedCallback):
    """Keeps the best round's tensors in `checkpoints/best.safetensors`, and makes them the final model.

    A round whose tensors cannot be written does not count; if the file cannot be read at the end, the run ends with the
    last round's model. Either is said when it happens, and under ``kept_note`` in `summary.json`.

    Args:
        monitor: Path of a metric in `metrics.jsonl`, measured on validation data or general tasks.
        mode: ``max`` if more is better, ``min`` if less is.
    """

    phase = Phase.DECIDE
    needs: Traits = frozenset({Trait.FIXED_STRUCTURE})

    def __init__(self, monitor: str = "downstream/accuracy", mode: Mode = "max") -> None:
        self.monitor = monitor
        self.mode = mode
        self.value: float | None = None
        self.round: int | None = None
        self.note: str | None = None

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the metric's name."""
        return check_monitor(key, self.monitor, self.mode, facts.metrics)

    def on_round_written(self, run: RunView) -> None:
        """Save the tensors if this round is the best so far; the first of equal ones stays.

        Raises:
            ConfigError: There is no such metric.
        """
        value = metric_value(run.history[-1], self.monitor)
        if value is None or math.isnan(value):
            return
        if self.value is None or better(value, self.value, self.mode):
            self._keep(run, value)

    def on_last_round(self, run: RunView) -> None:
        """Put the best round's tensors back, before the final scoring."""
        tensors = None if self.round is None else self._read(run)
        if tensors is not None:
            run.restore(tensors)
        run.summarise(kept_round=None if tensors is None else self.round, kept_note=self.note)

    def _keep(self, run: RunView, value: float) -> None:
        """Save the tensors; where that fails, the file of the best round before stays."""
        number = run.record.round
        try:
            with explained(f"round {number}, the best so far,"):
                save_tensors(run.folder.checkpoints / BEST, run.state, {"round": number})
        except StorageError as error:
            stays = "" if self.round is None else f"; round {self.round} stays the one that is kept"
            self._say(f"{error}{stays}")
        else:
            self.value, self.round = value, number

    def _read(self, run: RunView) -> dict[str, Tensor] | None:
        """Return the tensors of the best round; where there are none any more, say so."""
        path = run.folder.checkpoints / BEST
        try:
            tensors, state = load_tensors(path)
            if state.get("round") != self.round or _shapes(tensors) != _shapes(run.state):
                raise ValueError("it is of another round or another run")
        except (OSError, SafetensorError, ValueError) as error:
            why = " ".join(str(error).split())
            self._say(f"the run ends with the last round's model: round {self.round} was best, and {path}: {why}")
            return None
        return tensors

    def _say(self, note: str) -> None:
        self.note = note
        say(note)

    def state_dict(self) -> dict[str, Any]:
        """Return which round was the best so far; its tensors are on disk."""
        return {"value": self.value, "round": self.round, "note": self.note}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the best round so far."""
        self.value, self.round, self.note = state["value"], state["round"], state["note"]


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
