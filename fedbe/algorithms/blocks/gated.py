"""The gate: what another algorithm adds to the model is let through on the clients' domains, token by token."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.aggregation import Aggregator, HolderMean
from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.blocks.block_expansion import BlockExpansion
from fedbe.algorithms.controls.wrapper import Wrapper
from fedbe.algorithms.lora.base import LoRA
from fedbe.corpora import Corpus
from fedbe.data import Batch
from fedbe.errors import Problem
from fedbe.expansion import ExportReport
from fedbe.expansion.gate import (
    MODULE_NAME,
    find_gate,
    gate_adapters,
    gate_features,
    gate_loss,
    gate_parameter_names,
    install_gate,
    remove_gate,
)
from fedbe.expansion.token_gate import TokenGate
from fedbe.messages import ClientTask, Update
from fedbe.modeling.tensors import copy_tensors, load_tensors
from fedbe.seeding import generator
from fedbe.text.packing import pack
from fedbe.text.reference import batches_of, corpus_text, own_text

UNIT = "gate"


class Gated(Wrapper):
    """Put a gate on expanded blocks, or on adapters: open where text is like the clients', shut elsewhere.

    One logistic unit tells the clients' tokens from those that the base model itself writes, by the output of a base
    block below all that is trained. It is trained beside the other algorithm's parameters, on the same batches: its
    loss is added, its gradients reach nothing else. In training all is open; a model that is evaluated is gated.

    Args:
        algorithm: What is trained: `BlockExpansion` or a kind of it, or a LoRA method that leaves the base weights be.
        block: The base block (from 0) whose output the gate sees.
        mode: ``soft``: what is added is multiplied by the gate's probability; ``hard``: by 0 or 1.
        sequences: About how many sequences the base model writes for the gate to stay shut on.
        sequence_length: Tokens of each.
        openness: Weight of the clients' text in the gate's loss, in (0, 1); the rest is that of the text to stay shut
            on. Above ½ the gate opens when in doubt: nothing learned is held back, and more is forgotten.
        weight: Factor on the gate's loss; with Adam it hardly matters.
        corpus: Other text to stay shut on (its training split); a model that cannot write needs one.

    Source: ours.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        block: int = 0,
        mode: Literal["soft", "hard"] = "soft",
        sequences: int = 96,
        sequence_length: int = 128,
        openness: float = 0.5,
        weight: float = 1.0,
        corpus: Corpus | None = None,
    ) -> None:
        super().__init__(algorithm)
        self.corpus = corpus
        self.block, self.mode, self.openness, self.weight = block, mode, openness, weight
        self.sequences, self.sequence_length = sequences, sequence_length
        self._names: tuple[str, ...] = ()
        self._model: PreTrainedModel | None = None

    def check(self, depth: int, key: str = "algorithm") -> list[Problem]:
        """Return the mistakes in these arguments, and those of the other algorithm."""
        problems = super().check(depth, key)
        inner, key = self.algorithm, f"{key}.init_args"
        if not isinstance(inner, BlockExpansion | LoRA) or getattr(inner, "changes_base", False) or inner.personalised:
            remedy = "a gate goes on expanded blocks or on adapters of one global model beside an unchanged base"
            problems.append(Problem(f"{key}.algorithm", type(inner).__name__, remedy))
        if not 0 <= self.block < depth:
            problems.append(Problem(f"{key}.block", self.block, f"give a block from 0 to {depth - 1}"))
        for name in ("sequences", "sequence_length"):
            if getattr(self, name) < 2:
                problems.append(Problem(f"{key}.{name}", getattr(self, name), "give 2 or more"))
        problems += self.corpus.check(f"{key}.corpus") if self.corpus else []
        if not 0 < self.openness < 1:
            problems.append(Problem(f"{key}.openness", self.openness, "give a weight above 0 and below 1"))
        if not self.weight > 0:
            problems.append(Problem(f"{key}.weight", self.weight, "give a factor above 0"))
        return problems

    def prepare(self, model: PreTrainedModel, inputs: Batch) -> None:
        """Let the base model write, prepare the other algorithm, and put in the gate, which is half open at first."""
        text = self._shut_text(model)
        super().prepare(model, inputs)
        self._model = model
        self._install(model, TokenGate(model.config.get_text_config().hidden_size, self.block, self.mode))
        parts = ({name: t.to(model.device) for name, t in part.items()} for part in batches_of(text, 16))
        self._negatives = torch.cat([gate_features(model, part) for part in parts])
        self._gate(model).standardise(self._negatives)

    @property
    def shares_passes(self) -> bool:
        """Whether clients may train in one pass: where they may without the gate."""
        kind = type(self)
        return kind.begin is Gated.begin and kind.finish is Gated.finish and self.algorithm.shares_passes

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of the other algorithm's parameters, and of the gate's."""
        return (*self.algorithm.trainable_names, *self._names)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Exact names of the other algorithm's global state, and of the gate."""
        return (*self.algorithm.state_names, *self._names)

    def units(self) -> dict[str, tuple[str, ...]]:
        """Return the other algorithm's units, and the gate."""
        return {**self.algorithm.units(), UNIT: self._names}

    def allocate(self, cohort: Sequence[str], round_index: int) -> dict[str, tuple[str, ...]]:
        """Return the other algorithm's units; whoever trains any trains the gate."""
        allocation = self.algorithm.allocate(cohort, round_index)
        return {client: (*units, UNIT) if units else () for client, units in allocation.items()}

    def send(self, state: Mapping[str, Tensor], client_id: str) -> Mapping[str, Tensor]:
        """Return what a client downloads, the gate with it."""
        return {**self.algorithm.send(self._others(state), client_id), **self._own(state)}

    def dial(self, start: Mapping[str, Tensor], state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """Turn the other algorithm's dial; the gate stays as it is."""
        return {**self.algorithm.dial(self._others(start), self._others(state), factor), **self._own(state)}

    def begin(self, model: PreTrainedModel, task: ClientTask) -> None:
        """Load what a client received, the gate with it."""
        trainable = self._without(task.trainable_names)
        super().begin(model, replace(task, received=self._others(task.received), trainable_names=trainable))
        load_tensors(model, self._own(task.received))

    def added_loss(self, model: PreTrainedModel, task: ClientTask) -> Callable[[], Tensor]:
        """Return the gate's loss on the batch that it has just seen."""
        chance = generator(self.seed, "gate negatives", *task.purpose)

        def loss() -> Tensor:
            gate = getattr(model.base_model, MODULE_NAME)  # anew each time: in one pass it has each client's tensors
            # A step sees as many of the base's own tokens as of the client's.
            positive = gate.features
            rows = torch.randint(len(self._negatives), (len(positive),), generator=chance).to(positive.device)
            return self.weight * gate_loss(gate, positive, self._negatives[rows], self.openness)

        return loss

    def finish(self, model: PreTrainedModel, task: ClientTask) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return what the other algorithm sends, and the gate."""
        sent, kept = self.algorithm.finish(model, replace(task, trainable_names=self._without(task.trainable_names)))
        return {**sent, **copy_tensors(model, self._names)}, kept

    def aggregator(self, state: Mapping[str, Tensor]) -> Aggregator:
        """Return the other algorithm's aggregator, with the mean of the clients' gates."""
        return _Split(self.algorithm.aggregator(self._others(state)), HolderMean(self._own(state)), self._names)

    def grow(self, model: PreTrainedModel, inputs: Batch, record: Mapping[str, Any]) -> Mapping[str, str] | None:
        """Let the other algorithm change the structure while the gate is out."""
        gate = remove_gate(model)
        renamed = self.algorithm.grow(model, inputs, record)
        self._install(model, gate)
        return renamed

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the model; plain it is open to all tokens, and beside expanded blocks the gate is saved."""
        if isinstance(self.algorithm, BlockExpansion):
            return super().export(model, directory, tokenizer)
        gate = remove_gate(model)
        report = super().export(model, directory, tokenizer)
        self._install(model, gate)
        return replace(report, reason=f"{report.reason} The gate is not in it: the adapters are open to all tokens.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; the other algorithm may insert blocks, while the gate is out."""
        if self._model is None:
            raise RuntimeError("the model is known after `prepare` has been called")
        gate = remove_gate(self._model)
        super().load_state_dict(state)
        self._install(self._model, gate)

    def _install(self, model: PreTrainedModel, gate: TokenGate) -> None:
        inner = self.algorithm
        install_gate(model, inner.expansion if isinstance(inner, BlockExpansion) else None, gate)
        if isinstance(inner, LoRA):
            gate_adapters(model, gate, inner.layer_names)
        self._names = gate_parameter_names(model)

    def _shut_text(self, model: PreTrainedModel) -> Batch:
        """Return the text to stay shut on.

        What the base model writes is cut into pieces of many lengths and packed as clients' documents are: uncut, its
        beginnings and the missing begin tokens inside of rows would give it away, whatever it says.
        """
        key, count, length = "algorithm.init_args.corpus", self.sequences, self.sequence_length
        if self.corpus is not None:
            return corpus_text(model, self.tokenizer, self.corpus, count, length, key)
        chance = generator(self.seed, "gate text")
        written = own_text(model, self.tokenizer, -(-count // 3), 3 * length, chance, key)
        pieces = [piece.tolist() for row in written[:, 1:] for piece in cut_at_random(row, length, chance)]
        tokens = pack(pieces, int(written[0, 0]), min(length, written.shape[1]))[0]
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def _gate(self, model: PreTrainedModel) -> TokenGate:
        gate = find_gate(model)
        if gate is None:
            raise RuntimeError("the gate is there after `prepare` has been called")
        return gate

    def _own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensors[name] for name in self._names if name in tensors}

    def _others(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if name not in self._names}

    def _without(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name not in self._names)


class _Split:
    """Hands the gate's tensors of each update to one aggregator and all others to another."""

    def __init__(self, others: Aggregator, gate: HolderMean, names: Iterable[str]) -> None:
        self._others, self._gate, self._names = others, gate, frozenset(names)

    def add(self, update: Update) -> None:
        own = {name: tensor for name, tensor in update.tensors.items() if name in self._names}
        others = {name: tensor for name, tensor in update.tensors.items() if name not in self._names}
        self._others.add(replace(update, tensors=others))
        self._gate.add(replace(update, tensors=own))

    def result(self) -> dict[str, Tensor]:
        return {**self._others.result(), **self._gate.result()}


def cut_at_random(row: Tensor, longest: int, chance: torch.Generator) -> list[Tensor]:
    """Return a row of tokens in pieces of 1 to `longest` tokens, every length as likely as another."""
    lengths, left = [], len(row)
    while left > 0:
        lengths.append(min(left, int(torch.randint(1, longest + 1, (), generator=chance))))
        left -= lengths[-1]
    return list(torch.split(row, lengths))
