"""How well the cost model predicts time and memory of a local step on this machine."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchmetrics.functional import spearman_corrcoef
from transformers import PreTrainedModel

from fedbe.allocation.cost import Calibration, Cost, CostModel, seconds
from fedbe.allocation.profiles import Profile
from fedbe.federation.loop import FederatedLoop
from fedbe.modeling.base_model import forward_options
from fedbe.modeling.freezing import freeze, set_training_modes
from fedbe.seeding import generator

MIB = 2**20
MAX_UNITS = 8
# Of a profile only the FLOP/s matter here, and the calibration replaces them.
_ANY = Profile(1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Measurement:
    """One set of units, predicted and measured.

    Attributes:
        units: Names of the units that are trained.
        cost: The prediction for one step, without optimizer state.
        forward_seconds: Of a forward pass, median.
        backward_seconds: Of a backward pass, median.
        weight_bytes: Of the predicted memory what the model's weights take.
        peak_bytes: Most memory in use at once beside the weights: activations, gradients, temporary tensors.
    """

    units: tuple[str, ...]
    cost: Cost
    forward_seconds: float
    backward_seconds: float
    weight_bytes: int
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """Measured time of a step."""
        return self.forward_seconds + self.backward_seconds

    @property
    def predicted_bytes(self) -> float:
        """Predicted memory beside the weights."""
        return self.cost.memory_bytes - self.weight_bytes

    def predicted_seconds(self, probe: Measurement) -> float:
        """Return the predicted time after calibration by one measured set: a rate for each direction."""
        calibration = Calibration.of(probe.cost, _ANY, probe.forward_seconds, probe.backward_seconds)
        return seconds(self.cost, _ANY, calibration=calibration)


@dataclass(frozen=True)
class CostModelReport:
    """Result of `measure_cost_model`; the last measurement is of the set of all units.

    Attributes:
        measurements: One per set of units.
    """

    measurements: tuple[Measurement, ...]

    @property
    def time_rank_correlation(self) -> float:
        """Spearman's, of predicted FLOPs and measured time."""
        flops = [m.cost.forward_flops + m.cost.backward_flops for m in self.measurements]
        return spearman(flops, [m.seconds for m in self.measurements])

    @property
    def memory_rank_correlation(self) -> float:
        """Spearman's, of predicted and measured memory."""
        return spearman([m.predicted_bytes for m in self.measurements], [m.peak_bytes for m in self.measurements])

    def time_errors(self, probe: Measurement) -> list[float]:
        """Return predicted ÷ measured time − 1 of the sets that are not the probe."""
        return [m.predicted_seconds(probe) / m.seconds - 1 for m in self.measurements if m is not probe]

    def memory_errors(self, probe: Measurement) -> list[float]:
        """Return predicted ÷ measured memory − 1 of the others, given what the probe needs beyond its prediction."""
        beyond = probe.peak_bytes - probe.predicted_bytes
        return [(m.predicted_bytes + beyond) / m.peak_bytes - 1 for m in self.measurements if m is not probe]

    def __str__(self) -> str:
        probe = self.measurements[-1]
        beyond = (probe.peak_bytes - probe.predicted_bytes) / MIB
        lines = [f"{'units':<44}{'predicted':>12}{'measured':>12}{'predicted':>13}{'measured':>13}"]
        lines += [
            f"{' '.join(m.units):<44}{1e3 * m.predicted_seconds(probe):>9.1f} ms{1e3 * m.seconds:>9.1f} ms"
            f"{m.predicted_bytes / MIB:>9.2f} MiB{m.peak_bytes / MIB:>9.2f} MiB"
            for m in self.measurements
        ]
        time_line = self._line("time", self.time_rank_correlation, self.time_errors)
        memory_line = self._line("memory", self.memory_rank_correlation, self.memory_errors)
        return "\n".join([*lines, time_line, f"{memory_line}; temporary tensors of the probe {beyond:.2f} MiB"])

    def _line(self, what: str, correlation: float, errors: Callable[[Measurement], list[float]]) -> str:
        every = [largest(errors(measurement)) for measurement in self.measurements]
        return (
            f"{what}: rank correlation {correlation:.3f}; largest error {every[-1]:.1%} with the last set as the "
            f"probe, {statistics.median(every):.1%} in the median over all probes, {max(every):.1%} with the worst"
        )


def largest(errors: Iterable[float]) -> float:
    """Return the largest absolute value; 0 if there is none."""
    return max(map(abs, errors), default=0.0)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 1 for a single pair."""
    if len(first) < 2:
        return 1.0
    tensors = (torch.tensor(list(values), dtype=torch.float64) for values in (first, second))
    return float(spearman_corrcoef(*tensors))


def measure_cost_model(loop: FederatedLoop, repeats: int) -> CostModelReport:
    """Measure forward and backward passes for sets of the algorithm's units, one set after another, again and again.

    Args:
        loop: Built and not set up; its model is prepared here.
        repeats: Passes of each set that count, after one that does not.

    Raises:
        ExpansionError: The model has no stack of blocks.
    """
    loop.setup()
    model, data, adaptation = loop.model, loop.plan.data, loop.algorithm.adaptation
    batch = next(iter(data.client_dataloader(data.client_ids[0], generator(loop.plan.seed, "bench"))))
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    costs = CostModel.of(model, inputs, 0.0, adaptation.trainable_names)
    units = reached(model, adaptation.units(), inputs)
    sets = subsets(tuple(units))
    names = {chosen: tuple(name for unit in chosen for name in units[unit]) for chosen in sets}
    times: dict[tuple[str, ...], list[tuple[float, float]]] = {chosen: [] for chosen in sets}
    for _ in range(repeats + 1):
        for chosen in sets:
            times[chosen].append(step_seconds(model, names[chosen], inputs))
    measurements = []
    for chosen in sets:
        forward, backward = (statistics.median(taken) for taken in zip(*times[chosen][1:], strict=True))
        cost = costs.cost(names[chosen], len(next(iter(inputs.values()))))
        peak = peak_bytes(model, names[chosen], inputs)
        measurements.append(Measurement(chosen, cost, forward, backward, costs.weight_bytes, peak))
    return CostModelReport(tuple(measurements))


def reached(
    model: PreTrainedModel, units: Mapping[str, tuple[str, ...]], inputs: Mapping[str, Tensor]
) -> dict[str, tuple[str, ...]]:
    """Return the units to which the model's loss gives a gradient; a gate, which has a loss of its own, is none."""
    parameters = dict(model.named_parameters())
    freeze(model, [name for names in units.values() for name in names])
    set_training_modes(model, [name for names in units.values() for name in names])
    model(**inputs, **forward_options(model)).loss.backward()
    found = {u: names for u, names in units.items() if any(parameters[name].grad is not None for name in names)}
    model.zero_grad(set_to_none=True)
    return found


def subsets(units: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return every set of up to three units; of more units the single ones, pairs, and all from each one up."""
    if len(units) <= 3:
        return [chosen for count in range(1, len(units) + 1) for chosen in combinations(units, count)]
    kept = [units[round(i * (len(units) - 1) / (MAX_UNITS - 1))] for i in range(MAX_UNITS)]
    spread = tuple(dict.fromkeys(kept))
    single = [(unit,) for unit in spread]
    ends = [(spread[0], unit) for unit in spread[1:]]
    upper = [units[units.index(unit) :] for unit in reversed(spread)]
    return list(dict.fromkeys([*single, *ends, *upper]))


def step_seconds(model: PreTrainedModel, names: Sequence[str], inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return how long a forward and a backward pass take with these parameters trained."""
    freeze(model, names)
    set_training_modes(model, names)
    options = forward_options(model)
    started = _now(model.device)
    loss = model(**inputs, **options).loss
    forward = _now(model.device)
    loss.backward()
    backward = _now(model.device)
    model.zero_grad(set_to_none=True)
    return forward - started, backward - forward


def peak_bytes(model: PreTrainedModel, names: Sequence[str], inputs: Mapping[str, Tensor]) -> int:
    """Return the most memory that tensors made in one forward and backward pass have in use at once."""
    if model.device.type != "cuda":
        with TensorMemory() as memory:
            step_seconds(model, names, inputs)
        return int(memory.peak)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    step_seconds(model, names, inputs)
    return int(torch.cuda.max_memory_allocated(model.device) - before)


class TensorMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages of all tensors that operations return, from when they are made until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it made."""
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given | self._alive:
                self._note(leaf.untyped_storage())
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        self._alive.add(address)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.current -= size


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
