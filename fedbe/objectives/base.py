"""The protocol of a local objective: on the server over all rounds, and at a client during its run."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.data import Batch
from fedbe.errors import Problem
from fedbe.messages import ClientTask, Update

KEY = "client.objective"


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


class Objective:
    """Base class: an objective over all rounds, on the server's side; the default is the model's own loss.

    Subclass it in a file of your own and name it by ``class_path`` under ``client.objective``.

    Attributes:
        needs_global_model: Whether it makes no sense where clients do not share one global model.
        needs_lasting_tensors: Whether it makes no sense where the trained tensors start anew in each round.
        extra_samples: Samples that a step computes on for each sample of its batch, besides that one.
    """

    needs_global_model: bool = False
    needs_lasting_tensors: bool = False
    extra_samples: float = 0.0

    def check(self, optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]) -> list[Problem]:
        """Return the mistakes in this configuration, given the clients' optimizer; found before work starts."""
        return []

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> None:
        """Look at the base model, once, before it is changed; called before `setup`.

        Raises:
            ConfigError: It does not fit this model.
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

    def local(self, model: nn.Module, task: ClientTask) -> LocalObjective:
        """Return the objective of one client's run; called where the client is, before its first step.

        Args:
            model: The resident model with the client's tensors in it.
            task: The client's; ``extra`` is what `send` returned, ``objective_kept`` what its last run's
                `LocalObjective.finish` kept, which is nothing at first.
        """
        return LocalObjective()

    def receive(self, update: Update) -> None:
        """Take in what a client sent besides (`Update.extra`); called in the order of the cohort."""

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
