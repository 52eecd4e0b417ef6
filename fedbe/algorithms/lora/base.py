"""What the LoRA methods share: adapters of `peft`, ranks per client, what travels, rounds over all factors."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
from fedbe.aggregation import Aggregator, HolderMean, check_update
from fedbe.aggregation.low_rank import cut, pad
from fedbe.algorithms.base import Algorithm
from fedbe.data import Batch
from fedbe.errors import ConfigError, Problem
from fedbe.expansion import ExportReport, head_parameter_names
from fedbe.messages import ClientTask, Update
from fedbe.modeling.tensors import copy_tensors, load_tensors
from fedbe.seeding import derive_seed, generator

Ranks = dict[str, int] | list[int] | None


class LoRA(Algorithm):
    """Train adapters s·BA beside frozen linear layers, and a new task head where there is one; clients are averaged.

    The resident model holds adapters of the largest rank. A client of rank r_k uses the first r_k rows of A and columns
    of B, trains with s = alpha/r_k, and only these travel; its tail is zero in both
    factors, gets no gradient, and is cut.

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

    mixed_ranks: ClassVar[bool] = False
    changes_base: ClassVar[bool] = False

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
        self._adapters: tuple[Adapter, ...] = ()
        self._head: tuple[str, ...] = ()

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The adapted layers; available after `prepare`."""
        if not self._adapters:
            raise RuntimeError("`adapters` are known after `prepare` has been called")
        return self._adapters

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Exact names of the adapted layers."""
        return tuple(adapter.weight.removesuffix(".base_layer.weight") for adapter in self.adapters)

    @property
    def max_rank(self) -> int:
        """The largest rank of a client, that of the resident adapters."""
        if isinstance(self.ranks, dict):
            return max(self.rank, *self.ranks.values(), 0)
        return max(self.ranks) if self.ranks else self.rank

    def rank_of(self, client_id: str) -> int:
        """Return a client's rank r_k."""
        if isinstance(self.ranks, dict):
            return self.ranks.get(client_id, self.rank)
        if self.ranks:
            own: int = self.ranks[derive_seed(0, "rank", client_id) % len(self.ranks)]
            return own
        return self.rank

    def scaling(self, rank: int) -> float:
        """Return s with which adapters of this rank are trained: alpha/r."""
        return self.alpha / rank

    def check(self, depth: int, key: str = "algorithm") -> list[Problem]:
        """Return the mistakes in these arguments."""
        key = f"{key}.init_args"
        given = list(self.ranks.values()) if isinstance(self.ranks, dict) else list(self.ranks or ())
        problems = []
        if self.rank < 1:
            problems.append(Problem(f"{key}.rank", self.rank, "give a rank of at least 1"))
        if self.ranks is not None and not self.mixed_ranks:
            remedy = f"{type(self).__name__} averages factors, which need equal shapes: give one `rank`, or use FLoRA"
            problems.append(Problem(f"{key}.ranks", self.ranks, remedy))
        elif self.ranks is not None and (not given or min(given) < 1):
            problems.append(Problem(f"{key}.ranks", self.ranks, "give at least one rank, each at least 1"))
        if not self.alpha > 0:
            problems.append(Problem(f"{key}.alpha", self.alpha, "give a factor above 0"))
        if not 0 <= self.dropout < 1:
            problems.append(Problem(f"{key}.dropout", self.dropout, "a rate lies in [0, 1)"))
        if self.target_modules == []:
            problems.append(Problem(f"{key}.target_modules", [], "name a layer, or write `all-linear`"))
        if not 0 <= self.first_block < depth:
            problems.append(Problem(f"{key}.first_block", self.first_block, f"give a block from 0 to {depth - 1}"))
        if self.export_as == "adapter" and self.changes_base:
            remedy = f"{type(self).__name__} changes the base weights, which an adapter does not hold: write `merged`"
            problems.append(Problem(f"{key}.export", self.export_as, remedy))
        return problems

    def prepare(self, model: PreTrainedModel, inputs: Batch) -> None:
        """Put in adapters with B = 0 and verify on `inputs` that no output changed, to the bit."""
        if problems := self.check(model.config.get_text_config().num_hidden_layers):
            raise ConfigError(*problems)
        self._head = head_parameter_names(model)
        rank = self.max_rank
        # peft says `int`, and only divides by the rank.
        config = LoraConfig(r=rank, lora_alpha=self.alpha, lora_dropout=self.dropout)  # type: ignore[arg-type]
        self._adapters = inject(model, target_names(model, self.target_modules, self.first_block), config, inputs)
        load_tensors(model, {adapter.a: self.start(model, adapter) for adapter in self._adapters})
        set_scaling(model, self.scaling(rank))

    def start(self, model: PreTrainedModel, adapter: Adapter, round_index: int = 0) -> Tensor:
        """Return the A that adapters start with, drawn from the run's seed and the round."""
        own = generator(self.seed, "adapter", adapter.a, round_index)
        return start_a(model.get_parameter(adapter.a).shape, own)

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Exact names of all factors, A and B of each layer."""
        return tuple(name for adapter in self.adapters for name in (adapter.a, adapter.b))

    @property
    def shares_passes(self) -> bool:
        """Whether clients may train in one pass: all have adapters of one rank and scale."""
        kind = type(self)
        return kind.begin is LoRA.begin and kind.finish is LoRA.finish and self.ranks is None

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of the factors and of a new task head."""
        return (*self.factor_names, *self._head)

    @property
    def dialled_names(self) -> tuple[str, ...]:
        """Exact names of every B, which starts at zero, and of base weights that the method changes; A stays."""
        still = {*(adapter.a for adapter in self.adapters), *self._head}
        return tuple(name for name in self.state_names if name not in still)

    def cut(self, tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """Return tensors with each factor among them cut to `rank`."""
        dims = self._rank_dims()
        return {name: cut(t, rank, dims[name]) if name in dims else t for name, t in tensors.items()}

    def pad(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors with each factor among them filled up with zeros to the resident rank."""
        dims, rank = self._rank_dims(), self.max_rank
        return {name: pad(t, rank, dims[name]) if name in dims else t for name, t in tensors.items()}

    def send(self, state: Mapping[str, Tensor], client_id: str) -> Mapping[str, Tensor]:
        """Return the factors cut to the client's rank, and the head."""
        return self.cut({name: state[name] for name in self.trainable_names}, self.rank_of(client_id))

    def begin(self, model: PreTrainedModel, task: ClientTask) -> None:
        """Load what a client received, zeros above its rank, and scale the adapters for it."""
        rank = received_rank(self.adapters, task.received) or self.rank_of(task.client_id)
        load_tensors(model, self.pad(task.received))
        set_scaling(model, self.scaling(rank))

    def finish(self, model: PreTrainedModel, task: ClientTask) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return the trained factors cut to the client's rank, and the head; scale for the global model again."""
        rank = received_rank(self.adapters, task.received) or self.rank_of(task.client_id)
        if rank != self.max_rank:
            set_scaling(model, self.scaling(self.max_rank))
        return self.cut(copy_tensors(model, task.trainable_names), rank), {}

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the model with its adapters merged in, or the adapters alone."""
        if self.export_as == "adapter":
            return save_adapter(model, self._head, directory, tokenizer)
        return save_merged(model, directory, tokenizer)

    def _rank_dims(self) -> dict[str, int]:
        return {name: dim for adapter in self.adapters for name, dim in ((adapter.a, 0), (adapter.b, 1))}


@dataclass(frozen=True)
class Contribution:
    """One client's part in a round.

    Attributes:
        update: What it sent.
        rank: Its rank.
        share: p_k, its part of the round's samples; the parts sum to 1.
    """

    update: Update
    rank: int
    share: float


class JointLoRA(LoRA):
    """A LoRA method whose server needs the factors of all clients of a round at once."""

    own_average = True

    def aggregator(self, state: Mapping[str, Tensor]) -> Aggregator:
        """Return an aggregator that keeps the round's factors, and averages the head."""
        return FactorRound(self, state)

    @abstractmethod
    def combine(self, state: Mapping[str, Tensor], contributions: Sequence[Contribution]) -> dict[str, Tensor]:
        """Return the tensors of the next state that the factors decide; the others keep what they are."""


class FactorRound:
    """Collects the factors of a round, of any ranks, and takes the sample-weighted mean of all else.

    Args:
        algorithm: What the factors mean.
        state: The global tensors at the start of the round.
    """

    def __init__(self, algorithm: JointLoRA, state: Mapping[str, Tensor]) -> None:
        self._algorithm, self._state = algorithm, state
        self._factors = frozenset(algorithm.factor_names)
        self._rest = HolderMean({name: state[name] for name in algorithm.trainable_names if name not in self._factors})
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        """Take in one update; factors are checked at the resident rank.

        Raises:
            UpdateError: See `check_update`; nothing of the update is kept then.
        """
        padded = self._algorithm.pad(update.tensors)
        check_update(Update(update.client_id, padded, update.samples), self._state)
        rest = {name: tensor for name, tensor in update.tensors.items() if name not in self._factors}
        self._rest.add(Update(update.client_id, rest, update.samples))
        self._updates.append(update)

    def result(self) -> dict[str, Tensor]:
        """Return the next global tensors."""
        rest = self._rest.result()
        if not self._updates:
            return dict(self._state)
        total = sum(update.samples for update in self._updates)
        contributions = [Contribution(u, self._rank(u), u.samples / total) for u in self._updates]
        with torch.no_grad():
            return dict(self._state) | rest | self._algorithm.combine(self._state, contributions)

    def _rank(self, update: Update) -> int:
        rank = received_rank(self._algorithm.adapters, update.tensors)
        return self._algorithm.max_rank if rank is None else rank


def factor_mean(contributions: Sequence[Contribution], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the sample-weighted means of tensors that all contributions hold in one shape."""
    mean = HolderMean({name: contributions[0].update.tensors[name] for name in names})
    for part in contributions:
        own = {name: part.update.tensors[name] for name in names}
        mean.add(Update(part.update.client_id, own, part.update.samples))
    return mean.result()
