"""Full fine-tuning: every parameter is trained by every client."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.algorithms.base import Algorithm
from fedbe.data import Batch
from fedbe.expansion import ExportReport, head_parameter_names, save_plain


class FedAvg(Algorithm):
    """Train all parameters and take the sample-weighted mean; tied weights are one tensor.

    Memory, in copies of the model: the resident weights, the global state, one client's update and the running mean of
    the updates, and during a client's run its gradients and optimizer state (two more for Adam). It does not grow with
    the number of clients. All of the model travels, both ways, for each client and round.

    Source: FedAvg (arXiv 1602.05629) (C).
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._head: frozenset[str] = frozenset()

    def prepare(self, model: PreTrainedModel, inputs: Batch) -> None:
        """Note the names of the parameters; the model stays what it is."""
        self._names = tuple(name for name, _ in model.named_parameters())
        self._head = frozenset(head_parameter_names(model))

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of all parameters; of tied ones the first."""
        return self._names

    @property
    def dialled_names(self) -> tuple[str, ...]:
        """Exact names of all parameters but those of a new task head."""
        return tuple(name for name in self._names if name not in self._head)

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the model as the plain checkpoint that it is."""
        return save_plain(model, directory, tokenizer)
