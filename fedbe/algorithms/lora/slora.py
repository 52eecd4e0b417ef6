"""SLoRA: a sparse stage finds where adapters should start, then they are trained as in FedIT."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.adaptation.lora_layers import save_merged
from fedbe.aggregation import Aggregator, HolderMean
from fedbe.aggregation.low_rank import leading, live_factors
from fedbe.algorithms.lora.base import LoRA
from fedbe.data import Batch
from fedbe.errors import Problem
from fedbe.expansion import ExportReport
from fedbe.messages import ClientTask
from fedbe.modeling.tensors import copy_tensors, load_tensors
from fedbe.seeding import generator


class SLoRA(LoRA):
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

    own_average = True

    def __init__(
        self, rank: int = 8, alpha: float = 16.0, sparse_rounds: int = 5, density: float = 0.01, **options: Any
    ) -> None:
        super().__init__(rank, alpha, **options)
        self.sparse_rounds, self.density = sparse_rounds, density
        self.base: dict[str, Tensor] = {}
        self._places: dict[str, Tensor] = {}
        self._round = 0
        self._hooks: list[RemovableHandle] = []

    def check(self, depth: int, key: str = "algorithm") -> list[Problem]:
        """Return the mistakes in these arguments."""
        problems = super().check(depth, key)
        if self.sparse_rounds < 1:
            remedy = "the first stage takes at least one round; FedIT is the method without it"
            problems.append(Problem(f"{key}.init_args.sparse_rounds", self.sparse_rounds, remedy))
        if not 0 < self.density <= 1:
            problems.append(Problem(f"{key}.init_args.density", self.density, "a part lies in (0, 1]"))
        return problems

    def prepare(self, model: PreTrainedModel, inputs: Batch) -> None:
        """Put in adapters, keep the base weights of stage 1, and draw its mask."""
        super().prepare(model, inputs)
        self.base = copy_tensors(model, self._weights)
        self._places = {name: self._draw(name, weight) for name, weight in self.base.items()}

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of stage 1's weights, the factors, and a new task head."""
        return (*self._weights, *super().trainable_names)

    def units(self) -> dict[str, tuple[str, ...]]:
        """Return what either stage trains."""
        return {
            "sparse": (*self._weights, *self._head),
            "adapters": (*self.factor_names, *self._head),
        }

    def allocate(self, cohort: Sequence[str], round_index: int) -> dict[str, tuple[str, ...]]:
        """Return the unit of the round's stage for every client."""
        self._round = round_index
        return dict.fromkeys(cohort, ("sparse" if self._sparse else "adapters",))

    def send(self, state: Mapping[str, Tensor], client_id: str) -> Mapping[str, Tensor]:
        """Return the values under the mask, or the factors; and the head."""
        if not self._sparse:
            return {name: state[name] for name in self.units()["adapters"]}
        return self._values(state) | {name: state[name] for name in self._head}

    def begin(self, model: PreTrainedModel, task: ClientTask) -> None:
        """Start from the base; in stage 1 put in the values under the mask and stop all other gradients."""
        self._remove_hooks()
        own = {name: tensor for name, tensor in task.received.items() if not name.endswith(".values")}
        load_tensors(model, {**self._weights_with(task.received), **own})
        if self._weights[0] not in task.trainable_names:
            return
        for name, places in self._places.items():
            weight = model.get_parameter(name).requires_grad_(True)
            mask = torch.zeros_like(weight, requires_grad=False)
            mask.view(-1)[places.to(mask.device)] = 1
            self._hooks.append(weight.register_hook(mask.mul))  # type: ignore[no-untyped-call]

    def finish(self, model: PreTrainedModel, task: ClientTask) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return the values under the mask, or the factors; and the head."""
        self._remove_hooks()
        trained = copy_tensors(model, task.trainable_names)
        if self._weights[0] not in trained:
            return trained, {}
        return self._values(trained) | {name: trained[name] for name in self._head}, {}

    def aggregator(self, state: Mapping[str, Tensor]) -> Aggregator:
        """Return the mean of the values under the mask in stage 1, of the factors in stage 2."""
        return _SparseMean(self, state) if self._sparse else HolderMean(state)

    def next_state(self, state: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state after a round of stage 1, with adapters in place of the change after the last.

        Args:
            state: The state at the start of the round.
            mean: The mean of what the clients sent.
        """
        weights = self._weights_with(mean)
        new = dict(state) | weights | {name: mean[name] for name in self._head}
        if self._round + 1 < self.sparse_rounds:
            return new
        for adapter in self.adapters:
            change = weights[adapter.weight].double() - self.base[adapter.weight].double()
            b, a = self.factors(adapter.oriented(change), state[adapter.a])
            new |= {adapter.b: b, adapter.a: a, adapter.weight: self.base[adapter.weight]}
        return new

    def factors(self, change: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, A) with s·BA the best approximation of a change [out, in] of the adapters' rank."""
        u, sigma, vt = torch.linalg.svd(change, full_matrices=False)
        u, sigma, vt = leading(u, sigma, vt, self.rank)
        root = (sigma / self.scaling(self.rank)).sqrt()
        return live_factors(u * root, root[:, None] * vt, sigma, start)

    def export(
        self, model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None
    ) -> ExportReport:
        """Write the model; adapters alone only where the base is what it was, so not out of stage 1."""
        unchanged = all(torch.equal(model.get_parameter(name), weight) for name, weight in self.base.items())
        return super().export(model, directory, tokenizer) if unchanged else save_merged(model, directory, tokenizer)

    @property
    def _sparse(self) -> bool:
        return self._round < self.sparse_rounds

    @property
    def _weights(self) -> tuple[str, ...]:
        return tuple(adapter.weight for adapter in self.adapters)

    def _draw(self, name: str, weight: Tensor) -> Tensor:
        order = torch.randperm(weight.numel(), generator=generator(self.seed, "sparse mask", name))
        return order[: max(1, round(self.density * weight.numel()))].sort().values

    def _values(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values under the mask, a vector for each weight."""
        return {
            f"{name}.values": tensors[name].flatten()[places.to(tensors[name].device)]
            for name, places in self._places.items()
        }

    def _weights_with(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the base weights, with the values under the mask where there are some."""
        weights = {}
        for name, base in self.base.items():
            values = tensors.get(f"{name}.values")
            weights[name] = base if values is None else base.clone()
            if values is not None:
                weights[name].view(-1)[self._places[name].to(base.device)] = values.to(base.device)
        return weights

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


class _SparseMean(HolderMean):
    def __init__(self, algorithm: SLoRA, state: Mapping[str, Tensor]) -> None:
        super().__init__(algorithm.send(state, ""))
        self._algorithm, self._whole = algorithm, state

    def result(self) -> dict[str, Tensor]:
        return self._algorithm.next_state(self._whole, super().result())
