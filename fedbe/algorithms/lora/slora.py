"""SLoRA: a sparse stage finds where adapters should start, then they are trained as in FedIT."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.adaptation.adapters import Adapters
from fedbe.adaptation.base import Tensors
from fedbe.adaptation.lora_layers import save_merged
from fedbe.aggregation import Aggregator, HolderMean
from fedbe.aggregation.low_rank import leading, live_factors
from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.lora.strategy import FactorStrategy
from fedbe.data import Batch
from fedbe.errors import Facts, Problem
from fedbe.expansion import ExportReport
from fedbe.messages import FitTask, Structure
from fedbe.modeling.tensors import copy_tensors, parameters_of
from fedbe.seeding import generator
from fedbe.traits import Trait, Traits


class SparseAdapters(Adapters):
    """Adapters, and before them a fixed random part of the adapted layers' own weights.

    A client trains the weights in a round whose task names them, with gradients under the mask alone, and only the
    values under it travel; in any other round the weights are the base's and the factors are trained.

    Args:
        rank: Rank of the adapters.
        alpha: An adapter adds alpha/r·BA.
        density: Part of the adapted layers' weights that may be trained.
        options: See `LoRA`.

    Attributes:
        base: The base weights by exact name; available after `prepare`.
        places: The flat indices under the mask of each weight, in rising order; available after `prepare`.
    """

    def __init__(self, rank: int = 8, alpha: float = 16.0, density: float = 0.01, **options: Any) -> None:
        super().__init__(rank, alpha, **options)
        self.density = density
        self.base: Mapping[str, Tensor] = {}
        self.places: Mapping[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in these arguments."""
        problems = super().check(key, facts)
        if not 0 < self.density <= 1:
            problems.append(Problem(f"{key}.density", self.density, "a part lies in (0, 1]"))
        return problems

    def prepare(self, model: PreTrainedModel, inputs: Batch, structure: Structure | None = None) -> None:
        """Put in adapters, keep the base weights, and draw the mask."""
        super().prepare(model, inputs, structure)
        self.base = copy_tensors(model, self.weight_names)
        self.places = {name: self._draw(name, weight) for name, weight in self.base.items()}

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of the adapted layers' weights, the factors, and a new task head."""
        return (*self.weight_names, *super().trainable_names)

    def units(self) -> dict[str, tuple[str, ...]]:
        """Return what either stage trains."""
        return {
            "sparse": (*self.weight_names, *self.head_names),
            "adapters": (*self.factor_names, *self.head_names),
        }

    def begin(self, model: PreTrainedModel, task: FitTask, kept: Tensors) -> None:
        """Start from the base; in a sparse round put in the values under the mask and stop all other gradients."""
        self._remove_hooks()
        received = {**task.received, **self.weights_with(task.received)}
        super().begin(model, replace(task, received=received), kept)
        if not self._is_sparse(task):
            return
        for name, weight in parameters_of(model, self.weight_names).items():
            mask = torch.zeros_like(weight, requires_grad=False)
            mask.view(-1)[self.places[name].to(mask.device)] = 1
            weight.requires_grad_(True)
            self._hooks.append(weight.register_hook(mask.mul))  # type: ignore[no-untyped-call]

    def finish(self, model: PreTrainedModel, task: FitTask, kept: Tensors) -> tuple[Tensors, Tensors]:
        """Return the values under the mask, or the factors; and the head."""
        self._remove_hooks()
        trained, own = super().finish(model, task, kept)
        if not self._is_sparse(task):
            return trained, own
        rest = {name: tensor for name, tensor in trained.items() if name not in self.base}
        return self.values(trained) | rest, own

    def leave(self, model: PreTrainedModel) -> None:
        """Let all gradients through again."""
        super().leave(model)
        self._remove_hooks()

    def values(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return the values under the mask, a vector for each weight, under the name ``weight.values``."""
        return {
            f"{name}.values": tensors[name].flatten()[places.to(tensors[name].device)]
            for name, places in self.places.items()
        }

    def weights_with(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return the base weights, with the `values` under the mask where there are some."""
        weights = {}
        for name, base in self.base.items():
            values = tensors.get(f"{name}.values")
            weights[name] = base if values is None else base.clone()
            if values is not None:
                weights[name].view(-1)[self.places[name].to(base.device)] = values.to(base.device)
        return weights

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the model; adapters alone only where the base is what it was, so not out of a sparse round."""
        unchanged = all(torch.equal(model.get_parameter(name), weight) for name, weight in self.base.items())
        return super().export(model, directory, tokenizer) if unchanged else save_merged(model, directory, tokenizer)

    def _is_sparse(self, task: FitTask) -> bool:
        return self.weight_names[0] in task.trainable_names

    def _draw(self, name: str, weight: Tensor) -> Tensor:
        order = torch.randperm(weight.numel(), generator=generator(self.seed, "sparse mask", name))
        return order[: max(1, round(self.density * weight.numel()))].sort().values

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


class TwoStageStrategy(FactorStrategy):
    """Have clients train the sparse part in the first rounds, then adapters that start from its change.

    Args:
        adapters: Adapters with a sparse part before them.
        sparse_rounds: Rounds of the first stage.
    """

    needs: Traits = FactorStrategy.needs | {Trait.PLAIN_MEAN}

    def __init__(self, adapters: SparseAdapters, sparse_rounds: int = 5) -> None:
        super().__init__(adapters)
        self.sparse_rounds = sparse_rounds
        self._parts = adapters
        self._round = 0

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in these arguments."""
        problems = super().check(key, facts)
        if self.sparse_rounds < 1:
            remedy = "the first stage takes at least one round; FedIT is the method without it"
            problems.append(Problem(f"{key}.sparse_rounds", self.sparse_rounds, remedy))
        return problems

    def allocate(self, cohort: Sequence[str], round_index: int) -> dict[str, tuple[str, ...]]:
        """Return the unit of the round's stage for every client, and all units that are not the adapters'."""
        self._round = round_index
        others = (unit for unit in self.adaptation.units() if unit not in self.adapters.units())
        return dict.fromkeys(cohort, ("sparse" if self._sparse else "adapters", *others))

    def send(self, state: Tensors, client_id: str) -> Tensors:
        """Return the values under the mask, or the factors; and the rest."""
        return self._parts.values(state) | self.others(state) if self._sparse else super().send(state, client_id)

    def aggregator(self, state: Tensors) -> Aggregator:
        """Return the mean of the values under the mask in stage 1, of the factors in stage 2."""
        return _SparseMean(self, state) if self._sparse else HolderMean(state)

    def next_state(self, state: Tensors, mean: Tensors) -> dict[str, Tensor]:
        """Return the state after a round of stage 1, with adapters in place of the change after the last.

        Args:
            state: The state at the start of the round.
            mean: The mean of what the clients sent.
        """
        weights = self._parts.weights_with(mean)
        new = dict(state) | weights | self.others(mean)
        if self._round + 1 < self.sparse_rounds:
            return new
        for adapter in self.adapters.adapters:
            base = self._parts.base[adapter.weight]
            change = weights[adapter.weight].double() - base.double()
            b, a = self.factors(adapter.oriented(change), state[adapter.a])
            new |= {adapter.b: b, adapter.a: a, adapter.weight: base}
        return new

    def factors(self, change: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, A) with s·BA the best approximation of a change [out, in] of the adapters' rank."""
        rank = self.adapters.rank
        u, sigma, vt = torch.linalg.svd(change, full_matrices=False)
        u, sigma, vt = leading(u, sigma, vt, rank)
        root = (sigma / self.adapters.scaling(rank)).sqrt()
        return live_factors(u * root, root[:, None] * vt, sigma, start)

    @property
    def _sparse(self) -> bool:
        return self._round < self.sparse_rounds


class _SparseMean(HolderMean):
    def __init__(self, strategy: TwoStageStrategy, state: Tensors) -> None:
        super().__init__(strategy.send(state, ""))
        self._strategy, self._whole = strategy, state

    def result(self) -> dict[str, Tensor]:
        return self._strategy.next_state(self._whole, super().result())


class SLoRA(Algorithm):
    """Stage 1 tunes a fixed random part of the weights; its change, by SVD, is where stage 2's adapters start.

    Stage 1 trains the target layers' own weights under one mask for all rounds and clients, and only the values
    under it travel; clients still hold gradients of whole weights. Then B = U√(Σ/s) and A = √(Σ/s)Vᵀ of the top r
    singular values of its change, the weights return to the base, and adapters are averaged as in FedIT. What the
    SVD leaves out of stage 1 is dropped. All clients have one rank.

    Args:
        rank: Rank of the adapters.
        alpha: An adapter adds alpha/r·BA.
        sparse_rounds: Rounds of stage 1.
        density: Part of the target layers' weights that stage 1 trains.
        options: See `LoRA`.

    Source: SLoRA (arXiv 2308.06522) for the two stages and the density (C); the even split of Σ and the number of
    rounds are ours (R).
    """

    def __init__(
        self, rank: int = 8, alpha: float = 16.0, sparse_rounds: int = 5, density: float = 0.01, **options: Any
    ) -> None:
        adapters = SparseAdapters(rank, alpha, density, **options)
        super().__init__(adapters, TwoStageStrategy(adapters, sparse_rounds))
