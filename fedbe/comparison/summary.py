"""What a comparison comes to: for each arm the figures of its runs, over seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fedbe.comparison.results import RunResult
from fedbe.comparison.statistics import Estimate, common_level, value_at
from fedbe.evaluation.convergence import Point


@dataclass(frozen=True)
class Place:
    """An arm's means over seeds after a round, and what it had cost by then.

    Attributes:
        round: Rounds done.
        accuracy: Downstream validation accuracy.
        simulated_seconds: Simulated time since the start.
        bytes: Bytes sent since the start.
    """

    round: int
    accuracy: Estimate
    simulated_seconds: float
    bytes: float


@dataclass(frozen=True)
class Arm:
    """The runs of one arm that count, one per seed.

    Attributes:
        name: Its name.
        runs: At least one run.
    """

    name: str
    runs: Sequence[RunResult]

    def estimate(self, value: Callable[[RunResult], float | None]) -> Estimate | None:
        """Return the mean over seeds; ``None`` unless every run has the value."""
        values = [value(run) for run in self.runs]
        known = [value for value in values if value is not None]
        return Estimate.of(known) if len(known) == len(values) else None

    def retention_at(self, level: float | None) -> Estimate | None:
        """Return retention where the downstream score first reaches `level`; ``None`` unless every seed reaches it."""
        return None if level is None else self.estimate(lambda run: value_at(run.trajectory, level))

    def dialled_retention_at(self, level: float | None) -> Estimate | None:
        """Return the final models' retention where the dial, turned up from 0, first gives the downstream `level`.

        ``None`` unless every seed was measured and reaches it.
        """
        return None if level is None else self.estimate(lambda run: value_at([*run.dial_curve.values()], level))

    def cost(self, target: float | None, unit: Callable[[Point], float]) -> Estimate | None:
        """Return what it took to reach the target; ``None`` unless every seed reached it."""
        reached = [run.reaching(target) for run in self.runs]
        values = [unit(point) for point in reached if point is not None]
        return Estimate.of(values) if len(values) == len(reached) else None

    @cached_property
    def places(self) -> list[Place]:
        """Means after each round that every seed evaluated."""
        by_round = [{point.round: point for point in run.points} for run in self.runs]
        shared = sorted(set.intersection(*(set(points) for points in by_round)))
        return [_place([points[number] for points in by_round]) for number in shared]

    @cached_property
    def mean_trajectory(self) -> list[tuple[float, float]]:
        """Means of (downstream validation accuracy, retention), round by round."""
        steps = zip(*(run.trajectory for run in self.runs), strict=False)
        return [(_mean([x for x, _ in step]), _mean([y for _, y in step])) for step in steps]

    @cached_property
    def mean_dial(self) -> list[tuple[float, float]]:
        """Means of (downstream validation accuracy, retention) at the places of the dial that every seed has."""
        shared = sorted(set.intersection(*(set(run.dial_curve) for run in self.runs)))
        steps = [[run.dial_curve[factor] for run in self.runs] for factor in shared]
        return [(_mean([x for x, _ in step]), _mean([y for _, y in step])) for step in steps]


def _place(points: Sequence[Point]) -> Place:
    return Place(
        points[0].round,
        Estimate.of([point.accuracy for point in points]),
        _mean([point.simulated_seconds for point in points]),
        _mean([point.bytes for point in points]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Comparison:
    """Arms side by side.

    Attributes:
        results: Every finished run, those too that only served to choose a learning rate.
        given_level: Downstream validation accuracy to compare retention at; ``None`` for the highest common one.
        given_target: Downstream validation accuracy to time convergence to; ``None`` for the matched level.
        baseline: Arm over which acceleration is counted; ``None`` for the first.
        notes: What a reader must know.
    """

    results: Sequence[RunResult]
    given_level: float | None = None
    given_target: float | None = None
    baseline: str | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    @cached_property
    def arms(self) -> list[Arm]:
        """The arms with runs that count, in their order."""
        names = dict.fromkeys(result.arm for result in self.results if result.chosen)
        return [Arm(name, [r for r in self.results if r.chosen and r.arm == name]) for name in names]

    @cached_property
    def level(self) -> float | None:
        """The downstream validation accuracy at which retention is compared."""
        trajectories = {arm.name: [run.trajectory for run in arm.runs] for arm in self.arms}
        return self.given_level if self.given_level is not None else common_level(trajectories)

    @cached_property
    def target(self) -> float | None:
        """The downstream validation accuracy to which convergence is timed."""
        if self.given_target is not None or self.level is not None:
            return self.given_target if self.given_target is not None else self.level
        return common_level({a.name: [[(p.accuracy, 0.0) for p in run.points] for run in a.runs] for a in self.arms})

    @cached_property
    def common_seconds(self) -> float:
        """The simulated time that every run had: what the quickest one took in all."""
        return min(run.points[-1].simulated_seconds for arm in self.arms for run in arm.runs)

    @property
    def reference(self) -> Arm:
        """The arm over which acceleration is counted."""
        return next((arm for arm in self.arms if arm.name == self.baseline), self.arms[0])

    def acceleration(self, arm: Arm, unit: Callable[[Point], float]) -> float | None:
        """Return the baseline's cost of reaching the target ÷ this arm's; ``None`` if either does not reach it."""
        theirs, ours = self.reference.cost(self.target, unit), arm.cost(self.target, unit)
        return theirs.mean / ours.mean if theirs and ours and ours.mean > 0 else None
