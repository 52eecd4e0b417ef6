"""All that local training depends on and that stays the same over a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.adaptation.base import Adaptation
from fedbe.algorithms.topology import Topology
from fedbe.allocation import SimulatedClock
from fedbe.client.schedule import Schedule
from fedbe.data import Batch, FederatedDataModule
from fedbe.errors import ConfigError, Problem, under
from fedbe.messages import Structure
from fedbe.modeling.index import ModelIndex
from fedbe.objectives import Objective, Plain
from fedbe.prefix import PrefixReuse

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Builds an optimizer from parameters; in YAML the ``class_path`` and ``init_args`` of a `torch.optim` class."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What local steps depend on, wherever their batches come from.

    Attributes:
        model: The one resident model of this process.
        adaptation: What is added to the model.
        optimizer: Builds each client's optimizer; its state lasts for one round.
        schedule: The learning-rate schedule.
        rounds: Number of rounds, for schedules that span the run.
        objective: What clients minimise.
        timeout_seconds: How long a client may train, looked at before each step; ``None`` for as long as it takes.
    """

    model: PreTrainedModel
    adaptation: Adaptation
    optimizer: OptimizerFactory
    schedule: Schedule
    rounds: int
    objective: Objective = field(default_factory=Plain)
    timeout_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class LocalPlan(StepPlan):
    """What a client needs to train, wherever it is; built from its own configuration.

    Attributes:
        tokenizer: The base model's tokenizer or image processor.
        topology: How a client's round begins and ends.
        data: Where batches come from; at a client of a real federation its own rows only.
        trainer: Arguments of each client's `L.Trainer`, copied for each: no callback's state passes between clients.
        seed: The run's seed; each client has its own generator derived from it, the experience, the round and its name.
        clock: The clients' simulated devices; ``None`` to take each client's measured time.
        prefix: How much of what frozen blocks compute is kept; ``None`` to compute it each time.
        float32: Whether what is trained is float32, whatever the type of the base.
        cohort: Clients in a round, as far as is known: an engine that trains several at a time looks no further.
    """

    tokenizer: PreTrainedTokenizerBase | None
    topology: Topology
    data: FederatedDataModule
    trainer: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    clock: SimulatedClock | None = None
    prefix: PrefixReuse | None = None
    float32: bool = True
    cohort: int | None = None


def prepare_model(plan: LocalPlan, inputs: Batch, structure: Structure | None = None) -> None:
    """Turn the base model into the adapted model; server and clients call this alike, before round 1.

    Args:
        plan: Says what is added to which model.
        inputs: A real batch on which the outputs must stay what they were.
        structure: The structure to build; ``None`` for the one that the configuration says.

    Raises:
        ConfigError: The objective does not fit this model, or training would change running statistics.
        ExpansionError: The model cannot be changed without changing its outputs.
    """
    with under("client.objective.init_args"):
        plan.objective.prepare(plan.model, plan.tokenizer, plan.seed)
    plan.adaptation.seed, plan.adaptation.tokenizer, plan.adaptation.float32 = plan.seed, plan.tokenizer, plan.float32
    plan.adaptation.observe_base(plan.model)
    plan.adaptation.prepare(plan.model, inputs, structure)
    if norms := ModelIndex(plan.model).changing_statistics(plan.adaptation.trainable_names):
        remedy = (
            f"has batch norms that would be trained ({norms[0]}): their running statistics are in no client's update"
        )
        raise ConfigError(Problem("model.name", plan.model.name_or_path, f"{remedy}; name a model with layer norms"))
    plan.adaptation.hold(plan.model)
    plan.topology.prepared(plan.model, plan.adaptation)
