"""What each expanded block is worth to each client: scores that learn from what clients report."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedbe.errors import ConfigError, Facts, Problem, UpdateError
from fedbe.seeding import generator
from fedbe.traits import Part, Trait, Traits

Floats = NDArray[np.float64]

LEAST = 0.05
"""A learned score is never below this share of the client's mean: no block is written off for good."""


class Score(Part, ABC):
    """Base class: the value of each block to each client, 0 or more; only ratios within a client's row matter much.

    Subclass it in a file of your own and name it by ``class_path``. By default it learns nothing, but is taken to: one
    that does not depend on what clients report has empty `needs`.

    Attributes:
        probe_fields: What it needs of every client's probe before round 1: fields of `ProbeReport`, such as ``labels``.
        client_ids: All clients of the run.
        block_names: The blocks, the lowest first.
        seed: The run's seed.
    """

    needs: Traits = frozenset({Trait.SERVER_SEES_REPORTS})
    probe_fields: frozenset[str] = frozenset()

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this configuration, found before work starts; see `Facts`."""
        return []

    def setup(
        self,
        client_ids: Sequence[str],
        block_names: Sequence[str],
        seed: int,
        label_shares: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Learn who and what there is, once, before the first round.

        Args:
            client_ids: All clients of the run.
            block_names: The blocks, the lowest first.
            seed: The run's seed.
            label_shares: Each client's numbers of samples by class, or their shares, over the same classes.

        Raises:
            ConfigError: The score does not fit these clients or blocks.
        """
        self.client_ids = tuple(client_ids)
        self.block_names = tuple(block_names)
        self.seed = seed

    def probe(self, client_id: str, gradient_norms: Mapping[str, float]) -> None:
        """Take a client's gradient norms by block from before any training.

        Raises:
            UpdateError: A number is not finite, or a block is unknown.
        """
        return None

    def check_report(
        self, client_id: str, gradient_norms: Mapping[str, float], loss_before: float | None, loss_after: float | None
    ) -> None:
        """Refuse what `observe` could not use, before anything of the client's round is taken in; by default nothing.

        Args:
            client_id: The client.
            gradient_norms: As in `observe`, and like the losses a number of any kind: NaN, infinite, negative.
            loss_before: As in `observe`.
            loss_after: As in `observe`.

        Raises:
            UpdateError: It cannot be used; the message names the client.
        """
        return None

    def observe(
        self,
        client_id: str,
        gradient_norms: Mapping[str, float],
        loss_before: float | None,
        loss_after: float | None,
        round_index: int,
    ) -> None:
        """Take what a client reports of a round; within a round the order of clients does not matter.

        It never raises: `check_report` has let the report pass.

        Args:
            client_id: The client.
            gradient_norms: Norm of the gradient of each block it trained, by the block's name; on the probe's scale.
            loss_before: Its mean loss at the start of its round, in nats; ``None`` if not measured.
            loss_after: The same at the end.
            round_index: 0-based round; never before one that was observed.
        """
        return None

    @abstractmethod
    def values(self, cohort: Sequence[str], round_index: int) -> Floats:
        """Return what each block is worth to each client of a cohort, ``[K, L]``, finite and 0 or more."""

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned, as plain JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, after `setup`."""
        return None


class _MovingAverage(Score):
    """A moving average for each client and block, s ← decay·s + (1 − decay)·x, the first x taken as it is.

    A client's row is divided by the mean of its known averages; a block of which it knows nothing counts 1, that mean.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.averages: dict[str, dict[str, float]] = {}

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for a decay outside [0, 1)."""
        if 0 <= self.decay < 1:
            return []
        return [Problem(f"{key}.decay", self.decay, "give a number from 0 to below 1")]

    def values(self, cohort: Sequence[str], round_index: int) -> Floats:
        """Return the averages in units of each client's mean, ``[K, L]``."""
        unknown: dict[str, float] = {}
        rows = [
            [self.averages.get(client, unknown).get(block, math.nan) for block in self.block_names] for client in cohort
        ]
        return _relative(np.array(rows, dtype=float).reshape(len(cohort), len(self.block_names)))

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by client and block."""
        return {"averages": {client: dict(blocks) for client, blocks in self.averages.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.averages = {client: dict(blocks) for client, blocks in state["averages"].items()}

    def _check_blocks(self, client_id: str, numbers: Mapping[str, float]) -> None:
        """Refuse a number that is not finite, or one of a block that there is not."""
        for block, number in numbers.items():
            if block not in self.block_names or not math.isfinite(number):
                raise UpdateError(f"client {client_id!r} reports {number!r} for block {block!r}: no score can use that")

    def _update(self, client_id: str, numbers: Mapping[str, float]) -> None:
        averages = self.averages.setdefault(client_id, {})
        for block, number in numbers.items():
            averages[block] = self.decay * averages.get(block, number) + (1 - self.decay) * number


def _relative(averages: Floats) -> Floats:
    """Return each row divided by the mean of what is known, at least `LEAST`, and 1 where nothing is (NaN)."""
    known = ~np.isnan(averages)
    mean = np.where(known, averages, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    scale = np.where(mean > 0, mean, 1.0)[:, None]
    relative = np.where(known & (mean[:, None] > 0), averages / scale, 1.0)
    return np.maximum(relative, LEAST)


class GradientScore(_MovingAverage):
    """A moving average of the client's gradient norms, times a bonus for blocks that few clients trained lately.

    A block's gradient norm is what a small step on it gains, to first order. Before its first report a client's
    average is its probe's; without a probe all blocks count the same. The bonus of block j is
    ((1 + n̄)/(1 + n_j))^rarity, where n_j counts who trained it, a round ago times decay, two rounds ago times decay²,
    and n̄ is the mean over blocks: like an upper confidence bound it sends clients where little is known yet.

    Args:
        decay: Of the averages and of the counts, from one round to the next, in [0, 1).
        rarity: Exponent of the bonus, 0 or more; 0 is no bonus.

    Source: ours, in the place of FedBE's undisclosed rule (arXiv 2506.05977) **R**.
    """

    def __init__(self, decay: float = 0.5, rarity: float = 0.5) -> None:
        super().__init__(decay)
        self.rarity = rarity
        self.trained: dict[str, float] = {}
        self._last_round = 0

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for each number outside its range."""
        problems = super().check(key, facts)
        if not (self.rarity >= 0 and math.isfinite(self.rarity)):
            problems.append(Problem(f"{key}.rarity", self.rarity, "give a number of 0 or more"))
        return problems

    def probe(self, client_id: str, gradient_norms: Mapping[str, float]) -> None:
        """Start the client's averages from its probe."""
        self._check_blocks(client_id, gradient_norms)
        self._update(client_id, gradient_norms)

    def check_report(
        self, client_id: str, gradient_norms: Mapping[str, float], loss_before: float | None, loss_after: float | None
    ) -> None:
        """Refuse a norm that is not finite, or one of a block that there is not."""
        self._check_blocks(client_id, gradient_norms)

    def observe(
        self,
        client_id: str,
        gradient_norms: Mapping[str, float],
        loss_before: float | None,
        loss_after: float | None,
        round_index: int,
    ) -> None:
        """Move the client's averages, and count it as a trainer of its blocks."""
        self._update(client_id, gradient_norms)
        counts = self._counts(round_index)
        self._last_round = round_index
        self.trained = {block: count + (block in gradient_norms) for block, count in counts.items()}

    def values(self, cohort: Sequence[str], round_index: int) -> Floats:
        """Return the relative averages times the bonus, ``[K, L]``."""
        counts = np.array(list(self._counts(round_index).values()))
        bonus: Floats = ((1 + counts.mean()) / (1 + counts)) ** self.rarity
        values: Floats = super().values(cohort, round_index) * bonus
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the counts."""
        return {**super().state_dict(), "trained": dict(self.trained), "last_round": self._last_round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        super().load_state_dict(state)
        self.trained = dict(state["trained"])
        self._last_round = int(state["last_round"])

    def _counts(self, round_index: int) -> dict[str, float]:
        fade = self.decay ** (round_index - self._last_round)
        return {block: self.trained.get(block, 0.0) * fade for block in self.block_names}


class LossScore(_MovingAverage):
    """A moving average of how much a client's loss fell when it trained a block.

    The share of its loss that a client lost in a round, max(0, 1 − after/before), is split evenly among the blocks that
    it trained: only comparing rounds with different blocks tells blocks apart. Losses fall less as training goes on, so
    that a block not trained for long keeps a high score until it is tried again.

    Args:
        decay: Of the averages, in [0, 1).

    Source: ours.
    """

    def __init__(self, decay: float = 0.5) -> None:
        super().__init__(decay)

    def check_report(
        self, client_id: str, gradient_norms: Mapping[str, float], loss_before: float | None, loss_after: float | None
    ) -> None:
        """Refuse losses that are not finite, and a block that there is not."""
        if loss_before is None or loss_after is None or not gradient_norms:
            return
        if not math.isfinite(loss_before + loss_after):
            raise UpdateError(f"client {client_id!r} reports losses of {loss_before!r} and {loss_after!r}")
        self._check_blocks(client_id, dict.fromkeys(gradient_norms, 0.0))

    def observe(
        self,
        client_id: str,
        gradient_norms: Mapping[str, float],
        loss_before: float | None,
        loss_after: float | None,
        round_index: int,
    ) -> None:
        """Move the client's averages of the blocks it trained; without two losses nothing is learned."""
        if loss_before is None or loss_after is None or not gradient_norms:
            return
        fall = max(0.0, 1 - loss_after / loss_before) if loss_before > 0 else 0.0
        self._update(client_id, dict.fromkeys(gradient_norms, fall / len(gradient_norms)))


class LabelDivergenceScore(Score):
    """Gives high blocks the more weight, the further a client's labels are from those of all clients together.

    v_kj = 1 + strength·d_k·(2h_j − 1), where d_k in [0, 1] is the total variation distance between the client's label
    distribution and that of all clients, and h_j the block's height, 0 for the lowest and 1 for the highest. The idea:
    what sets an unusual client apart is its classes, which are decided near the output, while low blocks should be
    shaped by clients that resemble the whole. That is a guess to be tested: a negative strength turns it round.

    The server must know the clients' label distributions for it, which tell something about their data.

    Args:
        strength: In (−1, 1).

    Source: ours.
    """

    probe_fields = frozenset({"labels"})

    def __init__(self, strength: float = 0.5) -> None:
        self.strength = strength
        self.divergences: dict[str, float] = {}

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for a strength outside (−1, 1)."""
        if -1 < self.strength < 1:
            return []
        return [Problem(f"{key}.strength", self.strength, "give a number between −1 and 1")]

    def setup(
        self,
        client_ids: Sequence[str],
        block_names: Sequence[str],
        seed: int,
        label_shares: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Compute how far each client's labels are from the whole; with numbers of samples, larger clients weigh more.

        Raises:
            ConfigError: There are no label distributions, one is missing or empty, or their classes differ.
        """
        super().setup(client_ids, block_names, seed, label_shares)
        self.divergences = label_divergences(client_ids, label_shares or {})

    def values(self, cohort: Sequence[str], round_index: int) -> Floats:
        """Return 1 + strength·d·(2h − 1), ``[K, L]``."""
        tilt = np.linspace(-1, 1, len(self.block_names)) if len(self.block_names) > 1 else np.zeros(1)
        return 1 + self.strength * np.outer([self.divergences[client] for client in cohort], tilt)


def label_divergences(client_ids: Sequence[str], label_shares: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the total variation distance, ½ Σ_c |p_k(c) − p(c)| in [0, 1], of each client's labels from all labels.

    Args:
        client_ids: All clients.
        label_shares: Each client's numbers of samples by class, or their shares.

    Raises:
        ConfigError: A client's distribution is missing, empty or negative, or the classes differ in number.
    """
    rows = [np.asarray(label_shares.get(client, ()), dtype=float) for client in client_ids]
    sound = all(row.size == rows[0].size and (row >= 0).all() and 0 < row.sum() < np.inf for row in rows)
    if not sound:
        remedy = "needs numbers of samples by class from every client: choose another score for data without labels"
        raise ConfigError(Problem("algorithm.init_args.score", "LabelDivergenceScore", remedy))
    counts = np.stack(rows)
    own, whole = counts / counts.sum(axis=1, keepdims=True), counts.sum(axis=0) / counts.sum()
    return dict(zip(client_ids, (0.5 * np.abs(own - whole).sum(axis=1)).tolist(), strict=True))


class RandomScore(Score):
    """Control: uniform numbers in [0, 1), new for each client in each round, so that allocation is by budgets only.

    Source: ours.
    """

    needs: Traits = frozenset()

    def values(self, cohort: Sequence[str], round_index: int) -> Floats:
        """Return numbers that depend on seed, round and client only, ``[K, L]``."""
        values = np.empty((len(cohort), len(self.block_names)))
        for row, client in enumerate(cohort):
            draw = generator(self.seed, "allocation score", round_index, client)
            values[row] = torch.rand(len(self.block_names), generator=draw, dtype=torch.float64).numpy()
        return values


class StaticScore(Score):
    """Control: the same values for all clients in all rounds.

    Args:
        values: A number for each block, the lowest first, 0 or more (0: for coverage only); or ``even``; or
            ``top-first`` or ``bottom-first``: L for the block at that end down to 1 at the other. These are
            preferences: where reaching the lowest block leaves room for fewer blocks, more of the others may win.

    Source: ours.
    """

    needs: Traits = frozenset()

    def __init__(self, values: list[float] | Literal["top-first", "bottom-first", "even"] = "even") -> None:
        self.given = values

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for values that cannot rank blocks."""
        if isinstance(self.given, str):
            sound = self.given in ("top-first", "bottom-first", "even")
            remedy = "give top-first, bottom-first, even, or a number for each block"
        else:
            sound = all(math.isfinite(x) and x >= 0 for x in self.given) and any(x > 0 for x in self.given)
            remedy = "give a number of 0 or more for each block, one of them above 0"
        return [] if sound else [Problem(f"{key}.values", self.given, remedy)]

    def setup(
        self,
        client_ids: Sequence[str],
        block_names: Sequence[str],
        seed: int,
        label_shares: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Learn who and what there is.

        Raises:
            ConfigError: There is not one value for each block.
        """
        super().setup(client_ids, block_names, seed, label_shares)
        if not isinstance(self.given, str) and len(self.given) != len(block_names):
            remedy = f"give a number for each of the {len(block_names)} blocks: {', '.join(block_names)}"
            raise ConfigError(Problem("algorithm.init_args.score.init_args.values", self.given, remedy))

    def values(self, cohort: Sequence[str], round_index: int) -> Floats:
        """Return the same row for each client, ``[K, L]``."""
        rising = np.arange(1.0, len(self.block_names) + 1)
        named = {"top-first": rising, "bottom-first": rising[::-1], "even": np.ones_like(rising)}
        row = named[self.given] if isinstance(self.given, str) else np.array(self.given, dtype=float)
        return np.tile(row, (len(cohort), 1))
