"""The dial, a factor on what fine-tuning added: measured after training, and the choice of a place on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedbe.evaluation.tasks import RESERVED_NAME


@dataclass(frozen=True)
class DialPoint:
    """A trained model at one place of its dial.

    Attributes:
        factor: The part of what fine-tuning added, in [0, 1].
        accuracy: Downstream accuracy on validation data, in [0, 1].
        retention: General score ÷ the base model's by task, and their ``mean``; empty without general tasks.
    """

    factor: float
    accuracy: float
    retention: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean_retention(self) -> float | None:
        """The mean over general tasks; ``None`` without any."""
        return self.retention.get(RESERVED_NAME)


@dataclass(frozen=True)
class Dial:
    """The measured dial of a run.

    Attributes:
        points: In ascending order of the factor, from 0 to 1.
        chosen: The chosen factor; ``None`` without general tasks.
        wanted_retention: The retention to which it was chosen; ``None`` for the best trade-off.
    """

    points: list[DialPoint]
    chosen: float | None
    wanted_retention: float | None

    @classmethod
    def recorded(cls, summary: Mapping[str, Any]) -> Dial | None:
        """Return what a `summary.json` holds of it; ``None`` if it was not measured."""
        if not summary.get("dial"):
            return None
        record = summary["dial"]
        return cls(recorded_points(summary), record["chosen"], record["wanted_retention"])

    @property
    def reason(self) -> str:
        """Why the factor was chosen."""
        if self.chosen is None:
            return "no factor is chosen: the run has no general tasks to see what was kept"
        if self.wanted_retention is None:
            return f"{self.chosen:g} is the best trade-off between retention and what is left of the downstream gain"
        return f"{self.chosen:g} is the largest of these that keeps {100 * self.wanted_retention:.1f} % or more"


def choose_factor(points: Sequence[DialPoint], wanted: float | None = None) -> float | None:
    """Return a factor out of those measured; ``None`` if no retention was.

    With a wanted retention it is the largest factor that keeps as much. Without, it is the one with the highest
    harmonic mean of retention and of the share of the downstream gain that is left, which is small where either is;
    the smaller of equal ones. A model that gained nothing is best left what it was: 0.

    Args:
        points: In ascending order of the factor, the first at 0, the last at 1.
        wanted: The least mean retention.

    Source: ours.
    """
    known = [(point, point.mean_retention) for point in points if point.mean_retention is not None]
    if not known:
        return None
    if wanted is not None:
        return max((point.factor for point, kept in known if kept >= wanted), default=0.0)
    base, gain = points[0].accuracy, points[-1].accuracy - points[0].accuracy
    shares = [(point.accuracy - base) / gain if gain > 0 else 0.0 for point, _ in known]
    values = [harmonic_mean(kept, share) for (_, kept), share in zip(known, shares, strict=True)]
    return known[values.index(max(values))][0].factor


def harmonic_mean(first: float, second: float) -> float:
    """Return 2ab ÷ (a + b); 0 where one is not above 0."""
    return 2 * first * second / (first + second) if first > 0 and second > 0 else 0.0


def recorded_points(summary: Mapping[str, Any]) -> list[DialPoint]:
    """Return the points that a `summary.json` holds, in ascending order of the factor."""
    return [DialPoint(**point) for point in (summary.get("dial") or {}).get("points", ())]
