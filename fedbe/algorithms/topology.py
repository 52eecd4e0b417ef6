"""Who talks to whom: server and clients, clients by themselves, or nobody because all data is in one place."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from fedbe.adaptation.base import Adaptation, Tensors
from fedbe.messages import FitTask
from fedbe.modeling.tensors import copy_tensors, load_tensors
from fedbe.traits import ALL, Part, Trait, Traits


class Topology(Part):
    """Base class: how a client's round begins and ends; by default as the adaptation says.

    Attributes:
        pooled: Whether one client trains on the data of all.
        export_note: What there is to know of an exported model, a sentence; empty if nothing.
    """

    pooled: bool = False
    export_note: str = ""

    def prepared(self, model: PreTrainedModel, adaptation: Adaptation) -> None:
        """Look at the prepared model, once, where the client is."""

    def send(self, sent: Tensors) -> Tensors:
        """Return what a client downloads, given what the strategy sends."""
        return sent

    def begin(self, model: PreTrainedModel, adaptation: Adaptation, task: FitTask, kept: Tensors) -> None:
        """Load the tensors that a client starts from."""
        adaptation.begin(model, task, kept)

    def finish(
        self, model: PreTrainedModel, adaptation: Adaptation, task: FitTask, kept: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Return what a trained client sends, and what it keeps."""
        return adaptation.finish(model, task, kept)


class Federated(Topology):
    """Server and clients: what clients train is sent and aggregated."""


class Apart(Topology):
    """Each client by itself: nothing is sent; a client goes on from where it stopped.

    The global model stays the start, so that nothing about it could tell when the model should grow.
    """

    needs: Traits = frozenset({Trait.LASTING_TENSORS, Trait.FIXED_STRUCTURE})
    offers: Traits = ALL - {Trait.GLOBAL_MODEL, Trait.AGGREGATION, Trait.COPIED_IN_AND_OUT}
    export_note = "It is the start: clients keep what they trained to themselves."

    def __init__(self) -> None:
        self._start: Mapping[str, Tensor] = {}

    def prepared(self, model: PreTrainedModel, adaptation: Adaptation) -> None:
        """Note the start, which each client can build for itself."""
        self._start = copy_tensors(model, adaptation.trainable_names)

    def send(self, sent: Tensors) -> Tensors:
        """Return nothing."""
        return {}

    def begin(self, model: PreTrainedModel, adaptation: Adaptation, task: FitTask, kept: Tensors) -> None:
        """Load the start, and over it what the client has trained so far."""
        load_tensors(model, {**self._start, **kept})

    def finish(
        self, model: PreTrainedModel, adaptation: Adaptation, task: FitTask, kept: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Send nothing; keep what was trained, now and before."""
        return {}, {**kept, **copy_tensors(model, task.trainable_names)}


class Pooled(Topology):
    """One client with the data of all, which takes as many local steps in a round as a cohort would together."""

    needs: Traits = frozenset({Trait.SHARED_MEMORY})
    offers: Traits = ALL - {Trait.SEVERAL_CLIENTS}
    pooled = True
