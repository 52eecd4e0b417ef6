"""The whole model: every parameter trains."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.adaptation.base import Adaptation
from fedbe.data import Batch
from fedbe.expansion import ExportReport, head_parameter_names, save_plain
from fedbe.messages import Structure
from fedbe.traits import ALL, Trait, Traits


class WholeModel(Adaptation):
    """Every parameter of the base model trains; tied weights are one tensor. It is one unit of allocation."""

    offers: Traits = ALL - {Trait.UNCHANGED_BASE}

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._head: frozenset[str] = frozenset()

    def prepare(self, model: PreTrainedModel, inputs: Batch, structure: Structure | None = None) -> None:
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
