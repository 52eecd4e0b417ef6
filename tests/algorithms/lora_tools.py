"""A small LoRA federation: every method by name, and what its model computes as plain weights."""

from typing import Any

import torch
from toy import ToyData, tiny_llama, toy_loop

from fedbe.adaptation.lora_layers import merged_copy
from fedbe.algorithms import FedExLoRA, FedIT, FedSALoRA, FedTaLoRA, FFALoRA, FlexLoRA, FLoRA, HetLoRA, LoRA, SLoRA
from fedbe.federation.callback import FederatedCallback
from fedbe.messages import Update

OPTIONS: dict[type[LoRA], dict[str, Any]] = {
    FedIT: {"rank": 4},
    FFALoRA: {"rank": 4},
    FLoRA: {"rank": 4},
    FlexLoRA: {"rank": 4},
    HetLoRA: {"rank": 4},
    FedSALoRA: {"rank": 4},
    FedExLoRA: {"rank": 2},
    SLoRA: {"rank": 4, "sparse_rounds": 1, "density": 0.1},
    FedTaLoRA: {"rank": 2},
}
METHODS = list(OPTIONS)
MERGING = (FLoRA, FedExLoRA, FedTaLoRA)


def build(method: type[LoRA], **changes: Any) -> LoRA:
    return method(**{"target_modules": "attention", **OPTIONS[method], **changes})


def loop_of(folder, method, *, options=None, clients=3, **changes):
    data = changes.pop("data", None) or ToyData(clients=clients)
    algorithm = build(method, **(options or {}))
    return toy_loop(folder, algorithm=algorithm, data=data, model=tiny_llama(layers=2), **changes)


def effective(model) -> dict[str, torch.Tensor]:
    """The plain weights that compute the same."""
    return {name: tensor.clone() for name, tensor in merged_copy(model).state_dict().items()}


def distance(first, second) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


class Keeper(FederatedCallback):
    """Keeps what travels."""

    def __init__(self):
        self.tasks, self.updates = [], []

    def on_client_start(self, loop, task):
        self.tasks.append(task)

    def on_client_end(self, loop, task, update):
        self.updates.append(update)


def echo(loop, tasks, change=None):
    """Clients that load what they receive, take no step (or the same change), and send."""
    for task in tasks:
        loop.algorithm.begin(loop.model, task)
        if change is not None:
            change(loop.model, task)
        sent, kept = loop.algorithm.finish(loop.model, task)
        # As many samples as three steps see in this client's data.
        samples = 12 if task.client_id == "client-2" else 10
        yield task, Update(task.client_id, sent, samples, {"seconds": 0.0}, kept)


def ready(folder, method, **changes):
    """A loop that is set up, with its folder, before its first round."""
    loop = loop_of(folder, method, **changes)
    loop.setup()
    loop.on_run_start()
    return loop


class Echo:
    def __init__(self, loop, change=None):
        self.loop, self.change = loop, change

    def train(self, tasks):
        return echo(self.loop, tasks, self.change)


def nudge(purpose):
    """A change of the trained parameters, the same for every client that gets the same purpose."""

    @torch.no_grad()
    def change(model, task):
        own = torch.Generator().manual_seed(purpose if isinstance(purpose, int) else purpose(task))
        for name in task.trainable_names:
            parameter = model.get_parameter(name)
            if name.endswith(".base_layer.weight"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=own))
            else:
                noise = 0.1 * torch.randn(parameter.shape, generator=own)
                # The tail of a smaller rank is zero and stays zero.
                dim = 0 if ".lora_A." in name else 1
                parameter.add_(noise)
                rank = task.received[name].shape[dim] if name in task.received else None
                if rank is not None and ".lora_" in name:
                    parameter.narrow(dim, rank, parameter.shape[dim] - rank).zero_()

    return change


def per_client(task):
    return 100 + int(task.client_id.split("-")[1]) + 10 * task.round_index


def factors(seed, rank, out=7, into=5):
    own = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=own), torch.randn(rank, into, generator=own)
