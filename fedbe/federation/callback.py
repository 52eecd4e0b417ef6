"""The hooks of a federated run; concrete callbacks live in `fedbe.callbacks`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedbe.errors import Problem

if TYPE_CHECKING:
    from fedbe.federation.loop import FederatedLoop
    from fedbe.messages import ClientTask, Failure, Outcome, Update


class FederatedCallback:
    """Base class of callbacks of the `FederatedLoop`; override the hooks you need.

    Callbacks of the clients' own training (per batch, per optimizer step) are ordinary `lightning.Callback`s under
    ``trainer.callbacks``.

    Attributes:
        restores_rounds: Whether it may go back to an earlier round's tensors, which a model that grows cannot.
    """

    restores_rounds: bool = False

    def check(self, key: str, metrics: Collection[str] = ()) -> list[Problem]:
        """Return the mistakes in this callback's configuration, found before work starts.

        Args:
            key: Dotted key of its arguments.
            metrics: Paths of the metrics that the run records, for example ``downstream/accuracy``.
        """
        return []

    def on_run_start(self, loop: FederatedLoop) -> None:
        """Called once before round 1, with data, base scores and the expanded model in place."""

    def on_round_start(self, loop: FederatedLoop) -> None:
        """Called when the cohort and its allocation are known (`loop.record`), before any client trains."""

    def on_client_start(self, loop: FederatedLoop, task: ClientTask) -> None:
        """Called before a client trains, with what it received."""

    def on_client_update(self, loop: FederatedLoop, task: ClientTask, update: Update) -> Outcome | None:
        """Called when a client's update has arrived; return what takes its place, ``None`` to leave it."""
        return None

    def on_client_failure(self, loop: FederatedLoop, task: ClientTask, failure: Failure) -> None:
        """Called when nothing came of a client's round; it is left out."""

    def on_client_end(self, loop: FederatedLoop, task: ClientTask, update: Update) -> None:
        """Called with a client's update as `on_client_update` left it, before it is checked and aggregated."""

    def on_aggregate(self, loop: FederatedLoop, new_state: Mapping[str, Tensor]) -> None:
        """Called with the new global tensors, before they replace `loop.state`."""

    def on_round_end(self, loop: FederatedLoop) -> None:
        """Called after aggregation and downstream evaluation; may add to `loop.record`, then it is written."""

    def on_round_written(self, loop: FederatedLoop) -> None:
        """Called after `loop.record` was completed by every callback and written to `metrics.jsonl`."""

    def on_exception(self, loop: FederatedLoop, exception: BaseException) -> None:
        """Called when the run ends by an error or an interrupt, before it is raised further."""

    def on_last_round(self, loop: FederatedLoop) -> None:
        """Called after the last round and before the final scoring; may `loop.restore` another round's tensors."""

    def on_run_end(self, loop: FederatedLoop) -> None:
        """Called after the final downstream scoring; may add to `loop.summary`, which is written then."""

    def on_run_written(self, loop: FederatedLoop) -> None:
        """Called last, after `summary.json` and `model/` are written."""

    def state_dict(self) -> dict[str, Any]:
        """Return what this callback needs to continue a run."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
