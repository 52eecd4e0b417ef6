"""One pass of several clients tried on the real model: whether it is right, and for how many clients it is quickest."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from fedbe.client.plan import LocalPlan
from fedbe.client.trainer import QUIET
from fedbe.data import Batch
from fedbe.engines.one_pass.forward import OnePass, OnePassError
from fedbe.modeling.base_model import forward_options
from fedbe.modeling.freezing import freeze, set_training_modes
from fedbe.modeling.passes import evaluation_mode, freezing_kept
from fedbe.modeling.tensors import copy_tensors
from fedbe.seeding import generator, isolated_rng


def verify_one_pass(model: PreTrainedModel, names: Collection[str], inputs: Batch) -> None:
    """Try two clients with tensors of their own in one pass, and each by itself: outputs and gradients must agree.

    One trial has as many tokens in a sequence as rows in all, so that whatever is taken for rows and is none shows;
    in another the clients' sequences differ in length.

    Args:
        model: The prepared model.
        names: Exact names of all parameters that clients train.
        inputs: A real batch.

    Raises:
        OnePassError: They do not agree, or a trained module draws random numbers, which would not be each client's own.
    """
    one_pass = OnePass(model, names)
    clients = [_nudged(model, names, client) for client in range(2)]
    with evaluation_mode(model, inference=False):
        set_training_modes(model, names)
        for batches in _trials(inputs):
            drawn = random_state(model.device)
            apart = [
                _outcome([functional_call(model, t, (), {**b, **forward_options(model)})], [t])
                for t, b in zip(clients, batches, strict=True)
            ]
            if not torch.equal(drawn, random_state(model.device)):
                raise OnePassError("the trained part drops at random, by random numbers of each client's own")
            with one_pass.installed():
                together = _outcome(one_pass.outputs(clients, batches), clients)
            _compare([tensor for outcome in apart for tensor in outcome], together)


def random_state(device: torch.device) -> Tensor:
    """Return the state of the generator that modules on a device draw from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _nudged(model: PreTrainedModel, names: Collection[str], client: int) -> dict[str, Tensor]:
    """Return tensors like the model's own and a little off, so that one client's are not another's."""
    nudged = {}
    for name in names:
        tensor = model.get_parameter(name).detach()
        noise = torch.randn(tensor.shape, generator=generator(client, "one pass", name))
        nudged[name] = (tensor + 0.02 * noise.to(tensor)).requires_grad_()
    return nudged


def _trials(inputs: Batch) -> Iterator[list[Batch]]:
    rows = len(next(iter(inputs.values())))
    if "input_ids" not in inputs:
        yield [inputs, {name: tensor[:1] for name, tensor in inputs.items()}]
        return
    length = inputs["input_ids"].shape[1]
    yield [_shortened(inputs, min(length, 2 * rows))] * 2
    yield [inputs, {name: tensor[:1] for name, tensor in _shortened(inputs, max(1, length - 1)).items()}]


def _shortened(inputs: Batch, length: int) -> Batch:
    full = inputs["input_ids"].shape
    return {name: x[:, :length].contiguous() if x.shape == full else x for name, x in inputs.items()}


def _outcome(outputs: Sequence[Any], clients: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Return each client's logits and gradients, client by client."""
    names = [name for name, tensor in clients[0].items() if tensor.requires_grad]
    tensors = [client[name] for client in clients for name in names]
    loss = torch.stack([output.logits.float().square().mean() for output in outputs]).sum()
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    whole = [torch.zeros(()) if gradient is None else gradient for gradient in gradients]
    return [
        tensor
        for index, output in enumerate(outputs)
        for tensor in (output.logits.detach(), *whole[index * len(names) : (index + 1) * len(names)])
    ]


def _compare(apart: Sequence[Tensor], together: Sequence[Tensor]) -> None:
    for expected, found in zip(apart, together, strict=True):
        tolerance = 1e-3 if expected.dtype == torch.float32 else 5e-2
        largest = max(1e-3, expected.float().abs().max().item())
        if not torch.allclose(found.float(), expected.float(), 0.0, tolerance * largest, equal_nan=True):
            off = (found.float() - expected.float()).abs().max().item()
            raise OnePassError(f"outputs or gradients would be off by {off:.2g} in this architecture")


def measured(plan: LocalPlan, most: int, repeats: int = 3) -> dict[int, float]:
    """Return seconds per client of a local step, least of a few, by the number of clients in one pass.

    Forward and backward passes on clients' real first batches, one by one (1) and with 2, 4, … up to `most` and 16.
    The model and all random numbers are as they were afterwards.

    Args:
        plan: What clients train, with the model prepared.
        most: Clients in a cohort.
        repeats: Measurements of each, in turn, after one that does not count.
    """
    counts = [2**power for power in range(5) if 2**power <= most]
    precision = L.Trainer(**QUIET, precision=plan.trainer.get("precision")).precision_plugin
    restored, resting = freezing_kept(plan.model), evaluation_mode(plan.model, inference=False)
    with isolated_rng(plan.seed), restored, resting, precision.forward_context():
        batches = [first_batch(plan, index) for index in range(counts[-1])]
        rounds = [{n: step_seconds(plan, batches[:n]) / n for n in counts} for _ in range(repeats + 1)]
    return {n: min(seconds[n] for seconds in rounds[1:]) for n in counts}


def quickest(seconds: Mapping[int, float]) -> int:
    """Return the number of clients per pass with the least time per client; 1 unless that saves 5 %."""
    best = min(seconds, key=lambda number: seconds[number])
    return best if seconds[best] < 0.95 * seconds[1] else 1


def first_batch(plan: LocalPlan, index: int) -> Batch:
    """Return the first batch, on the model's device, of one of the run's clients, over again if there are fewer."""
    clients = plan.data.client_ids
    own = generator(plan.seed, "one pass", index)
    batch = next(iter(plan.data.client_dataloader(clients[index % len(clients)], own)))
    return {name: tensor.to(plan.model.device) for name, tensor in batch.items()}


def step_seconds(plan: LocalPlan, batches: Sequence[Batch]) -> float:
    """Return how long clients' forward and backward passes take: of several in one pass, of one as it trains alone."""
    model, names = plan.model, plan.adaptation.trainable_names
    freeze(model, names if len(batches) == 1 else ())
    set_training_modes(model, names)
    tensors = [{name: nn.Parameter(t) for name, t in copy_tensors(model, names).items()} for _ in batches]
    one_pass = OnePass(model, names)
    started = time.perf_counter()
    if len(batches) == 1:
        outputs = [model(**batches[0], **forward_options(model))]
    else:
        with one_pass.installed():
            outputs = one_pass.outputs(tensors, batches)
    torch.autograd.backward([output.loss for output in outputs])
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return seconds
