"""What algorithms have in common that change who trains on what, and leave to another one what is trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.aggregation import Aggregator
from fedbe.algorithms.base import Algorithm
from fedbe.data import Batch
from fedbe.errors import Problem
from fedbe.expansion import ExportReport
from fedbe.update import ClientTask


class Wrapper(Algorithm):
    """Does all as another algorithm does.

    Args:
        algorithm: The other algorithm: what is trained, and how the result is exported.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.personalised = algorithm.personalised
        self.restarts = algorithm.restarts
        self.aggregates = algorithm.aggregates

    def check(self, depth: int, key: str = "algorithm") -> list[Problem]:
        """Return the mistakes in the other algorithm's configuration."""
        return self.algorithm.check(depth, f"{key}.init_args.algorithm")

    def prepare(self, model: PreTrainedModel, inputs: Batch) -> None:
        """Prepare the other algorithm."""
        self.algorithm.seed = self.seed
        self.algorithm.prepare(model, inputs)

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of all parameters that any client may train."""
        return self.algorithm.trainable_names

    @property
    def state_names(self) -> tuple[str, ...]:
        """Exact names of all parameters that make up the global state."""
        return self.algorithm.state_names

    def units(self) -> dict[str, tuple[str, ...]]:
        """Return the units of allocation."""
        return self.algorithm.units()

    def allocate(self, cohort: Sequence[str], round_index: int) -> dict[str, tuple[str, ...]]:
        """Return the units that each client of the cohort trains this round."""
        return self.algorithm.allocate(cohort, round_index)

    def send(self, state: Mapping[str, Tensor], client_id: str) -> Mapping[str, Tensor]:
        """Return what a client downloads."""
        return self.algorithm.send(state, client_id)

    def begin(self, model: PreTrainedModel, task: ClientTask) -> None:
        """Load what a client received, and what it kept."""
        self.algorithm.begin(model, task)

    def finish(self, model: PreTrainedModel, task: ClientTask) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return what a trained client sends, and what it keeps."""
        return self.algorithm.finish(model, task)

    def aggregator(self, state: Mapping[str, Tensor]) -> Aggregator:
        """Return a fresh aggregator for one round."""
        return self.algorithm.aggregator(state)

    def state_dict(self) -> dict[str, Any]:
        """Return what the other algorithm needs to continue."""
        return self.algorithm.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.algorithm.load_state_dict(state)

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the resident model."""
        return self.algorithm.export(model, directory, tokenizer)
