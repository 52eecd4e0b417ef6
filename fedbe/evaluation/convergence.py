"""How quickly a run learned: its downstream score by round, by simulated second and by byte."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Point:
    """The downstream score after a round, and what it had cost by then.

    Attributes:
        round: Rounds done; 0 is the base model.
        accuracy: Downstream accuracy on the validation data, in [0, 1].
        simulated_seconds: Simulated time since the start.
        bytes: Bytes sent since the start, up and down together.
    """

    round: int
    accuracy: float
    simulated_seconds: float
    bytes: int


def curve(history: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the evaluated rounds of a run, in order.

    Args:
        history: The records of a run, as in `metrics.jsonl`.
    """
    points, sent = [], 0
    for record in history:
        sent += sum((record.get("bytes") or {}).values())
        if record.get("downstream"):
            seconds = record.get("simulated_seconds") or 0.0
            points.append(Point(record["round"], record["downstream"]["accuracy"], seconds, sent))
    return points


def first_reaching(points: Sequence[Point], target: float) -> Point | None:
    """Return the first point whose accuracy is at least `target`; ``None`` if there is none."""
    return next((point for point in points if point.accuracy >= target), None)


def best(points: Sequence[Point]) -> Point | None:
    """Return the point of the highest accuracy, the first of equal ones; ``None`` without points."""
    return max(points, key=lambda point: point.accuracy, default=None)


def mean_accuracy(points: Sequence[Point]) -> float | None:
    """Return the area under accuracy by round ÷ the number of rounds (trapezoids); ``None`` for fewer than two points.

    Quick learning shows as a mean near the final accuracy.
    """
    if len(points) < 2:
        return None
    area = sum((b.round - a.round) * (a.accuracy + b.accuracy) / 2 for a, b in pairwise(points))
    return area / (points[-1].round - points[0].round)


def level_of_gain(points: Sequence[Point], share: float) -> float | None:
    """Return the accuracy at which `share` of the run's gain (best - first) was made; ``None`` if it gained nothing."""
    top = best(points)
    if top is None or top.accuracy <= points[0].accuracy:
        return None
    return points[0].accuracy + share * (top.accuracy - points[0].accuracy)
