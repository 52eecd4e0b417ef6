"""What the clients of a run can afford, and how long their part of a round takes by the simulated clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedbe.allocation.clock import SimulatedClock, steps_within
from fedbe.allocation.cost import Cost, CostModel, UnitCosts, seconds
from fedbe.allocation.profiles import Profile, available
from fedbe.messages import FitTask, Update


@dataclass(frozen=True)
class Capabilities:
    """A run's clients, their devices, and what training this model costs them.

    Attributes:
        clock: The clients' devices, and what is done about late ones.
        costs: Counted on the resident model.
        steps: Local steps that each client takes in a round if it has the time.
        samples_per_step: Samples that a local step of each client computes on, those of the objective included; fewer
            where a client has fewer batches than are accumulated.
        seed: The run's seed.
    """

    clock: SimulatedClock
    costs: CostModel
    steps: Mapping[str, int]
    samples_per_step: Mapping[str, float]
    seed: int

    def profile(self, client_id: str, round_index: int) -> Profile:
        """Return what a client's device can do in a round."""
        return self.clock.fleet.profile(client_id, round_index)

    def available(self, client_ids: Sequence[str], round_index: int) -> list[str]:
        """Return the clients that are there in a round; all of them if nobody is, so that the round takes place."""
        return available(self.clock.fleet, client_ids, round_index, self.seed) or list(client_ids)

    def unit_costs(self, units: Mapping[str, Sequence[str]]) -> UnitCosts:
        """Return what units of allocation cost, in additive form."""
        return self.costs.units(units, max(self.samples_per_step.values()))

    def cost(self, task: FitTask) -> Cost:
        """Return what a client's local steps cost."""
        steps = self.steps[task.client_id] if task.max_steps is None else task.max_steps
        return self.costs.cost(task.trainable_names, self.samples_per_step[task.client_id], steps)

    def seconds(self, task: FitTask, update: Update) -> float:
        """Return how long a client took to download, train and upload."""
        profile = self.profile(task.client_id, task.round_index)
        return seconds(self.cost(task), profile, task.bytes_down, update.bytes_up)

    def lacking_memory(self, task: FitTask) -> float:
        """Return how many bytes a client's device has too few for its task; 0 if it has enough."""
        has = self.profile(task.client_id, task.round_index).memory_bytes
        return max(0.0, self.cost(task).memory_bytes - has)

    def max_steps(self, task: FitTask) -> int | None:
        """Return how many local steps end by the deadline, where clients may stop early; ``None`` for all of them.

        The upload is taken to be the trained parameters, which is more than some methods send.
        """
        if self.clock.late != "partial" or self.clock.deadline_seconds is None:
            return None
        profile, steps = self.profile(task.client_id, task.round_index), self.steps[task.client_id]
        up = sum(self.costs.parameter_bytes[name] for name in task.trainable_names)
        transfer = task.bytes_down / profile.download_bytes_per_second + up / profile.upload_bytes_per_second
        one = self.costs.cost(task.trainable_names, self.samples_per_step[task.client_id])
        fitting = steps_within(self.clock.deadline_seconds, transfer, seconds(one, profile), steps)
        return None if fitting == steps else fitting
