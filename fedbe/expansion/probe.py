"""The probe: how much a new block would gain at each position, in first order, from one backward pass per batch."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedbe.errors import ExpansionError
from fedbe.expansion.expand import expand_blocks, remove_blocks
from fedbe.expansion.gate import refuse_gate
from fedbe.expansion.identity import IdentityRule, make_identity, target_parameters
from fedbe.messages import ProbeReport
from fedbe.modeling.architecture import all_configs, arrange, find_blocks
from fedbe.modeling.base_model import forward_options
from fedbe.modeling.passes import evaluation_mode, freezing_kept
from fedbe.modeling.verification import on_device
from fedbe.seeding import generator

Writers = tuple[nn.Parameter, ...]
"""The parameters of one identity block that its rule holds at the identity, and that alone have a gradient there."""

_CHUNK = 1 << 20


def probe_client(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    client_id: str,
    rule: IdentityRule | None = None,
    *,
    sketch_dimension: int = 0,
    seed: int = 0,
) -> ProbeReport:
    """Return what a client reports of the positions of its base model; the model is the same afterwards, to the bit.

    Args:
        model: The base model.
        batches: A few of the client's batches, ``labels`` among them.
        client_id: The client's name.
        rule: How a block of this model starts as the identity, if known already (see `identity_rule`).
        sketch_dimension: Numbers per position that show the gradient's direction; 0 for none.
        seed: The run's seed: the projection depends on it and on the position, and on nothing of the client.

    Raises:
        ExpansionError: If the model cannot be expanded, or the batches give no loss.

    Source: ours.
    """
    with identity_blocks(model, rule or identity_rule(model)) as positions:
        samples = backward(model, batches)
        gradients = [[_gradient(writer) for writer in writers] for writers in positions]
        scores = tuple(_norm(tensors) for tensors in gradients)
        sketch = _sketch(gradients, sketch_dimension, seed) if sketch_dimension else None
    return ProbeReport(client_id, scores, samples, sketch)


def probe_gradients(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], rule: IdentityRule | None = None
) -> Tensor:
    """Return for each position the exact first-order gain of a block there, shape [positions], float64.

    The norm is that of the mean gradient over the samples, not the mean of the batches' norms: a step of length ε along
    the mean gradient lowers the mean loss by ε times its norm, while the norms of single batches also count the
    directions on which the batches disagree. Of the block's parameters only those that its rule holds at the identity
    have a gradient at first. All positions are probed at once: the identity blocks change no activation and no
    gradient of each other.

    Args:
        model: The base model; it is the same afterwards, to the bit.
        batches: Batches with ``labels``; one forward and one backward pass each.
        rule: How a block of this model starts as the identity, if known already (see `identity_rule`).

    Raises:
        ExpansionError: If the model cannot be expanded, or the batches give no loss.

    Source: ours.
    """
    return torch.tensor(probe_client(model, batches, "", rule).scores, dtype=torch.float64)


def identity_rule(model: PreTrainedModel, inputs: Mapping[str, Tensor] | None = None) -> IdentityRule:
    """Return how a block of this model starts as the identity, verified; the model is the same afterwards.

    Args:
        model: The base model.
        inputs: What the outputs are compared on; random tokens (with padding) or pixels if left out.

    Raises:
        ExpansionError: If the model cannot be expanded with unchanged outputs.
    """
    expansion = expand_blocks(model, 1, inputs=inputs)
    remove_blocks(model, expansion)
    return expansion.rule


@contextmanager
def identity_blocks(model: PreTrainedModel, rule: IdentityRule) -> Iterator[list[Writers]]:
    """Put an identity block above every block of a model and yield their zeroed parameters, bottom first.

    Only these require gradients and are new: all else of an identity block is the very tensors of the block below it.
    Inside, the model is in evaluation mode; afterwards it is what it was.

    Raises:
        ExpansionError: If a block lacks the rule's targets, or the model has a token gate.
    """
    refuse_gate(model, "a new block")
    stack = find_blocks(model)
    base = list(stack.blocks)
    configs = {id(config): config for config in all_configs(model)}
    twins = [_twin(block, rule, configs) for block in base]
    positions = [tuple(target_parameters(rule, twin)) for twin in twins]
    doubled = [index for index in range(len(base)) for _ in range(2)]
    with freezing_kept(model):
        model.requires_grad_(False)
        for writer in (writer for writers in positions for writer in writers):
            writer.requires_grad_(True)
        arrange(stack, [block for pair in zip(base, twins, strict=True) for block in pair], doubled)
        try:
            with evaluation_mode(model, inference=False):
                yield positions
        finally:
            arrange(stack, base, range(0, len(doubled), 2))


def backward(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> int:
    """Add the gradients of the mean loss over all samples to the parameters that require one; return their number.

    Args:
        model: The model.
        batches: Batches with ``labels``; one forward and one backward pass each.

    Raises:
        ExpansionError: If there is no batch, or the model gives no loss.
    """
    given = list(batches)
    sizes = [len(next(iter(batch.values()))) for batch in given]
    if not given:
        raise ExpansionError("The probe was given no batch: it needs one at least.")
    for batch, size in zip(given, sizes, strict=True):
        with torch.enable_grad():
            (size / sum(sizes) * _loss(model, batch)).backward()  # type: ignore[no-untyped-call]
    return sum(sizes)


def count_sketch(tensors: Iterable[Tensor], dimension: int, random: torch.Generator) -> Tensor:
    """Return a random projection of a list of tensors, shape [dimension], float64, on the CPU.

    Each number is added, with a random sign, to one of the sketch's places, so that the projection is linear and keeps
    inner products in expectation, with a relative error of about 1/√dimension.

    Args:
        tensors: The vector, in pieces of any shape.
        dimension: Length of the sketch.
        random: Draws places and signs; sketches compare only if drawn from equal generators for equal shapes.

    Source: count sketch (Charikar, Chen and Farach-Colton 2002); as feature hashing arXiv 0902.2206, section 2.
    """
    sketch = torch.zeros(dimension, dtype=torch.float64)
    for tensor in tensors:
        for part in torch.split(tensor.detach().flatten(), _CHUNK):
            drawn = torch.randint(2 * dimension, part.shape, generator=random)
            signs = 1 - 2 * (drawn // dimension)
            sketch.index_add_(0, drawn % dimension, signs * part.cpu().double())
    return sketch


def _twin(block: nn.Module, rule: IdentityRule, configs: Mapping[int, object]) -> nn.Module:
    """Return an identity block that shares with a block everything that its rule does not name."""
    tensors: dict[int, object] = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    if not rule.gated:
        for target in target_parameters(rule, block):
            del tensors[id(target)]
    twin = copy.deepcopy(block, {**configs, **tensors})
    make_identity(rule, twin)
    return twin


def _loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    loss = model(**on_device(model, batch), **forward_options(model)).loss
    if not isinstance(loss, Tensor):
        raise ExpansionError(f"{type(model).__name__} gives no loss on the probe's batches: they need `labels`.")
    return loss


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _norm(tensors: Sequence[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def _sketch(gradients: Sequence[Sequence[Tensor]], dimension: int, seed: int) -> tuple[tuple[float, ...], ...]:
    randoms = (generator(seed, "probe sketch", position) for position in range(len(gradients)))
    return tuple(tuple(count_sketch(t, dimension, r).tolist()) for t, r in zip(gradients, randoms, strict=True))
