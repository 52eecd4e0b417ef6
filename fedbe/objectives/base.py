"""The protocol of a local objective: on the server over all rounds, and at a client during its run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.data import Batch
from fedbe.errors import Facts, Problem
from fedbe.messages import FitTask, Update
from fedbe.traits import Part, Trait, Traits


class LocalObjective:
    """The objective during one client's run: it acts on the loss, on the gradients, and when the run ends."""

    def loss(self, loss: Tensor, batch: Batch) -> Tensor:
        """Return what is minimised, from the model's own loss on a batch."""
        return loss

    def correct_gradients(self, learning_rate: float) -> None:
        """Change the gradients in place, after clipping and before an optimizer step at this rate."""

    def finish(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return what the client sends besides its tensors, and what it keeps for the next time."""
        return {}, {}


class Objective(Part):
    """Base class: an objective over all rounds, on the server and at clients; the default is the model's own loss.

    Subclass it in a file of your own and name it by ``class_path`` under ``client.objective``. On a machine of its own
    a client has an object of its own, which `prepare` and `local` are called on; the server has another.

    Attributes:
        needs: By default local steps that belong to one client, as what acts on a client's loss or gradients does.
        extra_samples: Samples that a step computes on for each sample of its batch, besides that one.
    """

    needs: Traits = frozenset({Trait.SINGLE_CLIENT_STEPS})
    extra_samples: float = 0.0

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this configuration, found before work starts; see `Facts`."""
        return []

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> None:
        """Look at the base model, once, before it is changed.

        Raises:
            ConfigError: It does not fit this model; keys are those of this objective's arguments.
        """

    def setup(self, state: Mapping[str, Tensor], clients: int) -> None:
        """Start on the server, once, before round 1.

        Args:
            state: The global tensors that clients train, by exact parameter name.
            clients: Number of clients of the run, in whatever cohort.
        """

    def send(self, trainable_names: Iterable[str]) -> Mapping[str, Tensor]:
        """Return what a client that trains these parameters downloads besides."""
        return {}

    def local(self, model: nn.Module, task: FitTask, kept: Mapping[str, Tensor]) -> LocalObjective:
        """Return the objective of one client's run; called where the client is, before its first step.

        Args:
            model: The resident model with the client's tensors in it.
            task: The client's; ``extra`` is what `send` returned.
            kept: What `LocalObjective.finish` kept in the round that the client goes on from; nothing at first.
        """
        return LocalObjective()

    def check_update(self, update: Update) -> None:
        """Refuse an update whose ``extra`` `receive` could not use; nothing of it is taken in.

        Raises:
            UpdateError: It cannot be used; the message names the client and the tensor.
        """

    def receive(self, update: Update) -> None:
        """Take in what a client sent besides (`Update.extra`), let pass by `check_update`; in the cohort's order."""

    def step(self) -> None:
        """End a round on the server; until then `send` returns what it returned when the round began."""

    def rename(self, renamed: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
        """Follow parameters that have new names, and take in new ones.

        Args:
            renamed: Old → new names.
            state: The global tensors that clients train from now on.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Return the server's tensors that it takes to continue a run."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`; called after `setup`."""


class Plain(Objective):
    """The model's own loss, and nothing else."""

    needs: Traits = frozenset()
