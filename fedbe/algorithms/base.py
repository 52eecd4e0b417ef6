"""What an algorithm is made of: an adaptation, a strategy of the server, and a topology."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.adaptation.base import Adaptation, Tensors
from fedbe.aggregation import Aggregator, HolderMean
from fedbe.algorithms.topology import Federated, Topology
from fedbe.allocation.capabilities import Capabilities
from fedbe.errors import Facts, Problem
from fedbe.expansion import ExportReport
from fedbe.expansion.card import write_card
from fedbe.messages import FitTask, ProbeReport, Structure, Update
from fedbe.traits import Part, Traits


class Strategy(Part):
    """The server's side: who trains what, what travels, and how updates become the next state.

    The default lets every client of the cohort train everything, sends the whole state, and takes the sample-weighted
    mean over the holders of each tensor.

    Attributes:
        seed: The run's seed, set before `probed`.
        adaptation: What is trained, set by `setup`; with several in a `Stack` the whole stack.
        capabilities: What clients can afford, set after `setup`; ``None`` where their devices are not simulated.
    """

    seed: int = 0
    adaptation: Adaptation
    capabilities: Capabilities | None = None

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this configuration, found before work starts; see `Facts`."""
        return []

    def probed(self, client_ids: Sequence[str]) -> Sequence[str]:
        """Return the clients that look at the base model before it is adapted; by default none."""
        return ()

    def place(self, reports: Sequence[ProbeReport], depth: int) -> Structure | None:
        """Return the structure that the model begins with.

        Args:
            reports: Those of the clients that were asked.
            depth: Blocks of the base model.

        Returns:
            The structure for `Adaptation.prepare`; ``None`` for the one that the configuration says.
        """
        return None

    def setup(self, adaptation: Adaptation) -> None:
        """Learn what is trained, once the model is prepared."""
        self.adaptation = adaptation

    def allocate(self, cohort: Sequence[str], round_index: int) -> dict[str, tuple[str, ...]]:
        """Return the units that each client of the cohort trains this round; by default all of them.

        Returns:
            Client → names of units, in the order of the cohort; a client with no unit sits the round out. Every client
            of the cohort is in it.
        """
        return dict.fromkeys(cohort, tuple(self.adaptation.units()))

    def explanation(self) -> dict[str, Any]:
        """Return why the last allocation is what it is, as plain JSON values; by default nothing."""
        return {}

    def send(self, state: Tensors, client_id: str) -> Tensors:
        """Return what a client downloads at the start of its round; by default the whole global state."""
        return state

    @property
    def peeked_names(self) -> frozenset[str]:
        """Names of tensors that clients keep and a simulation may look at, to score a global model with them."""
        return frozenset()

    def aggregator(self, state: Tensors) -> Aggregator:
        """Return a fresh aggregator for one round, starting from the global tensors `state`."""
        return HolderMean(state)

    def check_report(self, task: FitTask, update: Update) -> None:
        """Refuse an update whose metrics `observe` could not use; nothing is taken in.

        Raises:
            UpdateError: It cannot be used; the message names the client and the metric.
        """

    def observe(self, task: FitTask, update: Update) -> None:
        """Take in what an accepted update says besides its tensors; called in the order of the cohort."""

    def grow(self, record: Mapping[str, Any]) -> Structure | None:
        """Return the structure that the model is to have from the next round on; ``None`` to leave it.

        Args:
            record: The round's line of `metrics.jsonl` so far.
        """
        return None

    def restructured(self, renamed: Mapping[str, str]) -> None:
        """Follow the adaptation's change of structure; parameters have new names, old → new."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that the server needs to continue, beyond the global state, by name."""
        return {}

    def load_tensors(self, tensors: Tensors, state: Tensors) -> None:
        """Continue from `tensors`; called after `setup`.

        Args:
            tensors: What `tensors` returned.
            state: The global tensors that they belong to.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what the server knows beyond tensors and needs to continue, as plain JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; the model has its structure by then."""


class Algorithm:
    """A preset: what is added to the model, what the server does with updates, and who talks to whom.

    Subclass it, or one of the presets, in a file of your own and name it by ``class_path`` under ``algorithm:``. The
    annotations of the constructor are the schema of ``init_args``.

    Args:
        adaptation: What is added to the model and trained.
        strategy: The server's side; by default all clients train everything and the mean is taken.
        topology: Who talks at all; by default server and clients.
    """

    def __init__(
        self, adaptation: Adaptation, strategy: Strategy | None = None, topology: Topology | None = None
    ) -> None:
        self.adaptation = adaptation
        self.strategy = strategy or Strategy()
        self.topology = topology or Federated()

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this configuration, found before work starts; see `Facts`."""
        self.adaptation.key = key
        return [*self.adaptation.check(key, facts), *self.strategy.check(key, facts)]

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the adapted model as its adaptation does, with a model card; both say what the topology has to add."""
        report, note = self.adaptation.export(model, directory, tokenizer), self.topology.export_note
        report = replace(report, reason=f"{report.reason} {note}" if note else report.reason)
        write_card(directory, report, model, self.title)
        return report

    @property
    def title(self) -> str:
        """What it is called in a model card."""
        return type(self).__name__

    @property
    def needs(self) -> Traits:
        """What must hold in a run for its three parts to make sense."""
        return self.adaptation.needs | self.strategy.needs | self.topology.needs

    @property
    def offers(self) -> Traits:
        """What still holds in a run with this algorithm."""
        return self.adaptation.offers & self.strategy.offers & self.topology.offers
