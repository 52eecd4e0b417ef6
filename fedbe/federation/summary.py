"""What `summary.json` holds of a run, besides what callbacks add."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedbe.data import left_out_counts
from fedbe.system.machine import peak_rss_bytes, versions

if TYPE_CHECKING:
    from fedbe.federation.loop import FederatedLoop


def results(loop: FederatedLoop) -> dict[str, Any]:
    """Return what the run came to, its final model scored on the test data."""
    return {
        "algorithm": type(loop.algorithm).__name__,
        "seed": loop.plan.seed,
        "rounds": loop.progress.completed,
        "stop_reason": loop.stop_reason or f"all {loop.rounds} rounds are done",
        **loop.scorer.tested(loop.plan.data),
        "personalised": loop.scorer.personalised("test", loop.round.experience, loop.round.index),
        "left_out": left_out_counts(loop.plan.data.left_out),
        "trainable_parameters": sum(tensor.numel() for tensor in loop.server.state.values()),
    }


def costs(loop: FederatedLoop) -> dict[str, Any]:
    """Return what the run has taken: time, memory, the engine's and the prefix's figures, and versions of packages."""
    prefix = loop.engine.prefix
    return {
        "simulated_seconds": loop.progress.simulated_seconds,
        "wall_seconds": loop.progress.wall_seconds,
        "evaluation_seconds": loop.scorer.seconds,
        "engine": loop.engine.state_dict(),
        "prefix": None if prefix is None else prefix.figures,
        "peak_rss_bytes": peak_rss_bytes(),
        "versions": versions(),
    }
