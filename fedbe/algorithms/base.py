"""The protocol of a federated algorithm."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.aggregation import Aggregator, HolderMean
from fedbe.allocation.capabilities import Capabilities
from fedbe.data import Batch
from fedbe.errors import Problem
from fedbe.expansion import ExportReport
from fedbe.expansion.probe import ProbeReport
from fedbe.messages import ClientTask, Update
from fedbe.modeling.tensors import copy_tensors, load_tensors


class Algorithm(ABC):
    """What is trainable, who trains it, how updates become the next state, and how the result is exported.

    Subclass it in a file of your own and name it by ``class_path`` under ``algorithm:``. Defaults: each client of the
    cohort trains everything trainable, and the server takes the holders' sample-weighted mean.

    Attributes:
        personalised: Whether each client has a model of its own, made from what it receives and what it keeps.
        restarts: Whether what clients train starts anew in every round, so that nothing can be carried over.
        aggregates: Whether what clients train becomes part of a global model at all.
        pooled: Whether one client trains on the data of all.
        own_average: Whether what clients send cannot be averaged by another rule than its own aggregator's.
        seed: The run's seed, set before `prepare`.
        tokenizer: The base model's, or ``None``, set before `prepare`.
        capabilities: What clients can afford, set after `prepare`; ``None`` where their devices are not simulated.
    """

    personalised: bool = False
    restarts: bool = False
    aggregates: bool = True
    pooled: bool = False
    own_average: bool = False
    seed: int = 0
    tokenizer: PreTrainedTokenizerBase | None = None
    capabilities: Capabilities | None = None

    def check(self, depth: int, key: str = "algorithm") -> list[Problem]:
        """Return the mistakes in this configuration for a base model of `depth` blocks, found before work starts."""
        return []

    @property
    def reports(self) -> str | None:
        """What clients tell the server besides tensors and it acts on, in words; by default nothing."""
        return None

    @property
    def shares_passes(self) -> bool:
        """Whether `begin` and `finish` do no more than load and copy tensors, so that clients may train in one pass.

        By default where they are the ones of this class.
        """
        kind = type(self)
        return kind.begin is Algorithm.begin and kind.finish is Algorithm.finish

    def probed(self, client_ids: Sequence[str]) -> Sequence[str]:
        """Return the clients that look at the base model before `prepare`; by default none."""
        return ()

    def probe(self, model: PreTrainedModel, client_id: str, batches: Iterator[Batch]) -> ProbeReport:
        """Return what a client reports of the base model, in a few numbers; runs where the client is.

        Args:
            model: The base model; it must be the same afterwards.
            client_id: The client's name.
            batches: The client's batches, to take as many of as needed.
        """
        raise NotImplementedError(f"{type(self).__name__} asks clients to probe and does not say how")

    def place(self, reports: Sequence[ProbeReport]) -> None:
        """Take in the reports of the clients that were asked, before `prepare`."""
        return None

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

    def explanation(self) -> dict[str, Any]:
        """Return why the last allocation is what it is, as plain JSON values; by default nothing."""
        return {}

    @property
    def grows(self) -> bool:
        """Whether `grow` may change the model in this configuration; by default never."""
        return False

    def grow(self, model: PreTrainedModel, inputs: Batch, record: Mapping[str, Any]) -> Mapping[str, str] | None:
        """Change the resident model's structure after a round, but none of its outputs; by default nothing changes.

        Args:
            model: The resident model.
            inputs: The real batch that `prepare` got.
            record: The round's line of `metrics.jsonl` so far.

        Returns:
            Old → new name of each parameter whose name has changed; ``None`` if nothing has changed.
        """
        return None

    @property
    def state_names(self) -> tuple[str, ...]:
        """Exact names of all parameters that make up the global state; by default those that train."""
        return self.trainable_names

    @property
    def has_dial(self) -> bool:
        """Whether `dial` has a meaning: there is one global model, and clients' training becomes part of it."""
        return self.aggregates and not self.personalised

    @property
    def dialled_names(self) -> tuple[str, ...]:
        """Exact names of the global tensors that the dial moves; by default all.

        A new task head is left as trained by every method of ours: it is no part of what the base model could do, and
        nothing but chance would be at its other end.
        """
        return self.state_names

    def dial(self, start: Mapping[str, Tensor], state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """Return the global tensors with a part of what fine-tuning added: of 0 nothing, the base model; of 1 all.

        Args:
            start: The global tensors right after `prepare`.
            state: The trained ones; those that the dial does not move are returned as they are.
            factor: The part a.

        Source: WiSE-FT (arXiv 2109.01903) for linear interpolation of weights; which tensors move is ours.
        """
        moved = frozenset(self.dialled_names)
        return {
            name: interpolated(start[name], tensor, factor) if name in moved else tensor
            for name, tensor in state.items()
        }

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

    def added_loss(self, model: PreTrainedModel, task: ClientTask) -> Callable[[], Tensor] | None:
        """Return what is added to the model's own loss in a client's steps; by default nothing.

        Called after `begin`; what it returns is called after each forward pass on a batch of the client's.
        """
        return None

    def finish(self, model: PreTrainedModel, task: ClientTask) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return what a trained client sends, and what it keeps; runs where the client is."""
        return copy_tensors(model, task.trainable_names), {}

    def watched(self, trainable_names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        """Return the units whose gradients a client that trains these parameters measures; by default none."""
        return {}

    def observe(self, task: ClientTask, update: Update) -> None:
        """Take in what a client's update says besides its tensors; called in the order of the cohort."""
        return None

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


def interpolated(start: Tensor, trained: Tensor, factor: float) -> Tensor:
    """Return start + a(trained − start), exactly `start` for a = 0 and exactly `trained` for a = 1.

    Args:
        start: Any shape.
        trained: The same shape; its dtype is the result's, computed in float32.
        factor: a.
    """
    if factor in (0, 1):
        return trained if factor == 1 else start
    first, last = start.float(), trained.float()
    return (first + factor * (last - first)).to(trained.dtype)
