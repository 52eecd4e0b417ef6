"""How quickly a run learns its downstream task."""

from dataclasses import asdict

from fedbe.errors import Facts, Problem
from fedbe.evaluation.convergence import Point, best, curve, first_reaching, level_of_gain, mean_accuracy
from fedbe.federation.callback import FederatedCallback, Phase
from fedbe.federation.view import RunView

_SHARE = 0.9


class ConvergenceCallback(FederatedCallback):
    """Reports downstream accuracy by round, simulated second and byte, and what it took to get to a target.

    Under ``convergence`` in `summary.json`: the curve, its best point and mean accuracy, the first point at the target,
    and the first at which 90 % of the run's whole gain was made; null for a point that was not reached.

    Args:
        target: Downstream accuracy on the validation data to wait for, in (0, 1]; ``None`` for none.
    """

    phase = Phase.MEASURE

    def __init__(self, target: float | None = None) -> None:
        self.target = target

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the target."""
        if self.target is not None and not 0 < self.target <= 1:
            return [Problem(f"{key}.target", self.target, "an accuracy is above 0 and at most 1.")]
        return []

    def on_run_end(self, run: RunView) -> None:
        """Add what the history shows to the summary."""
        points = curve(run.history)
        level = level_of_gain(points, _SHARE)
        figures = {
            "target": self.target,
            "to_target": _cost(points, self.target),
            "to_90_percent_of_gain": _cost(points, level),
            "best": _as_dict(best(points)),
            "mean_accuracy": mean_accuracy(points),
            "curve": [asdict(point) for point in points],
        }
        run.summarise(convergence=figures)


def _cost(points: list[Point], target: float | None) -> dict[str, float] | None:
    return None if target is None else _as_dict(first_reaching(points, target))


def _as_dict(point: Point | None) -> dict[str, float] | None:
    return None if point is None else asdict(point)
