"""What the parts of a model cost, counted on real forward and backward passes: FLOPs and saved activations."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedbe.allocation.passes import BlockRun, Call, Graph, OutsideRun, flop_counter, observe, storages
from fedbe.modeling.architecture import find_blocks
from fedbe.modeling.freezing import freeze, set_training_modes
from fedbe.modeling.passes import freezing_kept, modes_kept
from fedbe.seeding import isolated_rng


@dataclass(frozen=True)
class Part:
    """What one part of a model costs for one batch: what lies below the blocks, a block, or what lies above them.

    Attributes:
        forward_flops: FLOPs of the forward pass.
        input_flops: Of a backward pass to the part's input, all its weights frozen.
        start_flops: Of a backward pass to its own weights only, without what the weights' gradients themselves cost:
            the part is the lowest that trains.
        weight_flops: What the gradient of each parameter costs, by its name; only those that may train.
        passing_bytes: Activations saved where a gradient passes through frozen weights.
        start_bytes: Activations saved where it trains, and nothing below.
        training_bytes: Activations saved where it trains, and something below too.
    """

    forward_flops: int
    input_flops: int
    start_flops: int
    weight_flops: Mapping[str, int]
    passing_bytes: int
    start_bytes: int
    training_bytes: int


@dataclass(frozen=True)
class Counts:
    """What one batch costs on one model.

    Attributes:
        parts: What lies below the blocks, each block from the lowest up, and what lies above them.
        shared_bytes: Inputs that all blocks share and save: masks, rotary tables.
    """

    parts: tuple[Part, ...]
    shared_bytes: int


_Runner = Callable[[bool, bool], Graph]
"""Runs a part, given whether its input needs a gradient and whether its weights train."""


def count(model: PreTrainedModel, inputs: Mapping[str, Tensor], names: Iterable[str]) -> Counts:
    """Count what a batch costs on a model; afterwards the model is what it was.

    Each block is run by itself on the inputs that it gets in a real forward pass; blocks that are alike (modules,
    parameters, shapes of inputs, forward FLOPs) are counted once. What lies outside of the blocks is counted on passes
    through the whole model, whose graph is cut at both ends of the stack. A part is in training mode where its weights
    train, as in a client's run, and in evaluation mode elsewhere.

    Args:
        model: A model with one stack of like blocks, expanded or adapted or neither.
        inputs: A batch like those of a local step, on the model's device, with ``labels`` if there is a loss.
        names: Exact names of the parameters that may train.

    Raises:
        ExpansionError: The model has no stack of blocks, or a name is no parameter of it.

    Source: ours, on PyTorch's FLOP formulas (matrix products, attention, convolutions) and hooks on saved tensors.
    """
    with modes_kept(model), freezing_kept(model), isolated_rng(0):
        trained = _by_identity(model, names)
        blocks = list(find_blocks(model).blocks)
        calls, forward_flops = observe(model, blocks, inputs)
        fixed = storages([*model.parameters(), *model.buffers()])
        shared = _shared(calls)
        ignored = fixed.keys() | shared.keys()
        parts = _count_blocks(blocks, calls, forward_flops[1:-1], trained, ignored)
        within = {id(parameter) for block in blocks for parameter in block.parameters()}
        outside = {name: model.get_parameter(name) for key, name in trained.items() if key not in within}
        below, above = (OutsideRun(model, blocks, inputs, tuple(outside), ignored, side) for side in (False, True))
        first = _count_part(below, outside, forward_flops[0])
        last = _count_part(above, outside, forward_flops[-1])
    return Counts((first, *parts, last), sum(size for key, size in shared.items() if key not in fixed))


def _count_blocks(
    blocks: Sequence[nn.Module],
    calls: Sequence[Call],
    forward_flops: Sequence[int],
    trained: Mapping[int, str],
    ignored: set[int],
) -> list[Part]:
    alike: dict[object, Part] = {}
    parts = []
    for block, call, flops in zip(blocks, calls, forward_flops, strict=True):
        own = {name: parameter for name, parameter in block.named_parameters() if id(parameter) in trained}
        kind = (_kind(block, call), tuple(own), flops)
        if kind not in alike:
            alike[kind] = _count_part(BlockRun(block, call, list(own.values()), ignored), own, flops)
        each = alike[kind].weight_flops
        parts.append(replace(alike[kind], weight_flops={trained[id(p)]: each.get(name, 0) for name, p in own.items()}))
    return parts


def _count_part(run: _Runner, parameters: Mapping[str, nn.Parameter], forward_flops: int) -> Part:
    """Run a part in the three ways in which gradients meet it, and count; each graph before the next one is made."""
    weights = list(parameters.values())
    passing = run(True, False)
    # Dropout may choose other kernels, so what passes through frozen weights is counted in evaluation mode.
    passed, _ = _backward(passing, _sources(passing))
    start = run(False, True) if weights else passing
    to_weights, _ = _backward(start, weights)
    both = run(True, True) if weights else passing
    source = _sources(both)
    to_input, _ = _backward(both, source)
    to_both, _ = _backward(both, [*source, *weights])
    each = {name: _backward(both, [*source, parameter]) for name, parameter in parameters.items()}
    return Part(
        forward_flops,
        passed,
        max(0, to_weights - (to_both - to_input)),
        {name: flops - to_input for name, (flops, reached) in each.items() if reached},
        passing.saved_bytes,
        start.saved_bytes,
        both.saved_bytes,
    )


def _sources(graph: Graph) -> list[Tensor]:
    return [] if graph.hidden is None else [graph.hidden]


def _backward(graph: Graph, inputs: Sequence[Tensor]) -> tuple[int, bool]:
    """Return the FLOPs of a backward pass to `inputs`, and whether it reaches the last of them."""
    outputs = [output for output in graph.outputs if output.requires_grad]
    if not outputs or not inputs:
        return 0, False
    ones = [torch.ones_like(output) for output in outputs]
    with flop_counter() as counter:
        gradients = torch.autograd.grad(outputs, list(inputs), ones, retain_graph=True, allow_unused=True)
    return counter.get_total_flops(), gradients[-1] is not None


def _by_identity(model: PreTrainedModel, names: Iterable[str]) -> dict[int, str]:
    """Freeze a model, put it in evaluation mode and return the name of each parameter that may train, by identity."""
    freeze(model, names)
    trained = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    freeze(model, ())
    set_training_modes(model, ())
    return trained


def _kind(block: nn.Module, call: Call) -> tuple[object, ...]:
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    parameters = tuple((name, parameter.shape, parameter.dtype) for name, parameter in block.named_parameters())
    return modules, parameters, tuple((tensor.shape, tensor.dtype) for tensor in call.tensors)


def _shared(calls: Sequence[Call]) -> dict[int, int]:
    """Return the storages that several blocks get: bytes by address."""
    each = [storages(call.tensors) for call in calls]
    met = Counter(address for held in each for address in held)
    return {address: size for held in each for address, size in held.items() if met[address] > 1}
