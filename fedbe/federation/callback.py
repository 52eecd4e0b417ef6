"""The hooks of a federated run; concrete callbacks live in `fedbe.callbacks`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from torch import Tensor

from fedbe.errors import Facts, Problem
from fedbe.federation.view import RunView
from fedbe.messages import Failure, FitTask, Outcome, Update
from fedbe.traits import Part


class Phase(IntEnum):
    """When a callback is called at each hook, relative to the others: by phase, then in the order of the list."""

    GUARD = 0
    """Decides whether a round counts, before anything is measured on its result."""

    MEASURE = 1
    """Measures and records."""

    DECIDE = 2
    """Acts on what was measured: stops, keeps the best. Callbacks of your own are here unless they say otherwise."""

    SHOW = 3
    """Draws and writes pictures, which loggers send on."""

    LOG = 4
    """Writes to loggers: before the checkpoint, so that a continued round may be logged twice and none is left out."""

    SAVE = 5
    """Writes what it takes to continue."""

    DISPLAY = 6
    """Says on the terminal what is done by then."""


class FederatedCallback(Part):
    """Base class of callbacks of the `FederatedLoop`; override the hooks you need.

    Callbacks of the clients' own training (per batch, per optimizer step) are ordinary `lightning.Callback`s under
    ``trainer.callbacks``.

    Attributes:
        phase: When it is called at each hook, relative to the others.
        logs: Metrics that it records by `RunView.log` and that others may monitor.
    """

    phase: Phase = Phase.DECIDE
    logs: tuple[str, ...] = ()

    @property
    def state_key(self) -> str:
        """What its state is kept under in a checkpoint; two of one class need keys of their own."""
        return type(self).__qualname__

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this callback's configuration, found before work starts; see `Facts`.

        Args:
            key: Dotted key of its arguments, for example ``callbacks[0].init_args``.
            facts: What is known of the run: `Facts.metrics` are the paths of what may be monitored.
        """
        return []

    def on_run_start(self, run: RunView) -> None:
        """Called once before round 1, with data, base scores and the expanded model in place."""

    def on_round_start(self, run: RunView) -> None:
        """Called when the cohort and its allocation are known (`run.record`), before any client trains."""

    def on_client_start(self, run: RunView, task: FitTask) -> None:
        """Called before a client trains, with what it is sent."""

    def on_client_update(self, run: RunView, task: FitTask, update: Update) -> Outcome | None:
        """Called when a client's update has arrived; return what takes its place, ``None`` to leave it."""
        return None

    def on_client_failure(self, run: RunView, task: FitTask, failure: Failure) -> None:
        """Called when a client has failed in a round; it is left out."""

    def on_client_end(self, run: RunView, task: FitTask, update: Update) -> None:
        """Called with a client's update once it is accepted, or left out for being late; never for a failed one."""

    def on_aggregate(self, run: RunView, new_state: Mapping[str, Tensor]) -> None:
        """Called with the new global tensors, before they replace `run.state`."""

    def on_round_end(self, run: RunView) -> None:
        """Called after aggregation and downstream evaluation; may `run.log`, then the record is written."""

    def on_round_written(self, run: RunView) -> None:
        """Called after the record was completed by every callback and written to `metrics.jsonl`."""

    def on_exception(self, run: RunView, exception: BaseException) -> None:
        """Called when the run ends by an error or an interrupt, before it is raised further."""

    def on_last_round(self, run: RunView) -> None:
        """Called after the last round and before the final scoring; may `run.restore` another round's tensors."""

    def on_run_end(self, run: RunView) -> None:
        """Called after the final downstream scoring; may `run.summarise`, then the summary is written."""

    def on_run_written(self, run: RunView) -> None:
        """Called last, after `summary.json` and `model/` are written."""

    def state_dict(self) -> dict[str, Any]:
        """Return what this callback needs to continue a run, as plain JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
