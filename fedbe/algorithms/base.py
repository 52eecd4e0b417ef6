"""The protocol of a federated algorithm."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.aggregation import Aggregator, HolderMean
from fedbe.data import Batch
from fedbe.errors import Problem
from fedbe.expansion import ExportReport
from fedbe.update import ClientTask, copy_tensors, load_tensors


class Algorithm(ABC):
    """What is trainable, who trains it, how updates become the next state, and how the result is exported.

    Subclass it in a file of your own and name it by ``class_path`` under ``algorithm:``. Defaults: each client of the
    cohort trains everything trainable, and the server takes the holders' sample-weighted mean.

    Attributes:
        personalised: Whether each client has a model of its own, made from what it receives and what it keeps.
        restarts: Whether what clients train starts anew in every round, so that nothing can be carried over.
        aggregates: Whether what clients train becomes part of a global model at all.
        pooled: Whether one client trains on the data of all.
        seed: The run's seed, set before `prepare`.
    """

    personalised: bool = False
    restarts: bool = False
    aggregates: bool = True
    pooled: bool = False
    seed: int = 0

    def check(self, depth: int, key: str = "algorithm") -> list[Problem]:
        """Return the mistakes in this configuration for a base model of `depth` blocks, found before work starts."""
        return []

    @abstractmethod
    def prepare(self, model: PreTrainedModel, inputs: Batch) -> None:
        """Turn the base model into the resident model, in place, once, before round 1.

        Args:
            model: The base model.
            inputs: A real batch on which the outputs must stay what they were.

        Raises:
            ExpansionError: The model cannot be changed without changing its outputs.
        """

    @property
    @abstractmethod
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of all parameters that any client may train; available after `prepare`."""

    def units(self) -> dict[str, tuple[str, ...]]:
        """Return the units of allocation, name → parameter names; by default one unit holds everything."""
        return {"all": self.trainable_names}

    def allocate(self, cohort: Sequence[str], round_index: int) -> dict[str, tuple[str, ...]]:
        """Return the units that each client of the cohort trains this round; by default all of them."""
        return dict.fromkeys(cohort, tuple(self.units()))

    @property
    def state_names(self) -> tuple[str, ...]:
        """Exact names of all parameters that make up the global state; by default those that train."""
        return self.trainable_names

    def send(self, state: Mapping[str, Tensor], client_id: str) -> Mapping[str, Tensor]:
        """Return what a client downloads at the start of its round; by default the whole global state."""
        return state

    def begin(self, model: PreTrainedModel, task: ClientTask) -> None:
        """Load what a client received, and what it kept, into the resident model; runs where the client is.

        Raises:
            ValueError: A tensor that it trains is in neither, and would be what the client before left behind.
        """
        left_behind = set(task.trainable_names) - task.received.keys() - task.kept.keys()
        if left_behind:
            raise ValueError(f"client {task.client_id!r} trains {min(left_behind)!r} but has no value to start from")
        load_tensors(model, {**task.received, **task.kept})

    def finish(self, model: PreTrainedModel, task: ClientTask) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return what a trained client sends, and what it keeps; runs where the client is."""
        return copy_tensors(model, task.trainable_names), {}

    def aggregator(self, state: Mapping[str, Tensor]) -> Aggregator:
        """Return a fresh aggregator for one round, starting from the global tensors `state`."""
        return HolderMean(state)

    def state_dict(self) -> dict[str, Any]:
        """Return what the server knows beyond the global state and needs to continue, as plain JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        return None

    @abstractmethod
    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the resident model as a checkpoint, plain wherever the architecture allows it."""
