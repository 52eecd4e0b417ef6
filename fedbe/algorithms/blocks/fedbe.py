"""FedBE: blocks where clients gain most by them, and each client trains those that suit its data and its device."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from fedbe.adaptation.base import Adaptation
from fedbe.adaptation.placed_blocks import PlacedBlocks
from fedbe.algorithms.base import Algorithm, Strategy
from fedbe.allocation.allocator import Allocation, Allocator
from fedbe.allocation.best_sets import CohortCosts
from fedbe.allocation.capabilities import Capabilities
from fedbe.allocation.scores import GradientScore, Score
from fedbe.errors import Facts, Problem, UpdateError
from fedbe.expansion.growth import Plateau
from fedbe.expansion.placement import AdaptivePlacement, Choice, Placement
from fedbe.messages import FitTask, ProbeReport, Structure, Update
from fedbe.seeding import generator
from fedbe.traits import ALL, Trait

GRADIENT = "gradient_norm/"


class FedBE(Algorithm):
    """Place identity blocks by what clients report of the base model, and allocate them in each round.

    Before round 1 some clients probe: one backward pass per batch tells them what a block at each position would gain;
    `placement` decides. In each round a client gets the blocks of the highest total score that it can train within
    its memory and the round's time; without a simulated clock it trains all. A classifier's head is always trained.

    Args:
        placement: How many blocks, and where.
        score: What each block is worth to each client.
        allocator: How many clients should train each block.
        round_seconds: Time that a client may take in round 1; ``null``: what the slowest client of the cohort takes for
            its cheapest block, so that nobody is left out and nobody waits for long.
        round_growth: Factor on that time from one round to the next. Above 1 the quick clients begin, and slow ones and
            more blocks join as rounds become longer: what is gained early is gained soon.
        plateau: When to insert one more block; ``null`` for never.
        probe_clients: Most clients that probe, drawn from the seed.
        probe_batches: Batches that each of them probes on.
        sketch: Numbers per position that show the direction of a client's gradient, for agreement; 0 for none.

    Source: FedBE (arXiv 2506.05977) for frozen weights, blocks, and subsets by data and capability (C); how they are
    placed and chosen, the budgets and all defaults are our reconstruction (R).
    """

    def __init__(
        self,
        placement: Placement | None = None,
        score: Score | None = None,
        allocator: Allocator | None = None,
        round_seconds: float | None = None,
        round_growth: float = 1.0,
        plateau: Plateau | None = None,
        probe_clients: int = 20,
        probe_batches: int = 2,
        sketch: int = 64,
    ) -> None:
        strategy = FedBEStrategy(
            placement or AdaptivePlacement(),
            score or GradientScore(),
            allocator or Allocator(),
            round_seconds,
            round_growth,
            plateau,
            probe_clients,
        )
        super().__init__(PlacedBlocks(probe_batches, sketch, "labels" in strategy.score.probe_fields), strategy)


class FedBEStrategy(Strategy):
    """The server's side of FedBE: it places blocks, allocates them, and has the model grow.

    What is trained has `Blocks` whose units are named ``block_…``; all other units are trained by whoever trains one.

    Args:
        placement: See `FedBE`, as the others.
        score: What each block is worth to each client.
        allocator: How many clients should train each block.
        round_seconds: Time that a client may take in round 1.
        round_growth: Factor on that time from one round to the next.
        plateau: When to insert one more block.
        probe_clients: Most clients that probe.
    """

    def __init__(
        self,
        placement: Placement,
        score: Score,
        allocator: Allocator,
        round_seconds: float | None,
        round_growth: float,
        plateau: Plateau | None,
        probe_clients: int,
    ) -> None:
        self.placement, self.score, self.allocator = placement, score, allocator
        self.round_seconds, self.round_growth, self.plateau = round_seconds, round_growth, plateau
        self.probe_clients = probe_clients
        self.needs = placement.needs | score.needs
        self.offers = ALL - {Trait.FIXED_STRUCTURE} if plateau else ALL
        self.choice: Choice | None = None
        self._reports: Sequence[ProbeReport] = ()
        self._clients: Sequence[str] = ()
        self._allocation: Allocation | None = None

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in these arguments, those of placement, score and plateau among them."""
        problems = [
            *self.placement.check(f"{key}.placement.init_args", facts),
            *self.score.check(f"{key}.score.init_args", facts),
            *self.allocator.check(f"{key}.allocator", facts),
            *(self.plateau.check(f"{key}.plateau", facts) if self.plateau else []),
        ]
        if self.round_seconds is not None and not self.round_seconds > 0:
            problems.append(Problem(f"{key}.round_seconds", self.round_seconds, "give seconds above 0, or null"))
        if not 1 <= self.round_growth < math.inf:
            problems.append(Problem(f"{key}.round_growth", self.round_growth, "give a finite factor of 1 or more"))
        if self.probe_clients < 1:
            problems.append(Problem(f"{key}.probe_clients", self.probe_clients, "give 1 or more"))
        return problems

    def probed(self, client_ids: Sequence[str]) -> Sequence[str]:
        """Return the clients that probe, in their order: all where the score needs it of all, else a draw or none."""
        self._clients = tuple(client_ids)
        if self.score.probe_fields:
            return client_ids
        if Trait.SERVER_SEES_REPORTS not in self.placement.needs:
            return ()
        order = torch.randperm(len(client_ids), generator=generator(self.seed, "probing clients")).tolist()
        return [client_ids[index] for index in sorted(order[: self.probe_clients])]

    def place(self, reports: Sequence[ProbeReport], depth: int) -> Structure:
        """Choose the positions, and keep the reports for the score."""
        self._reports, self.placement.seed = reports, self.seed
        self.choice = self.placement.choose(reports, depth, relative_costs(depth))
        return {"positions": list(self.choice.positions)}

    def setup(self, adaptation: Adaptation) -> None:
        """Tell the score which blocks there are, and what clients that probed have reported of them."""
        super().setup(adaptation)
        labels = {report.client_id: report.labels for report in self._reports if report.labels is not None}
        self.score.setup(self._clients, self._blocks, self.seed, of_equal_length(labels) or None)
        for report in self._reports:
            at = zip(self._blocks, self._positions, strict=True)
            self.score.probe(report.client_id, {block: report.scores[position] for block, position in at})

    def allocate(self, cohort: Sequence[str], round_index: int) -> dict[str, tuple[str, ...]]:
        """Return for each client the blocks that are worth most to it, of those that it can afford."""
        if self.capabilities is None:
            return super().allocate(cohort, round_index)
        values = self.score.values(cohort, round_index)
        costs = self._costs(self.capabilities, cohort, round_index)
        self._allocation = self.allocator.allocate(cohort, self._blocks, values, costs)
        always = tuple(unit for unit in self.adaptation.units() if unit not in self._blocks)
        return {c.client_id: (*c.blocks, *always) if c.blocks else () for c in self._allocation.clients}

    def explanation(self) -> dict[str, Any]:
        """Return why the blocks are where they are, and who trains which of them why."""
        told: dict[str, Any] = {"positions": self._positions}
        if self._allocation is None:
            return told | {"placement": self.choice.to_dict() if self.choice else None}
        clients = {client.client_id: asdict(client) for client in self._allocation.clients}
        return told | {"clients": clients, "missing_trainers": self._allocation.missing}

    def check_report(self, task: FitTask, update: Update) -> None:
        """Refuse an update of which a metric is no number, or one that the score could not use.

        Raises:
            UpdateError: It is so; the message names the client, and the metric or the block.
        """
        self.score.check_report(task.client_id, *reported(task.client_id, update.metrics))

    def observe(self, task: FitTask, update: Update) -> None:
        """Let the score learn from what a client reports."""
        self.score.observe(task.client_id, *reported(task.client_id, update.metrics), task.round_index)

    def grow(self, record: Mapping[str, Any]) -> Structure | None:
        """Return the structure with the next best block when the downstream score has stopped rising."""
        downstream = record["downstream"]
        if self.plateau is None or downstream is None or not self.plateau.update(downstream["accuracy"]):
            return None
        position = None if self.choice is None else self.placement.next_position(self.choice, self._positions)
        if position is None:
            return None
        return {**self.adaptation.structure(), "positions": sorted([*self._positions, position])}

    def restructured(self, renamed: Mapping[str, str]) -> None:
        """Tell the score which blocks there are now."""
        self.score.block_names = tuple(self._blocks)

    def state_dict(self) -> dict[str, Any]:
        """Return plateau and scores."""
        plateau = self.plateau.state_dict() if self.plateau else None
        return {"plateau": plateau, "score": self.score.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        if self.plateau is not None:
            self.plateau.load_state_dict(state["plateau"])
        self.score.load_state_dict(state["score"])

    @property
    def _positions(self) -> list[int]:
        """Where the blocks are, the lowest first."""
        return list(self.adaptation.structure()["positions"])

    @property
    def _blocks(self) -> list[str]:
        """The units that are blocks, the lowest first."""
        return [unit for unit in self.adaptation.units() if unit.startswith("block_")]

    def _costs(self, capabilities: Capabilities, cohort: Sequence[str], round_index: int) -> CohortCosts:
        """Return what blocks cost the cohort, the head's share in what every set costs; a gate counts as nothing."""
        units = next(part.units() for part in self.adaptation.parts if part.expansion is not None)
        costs = capabilities.unit_costs(units)
        rows = [costs.names.index(block) for block in self._blocks]
        always = [costs.names.index(unit) for unit in units if unit not in self._blocks]
        down = sum(capabilities.costs.parameter_bytes.values())
        profiles = [capabilities.profile(client, round_index) for client in cohort]
        times = [costs.seconds(p, capabilities.steps[c], down) for p, c in zip(profiles, cohort, strict=True)]
        low, train = (np.stack(column) for column in zip(*times, strict=True))
        time_low = low[:, rows] + train[:, always].sum(1, keepdims=True)
        memory_low = np.tile(costs.memory_low[rows] + costs.memory_train[always].sum(), (len(cohort), 1))
        first = self.round_seconds or float((time_low + train[:, rows]).min(axis=1).max()) * (1 + 1e-9)
        return CohortCosts(
            time_low,
            train[:, rows],
            memory_low,
            np.tile(costs.memory_train[rows], (len(cohort), 1)),
            np.full(len(cohort), first * self._grown(round_index)),
            np.array([profile.memory_bytes for profile in profiles]),
        )

    def _grown(self, round_index: int) -> float:
        """Return `round_growth` to the power of the round; large, not an overflow, after thousands of rounds."""
        return math.exp(min(round_index * math.log(self.round_growth), 300.0))


def reported(client_id: str, metrics: Mapping[str, Any]) -> tuple[dict[str, float], float | None, float | None]:
    """Return what a client's metrics say to a score.

    Args:
        client_id: The client.
        metrics: `Update.metrics`.

    Returns:
        The gradient norm of each block that it trained, and its loss at its first and at its last step, ``None`` where
        not measured.

    Raises:
        UpdateError: One of these metrics is no number; the message names the client and the metric.
    """
    numbers = {
        name: _number(f"client {client_id!r} reports {name!r}", value)
        for name, value in metrics.items()
        if name.startswith(GRADIENT) or name in ("first_loss", "last_loss")
    }
    norms = {name.removeprefix(GRADIENT): number for name, number in numbers.items() if name.startswith(GRADIENT)}
    return norms, numbers.get("first_loss"), numbers.get("last_loss")


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UpdateError(f"{what} as {value!r}, which is no number")
    try:
        return float(value)
    except OverflowError:
        raise UpdateError(f"{what} as a number that is too large") from None


def relative_costs(depth: int) -> list[float]:
    """Return what training a block at each position costs, in forward passes of a block.

    Its own forward pass and gradients, 3, and the backward pass through the blocks above it. Source: ours.
    """
    return [3.0 + (depth - 1 - position) for position in range(depth)]


def of_equal_length(counts: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return counts over the same classes: a client sees none of those above its own highest."""
    longest = max(map(len, counts.values()), default=0)
    return {client: (*own, *[0] * (longest - len(own))) for client, own in counts.items()}
