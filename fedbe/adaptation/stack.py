"""Several adaptations of one model, one upon the other."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.adaptation.base import Adaptation, Tensors
from fedbe.data import Batch
from fedbe.errors import Facts, Problem
from fedbe.expansion import Expansion, ExportReport
from fedbe.messages import FitTask, ProbeReport, Structure
from fedbe.traits import Trait

T = TypeVar("T")


class Stack(Adaptation):
    """Adaptations that are prepared one after another: names, units and structures are those of all.

    Each part loads and returns its own tensors only. The first part is what clients probe for and what is exported,
    with the others in it or not as they say (`Adaptation.exported_beside`). When the structure changes, every part is
    detached meanwhile.

    Args:
        parts: In the order in which the model is changed, at least one and no two of a kind. Their names are disjoint.
    """

    def __init__(self, parts: Sequence[Adaptation]) -> None:
        self._parts = tuple(part for given in parts for part in given.parts)
        self.needs = frozenset[Trait]().union(*(part.needs for part in self._parts))
        self.offers = frozenset(Trait).intersection(*(part.offers for part in self._parts))
        for part in self._parts:
            part.beside = tuple(other for other in self._parts if other is not part)

    @property
    def parts(self) -> Sequence[Adaptation]:
        """The adaptations, those of a stack in it one by one."""
        return self._parts

    @property
    def expansion(self) -> Expansion | None:
        """The blocks that a part has inserted."""
        return next((part.expansion for part in self._parts if part.expansion is not None), None)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Exact names of the layers that parts have put adapters on."""
        return _joined(part.layer_names for part in self._parts)

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in the parts' configurations, and a kind of part that is there twice."""
        kinds = [type(part).__name__ for part in self._parts]
        twice = [kind for kind in dict.fromkeys(kinds) if kinds.count(kind) > 1]
        problems = [Problem(key, kind, "a model is adapted in this way once: leave one of them out") for kind in twice]
        return [*problems, *(problem for part in self._parts for problem in part.check(key, facts))]

    def probe(self, model: PreTrainedModel, client_id: str, batches: Iterator[Batch]) -> ProbeReport:
        """Return what a client reports of the base model to the first part."""
        self._share()
        return self._parts[0].probe(model, client_id, batches)

    def observe_base(self, model: PreTrainedModel) -> None:
        """Let every part look at the base model."""
        self._share()
        for part in self._parts:
            part.observe_base(model)

    def prepare(self, model: PreTrainedModel, inputs: Batch, structure: Structure | None = None) -> None:
        """Prepare part by part; each takes from the structure what it knows."""
        for part in self._parts:
            part.prepare(model, inputs, structure)

    def structure(self) -> Structure:
        """Return the structures of all parts in one."""
        return {name: value for part in self._parts for name, value in part.structure().items()}

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of the parameters of all parts that any client may train."""
        return _joined(part.trainable_names for part in self._parts)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Exact names of the parameters of all parts that make up the global state."""
        return _joined(part.state_names for part in self._parts)

    @property
    def dialled_names(self) -> tuple[str, ...]:
        """Exact names of the global tensors of all parts that the dial moves."""
        return _joined(part.dialled_names for part in self._parts)

    def units(self) -> dict[str, tuple[str, ...]]:
        """Return the units of all parts."""
        return {name: names for part in self._parts for name, names in part.units().items()}

    def begin(self, model: PreTrainedModel, task: FitTask, kept: Tensors) -> None:
        """Let every part load its tensors."""
        for part, own, own_kept in self._split(task, kept):
            part.begin(model, own, own_kept)

    def added_loss(self, model: PreTrainedModel, task: FitTask) -> Callable[[], Tensor] | None:
        """Return the sum of what the parts add to a client's loss; each sees the whole task."""
        added = [part.added_loss(model, task) for part in self._parts]
        losses = [loss for loss in added if loss is not None]
        if len(losses) < 2:
            return losses[0] if losses else None
        return partial(_sum, losses)

    def watched(self, trainable_names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        """Return the units of all parts whose gradients a client measures."""
        return {unit: names for part in self._parts for unit, names in part.watched(trainable_names).items()}

    def finish(self, model: PreTrainedModel, task: FitTask, kept: Tensors) -> tuple[Tensors, Tensors]:
        """Return what all parts send, and what they keep."""
        sent: dict[str, Tensor] = {}
        stays: dict[str, Tensor] = {}
        for part, own, own_kept in self._split(task, kept):
            part_sent, part_stays = part.finish(model, own, own_kept)
            sent |= part_sent
            stays |= part_stays
        return sent, stays

    def leave(self, model: PreTrainedModel) -> None:
        """Have every part undo what it did to the model."""
        for part in self._parts:
            part.leave(model)

    def grow(self, model: PreTrainedModel, structure: Structure, inputs: Batch | None = None) -> Mapping[str, str]:
        """Detach all parts, let those grow whose structure is another one, and attach them again.

        Args:
            model: The adapted model.
            structure: The structure to come to; what it leaves out stays as it is.
            inputs: A real batch; made up if left out.

        Raises:
            ValueError: A name in the structure is no part's, or a parameter of one part was moved by another.
        """
        if unknown := sorted(structure.keys() - self.structure().keys()):
            raise ValueError(f"no part of the stack has a {unknown[0]!r} in its structure")
        renamed: dict[str, str] = {}
        self.detach(model)
        try:
            for part in self._parts:
                own = {name: structure.get(name, now) for name, now in part.structure().items()}
                if own != dict(part.structure()):
                    renamed = composed(renamed, self._grown(part, model, own, inputs))
        finally:
            self.attach(model)
        return renamed

    def detach(self, model: PreTrainedModel) -> None:
        """Detach all parts, the last first."""
        for part in reversed(self._parts):
            part.detach(model)

    def attach(self, model: PreTrainedModel) -> None:
        """Attach all parts."""
        for part in self._parts:
            part.attach(model)

    def dial(self, start: Tensors, state: Tensors, factor: float) -> dict[str, Tensor]:
        """Return the global tensors with the dials of all parts turned."""
        dialled: dict[str, Tensor] = {}
        for part in self._parts:
            own = part.state_names
            dialled |= part.dial({name: start[name] for name in own}, {name: state[name] for name in own}, factor)
        return {name: dialled[name] for name in state}

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Have the first part write the model, with the others in it or not as they say."""
        write = partial(self._parts[0].export, model, directory, tokenizer)
        for part in self._parts[1:]:
            write = partial(part.exported_beside, model, write)
        return write()

    def _grown(
        self, part: Adaptation, model: PreTrainedModel, structure: Structure, inputs: Batch | None
    ) -> Mapping[str, str]:
        names = {name: other for other in part.beside for name in (*other.state_names, *other.trainable_names)}
        renamed = part.grow(model, structure, inputs)
        if moved := sorted(renamed.keys() & names.keys()):
            kind = type(names[moved[0]]).__name__
            raise ValueError(f"{kind} trains {moved[0]!r}, which {type(part).__name__} has moved to another name")
        return renamed

    def _share(self) -> None:
        """Pass on to the parts what was set on the stack."""
        for part in self._parts:
            part.seed, part.tokenizer, part.float32 = self.seed, self.tokenizer, self.float32

    def _split(self, task: FitTask, kept: Tensors) -> Iterator[tuple[Adaptation, FitTask, Tensors]]:
        """Yield each part with its task and its kept tensors: without what is another part's.

        What is no part's parameter goes to all: a part may receive tensors under names of its own.
        """
        names = [frozenset((*part.state_names, *part.trainable_names)) for part in self._parts]
        for index, part in enumerate(self._parts):
            others = frozenset[str]().union(*names[:index], *names[index + 1 :])
            trainable = tuple(name for name in task.trainable_names if name not in others)
            own = replace(task, received=_without(task.received, others), trainable_names=trainable)
            yield part, own, _without(kept, others)


def composed(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """Return the renaming, old → new name, that comes of two, one after the other."""
    both = {old: second.get(new, new) for old, new in first.items()}
    taken = {*first.keys(), *first.values()}
    return both | {old: new for old, new in second.items() if old not in taken}


def _joined(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(name for names in groups for name in names)


def _without(tensors: Tensors, names: frozenset[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _sum(losses: Sequence[Callable[[], Tensor]]) -> Tensor:
    first, *others = (loss() for loss in losses)
    for other in others:
        first = first + other
    return first
