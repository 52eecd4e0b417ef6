"""Baseline: no federation, each client fine-tunes a model of its own."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.aggregation import Aggregator, HolderMean
from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.controls.wrapper import Wrapper
from fedbe.data import Batch
from fedbe.errors import Problem
from fedbe.expansion import ExportReport
from fedbe.messages import ClientTask
from fedbe.modeling.tensors import copy_tensors, load_tensors


class LocalOnly(Wrapper):
    """Each client trains what another algorithm would train, from the same start, and nothing is averaged or sent.

    A client goes on from where it stopped when it took part last. The global model stays the untrained start: it is
    what `downstream`, retention and the export show; the clients' own models are in `personalised`.

    Args:
        algorithm: Says which parameters are trained.

    Source: ours, the usual lower control of federated learning.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__(algorithm)
        self.personalised = True
        self.aggregates = False
        self._start: dict[str, Tensor] = {}

    def check(self, depth: int, key: str = "algorithm") -> list[Problem]:
        """Return the mistakes in the other algorithm's configuration, or why it cannot train locally."""
        inner = self.algorithm
        if inner.personalised or inner.restarts or not inner.aggregates:
            remedy = "clients cannot go on from their own tensors alone: name one with a lasting global model"
            return [Problem(f"{key}.init_args.algorithm", type(inner).__name__, remedy)]
        return super().check(depth, key)

    def prepare(self, model: PreTrainedModel, inputs: Batch) -> None:
        """Prepare the other algorithm and note the start, which each client can build for itself."""
        super().prepare(model, inputs)
        self._start = copy_tensors(model, self.trainable_names)

    def send(self, state: Mapping[str, Tensor], client_id: str) -> Mapping[str, Tensor]:
        """Return nothing."""
        return {}

    def begin(self, model: PreTrainedModel, task: ClientTask) -> None:
        """Load the start, and over it what the client has trained so far."""
        load_tensors(model, {**self._start, **task.kept})

    def finish(self, model: PreTrainedModel, task: ClientTask) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Send nothing; keep what was trained, now and before."""
        return {}, {**task.kept, **copy_tensors(model, task.trainable_names)}

    def aggregator(self, state: Mapping[str, Tensor]) -> Aggregator:
        """Return the mean over holders, of which there are none."""
        return HolderMean(state)

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the untrained start."""
        report = super().export(model, directory, tokenizer)
        return replace(report, reason=f"{report.reason} It is the start: clients keep what they trained to themselves.")
