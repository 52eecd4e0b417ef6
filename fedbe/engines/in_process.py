"""Clients in this process, one after another, on the one resident model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedbe.engines.local import LocalEngine
from fedbe.messages import FitTask, Outcome


class InProcess(LocalEngine):
    """Trains clients one at a time: tensors are copied in, trained with the client's `L.Trainer`, and copied out."""

    def fit(self, tasks: Iterable[FitTask]) -> Iterator[tuple[FitTask, Outcome]]:
        """Yield each task with its outcome; each is taken when its client begins."""
        for task in tasks:
            yield task, self.attempt(task)
