"""The protocol of an adaptation: what is added to a base model, where the client is and where the server is alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.data import Batch
from fedbe.errors import Facts, Problem
from fedbe.expansion import Expansion, ExportReport
from fedbe.messages import FitTask, ProbeReport, Structure
from fedbe.modeling.precision import hold_in_float32
from fedbe.modeling.tensors import copy_tensors, load_tensors
from fedbe.traits import Part

Tensors = Mapping[str, Tensor]
"""Tensors by exact parameter name."""


class Adaptation(Part, ABC):
    """What is added to a model and trained: blocks, adapters, a gate, the whole model; or a `Stack` of several.

    It is built from the configuration and the seed alone, so on any machine: a server and a client that hold the same
    base model and prepare the same adaptation in the same structure have the same model. Who trains what, and how
    updates become the next state, is the `Strategy`'s; see `fedbe.algorithms.base`.

    Attributes:
        key: Dotted key of the arguments that it is built from, for mistakes that only the model shows; set by
            `Algorithm.check`.
        seed: The run's seed, set before `observe_base`.
        tokenizer: The base model's, or ``None``, set before `observe_base`.
        float32: Whether what is trained is float32 over a base of half precision.
        beside: The other parts of the `Stack` that it is a part of.
    """

    key: str = "algorithm.init_args"
    seed: int = 0
    tokenizer: PreTrainedTokenizerBase | None = None
    float32: bool = True
    beside: Sequence[Adaptation] = ()

    @property
    def parts(self) -> Sequence[Adaptation]:
        """The adaptations that it is made of: itself, or those of a `Stack`."""
        return (self,)

    @property
    def expansion(self) -> Expansion | None:
        """The blocks that it has inserted, on which a gate may be put; by default none. Known after `prepare`."""
        return None

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Exact names of the layers that it has put an adapter on, for a gate too; by default none."""
        return ()

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this configuration, found before work starts; see `Facts`."""
        return []

    def probe(self, model: PreTrainedModel, client_id: str, batches: Iterator[Batch]) -> ProbeReport:
        """Return what a client reports of the base model before it is changed; runs where the client is.

        Args:
            model: The base model; it must be the same afterwards.
            client_id: The client's name.
            batches: The client's batches, to take as many of as needed.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what clients report of the base model")

    def observe_base(self, model: PreTrainedModel) -> None:
        """Look at the base model before anything is added to it; by default nothing is looked at."""

    @abstractmethod
    def prepare(self, model: PreTrainedModel, inputs: Batch, structure: Structure | None = None) -> None:
        """Turn the base model into the adapted model, in place, once.

        Args:
            model: The base model.
            inputs: A real batch on which the outputs must stay what they were.
            structure: The structure to build; ``None`` for the one that the configuration says.

        Raises:
            ExpansionError: The model cannot be changed without changing its outputs.
        """

    def hold(self, model: PreTrainedModel) -> None:
        """Hold what is trained, and what the server keeps of it, in float32; after `prepare` and after `grow`."""
        if self.float32:
            hold_in_float32(model, (*self.trainable_names, *self.state_names))

    def structure(self) -> Structure:
        """Return what another machine needs to build the same model, as plain JSON values; by default nothing."""
        return {}

    @property
    @abstractmethod
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of all parameters that any client may train; available after `prepare`."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """Exact names of all parameters that make up the global state; by default those that train."""
        return self.trainable_names

    @property
    def dialled_names(self) -> tuple[str, ...]:
        """Exact names of the global tensors that the dial moves; by default all.

        A new task head is left as trained by every adaptation of ours: it is no part of what the base model could do,
        and nothing but chance would be at its other end.
        """
        return self.state_names

    def units(self) -> dict[str, tuple[str, ...]]:
        """Return the units of allocation, name → parameter names; by default one unit holds everything."""
        return {"all": self.trainable_names}

    def begin(self, model: PreTrainedModel, task: FitTask, kept: Tensors) -> None:
        """Load what a client received, and what it kept, into the model; runs where the client is.

        Args:
            model: The resident model.
            task: What the client was given; names that are not this adaptation's are left alone.
            kept: What `finish` kept in the round that the client goes on from; empty at first.

        Raises:
            ValueError: A tensor that it trains is in neither, and would be what the client before left behind.
        """
        own = frozenset((*self.state_names, *self.trainable_names))
        loaded = {name: tensor for name, tensor in {**task.received, **kept}.items() if name in own}
        left_behind = {name for name in task.trainable_names if name in own} - loaded.keys()
        if left_behind:
            raise ValueError(f"client {task.client_id!r} trains {min(left_behind)!r} but has no value to start from")
        load_tensors(model, loaded)

    def added_loss(self, model: PreTrainedModel, task: FitTask) -> Callable[[], Tensor] | None:
        """Return what is added to the model's own loss in a client's steps; by default nothing.

        Called after `begin`; what it returns is called after each forward pass on a batch of the client's.
        """
        return None

    def watched(self, trainable_names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        """Return the units whose gradients a client that trains these parameters measures; by default none.

        Returns:
            Unit → exact names of the parameters whose joint gradient norm is reported as ``gradient_norm/<unit>``.
        """
        return {}

    def finish(self, model: PreTrainedModel, task: FitTask, kept: Tensors) -> tuple[Tensors, Tensors]:
        """Return what a trained client sends, and what it keeps to itself; runs where the client is.

        Args:
            model: The resident model, trained.
            task: What the client was given.
            kept: What `begin` got.

        Returns:
            The tensors that travel to the server, and those that stay with the client for its next round.
        """
        own = frozenset(self.trainable_names)
        return copy_tensors(model, [name for name in task.trainable_names if name in own]), {}

    def leave(self, model: PreTrainedModel) -> None:
        """Undo what `begin` did to the model besides loading tensors, where a client's round fails; by default nothing.

        After `finish` nothing is left to undo.
        """

    def grow(self, model: PreTrainedModel, structure: Structure, inputs: Batch | None = None) -> Mapping[str, str]:
        """Change the adapted model to a larger structure, but none of its outputs.

        Args:
            model: The adapted model.
            structure: The structure to come to.
            inputs: A real batch on which the outputs must stay what they were; made up if left out.

        Returns:
            Old → new name of each parameter whose name has changed; empty if nothing has.
        """
        if dict(structure) != dict(self.structure()):
            raise ValueError(f"{type(self).__name__} cannot grow to {dict(structure)}")
        return {}

    def detach(self, model: PreTrainedModel) -> None:
        """Take out of the model what must not be there while another adaptation changes its structure."""

    def attach(self, model: PreTrainedModel) -> None:
        """Put back what `detach` took out."""

    def dial(self, start: Tensors, state: Tensors, factor: float) -> dict[str, Tensor]:
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

    @abstractmethod
    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the adapted model as a checkpoint, plain wherever the architecture allows it."""

    def exported_beside(self, model: PreTrainedModel, write: Callable[[], ExportReport]) -> ExportReport:
        """Have the first part of the stack that it is in write the model; by default with this part in it as it is.

        Args:
            model: The adapted model.
            write: Writes it.
        """
        return write()


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
