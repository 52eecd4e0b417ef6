"""When a run has learned enough, and which round's model it keeps."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedbe.errors import FedBEError, Problem, check_at_least
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.loop import FederatedLoop
from fedbe.federation.record import Mode, better, check_monitor, metric_value
from fedbe.storage.checkpoint import BEST, load_tensors, save_tensors


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
        monitor: Path of a metric in `metrics.jsonl`, for example ``downstream/accuracy`` or ``retention/mean``.
        mode: ``max`` if more is better, ``min`` if less is.
        patience: Measurements without improvement after which to stop; ``None`` for no limit.
        min_delta: Least change that counts as an improvement.
        target: Value at which to stop; ``None`` for none.
    """

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

    def check(self, key: str, metrics: Collection[str] = ()) -> list[Problem]:
        """Return what is wrong with the metric's name or the numbers."""
        return [
            *check_monitor(key, self.monitor, self.mode, metrics),
            *check_at_least(key, 1, patience=self.patience),
            *check_at_least(key, 0, min_delta=self.min_delta),
        ]

    def on_round_written(self, loop: FederatedLoop) -> None:
        """Stop the loop if there is a reason to.

        Raises:
            ConfigError: There is no such metric.
        """
        if metric_value(loop.record, self.monitor) is None:
            return
        measured = [metric_value(record, self.monitor) for record in loop.history]
        reason = self._reason([value for value in measured if value is not None])
        if reason is not None:
            loop.stop(reason)

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

    Args:
        monitor: Path of a metric in `metrics.jsonl`, measured on validation data or general tasks.
        mode: ``max`` if more is better, ``min`` if less is.
    """

    restores_rounds = True

    def __init__(self, monitor: str = "downstream/accuracy", mode: Mode = "max") -> None:
        self.monitor = monitor
        self.mode = mode
        self.value: float | None = None
        self.round: int | None = None

    def check(self, key: str, metrics: Collection[str] = ()) -> list[Problem]:
        """Return what is wrong with the metric's name."""
        return check_monitor(key, self.monitor, self.mode, metrics)

    def on_round_written(self, loop: FederatedLoop) -> None:
        """Save the tensors if this round is the best so far; the first of equal ones stays.

        Raises:
            ConfigError: There is no such metric.
        """
        value = metric_value(loop.record, self.monitor)
        if value is None or math.isnan(value):
            return
        if self.value is None or better(value, self.value, self.mode):
            self.value, self.round = value, loop.record["round"]
            save_tensors(loop.folder.checkpoints / BEST, loop.state, {"round": self.round})

    def on_last_round(self, loop: FederatedLoop) -> None:
        """Put the best round's tensors back, before the final scoring."""
        if self.round is not None:
            tensors, state = load_tensors(loop.folder.checkpoints / BEST)
            if state["round"] != self.round:
                raise FedBEError(f"{BEST} is of round {state['round']}, not of {self.round}")
            loop.restore(tensors)
        loop.summary["kept_round"] = self.round

    def state_dict(self) -> dict[str, Any]:
        """Return which round was the best so far; its tensors are on disk."""
        return {"value": self.value, "round": self.round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the best round so far."""
        self.value, self.round = state["value"], state["round"]
