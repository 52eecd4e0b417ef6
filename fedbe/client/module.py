"""ClientModule: the LightningModule of one client, around the one resident model."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from fedbe.data import Batch
from fedbe.errors import ClientTimeoutError
from fedbe.expansion import freeze, set_training_modes
from fedbe.modeling.base_model import forward_options
from fedbe.objectives import LocalObjective

OptimizerFactory = Callable[[Iterable[torch.nn.Parameter]], Optimizer]
"""Builds an optimizer from parameters; in YAML the ``class_path`` and ``init_args`` of a `torch.optim` class."""


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


class ResidentModule(L.LightningModule):
    """Base class of modules around the one resident model, which stays where it is."""

    def to(self, *arguments: Any, **options: Any) -> Self:
        """Stay: the resident model is on its device, and Lightning would look at each tensor once more."""
        return self

    def cpu(self) -> Self:
        """Stay: Lightning would move the resident model to the CPU after each fit."""
        return self


class ClientModule(ResidentModule):
    """One client's training of the shared model, with the client's freeze mask.

    Args:
        model: The resident model, with the client's tensors already loaded.
        trainable_names: Exact names of the parameters this client trains.
        optimizer: Builds the optimizer over exactly these parameters.
        schedule: Builds the learning-rate scheduler from an optimizer and the number of steps; ``None`` for none.
        objective: What this client minimises; ``None`` for the model's own loss.
        watched: Groups of trained parameters, name → parameter names, whose gradients' size is measured.
        timeout_seconds: How long the training may take, from now on; ``None`` for as long as it takes.
        added_loss: What is added to the model's own loss after each forward pass; ``None`` for nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainable_names: tuple[str, ...],
        optimizer: OptimizerFactory,
        schedule: Callable[[Optimizer, int], LambdaLR] | None = None,
        objective: LocalObjective | None = None,
        watched: Mapping[str, tuple[str, ...]] | None = None,
        timeout_seconds: float | None = None,
        added_loss: Callable[[], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._timeout, self._begun = timeout_seconds, time.monotonic()
        self.model = model
        self.trainable_names = trainable_names
        self._optimizer = optimizer
        self._schedule = schedule
        self._objective = objective or LocalObjective()
        self._added_loss = added_loss
        groups = watched or {}
        self.notes = StepNotes({unit: [model.get_parameter(name) for name in groups[unit]] for unit in groups})
        freeze(model, trainable_names)
        set_training_modes(model, trainable_names)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the objective on one batch; count its samples and note the model's own loss.

        Raises:
            ClientTimeoutError: The client has trained for too long.
        """
        if self._timeout is not None and time.monotonic() - self._begun > self._timeout:
            raise ClientTimeoutError(f"not done after {self._timeout:g} s and {batch_index} steps")
        loss: Tensor = self.model(**batch, **forward_options(self.model)).loss
        if self._added_loss is not None:
            loss = loss + self._added_loss()
        self.notes.loss(loss, batch)
        return self._objective.loss(loss, batch)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure the gradients, clip them as the trainer says, then let the objective correct them."""
        self.notes.gradients()
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self._objective.correct_gradients(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        """Build the optimizer over the trained parameters, and the schedule per optimizer step."""
        optimizer = self._optimizer([p for p in self.model.parameters() if p.requires_grad])
        if self._schedule is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches  # infinite where only time is limited
        scheduler = self._schedule(optimizer, int(steps) if math.isfinite(steps) else 0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_end(self) -> None:
        """Free gradients and optimizer state now, and not when the Trainer's reference cycles are collected."""
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()
