"""What algorithms have in common that change who trains on what, and leave to another one what is trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.aggregation import Aggregator
from fedbe.algorithms.base import Algorithm
from fedbe.allocation import Capabilities
from fedbe.data import Batch
from fedbe.errors import Problem
from fedbe.expansion import ExportReport
from fedbe.expansion.probe import ProbeReport
from fedbe.messages import ClientTask, Update


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
        self.own_average = algorithm.own_average

    def check(self, depth: int, key: str = "algorithm") -> list[Problem]:
        """Return the mistakes in the other algorithm's configuration."""
        return self.algorithm.check(depth, f"{key}.init_args.algorithm")

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.algorithm.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.algorithm.seed = seed

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The base model's tokenizer."""
        return self.algorithm.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.algorithm.tokenizer = tokenizer

    @property
    def capabilities(self) -> Capabilities | None:
        """What clients can afford."""
        return self.algorithm.capabilities

    @capabilities.setter
    def capabilities(self, capabilities: Capabilities | None) -> None:
        self.algorithm.capabilities = capabilities

    @property
    def reports(self) -> str | None:
        """What clients tell the server besides tensors."""
        return self.algorithm.reports

    def probed(self, client_ids: Sequence[str]) -> Sequence[str]:
        """Return the clients that look at the base model before `prepare`."""
        return self.algorithm.probed(client_ids)

    def probe(self, model: PreTrainedModel, client_id: str, batches: Iterator[Batch]) -> ProbeReport:
        """Return what a client reports of the base model."""
        return self.algorithm.probe(model, client_id, batches)

    def place(self, reports: Sequence[ProbeReport]) -> None:
        """Take in the reports of the clients that were asked."""
        self.algorithm.place(reports)

    def prepare(self, model: PreTrainedModel, inputs: Batch) -> None:
        """Prepare the other algorithm."""
        self.algorithm.prepare(model, inputs)

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of all parameters that any client may train."""
        return self.algorithm.trainable_names

    def explanation(self) -> dict[str, Any]:
        """Return why the last allocation is what it is."""
        return self.algorithm.explanation()

    def watched(self, trainable_names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        """Return the units whose gradients a client measures."""
        return self.algorithm.watched(trainable_names)

    def observe(self, task: ClientTask, update: Update) -> None:
        """Take in what a client's update says besides its tensors."""
        self.algorithm.observe(task, update)

    @property
    def grows(self) -> bool:
        """Whether the model's structure may change after a round."""
        return self.algorithm.grows

    def grow(self, model: PreTrainedModel, inputs: Batch, record: Mapping[str, Any]) -> Mapping[str, str] | None:
        """Change the resident model's structure after a round, but none of its outputs."""
        return self.algorithm.grow(model, inputs, record)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Exact names of all parameters that make up the global state."""
        return self.algorithm.state_names

    @property
    def has_dial(self) -> bool:
        """Whether the dial has a meaning: for the other algorithm, and for the way in which it is trained."""
        return super().has_dial and self.algorithm.has_dial

    @property
    def dialled_names(self) -> tuple[str, ...]:
        """Exact names of the global tensors that the dial moves."""
        return self.algorithm.dialled_names

    def dial(self, start: Mapping[str, Tensor], state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """Return the global tensors with a part of what fine-tuning added."""
        return self.algorithm.dial(start, state, factor)

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

    def added_loss(self, model: PreTrainedModel, task: ClientTask) -> Callable[[], Tensor] | None:
        """Return what the other algorithm adds to a client's loss."""
        return self.algorithm.added_loss(model, task)

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
