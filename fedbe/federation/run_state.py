"""What it takes to continue a run: the states of its parts, put together and taken apart again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedbe.storage.checkpoint import FORMAT, Checkpoint
from fedbe.storage.tensor_names import grouped, prefixed

if TYPE_CHECKING:
    from fedbe.federation.loop import FederatedLoop


def tensors(loop: FederatedLoop) -> dict[str, Tensor]:
    """Return every tensor that it takes to continue, by ``owner/…/name``."""
    server, engine = loop.server, loop.engine
    prefix = {} if engine.prefix is None else engine.prefix.tensors()
    return (
        prefixed("server", server.tensors())
        | prefixed("engine", engine.tensors(server.accepted))
        | prefixed("prefix", prefix)
    )


def state_dict(loop: FederatedLoop) -> dict[str, Any]:
    """Return everything but the tensors (`tensors`) that it takes to continue, as plain JSON values."""
    prefix = loop.engine.prefix
    return {
        "format": FORMAT,
        **loop.identity.state_dict(),
        **loop.progress.state_dict(),
        "metrics": loop.metrics.position,
        "summary": loop.summary,
        "stop_reason": loop.stop_reason,
        "evaluation_seconds": loop.scorer.seconds,
        "server": loop.server.state_dict(),
        "engine": loop.engine.state_dict(),
        "prefix": None if prefix is None else prefix.state_dict(),
        "logger": None if loop.logger is None else loop.logger.version,
        "callbacks": loop.hooks.state_dict(),
    }


def load(loop: FederatedLoop, checkpoint: Checkpoint) -> None:
    """Bring a loop after its `setup` to where a checkpoint of the same run was written."""
    state: Mapping[str, Any] = checkpoint.state
    owned = grouped(checkpoint.tensors)
    loop.history = loop.metrics.rewind(state["metrics"])
    loop.progress.load_state_dict(state)
    loop.summary = dict(state["summary"])
    loop.stop_reason = state["stop_reason"]
    loop.scorer.seconds = float(state["evaluation_seconds"])
    renamed = loop.server.come_to(state["server"])
    if renamed is not None:
        loop.restructured(renamed)
    loop.server.load_state_dict(state["server"], owned.get("server", {}))
    loop.engine.load_state_dict(state["engine"])
    loop.engine.load_tensors(owned.get("engine", {}))
    if loop.engine.prefix is not None:
        loop.engine.prefix.load_state_dict(state["prefix"], owned.get("prefix", {}))
    loop.hooks.load_state_dict(state["callbacks"])
