"""A small LoRA federation: every method by name, and what its model computes as plain weights."""

from typing import Any

import torch
from toy import ToyData, tiny_llama, toy_loop

from fedbe.adaptation.lora_layers import merged_copy
from fedbe.algorithms import FedExLoRA, FedIT, FedSALoRA, FedTaLoRA, FFALoRA, FlexLoRA, FLoRA, HetLoRA, SLoRA
from fedbe.algorithms.base import Algorithm
from fedbe.client.memory import Kept
from fedbe.engines import InProcess
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.server import Server
from fedbe.messages import Update, structure_version

OPTIONS: dict[type[Algorithm], dict[str, Any]] = {
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
MIXED_RANKS = (FLoRA, FlexLoRA, HetLoRA)


def build(method: type[Algorithm], **changes: Any) -> Algorithm:
    return method(**{"target_modules": "attention", **OPTIONS[method], **changes})


class Acting(InProcess):
    """Trains clients, until `act` is called: from then on they load, take no step (or the given change), and send.

    Attributes:
        kept: What each client kept that acted, one after another.
    """

    def __init__(self):
        self.acting, self.change, self.kept = False, None, []

    def act(self, change=None):
        self.acting, self.change = True, change

    def fit(self, tasks):
        if not self.acting:
            yield from super().fit(tasks)
            return
        for task in tasks:
            own = self.memory.get(task.client_id, task.resumes).tensors
            update, kept = acted(self.plan, task, own, self.change)
            self.memory.put(task.client_id, task.round_index, Kept(kept), task.resumes)
            self.kept.append(kept)
            yield task, update


def acted(plan, task, kept, change=None):
    """What a client sends and keeps that loads what it receives, takes no step (or the given change), and sends."""
    plan.topology.begin(plan.model, plan.adaptation, task, kept)
    if change is not None:
        change(plan.model, task)
    sent, own = plan.topology.finish(plan.model, plan.adaptation, task, kept)
    # As many samples as three steps see in this client's data.
    samples = 12 if task.client_id == "client-2" else 10
    version = structure_version(plan.adaptation.structure())
    return Update(task.client_id, sent, samples, {"seconds": 0.0}, structure=version), own


def loop_of(folder, method, *, options=None, clients=3, **changes):
    data = changes.pop("data", None) or ToyData(clients=clients)
    algorithm = build(method, **(options or {}))
    return toy_loop(folder, algorithm=algorithm, data=data, model=tiny_llama(layers=2), engine=Acting(), **changes)


def ready(folder, method, **changes):
    """A loop that is set up, with its folder, before its first round."""
    loop = loop_of(folder, method, **changes)
    loop.setup()
    loop.on_run_start()
    return loop


class Place:
    """A model and an algorithm of its own, prepared as server and clients do, each by itself.

    Attributes:
        server: Holds the global state; unused where the place is a client's.
    """

    def __init__(self, algorithm, layers=2):
        self.algorithm, self.model = algorithm, tiny_llama(layers=layers)
        self.adaptation, self.topology = algorithm.adaptation, algorithm.topology
        self.adaptation.observe_base(self.model)
        self.adaptation.prepare(self.model, {"input_ids": torch.arange(12)[None]})
        self.topology.prepared(self.model, self.adaptation)
        self.server = Server(self.model, algorithm)
        self.server.setup(3, 3, 0)

    @property
    def strategy(self):
        return self.algorithm.strategy

    def tasks(self, index, clients=3):
        """Begin a round of the server, and return what it gives the clients."""
        cohort = [f"client-{k}" for k in range(clients)]
        allocation = self.strategy.allocate(cohort, index)
        self.server.begin_round(index)
        return [self.server.task(client, 0, index, units) for client, units in allocation.items()]

    def round(self, index, change=None, clients=3):
        """Run a round with clients that keep nothing; return tasks, updates, and the next global tensors."""
        tasks = self.tasks(index, clients)
        updates = [acted(self, task, {}, change)[0] for task in tasks]
        for task, update in zip(tasks, updates, strict=True):
            self.server.receive(task, update)
        return tasks, updates, self.server.step()

    def advance(self, index, change=None, clients=3):
        """Run a round, and make its result the global state."""
        tasks, updates, new = self.round(index, change, clients)
        self.server.restore(new)
        return tasks, updates


def effective(model) -> dict[str, torch.Tensor]:
    """The plain weights that compute the same."""
    return {name: tensor.clone() for name, tensor in merged_copy(model).state_dict().items()}


def distance(first, second) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def identical(first, second) -> bool:
    """Whether two mappings hold the same names and the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Keeper(FederatedCallback):
    """Keeps what travels."""

    def __init__(self):
        self.tasks, self.updates = [], []

    def on_client_start(self, run, task):
        self.tasks.append(task)

    def on_client_end(self, run, task, update):
        self.updates.append(update)


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
                if ".lora_" in name and name in task.received:
                    rank = task.received[name].shape[dim]
                    parameter.narrow(dim, rank, parameter.shape[dim] - rank).zero_()

    return change


def per_client(task):
    return 100 + int(task.client_id.split("-")[1]) + 10 * task.round_index


def factors(seed, rank, out=7, into=5):
    own = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=own), torch.randn(rank, into, generator=own)
