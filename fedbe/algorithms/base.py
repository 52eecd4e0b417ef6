"""The protocol of a federated algorithm."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.aggregation import HolderMean
from fedbe.data import Batch
from fedbe.errors import Problem
from fedbe.expansion import ExportReport


class Algorithm(ABC):
    """What is trainable, who trains it, how updates become the next state, and how the result is exported.

    Subclass it in a file of your own and name it by ``class_path`` under ``algorithm:``. Defaults: each client of the
    cohort trains everything trainable, and the server takes the holders' sample-weighted mean.
    """

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

    def aggregator(self, state: Mapping[str, Tensor]) -> HolderMean:
        """Return a fresh aggregator for one round, starting from the global tensors `state`."""
        return HolderMean(state)

    @abstractmethod
    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the resident model as a checkpoint, plain wherever the architecture allows it."""
