"""How long a round takes, and who is late."""

from dataclasses import dataclass, field

from fedbe.allocation.capabilities import Capabilities
from fedbe.messages import FitTask, Update


@dataclass
class RoundTiming:
    """The time of one round: by the clients' simulated devices, or as it was measured.

    Attributes:
        capabilities: The clients' devices; ``None`` to take the measured time of each client.
        seconds: How long each client took.
        late: The clients for whom the server did not wait.
    """

    capabilities: Capabilities | None
    seconds: dict[str, float] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)

    def in_time(self, task: FitTask, update: Update) -> bool:
        """Note how long a client took, and return whether its update counts."""
        if self.capabilities is None:
            self.seconds[task.client_id] = update.metrics.get("seconds", 0.0)
            return True
        taken = self.seconds[task.client_id] = self.capabilities.seconds(task, update)
        late = self.capabilities.clock.round({task.client_id: taken}).late
        self.late += late
        return not late

    @property
    def round_seconds(self) -> float:
        """How long the server waited."""
        if self.capabilities is None:
            return max(self.seconds.values(), default=0.0)
        return self.capabilities.clock.round(self.seconds).seconds
