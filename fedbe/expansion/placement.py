"""Placement: how many blocks to insert, and where, from what the clients' probes report."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fedbe.errors import Facts, Problem, UpdateError
from fedbe.expansion.expand import resolve_positions
from fedbe.messages import ProbeReport
from fedbe.seeding import generator
from fedbe.traits import Part, Trait, Traits


@dataclass(frozen=True)
class Reason:
    """What spoke for and against one position.

    Attributes:
        position: The base block (from 0) above which the block would sit.
        why: Why it was taken, or why not, one sentence.
        order: As which one it was taken, from 1; None if it was not.
        score: The clients' mean score; None where no client was asked, as below.
        agreement: How far the clients' gradients point the same way, from 0 to 1.
        gain: The marginal gain when it was taken, or when the choice was over: score times agreement, less what the
            blocks nearby offer.
        cost: Its cost.
    """

    position: int
    why: str
    order: int | None = None
    score: float | None = None
    agreement: float | None = None
    gain: float | None = None
    cost: float | None = None


@dataclass(frozen=True)
class Choice:
    """The positions chosen, and why.

    Attributes:
        positions: Base blocks above each of which a block goes, sorted.
        reasons: One for each base block, bottom first.
    """

    positions: tuple[int, ...]
    reasons: tuple[Reason, ...]

    def to_dict(self) -> dict[str, object]:
        """Return a dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Choice":
        """Return the choice that `to_dict` described, straight or by way of JSON."""
        return cls(tuple(values["positions"]), tuple(Reason(**reason) for reason in values["reasons"]))


class Placement(Part, ABC):
    """Where blocks go, decided once on the server before round 1, and where the next one would go.

    Subclass it in a file of your own and name it by ``class_path``. If `choose` reads the clients' probes, `needs` says
    so: a server that acts on reports. Otherwise nobody needs to probe.

    Attributes:
        seed: The run's seed, set before `choose`.
    """

    seed: int = 0

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this configuration, found before work starts; see `Facts`."""
        return []

    @abstractmethod
    def choose(self, reports: Sequence[ProbeReport], depth: int, costs: Sequence[float] | None = None) -> Choice:
        """Return the positions for a base model.

        Args:
            reports: What the clients sent, in any order.
            depth: The number of blocks of the base model.
            costs: What a block costs at each position, positive, in any unit; None if all cost the same.

        Raises:
            UpdateError: If a report is unusable.
        """

    @abstractmethod
    def next_position(self, choice: Choice, taken: Collection[int]) -> int | None:
        """Return where one more block should go when learning stalls; None for nowhere.

        Args:
            choice: What `choose` returned.
            taken: The positions that have a block by now.
        """


class AdaptivePlacement(Placement):
    """Takes the position with the largest marginal gain per cost, one at a time, while that still pays.

    A position's gain is the clients' sample-weighted score times their agreement: the gain of a block there for all
    clients together, in first order. Its marginal gain leaves out what the blocks taken already offer in its place:
    each of them, d positions away, leaves the share 1 − exp(−d / spacing). One more block pays while its marginal gain
    per cost is at least `threshold` of the first block's.

    Args:
        max_blocks: Most blocks; never more than one for each base block.
        min_blocks: Blocks to take in any case.
        spacing: How many positions apart blocks start to be of use side by side; 0 to let them be neighbours at will.
        threshold: Share of the first block's gain per cost, from 0 to 1, below which no more blocks are taken.

    Source: ours.
    """

    needs: Traits = frozenset({Trait.SERVER_SEES_REPORTS})

    def __init__(self, max_blocks: int = 4, min_blocks: int = 1, spacing: float = 1.0, threshold: float = 0.5) -> None:
        self.max_blocks = max_blocks
        self.min_blocks = min_blocks
        self.spacing = spacing
        self.threshold = threshold

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for each argument outside its range, and where the base model has no blocks."""
        problems = _count_problems(f"{key}.max_blocks", self.max_blocks, 0) if facts.depth == 0 else []
        if self.max_blocks < 1:
            problems.append(Problem(f"{key}.max_blocks", self.max_blocks, "give 1 or more blocks"))
        if not 1 <= self.min_blocks <= self.max_blocks:
            remedy = f"give 1 or more blocks, and no more than `max_blocks`, {self.max_blocks}"
            problems.append(Problem(f"{key}.min_blocks", self.min_blocks, remedy))
        if not 0 <= self.spacing < math.inf:
            remedy = "give a finite number of positions, 0 or more"
            problems.append(Problem(f"{key}.spacing", self.spacing, remedy))
        if not 0 <= self.threshold <= 1:
            problems.append(Problem(f"{key}.threshold", self.threshold, "give a share from 0 to 1"))
        return problems

    def choose(self, reports: Sequence[ProbeReport], depth: int, costs: Sequence[float] | None = None) -> Choice:
        """Return the positions that pay.

        Raises:
            UpdateError: If a report is unusable, or there is none.
        """
        appraisals = appraise(reports, depth, costs)
        taken: dict[int, Reason] = {}
        while len(taken) < min(self.max_blocks, depth):
            best = self._best(appraisals, taken)
            first = next(iter(taken.values()), best)
            if len(taken) >= self.min_blocks and not self._pays(best, first):
                break
            order = len(taken) + 1
            why = f"gains {_share(best, first)} as much per cost as the first" if taken else "gains most per cost"
            taken[best.position] = replace(best, order=order, why=why)
        return Choice(tuple(sorted(taken)), tuple(self._reasons(appraisals, taken)))

    def next_position(self, choice: Choice, taken: Collection[int]) -> int | None:
        """Return the position with the largest marginal gain per cost, whether or not it is above the threshold."""
        if set(taken) >= {reason.position for reason in choice.reasons}:
            return None
        return self._best(choice.reasons, taken).position

    def _best(self, appraisals: Sequence[Reason], taken: Collection[int]) -> Reason:
        """Return the best position left with its marginal gain; of equals the highest, which is cheapest to train."""
        left = [self._discounted(reason, taken) for reason in appraisals if reason.position not in taken]
        return max(left, key=lambda reason: (_rate(reason), reason.position))

    def _discounted(self, reason: Reason, taken: Iterable[int]) -> Reason:
        whole = (reason.score or 0.0) * (reason.agreement or 0.0)
        return replace(reason, gain=whole * share_left(reason.position, taken, self.spacing))

    def _pays(self, best: Reason, first: Reason) -> bool:
        return _rate(best) > 0 and _rate(best) >= self.threshold * _rate(first)

    def _reasons(self, appraisals: Sequence[Reason], taken: Mapping[int, Reason]) -> Iterable[Reason]:
        first = next(iter(taken.values()))
        for appraisal in appraisals:
            if appraisal.position in taken:
                yield taken[appraisal.position]
                continue
            left = self._discounted(appraisal, taken)
            limit = f"under the threshold of {self.threshold:.0%}"
            if self._pays(left, first):
                limit = f"but there are {len(taken)} blocks already"
            yield replace(left, why=f"would gain {_share(left, first)} as much per cost as the first, {limit}")


class FixedPlacement(Placement):
    """Puts blocks where it is told, whatever the clients report; a control. It does not grow.

    Args:
        positions: Base blocks above which a block sits (0-based), or a number of blocks to interleave evenly.
    """

    def __init__(self, positions: list[int] | int) -> None:
        self.positions = positions

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem when `positions` does not fit the base model."""
        return check_positions(self.positions, facts.depth, f"{key}.positions")

    def choose(self, reports: Sequence[ProbeReport], depth: int, costs: Sequence[float] | None = None) -> Choice:
        """Return the given positions."""
        return _given(resolve_positions(self.positions, depth), depth, "given")

    def next_position(self, choice: Choice, taken: Collection[int]) -> None:
        """Return None: no other position is given."""


class RandomPlacement(Placement):
    """Draws positions at random, each at most once; a control without which no claim about placement stands.

    Args:
        blocks: Number of blocks.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem when `blocks` is more than the base model has, or less than 1."""
        return _count_problems(f"{key}.blocks", self.blocks, facts.depth)

    def choose(self, reports: Sequence[ProbeReport], depth: int, costs: Sequence[float] | None = None) -> Choice:
        """Return the positions drawn from the run's seed."""
        return _given(self._drawn(depth)[: self.blocks], depth, "drawn at random")

    def next_position(self, choice: Choice, taken: Collection[int]) -> int | None:
        """Return the position drawn next."""
        return next((position for position in self._drawn(len(choice.reasons)) if position not in taken), None)

    def _drawn(self, depth: int) -> list[int]:
        drawn: list[int] = torch.randperm(depth, generator=generator(self.seed, "placement")).tolist()
        return drawn


def appraise(reports: Sequence[ProbeReport], depth: int, costs: Sequence[float] | None = None) -> list[Reason]:
    """Return score, agreement and cost of each position, bottom first; the order of the reports does not matter.

    With p_k a client's share of the samples and g_k its gradient at a position, the score is Σ p_k ‖g_k‖ and the
    agreement ‖Σ p_k g_k‖ / Σ p_k ‖g_k‖, estimated from the sketches; 1 without any. Their product is the norm of the
    gradient of the clients' common loss. K clients that have nothing but chance in common agree to about 1/√K.

    Args:
        reports: One or more, with sketches or all without.
        depth: The number of blocks of the base model.
        costs: What a block costs at each position; None if all cost the same.

    Raises:
        UpdateError: If there is no report, or one does not fit the others or holds a number that is not finite.
        ValueError: If there are not `depth` positive costs.

    Source: ours.
    """
    prices = [1.0] * depth if costs is None else list(costs)
    if len(prices) != depth or not all(0 < price < math.inf for price in prices):
        raise ValueError(f"`costs` = {costs!r}: give {depth} positive numbers, one for each position.")
    ordered = sorted(reports, key=lambda report: report.client_id)
    _check_reports(ordered, depth)
    samples = torch.tensor([report.samples for report in ordered], dtype=torch.float64)
    shares = samples / samples.sum()
    scores = shares @ torch.tensor([report.scores for report in ordered], dtype=torch.float64)
    agreements = _agreements([report.sketch for report in ordered if report.sketch], shares, depth)
    columns = zip(scores.tolist(), agreements.tolist(), prices, strict=True)
    return [
        Reason(position, "", score=score, agreement=agreement, gain=score * agreement, cost=float(price))
        for position, (score, agreement, price) in enumerate(columns)
    ]


def share_left(position: int, taken: Iterable[int], spacing: float) -> float:
    """Return the share of a position's gain that the blocks taken do not offer: Π (1 − exp(−distance / spacing)).

    Args:
        position: The position in question.
        taken: The positions of the blocks there are.
        spacing: How many positions apart blocks start to be of use side by side; with 0 only a block in the very
            place counts.

    Source: ours.
    """
    distances = sorted(abs(position - other) for other in taken)
    if spacing == 0:
        return float(all(distances))
    return math.prod(1 - math.exp(-distance / spacing) for distance in distances)


def check_positions(positions: list[int] | int, depth: int, key: str) -> list[Problem]:
    """Return a problem when these blocks, or so many, are not among `depth` blocks."""
    if isinstance(positions, int) or depth == 0:
        return _count_problems(key, positions, depth)
    if positions and all(0 <= position < depth for position in positions):
        return []
    remedy = f"give at least one block, each from 0 to {depth - 1}: the base model has {depth} blocks"
    return [Problem(key, positions, remedy)]


def _count_problems(key: str, count: Sequence[int] | int, depth: int) -> list[Problem]:
    if depth == 0:
        remedy = "the base model's configuration states no number of blocks, between which new ones could go"
        return [Problem(key, count, f"{remedy}: name a model that is a list of blocks (BERT, Llama, ViT, …)")]
    if isinstance(count, int) and 1 <= count <= depth:
        return []
    return [Problem(key, count, f"a number of blocks lies between 1 and the depth, {depth}")]


def _check_reports(reports: Sequence[ProbeReport], depth: int) -> None:
    if not reports:
        raise UpdateError("no client reported its probe: the placement needs one report at least")
    shape = _sketch_shape(reports[0])
    for report in reports:
        who = f"client {report.client_id!r}"
        if not (math.isfinite(report.samples) and report.samples > 0):
            raise UpdateError(f"{who} reports {report.samples} samples: a weight must be positive")
        if len(report.scores) != depth:
            raise UpdateError(f"{who} sent {len(report.scores)} scores for {depth} positions")
        if _sketch_shape(report) != shape or (shape and (len(shape) != 2 or shape[0] != depth)):
            raise UpdateError(f"{who} sent a sketch of shape {_sketch_shape(report)}, expected {shape}")
        numbers = (*report.scores, *(number for row in report.sketch or () for number in row))
        if not all(map(math.isfinite, numbers)):
            raise UpdateError(f"{who} sent a probe with values that are not finite")


def _sketch_shape(report: ProbeReport) -> tuple[int, ...]:
    return () if report.sketch is None else (len(report.sketch), *sorted({len(row) for row in report.sketch}))


def _agreements(sketches: Sequence[Sequence[Sequence[float]]], shares: torch.Tensor, depth: int) -> torch.Tensor:
    if not sketches:
        return torch.ones(depth, dtype=torch.float64)
    weighted = shares[:, None, None] * torch.tensor(sketches, dtype=torch.float64)  # [clients, positions, dimension]
    norms = weighted.norm(dim=-1).sum(0)
    return torch.where(norms > 0, weighted.sum(0).norm(dim=-1) / norms, 1.0).clamp(max=1.0)


def _rate(reason: Reason) -> float:
    return (reason.gain or 0.0) / (reason.cost or 1.0)


def _share(reason: Reason, first: Reason) -> str:
    return f"{_rate(reason) / _rate(first):.0%}" if _rate(first) else "0%"


def _given(positions: Sequence[int], depth: int, why: str) -> Choice:
    orders = {position: order for order, position in enumerate(positions, start=1)}
    reasons = [
        Reason(position, why if position in orders else f"not {why}", orders.get(position)) for position in range(depth)
    ]
    return Choice(tuple(sorted(positions)), tuple(reasons))
