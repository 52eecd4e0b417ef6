"""The gate: what the other parts add to the model is let through on the clients' domains, token by token."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.adaptation.base import Adaptation
from fedbe.corpora import Corpus
from fedbe.data import Batch
from fedbe.errors import ConfigError, ExpansionError, Facts, Problem
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
from fedbe.messages import FitTask, Structure
from fedbe.modeling.architecture import stack_config_of
from fedbe.modeling.verification import observe
from fedbe.seeding import generator
from fedbe.text.packing import pack
from fedbe.text.reference import batches_of, corpus_text, own_text
from fedbe.traits import Trait, Traits

UNIT = "gate"
SCALING = "gate_features"
"""Name in the structure of the gate's mean and scale of each feature."""


class Gate(Adaptation):
    """A gate on the expanded blocks and the adapters beside it in a `Stack`: open where text is like the clients'.

    One logistic unit tells the clients' tokens from those that the base model itself writes, by the output of a base
    block below every trained one. It is trained beside the other parts, on the same batches: its loss is added, its
    gradients reach nothing else. In training all is open; a model that is evaluated is gated.

    Args:
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

    needs: Traits = frozenset({Trait.UNCHANGED_BASE, Trait.GLOBAL_MODEL})

    def __init__(
        self,
        block: int = 0,
        mode: Literal["soft", "hard"] = "soft",
        sequences: int = 96,
        sequence_length: int = 128,
        openness: float = 0.5,
        weight: float = 1.0,
        corpus: Corpus | None = None,
    ) -> None:
        self.block, self.mode, self.openness, self.weight = block, mode, openness, weight
        self.sequences, self.sequence_length, self.corpus = sequences, sequence_length, corpus
        self._names: tuple[str, ...] = ()
        self._shut_on: Batch = {}
        self._negatives = torch.empty(0)
        self._detached: TokenGate | None = None
        self._scaling: dict[str, list[float]] = {}

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in these arguments."""
        problems = []
        if not 0 <= self.block < facts.depth:
            problems.append(Problem(f"{key}.block", self.block, f"give a block from 0 to {facts.depth - 1}"))
        for name in ("sequences", "sequence_length"):
            if getattr(self, name) < 2:
                problems.append(Problem(f"{key}.{name}", getattr(self, name), "give 2 or more"))
        problems += self.corpus.check(f"{key}.corpus.init_args", facts) if self.corpus else []
        if not 0 < self.openness < 1:
            problems.append(Problem(f"{key}.openness", self.openness, "give a weight above 0 and below 1"))
        if not self.weight > 0:
            problems.append(Problem(f"{key}.weight", self.weight, "give a factor above 0"))
        return problems

    def observe_base(self, model: PreTrainedModel) -> None:
        """Get the text to stay shut on.

        What the base model writes is cut into pieces of many lengths and packed as clients' documents are: uncut, its
        beginnings and the missing begin tokens inside of rows would give it away, whatever it says.
        """
        key, count, length = f"{self.key}.corpus", self.sequences, self.sequence_length
        if self.corpus is not None:
            self._shut_on = corpus_text(model, self.tokenizer, self.corpus, count, length, key)
            return
        chance = generator(self.seed, "gate text")
        written = own_text(model, self.tokenizer, -(-count // 3), 3 * length, chance, key)
        pieces = [piece.tolist() for row in written[:, 1:] for piece in cut_at_random(row, length, chance)]
        tokens = pack(pieces, int(written[0, 0]), min(length, written.shape[1]))[0]
        self._shut_on = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def prepare(self, model: PreTrainedModel, inputs: Batch, structure: Structure | None = None) -> None:
        """Put in the gate, which is half open at first; the parts beside it are prepared by now.

        Raises:
            ConfigError: None of them has anything that a gate can be put on.
            ExpansionError: The gated model does not run, with or without a key-value cache.
        """
        self._install(model, TokenGate(stack_config_of(model).hidden_size, self.block, self.mode))
        parts = ({name: t.to(model.device) for name, t in part.items()} for part in batches_of(self._shut_on, 16))
        self._negatives = torch.cat([gate_features(model, part) for part in parts])
        self._shut_on = {}
        gate = self._installed(model)
        gate.standardise(self._negatives)
        self._scale(gate, structure or {})
        _refuse_failing_passes(model, inputs)

    def structure(self) -> Structure:
        """Return by what features are standardised: the server's, whatever another machine computes."""
        return {SCALING: self._scaling} if self._scaling else {}

    def grow(self, model: PreTrainedModel, structure: Structure, inputs: Batch | None = None) -> Mapping[str, str]:
        """Standardise features as this structure says."""
        gate = self._detached or self._installed(model)
        self._scale(gate, structure)
        return {}

    def _scale(self, gate: TokenGate, structure: Structure) -> None:
        for name, values in structure.get(SCALING, {}).items():
            gate.get_buffer(name).copy_(torch.tensor(values))
        self._scaling = {name: gate.get_buffer(name).tolist() for name in ("mean", "scale")}

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of the gate's parameters."""
        return self._names

    @property
    def dialled_names(self) -> tuple[str, ...]:
        """None: the gate stays as it is."""
        return ()

    def units(self) -> dict[str, tuple[str, ...]]:
        """Return the gate."""
        return {UNIT: self._names}

    def added_loss(self, model: PreTrainedModel, task: FitTask) -> Callable[[], Tensor] | None:
        """Return the gate's loss on the batch that it has just seen."""
        chance = generator(self.seed, "gate negatives", *task.purpose)

        def loss() -> Tensor:
            gate = getattr(model.base_model, MODULE_NAME)  # each time: in one pass it has each client's tensors
            # A step sees as many of the base's own tokens as of the client's.
            positive = gate.features
            rows = torch.randint(len(self._negatives), (len(positive),), generator=chance).to(positive.device)
            return self.weight * gate_loss(gate, positive, self._negatives[rows], self.openness)

        return loss

    def detach(self, model: PreTrainedModel) -> None:
        """Take the gate out: all is open."""
        self._detached = remove_gate(model)

    def attach(self, model: PreTrainedModel) -> None:
        """Put the gate back, on all that the parts beside it have added by now."""
        if self._detached is None:
            raise RuntimeError("`attach` puts back what `detach` has taken out")
        self._install(model, self._detached)
        self._detached = None

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Refuse: the part that the gate is on writes the model.

        Raises:
            ExpansionError: Always.
        """
        raise ExpansionError("a gate alone is no model: the first part of the stack that it is in is exported")

    def exported_beside(self, model: PreTrainedModel, write: Callable[[], ExportReport]) -> ExportReport:
        """Have it written: expanded blocks with the gate, and a model with adapters open to all tokens."""
        if self._gated_blocks:
            return write()
        self.detach(model)
        try:
            report = write()
        finally:
            self.attach(model)
        return replace(report, reason=f"{report.reason} The gate is not in it: the adapters are open to all tokens.")

    @property
    def _gated_blocks(self) -> bool:
        return any(part.expansion is not None for part in self.beside)

    def _install(self, model: PreTrainedModel, gate: TokenGate) -> None:
        expansion = next((part.expansion for part in self.beside if part.expansion is not None), None)
        layers = [name for part in self.beside for name in part.layer_names]
        if expansion is None and not layers:
            remedy = "none of them inserts blocks or puts adapters on layers, so that there is nothing to gate"
            kinds = [type(part).__name__ for part in self.beside]
            raise ConfigError(Problem(f"{self.key}.algorithm", kinds, remedy))
        install_gate(model, expansion, gate)
        if layers:
            gate_adapters(model, gate, layers)
        self._names = gate_parameter_names(model)

    @staticmethod
    def _installed(model: PreTrainedModel) -> TokenGate:
        gate = find_gate(model)
        if gate is None:
            raise RuntimeError("the gate is there after `prepare` has been called")
        return gate


def _refuse_failing_passes(model: PreTrainedModel, inputs: Batch) -> None:
    """Check that a gated model runs as a whole and with a cache, before it is trained.

    Raises:
        ExpansionError: If it does not.
    """
    try:
        observe(model, [inputs])
    # An unknown architecture may fail in any way.
    except Exception as error:
        name, reason = type(model).__name__, f"{type(error).__name__}: {error}"
        raise ExpansionError(f"{name} cannot be gated by token: train its blocks without a gate ({reason}).") from error


def cut_at_random(row: Tensor, longest: int, chance: torch.Generator) -> list[Tensor]:
    """Return a row of tokens in pieces of 1 to `longest` tokens, every length as likely as another."""
    lengths, left = [], len(row)
    while left > 0:
        lengths.append(min(left, int(torch.randint(1, longest + 1, (), generator=chance))))
        left -= lengths[-1]
    return list(torch.split(row, lengths))
