"""What the clients' simulated devices can afford: counted on the prepared model, their data and their optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedbe.allocation import Capabilities
from fedbe.allocation.cost import CostModel
from fedbe.client.plan import LocalPlan
from fedbe.client.trainer import batches_per_step, local_steps
from fedbe.data import Batch
from fedbe.errors import under


def simulated_capabilities(plan: LocalPlan, samples: Mapping[str, int], rows: Batch) -> Capabilities | None:
    """Return what clients can afford of the model as it is now; ``None`` where no devices are simulated.

    Args:
        plan: What they train, with the model prepared.
        samples: Client → number of its training samples.
        rows: Some like the clients', in a number like that of a local step.
    """
    if plan.clock is None:
        return None
    data, trainer = plan.data, plan.trainer
    with under("clock.fleet.init_args"):
        plan.clock.fleet.setup(list(samples), plan.seed)
    inputs = {name: tensor.to(plan.model.device) for name, tensor in rows.items()}
    costs = CostModel.of(plan.model, inputs, plan.optimizer, plan.adaptation.trainable_names)
    each_batch = data.batch_size * (1 + plan.objective.extra_samples)
    batches = {client: math.ceil(count / data.batch_size) for client, count in samples.items()}
    steps = {client: local_steps(trainer, count) for client, count in batches.items()}
    each_step = {client: each_batch * batches_per_step(trainer, count) for client, count in batches.items()}
    return Capabilities(plan.clock, costs, steps, each_step, plan.seed)
