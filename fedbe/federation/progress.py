"""How far a run is, and how long it has taken."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """How far the run is, and how long it has taken, before it was continued included.

    Attributes:
        started: Rounds begun.
        completed: Rounds aggregated, evaluated and written.
        simulated_seconds: Time that clients working side by side would have taken: each round until the server went
            on. By the clients' simulated devices, or else each client's measured time.
    """

    started: int = 0
    completed: int = 0
    simulated_seconds: float = 0.0
    _began: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def wall_seconds(self) -> float:
        """Measured seconds that the run has taken."""
        return time.perf_counter() - self._began

    def state_dict(self) -> dict[str, Any]:
        """Return what it takes to count on, as plain JSON values."""
        return {
            "progress": {"started": self.started, "completed": self.completed},
            "simulated_seconds": self.simulated_seconds,
            "wall_seconds": self.wall_seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from a `state_dict`."""
        self.started, self.completed = state["progress"]["started"], state["progress"]["completed"]
        self.simulated_seconds = float(state["simulated_seconds"])
        self._began = time.perf_counter() - state["wall_seconds"]
