"""Low-rank adapters beside frozen layers: what a LoRA method adds to a model, and what it does where the client is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.adaptation.base import Adaptation, Tensors
from fedbe.adaptation.lora_layers import (
    Adapter,
    Targets,
    inject,
    received_rank,
    save_adapter,
    save_merged,
    set_scaling,
    start_a,
    target_names,
)
from fedbe.aggregation.low_rank import cut, pad
from fedbe.data import Batch
from fedbe.errors import ConfigError, Facts, Problem
from fedbe.expansion import ExportReport, head_parameter_names
from fedbe.messages import FitTask, Structure
from fedbe.modeling.architecture import depth_of
from fedbe.modeling.tensors import load_tensors
from fedbe.seeding import derive_seed, generator
from fedbe.traits import Trait, Traits

Ranks = dict[str, int] | list[int] | None


class Adapters(Adaptation):
    """Adapters s·BA beside frozen linear layers, and a new task head where there is one.

    The resident model holds adapters of the largest rank. A client of rank r_k uses the first r_k rows of A and columns
    of B, trains with s = alpha/r_k, and only these travel; its tail is zero in both factors, gets no gradient, and is
    cut. A client learns its rank from the factors that it receives, and where it receives none from `ranks`.

    A method with another client side is a subclass. One that overrides neither `begin` nor `finish`, and has one rank,
    copies tensors in and out and nothing else, so that several of its clients may train in one pass.

    Args:
        rank: Rank of the adapters, r.
        alpha: An adapter adds alpha/r·BA.
        dropout: Rate of the dropout before A, in training.
        target_modules: ``all-linear`` or ``attention`` layers of the blocks, or the last parts of their names; ``null``
            for what `peft` has for the architecture.
        ranks: Ranks per client, for methods that allow them: by client name (the others have `rank`), or a list from
            which each client has one, by a hash of its name.
        export: ``merged`` into a plain checkpoint, or a `peft` ``adapter``.
        first_block: The lowest block (from 0) whose layers are adapted; 1 leaves the block that a gate sees as it is.

    Source: LoRA (arXiv 2106.09685).
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: Targets = "all-linear",
        ranks: Ranks = None,
        export: Literal["merged", "adapter"] = "merged",
        first_block: int = 0,
    ) -> None:
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.target_modules, self.ranks, self.export_as = target_modules, ranks, export
        self.first_block = first_block
        self.needs = self.needs | ({Trait.UNCHANGED_BASE} if export == "adapter" else frozenset())
        self.offers = self.offers - self._ruled_out()
        self._adapters: tuple[Adapter, ...] = ()
        self._head: tuple[str, ...] = ()

    def _ruled_out(self) -> Traits:
        if self.ranks is not None:
            return frozenset({Trait.EQUAL_SHAPES, Trait.COPIED_IN_AND_OUT})
        kind = type(self)
        plain = kind.begin is Adapters.begin and kind.finish is Adapters.finish
        return frozenset() if plain else frozenset({Trait.COPIED_IN_AND_OUT})

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The adapted layers; available after `prepare`."""
        if not self._adapters:
            raise RuntimeError("`adapters` are known after `prepare` has been called")
        return self._adapters

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Exact names of the adapted layers."""
        return tuple(name.removesuffix(".base_layer.weight") for name in self.weight_names)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Exact names of the adapted layers' own weights."""
        return tuple(adapter.weight for adapter in self.adapters)

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Exact names of all factors, A and B of each layer."""
        return tuple(name for adapter in self.adapters for name in (adapter.a, adapter.b))

    @property
    def head_names(self) -> tuple[str, ...]:
        """Exact names of a new task head's parameters; none where the base model had its head."""
        return self._head

    @property
    def max_rank(self) -> int:
        """The largest rank of a client, that of the resident adapters."""
        if isinstance(self.ranks, dict):
            return max(self.rank, *self.ranks.values(), 0)
        return max(self.ranks) if self.ranks else self.rank

    def rank_of(self, client_id: str) -> int:
        """Return the rank r_k with which a client begins."""
        if isinstance(self.ranks, dict):
            return self.ranks.get(client_id, self.rank)
        if self.ranks:
            own: int = self.ranks[derive_seed(0, "rank", client_id) % len(self.ranks)]
            return own
        return self.rank

    def scaling(self, rank: int) -> float:
        """Return s with which adapters of this rank are trained: alpha/r."""
        return self.alpha / rank

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in these arguments."""
        given = list(self.ranks.values()) if isinstance(self.ranks, dict) else list(self.ranks or ())
        problems = []
        if self.rank < 1:
            problems.append(Problem(f"{key}.rank", self.rank, "give a rank of at least 1"))
        if self.ranks is not None and (not given or min(given) < 1):
            problems.append(Problem(f"{key}.ranks", self.ranks, "give at least one rank, each at least 1"))
        if not self.alpha > 0:
            problems.append(Problem(f"{key}.alpha", self.alpha, "give a factor above 0"))
        if not 0 <= self.dropout < 1:
            problems.append(Problem(f"{key}.dropout", self.dropout, "a rate lies in [0, 1)"))
        if self.target_modules == []:
            problems.append(Problem(f"{key}.target_modules", [], "name a layer, or write `all-linear`"))
        if self.first_block < 0 or 0 < facts.depth <= self.first_block:
            remedy = f"give a block from 0 to {facts.depth - 1}" if facts.depth else "give a block, counted from 0"
            problems.append(Problem(f"{key}.first_block", self.first_block, remedy))
        if Trait.UNCHANGED_BASE in self.needs - self.offers:
            remedy = "the base weights change, which an adapter does not hold: write `merged`"
            problems.append(Problem(f"{key}.export", self.export_as, remedy))
        return problems

    def prepare(self, model: PreTrainedModel, inputs: Batch, structure: Structure | None = None) -> None:
        """Put in adapters with B = 0 and verify on `inputs` that no output changed, to the bit.

        Raises:
            ConfigError: An argument does not fit the model.
            ExpansionError: The model's outputs have changed.
        """
        if problems := self.check(self.key, Facts(depth=depth_of(model))):
            raise ConfigError(*problems)
        self._head = head_parameter_names(model)
        rank = self.max_rank
        # peft says `int`, and only divides by the rank.
        config = LoraConfig(r=rank, lora_alpha=self.alpha, lora_dropout=self.dropout)  # type: ignore[arg-type]
        names = target_names(model, self.target_modules, self.first_block, self.key)
        self._adapters = inject(model, names, config, inputs, self.key)
        self.hold(model)  # before anything is copied or drawn that must be as exact
        load_tensors(model, {adapter.a: self.start(model, adapter) for adapter in self._adapters})
        set_scaling(model, self.layer_names, self.scaling(rank))

    def start(self, model: PreTrainedModel, adapter: Adapter, round_index: int = 0) -> Tensor:
        """Return the A that adapters start with, drawn from the run's seed and the round."""
        own = generator(self.seed, "adapter", adapter.a, round_index)
        return start_a(model.get_parameter(adapter.a).shape, own)

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of the factors and of a new task head."""
        return (*self.factor_names, *self._head)

    @property
    def dialled_names(self) -> tuple[str, ...]:
        """Exact names of every B, which starts at zero, and of base weights that the method changes; A stays."""
        still = {*(adapter.a for adapter in self.adapters), *self._head}
        return tuple(name for name in self.state_names if name not in still)

    def cut(self, tensors: Tensors, rank: int) -> dict[str, Tensor]:
        """Return tensors with each factor among them cut to `rank`."""
        dims = self._rank_dims()
        return {name: cut(t, rank, dims[name]) if name in dims else t for name, t in tensors.items()}

    def pad(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return tensors with each factor among them filled up with zeros to the resident rank."""
        dims, rank = self._rank_dims(), self.max_rank
        return {name: pad(t, rank, dims[name]) if name in dims else t for name, t in tensors.items()}

    def begin(self, model: PreTrainedModel, task: FitTask, kept: Tensors) -> None:
        """Load what a client received, zeros above its rank, and scale the adapters for it."""
        super().begin(model, replace(task, received=self.pad(task.received)), kept)
        set_scaling(model, self.layer_names, self.scaling(self._rank_in(task)))

    def finish(self, model: PreTrainedModel, task: FitTask, kept: Tensors) -> tuple[Tensors, Tensors]:
        """Return the trained factors cut to the client's rank, and the head; scale for the global model again."""
        rank = self._rank_in(task)
        if rank != self.max_rank:
            self.leave(model)
        sent, own = super().finish(model, task, kept)
        return self.cut(sent, rank), own

    def leave(self, model: PreTrainedModel) -> None:
        """Scale for the global model again."""
        set_scaling(model, self.layer_names, self.scaling(self.max_rank))

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the model with its adapters merged in, or the adapters alone."""
        if self.export_as == "adapter":
            return save_adapter(model, self._head, directory, tokenizer)
        return save_merged(model, directory, tokenizer)

    def _rank_in(self, task: FitTask) -> int:
        return received_rank(self.adapters, task.received) or self.rank_of(task.client_id)

    def _rank_dims(self) -> Mapping[str, int]:
        return {name: dim for adapter in self.adapters for name, dim in ((adapter.a, 0), (adapter.b, 1))}
