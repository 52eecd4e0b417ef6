"""ClientModule: the LightningModule of one client, around the one resident model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import lightning as L
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from fedbe.client.plan import OptimizerFactory
from fedbe.client.run import LocalRun
from fedbe.data import Batch
from fedbe.modeling.base_model import forward_options


class ResidentModule(L.LightningModule):
    """Base class of modules around the one resident model, which stays where it is.

    Args:
        model: The resident model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def to(self, *arguments: Any, **options: Any) -> Self:
        """Stay: the resident model is on its device, and Lightning would look at each tensor once more."""
        return self

    def cpu(self) -> Self:
        """Stay: Lightning would move the resident model to the CPU after each fit."""
        return self


class ClientModule(ResidentModule):
    """One client's training of the shared model.

    On its own, in any `L.Trainer`, it trains the named parameters by the model's own loss and freezes all others. In a
    federation it is made by `of` from a run that has begun: freeze mask and training modes are the client's already.

    Args:
        model: The resident model.
        trainable_names: The exact parameter names it trains.
        optimizer: Builds the optimizer over them.
        run: The client's training, begun; ``None`` for one of no federation.

    Raises:
        ExpansionError: A name is no parameter of the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainable_names: Sequence[str],
        optimizer: OptimizerFactory,
        run: LocalRun | None = None,
    ) -> None:
        super().__init__(model)
        self.trainable_names = tuple(trainable_names)
        self._run: LocalRun | None = run or LocalRun.alone(model, self.trainable_names, optimizer)
        self._forward_options = forward_options(model)

    @classmethod
    def of(cls, run: LocalRun) -> Self:
        """Return the module of a client whose training has begun."""
        return cls(run.plan.model, run.task.trainable_names, run.plan.optimizer, run)

    @property
    def run(self) -> LocalRun:
        """The client's training.

        Raises:
            RuntimeError: It has ended.
        """
        if self._run is None:
            raise RuntimeError("this client has trained")
        return self._run

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the objective on one batch; count its samples and note the model's own loss.

        Raises:
            ClientTimeoutError: The client has trained for too long.
        """
        run = self.run
        run.check_time(batch_index)
        if batch_index % self.trainer.accumulate_grad_batches == 0:
            run.accumulation.batches = self.trainer.accumulate_grad_batches
            self.zero_grad()
        loss: Tensor = self.model(**batch, **self._forward_options).loss
        return run.loss(loss if run.added_loss is None else loss + run.added_loss(), batch)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure the gradients, clip them as the trainer says, then let the objective correct them."""
        self.run.before_step(
            optimizer, lambda: self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        )

    def configure_optimizers(self) -> Any:
        """Build the optimizer over the trained parameters, and the schedule per optimizer step."""
        steps = self.trainer.estimated_stepping_batches  # infinite where only time is limited
        optimizer, schedule = self.run.optimizer(int(steps) if math.isfinite(steps) else 0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients of the trained parameters; no others have any."""
        for parameter in self.run.parameters.values():
            parameter.grad = None

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Leave it to `training_step`.

        Lightning calls this after the forward pass, which by then has had to find its memory beside the old gradients:
        on small models, steps take 3 to 4 % longer that way.
        """

    def on_train_end(self) -> None:
        """Free what Lightning would move to the CPU otherwise, tensor by tensor."""
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()

    def let_go(self) -> None:
        """Free gradients, optimizer state and tensors now, and not when the Trainer's cycles are collected."""
        self.zero_grad()
        for optimizer in self._trainer.optimizers if self._trainer else ():
            optimizer.state.clear()
        self._run = None
