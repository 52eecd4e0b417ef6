"""What training a set of parameters costs a client: FLOPs, memory and, on its device, seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedbe.allocation.counting import Counts, Part, count
from fedbe.allocation.passes import storages
from fedbe.allocation.profiles import Profile

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Cost:
    """What a client's local steps cost.

    Attributes:
        forward_flops: FLOPs of all forward passes.
        backward_flops: FLOPs of all backward passes.
        memory_bytes: Weights, gradients and optimizer state of the trainable parameters, and the saved activations of
            one step. What a kernel needs for a moment comes on top.
        steps: Number of local steps.
    """

    forward_flops: float
    backward_flops: float
    memory_bytes: float
    steps: int = 1


@dataclass(frozen=True)
class Calibration:
    """How a device differs from its profile's FLOP/s.

    Attributes:
        forward: Factor on the time of forward passes.
        backward: Factor on the time of backward passes.
        step_seconds: Seconds of each step that no FLOP explains.
    """

    forward: float = 1.0
    backward: float = 1.0
    step_seconds: float = 0.0

    @classmethod
    def of(
        cls, cost: Cost, profile: Profile, forward_seconds: float, backward_seconds: float, other_seconds: float = 0.0
    ) -> Calibration:
        """Return the calibration under which `cost` takes the measured seconds; it must have trained something."""
        return cls(
            forward_seconds * profile.flops_per_second / cost.forward_flops,
            backward_seconds * profile.flops_per_second / cost.backward_flops,
            other_seconds / cost.steps,
        )


def seconds(
    cost: Cost, profile: Profile, bytes_down: float = 0.0, bytes_up: float = 0.0, calibration: Calibration | None = None
) -> float:
    """Return how long a client takes to download, train and upload, one after the other.

    Source: ours: FLOPs ÷ FLOP/s + bytes ÷ bandwidth, both ways.
    """
    factors = calibration or Calibration()
    flops = factors.forward * cost.forward_flops + factors.backward * cost.backward_flops
    training = flops / profile.flops_per_second + factors.step_seconds * cost.steps
    download = bytes_down / profile.download_bytes_per_second
    return training + download + bytes_up / profile.upload_bytes_per_second


@dataclass(frozen=True)
class UnitCosts:
    """The cost of units of allocation in a form that adds up: cost(S) = low[lowest of S] + Σ train[j] over j in S.

    All of one local step. Exact where no two units train parameters of the same block, else an upper bound.

    Attributes:
        names: The units, the lowest first.
        parts: Where each unit begins: 0 below the blocks, then the number of the block from 1, then what lies above.
        forward_flops: Of a step, whatever trains.
        backward_low: FLOPs of a backward pass down to each unit, without the gradients of any weights, [units].
        backward_train: FLOPs of the gradients of each unit's weights, [units].
        memory_low: Bytes of weights and of activations down to each unit, [units].
        memory_train: Bytes of gradients, optimizer state and further activations of each unit, [units].
        parameter_bytes: Bytes of each unit's parameters: what a client that trains it uploads, [units].
    """

    names: tuple[str, ...]
    parts: tuple[int, ...]
    forward_flops: float
    backward_low: Numbers
    backward_train: Numbers
    memory_low: Numbers
    memory_train: Numbers
    parameter_bytes: Numbers

    def seconds(
        self, profile: Profile, steps: int, bytes_down: float = 0.0, calibration: Calibration | None = None
    ) -> tuple[Numbers, Numbers]:
        """Return (low, train), the seconds of a round in the same additive form, the upload in `train`.

        Args:
            profile: The client's device.
            steps: Local steps.
            bytes_down: What the client downloads, whatever it trains.
            calibration: How the device differs from its profile.
        """
        factors = calibration or Calibration()
        per_flop = steps / profile.flops_per_second
        fixed = factors.forward * self.forward_flops * per_flop + factors.step_seconds * steps
        fixed += bytes_down / profile.download_bytes_per_second
        low = fixed + factors.backward * self.backward_low * per_flop
        train = factors.backward * self.backward_train * per_flop
        return low, train + self.parameter_bytes / profile.upload_bytes_per_second


@dataclass(frozen=True)
class CostModel:
    """Costs of training on one model, counted once and asked for as often as needed.

    Adding a parameter never lowers any cost. The gradients of single parameters are counted one by one; activations
    are counted by block: a block that trains in part saves as much as one of which everything trains that may.

    Attributes:
        counts: What one batch costs, part by part.
        samples: Samples of that batch; costs are in proportion to them.
        places: The parts in which a parameter acts, by its name: a tied embedding acts below and above the blocks.
        parameter_bytes: Size of each parameter that may train.
        trained_bytes: Size of its gradient and its optimizer state.
        weight_bytes: All parameters and buffers of the model, trained or not.

    Source: ours; §2.4 of the reconstruction of FedBE (arXiv 2506.05977) **R**.
    """

    counts: Counts
    samples: int
    places: Mapping[str, tuple[int, ...]]
    parameter_bytes: Mapping[str, int]
    trained_bytes: Mapping[str, float]
    weight_bytes: int

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | float,
        names: Iterable[str] | None = None,
    ) -> CostModel:
        """Count on a model as it is: expanded, with adapters, or neither.

        Args:
            model: The resident model; it is left as it was.
            inputs: A batch like those of a local step, on the model's device, ``labels`` among them.
            optimizer: Builds the clients' optimizer; or bytes of its state per parameter.
            names: Exact names of the parameters that may ever train; all if left out.

        Raises:
            ExpansionError: The model has no stack of like blocks, or a name is no parameter of it.
        """
        named = dict(model.named_parameters())
        chosen = tuple(named if names is None else dict.fromkeys(names))
        counts = count(model, inputs, chosen)
        parts = tuple(_monotone(part) for part in counts.parts)
        places = {
            # What no gradient reaches costs memory only, wherever it is.
            name: tuple(i for i, part in enumerate(parts) if name in part.weight_flops) or (len(parts) - 1,)
            for name in chosen
        }
        dtypes = {named[name].dtype for name in chosen}
        state = {dtype: state_bytes_per_parameter(optimizer, dtype) for dtype in dtypes}
        return cls(
            replace(counts, parts=parts),
            len(next(iter(inputs.values()))),
            places,
            {name: named[name].numel() * named[name].element_size() for name in chosen},
            {name: named[name].numel() * (named[name].element_size() + state[named[name].dtype]) for name in chosen},
            sum(storages([*model.parameters(), *model.buffers()]).values()),
        )

    def cost(self, trainable_names: Iterable[str], samples_per_step: float, steps: int = 1) -> Cost:
        """Return what local steps cost a client that trains these parameters; only forward passes if there are none.

        Args:
            trainable_names: Exact names among those that may train.
            samples_per_step: Samples of a local step.
            steps: Local steps.

        Raises:
            KeyError: A name is not among those that may train.
        """
        names = set(trainable_names)
        trained = {part for name in names for part in self.places[name]}
        scale = samples_per_step / self.samples
        backward, activations = 0.0, 0.0
        if trained:
            low = min(trained)
            backward = self._backward_low[low] + sum(self._weight_flops[name] for name in names)
            activations = self._activations_low[low] + sum(self._activations_train[part] for part in trained)
        state = sum(self.trained_bytes[name] for name in names)
        memory = self.weight_bytes + state + scale * (self.counts.shared_bytes + activations)
        return Cost(steps * scale * self._forward_flops, steps * scale * backward, memory, steps)

    def units(self, units: Mapping[str, Sequence[str]], samples_per_step: float) -> UnitCosts:
        """Return the costs of one step in additive form.

        Args:
            units: Parameter names of each unit of allocation, as `Algorithm.units` gives them; none may be empty.
            samples_per_step: Samples of a local step.

        Raises:
            KeyError: A name is not among those that may train.
        """
        begins = {unit: min(part for name in names for part in self.places[name]) for unit, names in units.items()}
        order = sorted(units, key=lambda unit: begins[unit])
        scale = samples_per_step / self.samples
        further = [{part for name in units[unit] for part in self.places[name]} for unit in order]
        low = [self._activations_low[begins[unit]] + self.counts.shared_bytes for unit in order]
        train = [sum(self._activations_train[part] for part in parts) for parts in further]
        return UnitCosts(
            tuple(order),
            tuple(begins[unit] for unit in order),
            scale * self._forward_flops,
            scale * np.array([self._backward_low[begins[unit]] for unit in order], dtype=float),
            scale * self._sums(units, order, self._weight_flops),
            self.weight_bytes + scale * np.array(low, dtype=float),
            self._sums(units, order, self.trained_bytes) + scale * np.array(train, dtype=float),
            self._sums(units, order, self.parameter_bytes),
        )

    def _sums(self, units: Mapping[str, Sequence[str]], order: Sequence[str], each: Mapping[str, float]) -> Numbers:
        return np.array([sum(each[name] for name in units[unit]) for unit in order], dtype=float)

    @cached_property
    def _forward_flops(self) -> int:
        return sum(part.forward_flops for part in self.counts.parts)

    @cached_property
    def _weight_flops(self) -> dict[str, int]:
        return {
            name: sum(self.counts.parts[part].weight_flops.get(name, 0) for part in parts)
            for name, parts in self.places.items()
        }

    @cached_property
    def _backward_low(self) -> list[int]:
        """FLOPs of a backward pass that ends in each part, without the gradients of weights."""
        above = _sums_above([part.input_flops for part in self.counts.parts])
        return [part.start_flops + passed for part, passed in zip(self.counts.parts, above, strict=True)]

    @cached_property
    def _activations_low(self) -> list[int]:
        """Bytes saved down to each part where it is the lowest that trains, less what `_activations_train` adds."""
        above = _sums_above([part.passing_bytes for part in self.counts.parts])
        saved = zip(self.counts.parts, self._activations_train, above, strict=True)
        return [part.start_bytes - further + passed for part, further, passed in saved]

    @cached_property
    def _activations_train(self) -> list[int]:
        return [part.training_bytes - part.passing_bytes for part in self.counts.parts]


def state_bytes_per_parameter(
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | float, dtype: torch.dtype = torch.float32
) -> float:
    """Return the bytes of optimizer state per trained parameter, measured on one step of a 16 by 16 matrix.

    Args:
        optimizer: Builds an optimizer; or the bytes, which are returned as they are.
        dtype: Type of the parameters. Adam keeps 8 bytes for one of float32, plain SGD none.
    """
    if not callable(optimizer):
        return float(optimizer)
    parameter = nn.Parameter(torch.zeros(16, 16, dtype=dtype))
    built = optimizer([parameter])
    parameter.grad = torch.ones_like(parameter)
    built.step()
    kept = [value for value in built.state[parameter].values() if isinstance(value, Tensor) and value.numel() > 1]
    return sum(value.numel() * value.element_size() for value in kept) / parameter.numel()


def _sums_above(values: Sequence[int]) -> list[int]:
    """Return for each index the sum of the values behind it."""
    return [sum(values[index + 1 :]) for index in range(len(values))]


def _monotone(part: Part) -> Part:
    """Return a part in which training saves no less than not training; dropout may choose other kernels."""
    most = max(part.training_bytes, part.passing_bytes, part.start_bytes)
    return replace(part, training_bytes=most)
