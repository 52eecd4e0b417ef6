"""Scores on the downstream task, of the global model and of clients' own models, and the time that scoring takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from fedbe.data import FederatedDataModule
from fedbe.engines.base import Engine
from fedbe.evaluation.downstream import evaluate_downstream
from fedbe.evaluation.personalised import summarise_clients
from fedbe.federation.server import Server
from fedbe.messages import Evaluate, Split
from fedbe.traits import Trait


@dataclass(frozen=True)
class Scores:
    """How one state of the run scores on the downstream task; ``None`` for what was not measured.

    Attributes:
        downstream: ``accuracy`` and ``loss`` of the global model.
        personalised: ``mean``, ``min``, ``max`` and ``loss`` of the clients' own models.
    """

    downstream: dict[str, float] | None = None
    personalised: dict[str, float] | None = None


@dataclass
class Scorer:
    """Scores the models of a run.

    Attributes:
        server: Whose global model is scored.
        engine: Where clients score their own.
        scores: Those of the server's present state on validation data.
        seconds: Time that scoring has taken so far, general tasks included.
    """

    server: Server
    engine: Engine
    scores: Scores = Scores()
    seconds: float = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count what happens inside as scoring."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def downstream(self, batches: DataLoader[Any]) -> dict[str, float]:
        """Return ``accuracy`` and ``loss`` of the global model."""
        with self.timed():
            score = evaluate_downstream(self.server.model, batches)
        return {"accuracy": score.accuracy, "loss": score.loss}

    def tested(self, data: FederatedDataModule) -> dict[str, Any]:
        """Return how the global model scores on the test data.

        Returns:
            ``downstream``: ``accuracy``, ``loss`` and the accuracy's ``standard_error``; ``by_class``: what
            `fedbe.evaluation.classes.class_scores` says of a classifier, ``None`` for another model.
        """
        with self.timed():
            score = evaluate_downstream(self.server.model, data.test_dataloader(), True, data.class_names)
        figures = {"accuracy": score.accuracy, "loss": score.loss, "standard_error": score.standard_error}
        return {"downstream": figures, "by_class": score.by_class}

    def personalised(self, split: Split, experience: int, round_index: int) -> dict[str, float] | None:
        """Return how clients' own models score, ``mean``, ``min``, ``max`` and ``loss``.

        Returns:
            ``None`` where there is one global model for all, or no client has answered.
        """
        if Trait.GLOBAL_MODEL in self.server.algorithm.offers:
            return None
        units = tuple(self.server.algorithm.adaptation.units())
        tasks = (self.server.task(client, experience, round_index, units) for client in self.engine.client_ids)
        with self.timed():
            scores = list(self.engine.evaluate(Evaluate(task, split) for task in tasks))
        return summarise_clients(scores) if scores else None
