"""FedBE: blocks where clients gain most by them, and each client trains those that suit its data and its device."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from fedbe.algorithms.blocks.block_expansion import BlockExpansion
from fedbe.allocation.allocator import Allocation, Allocator
from fedbe.allocation.best_sets import CohortCosts
from fedbe.allocation.scores import GradientScore, Score
from fedbe.data import Batch
from fedbe.errors import Problem
from fedbe.expansion import block_parameter_names
from fedbe.expansion.growth import Plateau, grow
from fedbe.expansion.identity import target_parameters
from fedbe.expansion.placement import AdaptivePlacement, Choice, Placement
from fedbe.expansion.probe import ProbeReport, probe_client
from fedbe.messages import ClientTask, Update
from fedbe.seeding import generator

GRADIENT = "gradient_norm/"


class FedBE(BlockExpansion):
    """Place identity blocks by what clients report of the base model, and allocate them anew in each round.

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
        super().__init__()
        self.placement = placement or AdaptivePlacement()
        self.score = score or GradientScore()
        self.allocator = allocator or Allocator()
        self.round_seconds, self.round_growth, self.plateau = round_seconds, round_growth, plateau
        self.probe_clients, self.probe_batches, self.sketch = probe_clients, probe_batches, sketch
        self.choice: Choice | None = None
        self._reports: Sequence[ProbeReport] = ()
        self._clients: Sequence[str] = ()
        self._allocation: Allocation | None = None
        self._model: PreTrainedModel | None = None
        self._writers: Mapping[str, tuple[str, ...]] = {}

    def check(self, depth: int, key: str = "algorithm") -> list[Problem]:
        """Return the mistakes in these arguments, those of placement, score and plateau among them."""
        key = f"{key}.init_args"
        problems = [
            *self.placement.check(depth, f"{key}.placement"),
            *self.score.check(f"{key}.score"),
            *self.allocator.check(f"{key}.allocator"),
            *(self.plateau.check(f"{key}.plateau") if self.plateau else []),
        ]
        if self.round_seconds is not None and not self.round_seconds > 0:
            problems.append(Problem(f"{key}.round_seconds", self.round_seconds, "give seconds above 0, or null"))
        if not 1 <= self.round_growth < math.inf:
            problems.append(Problem(f"{key}.round_growth", self.round_growth, "give a finite factor of 1 or more"))
        for name, least in (("probe_clients", 1), ("probe_batches", 1), ("sketch", 0)):
            if getattr(self, name) < least:
                problems.append(Problem(f"{key}.{name}", getattr(self, name), f"give {least} or more"))
        return problems

    @property
    def reports(self) -> str | None:
        """What it needs to know of clients' data: by its placement or by its score."""
        if self.placement.needs_reports:
            return "their probe of the base model; give fedbe.expansion.FixedPlacement"
        return "scores of blocks; give fedbe.allocation.RandomScore or StaticScore" if self.score.learns else None

    def probed(self, client_ids: Sequence[str]) -> Sequence[str]:
        """Return the clients that probe, in their order; none if the placement does not ask."""
        self._clients = tuple(client_ids)
        if self.score.needs_labels:
            return client_ids
        if not self.placement.needs_reports:
            return ()
        order = torch.randperm(len(client_ids), generator=generator(self.seed, "probing clients")).tolist()
        return [client_ids[index] for index in sorted(order[: self.probe_clients])]

    def probe(self, model: PreTrainedModel, client_id: str, batches: Iterator[Batch]) -> ProbeReport:
        """Return what a block at each position would gain a client, and where needed how often it has each label."""
        few = list(islice(batches, self.probe_batches))
        report = probe_client(model, few, client_id, sketch_dimension=self.sketch, seed=self.seed)
        return replace(report, labels=label_counts(chain(few, batches))) if self.score.needs_labels else report

    def place(self, reports: Sequence[ProbeReport]) -> None:
        """Keep the reports for `prepare`."""
        self._reports = reports

    def prepare(self, model: PreTrainedModel, inputs: Batch) -> None:
        """Choose the positions, and insert the blocks."""
        depth = model.config.get_text_config().num_hidden_layers
        self.placement.seed = self.seed
        self.choice = self.placement.choose(self._reports, depth, relative_costs(depth))
        self.positions = list(self.choice.positions)
        super().prepare(model, inputs)
        self._name_units(model)
        self._model = model
        labels = {report.client_id: report.labels for report in self._reports if report.labels is not None}
        self.score.setup(self._clients, self._blocks, self.seed, of_equal_length(labels) or None)
        for report in self._reports:
            self.score.probe(report.client_id, self._by_block(report.scores))

    def allocate(self, cohort: Sequence[str], round_index: int) -> dict[str, tuple[str, ...]]:
        """Return for each client the blocks that are worth most to it, of those that it can afford."""
        if self.capabilities is None:
            return super().allocate(cohort, round_index)
        values = self.score.values(cohort, round_index)
        self._allocation = self.allocator.allocate(cohort, self._blocks, values, self._costs(cohort, round_index))
        always = tuple(unit for unit in self.units() if unit not in self._blocks)
        return {c.client_id: (*c.blocks, *always) if c.blocks else () for c in self._allocation.clients}

    def explanation(self) -> dict[str, Any]:
        """Return why the blocks are where they are, and who trains which of them why."""
        told: dict[str, Any] = {"positions": list(self.expansion.positions)}
        if self._allocation is None:
            return told | {"placement": self.choice.to_dict() if self.choice else None}
        clients = {client.client_id: asdict(client) for client in self._allocation.clients}
        return told | {"clients": clients, "missing_trainers": self._allocation.missing}

    def watched(self, trainable_names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        """Return what a client measures of the blocks it trains: as in the probe, what began as zeros."""
        trained = set(trainable_names)
        return {block: names for block, names in self._writers.items() if trained.issuperset(names)}

    def observe(self, task: ClientTask, update: Update) -> None:
        """Let the score learn from what a client reports."""
        norms = {k.removeprefix(GRADIENT): v for k, v in update.metrics.items() if k.startswith(GRADIENT)}
        first, last = update.metrics.get("first_loss"), update.metrics.get("last_loss")
        self.score.observe(task.client_id, norms, first, last, task.round_index)

    @property
    def grows(self) -> bool:
        """Whether blocks are added on a plateau."""
        return self.plateau is not None

    def grow(self, model: PreTrainedModel, inputs: Batch, record: Mapping[str, Any]) -> Mapping[str, str] | None:
        """Insert the next best block when the downstream score has stopped rising."""
        downstream = record["downstream"]
        if self.plateau is None or downstream is None or not self.plateau.update(downstream["accuracy"]):
            return None
        position = self._next_position()
        return None if position is None else self._insert(model, position, inputs)

    def state_dict(self) -> dict[str, Any]:
        """Return positions, plateau and scores."""
        plateau = self.plateau.state_dict() if self.plateau else None
        return {
            "positions": list(self.expansion.positions), "plateau": plateau, "score": self.score.state_dict()
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; blocks that were inserted meanwhile are inserted again."""
        missing = list(state["positions"])
        for position in self.expansion.positions:
            missing.remove(position)
        for position in missing:
            self._insert(self._require_model(), position, None)
        if self.plateau is not None:
            self.plateau.load_state_dict(state["plateau"])
        self.score.load_state_dict(state["score"])

    @property
    def _blocks(self) -> list[str]:
        """The units that are blocks, the lowest first."""
        return [unit for unit in self.units() if unit.startswith("block_")]

    def _costs(self, cohort: Sequence[str], round_index: int) -> CohortCosts:
        """Return what blocks cost the cohort, the head's share in what every set costs."""
        if self.capabilities is None:
            raise RuntimeError("costs are known where clients' devices are simulated")
        capabilities, units = self.capabilities, self.units()
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

    def _next_position(self) -> int | None:
        return None if self.choice is None else self.placement.next_position(self.choice, self.expansion.positions)

    def _insert(self, model: PreTrainedModel, position: int, inputs: Batch | None) -> dict[str, str]:
        self._expansion, renamed = grow(model, self.expansion, position, inputs=inputs)
        self.positions = list(self.expansion.positions)
        self._name_units(model)
        self.score.block_names = tuple(self._blocks)
        return renamed

    def _name_units(self, model: PreTrainedModel) -> None:
        """Name blocks by their positions, which stay when more are inserted; of several at one the upper count on."""
        seen: Counter[int] = Counter()
        labels = []
        for position in self.expansion.positions:
            labels.append(f"{position}.{seen[position]}" if seen[position] else str(position))
            seen[position] += 1
        self._set_units(model, dict(zip(labels, block_parameter_names(model, self.expansion).values(), strict=True)))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._writers = {
            unit: tuple(names[id(p)] for p in target_parameters(self.expansion.rule, block))
            for unit, block in zip(self._blocks, self.expansion.blocks(model), strict=True)
        }

    def _by_block(self, scores: Sequence[float]) -> dict[str, float]:
        """Return the probe's scores of the positions where there are blocks now."""
        return {b: scores[position] for b, position in zip(self._blocks, self.expansion.positions, strict=True)}

    def _require_model(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("the model is known after `prepare` has been called")
        return self._model


def relative_costs(depth: int) -> list[float]:
    """Return what training a block at each position costs, in forward passes of a block.

    Its own forward pass and gradients, 3, and the backward pass through the blocks above it. Source: ours.
    """
    return [3.0 + (depth - 1 - position) for position in range(depth)]


def label_counts(batches: Iterable[Batch]) -> tuple[int, ...]:
    """Return how often each class, or each token, is a label in a client's batches."""
    counts = torch.zeros(0, dtype=torch.long)
    for batch in batches:
        labels = batch["labels"]
        now = torch.bincount(labels[labels >= 0].flatten().cpu(), minlength=len(counts))
        counts = now + torch.nn.functional.pad(counts, (0, len(now) - len(counts)))
    return tuple(counts.tolist())


def of_equal_length(counts: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return counts over the same classes: a client sees none of those above its own highest."""
    longest = max(map(len, counts.values()), default=0)
    return {client: (*own, *[0] * (longest - len(own))) for client, own in counts.items()}
