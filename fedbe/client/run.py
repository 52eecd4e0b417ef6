"""One client's training under way: what it trains, what its steps are made of, and what is noted of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from fedbe.adaptation.whole_model import WholeModel
from fedbe.client.accumulation import Accumulation
from fedbe.client.memory import Kept
from fedbe.client.plan import OptimizerFactory, StepPlan
from fedbe.client.schedule import Schedule
from fedbe.data import Batch
from fedbe.errors import ClientTimeoutError
from fedbe.messages import FitTask
from fedbe.modeling.index import ModelIndex


class StepNotes:
    """What is noted of a client's local steps.

    Args:
        watched: Groups of trained parameters, by name, whose gradients' size is measured.

    Attributes:
        samples: Number of samples really seen.
    """

    def __init__(self, watched: Mapping[str, Sequence[Tensor]]) -> None:
        self.samples = 0
        self._watched = watched
        self._losses: list[Tensor] = []
        self._norms: dict[str, list[Tensor]] = {unit: [] for unit in watched}

    def loss(self, loss: Tensor, batch: Batch) -> None:
        """Count the samples of a batch, and note the model's own loss on it."""
        self.samples += len(next(iter(batch.values())))
        self._losses.append(loss.detach())

    def gradients(self) -> None:
        """Measure the gradients as they are, before they are clipped."""
        for unit, parameters in self._watched.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            self._norms[unit].append(torch.nn.utils.get_total_norm(gradients))

    @property
    def metrics(self) -> dict[str, float]:
        """What an update says of the steps, see `Update`.

        The training loss in nats in the mean, at the first step and at the last, NaN before the first; and of each
        watched group's gradient the root mean square, over the steps, of its norm before clipping.
        """
        losses = torch.stack(self._losses) if self._losses else torch.tensor([math.nan])
        metrics = {"loss": losses.mean(), "first_loss": losses[0], "last_loss": losses[-1]}
        norms = {unit: torch.stack(norms).float() for unit, norms in self._norms.items() if norms}
        metrics |= {f"gradient_norm/{unit}": norm.square().mean().sqrt() for unit, norm in norms.items()}
        return {name: value.item() for name, value in metrics.items()}


class LocalRun:
    """One client's training from `LocalTraining.begin` to `LocalTraining.finish`, whatever loop takes its steps.

    Args:
        plan: What all clients' steps depend on.
        task: What the client was given; its tensors are in the model.
        kept: What it goes on from.
        parameters: What it trains, by exact name in the order of the model.

    Attributes:
        accumulation: Weighs the batches of one optimizer step.
        added_loss: What is added to the model's own loss after each forward pass; ``None`` for nothing.
        notes: What is noted of its steps.
    """

    def __init__(self, plan: StepPlan, task: FitTask, kept: Kept, parameters: Mapping[str, nn.Parameter]) -> None:
        self.plan, self.task, self.kept = plan, task, kept
        self.objective = plan.objective.local(plan.model, task, kept.objective)
        self.added_loss = plan.adaptation.added_loss(plan.model, task)
        self.accumulation = Accumulation()
        self._begun = time.monotonic()
        self.train(parameters)

    @classmethod
    def alone(cls, model: PreTrainedModel, trainable_names: Sequence[str], optimizer: OptimizerFactory) -> LocalRun:
        """Return the training of a client without a federation: of these parameters, by the model's own loss."""
        index = ModelIndex(model)
        index.train_only(trainable_names)
        plan = StepPlan(model=model, adaptation=WholeModel(), optimizer=optimizer, schedule=Schedule(), rounds=1)
        task = FitTask("client", 0, 0, {}, tuple(trainable_names))
        return cls(plan, task, Kept(), index.in_order(trainable_names))

    def train(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Train these in place of the model's own: copies of the client's, of the same names; before its first step."""
        self.parameters = parameters
        watched = self.plan.adaptation.watched(self.task.trainable_names)
        groups = {unit: [parameters[n] for n in names if n in parameters] for unit, names in watched.items()}
        self.notes = StepNotes(groups)

    def optimizer(self, steps: int) -> tuple[Optimizer, LambdaLR]:
        """Return a fresh optimizer over what the client trains, and its schedule over these optimizer steps."""
        optimizer = self.plan.optimizer(self.parameters.values())
        return optimizer, self.plan.schedule.build(optimizer, self.task.round_index, self.plan.rounds, steps)

    def check_time(self, steps: int) -> None:
        """Look at the clock before a step.

        Args:
            steps: How many the client has taken.

        Raises:
            ClientTimeoutError: It has trained for too long.
        """
        limit = self.plan.timeout_seconds
        if limit is not None and time.monotonic() - self._begun > limit:
            raise ClientTimeoutError(f"not done after {limit:g} s and {steps} steps")

    def loss(self, loss: Tensor, batch: Batch) -> Tensor:
        """Return what is minimised, and note the loss; of each batch by the part that its labels have in the step.

        Args:
            loss: The model's own on a batch, with `added_loss` in it.
            batch: The batch.
        """
        self.notes.loss(loss, batch)
        weight = self.accumulation.weight(batch)
        minimised = self.objective.loss(loss, batch)
        return minimised if weight == 1 else weight * minimised

    def before_step(self, optimizer: Optimizer, clip: Callable[[], None]) -> None:
        """Bring the gradients to those of one batch, measure and clip them, then let the objective correct them."""
        self.accumulation.end(self.parameters.values())
        self.notes.gradients()
        clip()
        self.objective.correct_gradients(optimizer.param_groups[0]["lr"])
