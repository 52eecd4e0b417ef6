"""Going back to where a round began, scores included: a score belongs to the state it was measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedbe.federation.record import RoundRecord
from fedbe.federation.scorer import Scorer, Scores
from fedbe.federation.server import Server


@dataclass(frozen=True)
class Snapshot:
    """Where a run stood: the server's tensors, and how that state scored.

    Attributes:
        state: The global tensors by exact parameter name.
        moments: The server optimizer's tensors.
        scores: Of that state; ``None`` where they were not measured.
    """

    state: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    scores: Scores


def snapshot(server: Server, scorer: Scorer) -> Snapshot:
    """Return where a run stands."""
    return Snapshot(dict(server.state), server.optimizer.state_dict(), scorer.scores)


def roll_back(server: Server, scorer: Scorer, record: RoundRecord, to: Snapshot, reason: str) -> None:
    """Take a round back; its record says why, and which scores the discarded model had."""
    discarded = {"downstream": record.downstream, "personalised": record.personalised}
    record.rolled_back = {"reason": reason, **discarded}
    server.restore(to.state)
    server.optimizer.load_state_dict(to.moments)
    scorer.scores = to.scores
    record.downstream, record.personalised = to.scores.downstream, to.scores.personalised
