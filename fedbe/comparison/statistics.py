"""The arithmetic of a comparison: means over seeds, retention at a matched score, the Pareto front."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        error: Its standard error; ``None`` for a single value.
        count: Number of values.
    """

    mean: float
    error: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Return the mean of at least one value with its standard error."""
        return cls(statistics.fmean(values), standard_error(values), len(values))


def standard_error(values: Sequence[float]) -> float | None:
    """Return sample standard deviation ÷ √n; ``None`` for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def value_at(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """Return y where a trajectory first reaches x = `level`, interpolated linearly; ``None`` if it never does.

    Args:
        points: The trajectory as (x, y), in the order of the rounds; x may fall in between.
        level: The x to reach from below.
    """
    if not points:
        return None
    if points[0][0] >= level:
        return points[0][1]
    for (x, y), (next_x, next_y) in pairwise(points):
        if next_x >= level:
            share = (level - x) / (next_x - x)
            return (1 - share) * y + share * next_y
    return None


def common_level(trajectories: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> float | None:
    """Return the highest x that every trajectory of every arm reaches; ``None`` if no arm learned anything.

    An arm of which a trajectory never rises above its start is left out: it would pull the level down to the base
    model's, where everyone retains everything. Source: ours.

    Args:
        trajectories: For each arm one trajectory per seed, as (x, y) in the order of the rounds.
    """
    peaks = [
        [max(x for x, _ in points) for points in seeds]
        for seeds in trajectories.values()
        if seeds and all(points and max(x for x, _ in points) > points[0][0] for points in seeds)
    ]
    return min((peak for arm in peaks for peak in arm), default=None)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other point matches in one coordinate and beats in the other.

    Both coordinates are better when larger. The result is sorted by the first coordinate; equal points are all in.
    """
    front = [index for index, point in enumerate(points) if not any(_dominates(other, point) for other in points)]
    return sorted(front, key=lambda index: points[index])


def _dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a != b and a[0] >= b[0] and a[1] >= b[1]
