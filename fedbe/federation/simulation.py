"""What the clients' simulated devices can afford of a run: counted on its prepared model, data and optimizer."""

import math
from collections.abc import Callable, Mapping, Sized
from typing import Any, cast

from fedbe.allocation import Capabilities, SimulatedClock
from fedbe.allocation.cost import CostModel
from fedbe.client.module import OptimizerFactory
from fedbe.client.trainer import local_steps
from fedbe.data import FederatedDataModule
from fedbe.federation.loop import FederatedLoop
from fedbe.seeding import generator


def capabilities_of(
    clock: SimulatedClock, optimizer: OptimizerFactory, options: Mapping[str, Any]
) -> Callable[[FederatedLoop], Capabilities]:
    """Return what counts, on a loop's prepared model, what its clients can afford.

    Args:
        clock: The clients' devices.
        optimizer: Builds the clients' optimizer.
        options: The arguments of each client's `L.Trainer`.
    """

    def measure(loop: FederatedLoop) -> Capabilities:
        clients, data = loop.data.client_ids, loop.data
        clock.fleet.setup(clients, loop.seed)
        batch = next(iter(data.client_dataloader(clients[0], generator(loop.seed, "cost model"))))
        inputs = {name: tensor.to(loop.model.device) for name, tensor in batch.items()}
        costs = CostModel.of(loop.model, inputs, optimizer, loop.algorithm.trainable_names)
        samples = data.batch_size * options.get("accumulate_grad_batches", 1)
        steps = {client: local_steps(options, _batches(data, client)) for client in clients}
        return Capabilities(clock, costs, steps, samples * (1 + loop.objective.extra_samples), loop.seed)

    return measure


def _batches(data: FederatedDataModule, client_id: str) -> int:
    return math.ceil(len(cast(Sized, data.client_dataset(client_id))) / data.batch_size)
