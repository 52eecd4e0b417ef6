"""What callbacks see of a run, and what they may ask of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger
from torch import Tensor
from transformers import PreTrainedModel

from fedbe.evaluation.tasks import GeneralTask
from fedbe.federation import run_state
from fedbe.federation.kept_outcomes import KeptOutcomes
from fedbe.federation.record import SECTIONS, RoundRecord
from fedbe.federation.rollback import Snapshot, roll_back, snapshot
from fedbe.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from fedbe.federation.loop import FederatedLoop


class RunView:
    """A run as callbacks see it: everything can be read; `log`, `summarise`, `restore` and `stop` act.

    Args:
        loop: The run.
    """

    def __init__(self, loop: FederatedLoop) -> None:
        self._loop = loop

    # --- what can be read -------------------------------------------------------------------------------------------

    @property
    def record(self) -> RoundRecord:
        """The line of `metrics.jsonl` of the round under way; 0 is the base model."""
        return self._loop.record

    @property
    def history(self) -> Sequence[Mapping[str, Any]]:
        """The written records, as in `metrics.jsonl`; the first is round 0, the base model."""
        return self._loop.history

    @property
    def summary(self) -> Mapping[str, Any]:
        """What `summary.json` will hold; add to it by `summarise`."""
        return self._loop.summary

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration."""
        return self._loop.config

    @property
    def folder(self) -> RunFolder:
        """The run's folder on disk."""
        return self._loop.folder

    @property
    def logger(self) -> Logger | None:
        """A Lightning logger, or ``None``."""
        return self._loop.logger

    @property
    def model(self) -> PreTrainedModel:
        """The resident model, with the global tensors in it whenever a hook is called."""
        return self._loop.model

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The global tensors by exact parameter name."""
        return self._loop.server.state

    @property
    def client_ids(self) -> Sequence[str]:
        """All clients of the run."""
        return self._loop.engine.client_ids

    @property
    def general_tasks(self) -> Sequence[GeneralTask]:
        """What the base model could do before."""
        return self._loop.general_tasks

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self._loop.plan.seed

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return self._loop.rounds

    @property
    def completed(self) -> int:
        """Rounds that are aggregated, evaluated and written."""
        return self._loop.progress.completed

    @property
    def done(self) -> bool:
        """Whether the last round has been run, or a callback has asked to stop."""
        return self._loop.done

    @property
    def interrupted(self) -> bool:
        """Whether the run is to end at the next place from which it can be continued."""
        return self._loop.interrupted

    @property
    def evaluation_seconds(self) -> float:
        """Seconds that scoring has taken so far."""
        return self._loop.scorer.seconds

    @property
    def identity(self) -> str:
        """A digest of the configuration, the base model and the data, which tells this run from others."""
        return self._loop.identity.digest

    # --- what can be done -------------------------------------------------------------------------------------------

    def log(self, name: str, value: float) -> None:
        """Record a metric of this round: in `metrics.jsonl` under ``metrics``, at every logger, and to be monitored.

        Args:
            name: Its path, for example ``largest_update``; a callback names in `FederatedCallback.logs` what may be
                monitored.
            value: A number.

        Raises:
            ValueError: It is the name of a figure that the record holds anyway.
        """
        if name.split("/")[0] in SECTIONS:
            raise ValueError(f"{name!r} is a name of the record's own: log the metric under another")
        self.record.metrics[name] = float(value)

    def summarise(self, **values: Any) -> None:
        """Add values to `summary.json`."""
        self._loop.summary |= values

    def stop(self, reason: str) -> None:
        """Ask the run to end after this round, and say why; the first reason counts."""
        self._loop.stop(reason)

    def snapshot(self) -> Snapshot:
        """Return where the run stands now, to go back to by `roll_back`."""
        return snapshot(self._loop.server, self._loop.scorer)

    def roll_back(self, to: Snapshot, reason: str) -> None:
        """Take the round back: the server's tensors, and the scores in the record, are those of the snapshot.

        The record says so under ``rolled_back``, with the reason and the scores of the model that was discarded.
        """
        roll_back(self._loop.server, self._loop.scorer, self.record, to, reason)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Make these the global tensors.

        Raises:
            ValueError: They are not this model's: it has grown since.
        """
        self._loop.server.restore(state)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count what happens inside as scoring, in ``evaluation_seconds``."""
        with self._loop.scorer.timed():
            yield

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that it takes to continue: tensors by name, and plain JSON values."""
        return run_state.tensors(self._loop), run_state.state_dict(self._loop)

    def keep_outcomes(self, store: KeptOutcomes) -> None:
        """Keep what clients of a round send until the round is done, so that they are not trained again."""
        self._loop.round.kept_outcomes = store

    @property
    def kept_outcomes(self) -> KeptOutcomes | None:
        """Where outcomes of the round under way are kept; ``None`` for nowhere."""
        return self._loop.round.kept_outcomes
