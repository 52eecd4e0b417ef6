"""The server of a federation: the global state, what clients are sent, and how their updates become the next state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedbe.aggregation import Aggregator, Averaging, Mean, SampleWeighted, ServerOptimizer
from fedbe.algorithms.base import Algorithm
from fedbe.data import Batch
from fedbe.errors import UpdateError
from fedbe.federation.validation import UpdateCheck
from fedbe.messages import FitTask, Structure, Update
from fedbe.modeling.tensors import copy_tensors, load_tensors
from fedbe.objectives import Objective
from fedbe.storage.tensor_names import grouped, prefixed
from fedbe.traits import Trait


@dataclass
class Server:
    """What the server holds and does; it sees tasks and updates, never a client's data.

    A round is `begin_round`, then `task` and `receive` for each client, then `step` and `commit`.

    Attributes:
        model: The resident model, which the global tensors are loaded into.
        algorithm: What is trained, and the strategy by which updates become the next state.
        averaging: How updates are averaged, where it is not the strategy's own rule.
        optimizer: How the mean of the updates moves the global tensors.
        objective: What clients minimise, here its part on the server.
        state: The global tensors by exact parameter name.
        accepted: Client → the 0-based round of its last accepted update.
        trained: Names of the tensors that a client of the round under way has sent.
    """

    model: PreTrainedModel
    algorithm: Algorithm
    averaging: Averaging = field(default_factory=SampleWeighted)
    optimizer: ServerOptimizer = field(default_factory=Mean)
    objective: Objective = field(default_factory=Objective)
    state: dict[str, Tensor] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    _aggregator: Aggregator | None = field(default=None, repr=False)
    _check: UpdateCheck | None = field(default=None, repr=False)

    def setup(self, clients: int, cohort: int, seed: int) -> None:
        """Take the prepared model's tensors as the global state; once, before round 1.

        Args:
            clients: Number of clients of the run.
            cohort: How many of them take part in a round.
            seed: The run's seed.
        """
        self.algorithm.strategy.setup(self.algorithm.adaptation)
        self.state = copy_tensors(self.model, self.algorithm.adaptation.state_names)
        self.objective.setup(self._trainable_state(), clients)
        self.averaging.setup(clients, cohort, seed)

    def begin_round(self, round_index: int) -> None:
        """Get ready for the updates of a round."""
        own_rule = Trait.AGGREGATION in self.algorithm.offers and Trait.PLAIN_MEAN in self.averaging.offers
        strategy, averaging = self.algorithm.strategy, self.averaging
        self._aggregator = strategy.aggregator(self.state) if own_rule else averaging.begin(self.state, round_index)
        self._check = UpdateCheck(self.state, self.structure)
        self.trained = set()

    def task(self, client_id: str, experience: int, round_index: int, units: Collection[str]) -> FitTask:
        """Return what a client is given in a round to train these units."""
        names = self.algorithm.adaptation.units()
        trainable = tuple(name for unit in units for name in names[unit])
        received = self.algorithm.topology.send(self.algorithm.strategy.send(self.state, client_id))
        return FitTask(
            client_id,
            experience,
            round_index,
            received,
            trainable,
            self.objective.send(trainable),
            self.structure,
            self.accepted.get(client_id),
        )

    def receive(self, task: FitTask, update: Update, peeked: Mapping[str, Tensor] | None = None) -> None:
        """Take in an update, whole or not at all: first every check, then everything that keeps.

        Args:
            task: What the client was given.
            update: What it sent.
            peeked: What a simulation sees of the tensors that the client keeps; they are averaged, not sent.

        Raises:
            UpdateError: It cannot be used, and nothing of it was taken in.
        """
        if self._aggregator is None or self._check is None:
            raise RuntimeError("`begin_round` comes before `receive`")
        self._check(task, update)
        if not update.tensors and Trait.AGGREGATION in self.algorithm.offers:
            raise UpdateError(f"client {task.client_id!r} sent no tensor")
        seen = update if not peeked else _with_tensors(update, peeked)
        self._aggregator.check(seen)
        self.algorithm.strategy.check_report(task, update)
        self.objective.check_update(update)
        self._aggregator.add(seen)
        self.algorithm.strategy.observe(task, update)
        self.objective.receive(update)
        self.accepted[task.client_id] = task.round_index
        self.trained.update(update.tensors)

    def step(self) -> dict[str, Tensor]:
        """Return the next global tensors, made of the updates of the round; they do not take their place yet.

        Raises:
            UpdateError: A tensor of the result is not finite; the server's optimizer is as before then.
        """
        if self._aggregator is None:
            raise RuntimeError("`begin_round` comes before `step`")
        before = self.optimizer.state_dict()
        new = self.optimizer.step(self.state, self._aggregator.result(), self.trained)
        self._aggregator = self._check = None
        self.objective.step()
        bad = [name for name, tensor in new.items() if not _finite(tensor, self.state.get(name))]
        if bad:
            self.optimizer.load_state_dict(before)
            raise UpdateError(f"the average of {bad[0]!r} has values that are not finite")
        return new

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Make these the global tensors, in `state` and in the model.

        Raises:
            ValueError: They are not this model's: it has grown since.
        """
        if state.keys() != set(self.algorithm.adaptation.state_names):
            raise ValueError("these tensors are of a model with other blocks: a run that grows cannot go back to them")
        self.state = dict(state)
        load_tensors(self.model, self.state)

    @property
    def structure(self) -> Structure:
        """The model's structure as it is now."""
        return self.algorithm.adaptation.structure()

    def grow(self, record: Mapping[str, Any], inputs: Batch) -> Mapping[str, str] | None:
        """Let the strategy change the model's structure after a round; whatever names its tensors follows.

        Args:
            record: The round's line of `metrics.jsonl` so far.
            inputs: A real batch, on which the outputs must stay what they were.

        Returns:
            Old → new name of each parameter whose name has changed; ``None`` if the structure stays.
        """
        fixed = Trait.FIXED_STRUCTURE in self.algorithm.offers
        structure = None if fixed else self.algorithm.strategy.grow(record)
        return None if structure is None else self._restructure(structure, inputs)

    def _restructure(self, structure: Structure, inputs: Batch | None) -> Mapping[str, str]:
        adaptation = self.algorithm.adaptation
        renamed = adaptation.grow(self.model, structure, inputs)
        adaptation.hold(self.model)
        state = {renamed.get(name, name): tensor for name, tensor in self.state.items()}
        new = copy_tensors(self.model, set(adaptation.state_names) - state.keys())
        self.state = {name: (state | new)[name] for name in adaptation.state_names}
        self.optimizer.rename(renamed)
        self.objective.rename(renamed, self._trainable_state())
        self.algorithm.strategy.restructured(renamed)
        return renamed

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that the server needs to continue, by ``owner/name``."""
        owners = {
            "state": self.state,
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "strategy": self.algorithm.strategy.tensors(),
        }
        return {name: tensor for owner, named in owners.items() for name, tensor in prefixed(owner, named).items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what the server needs to continue besides tensors, as plain JSON values."""
        return {
            "structure": dict(self.structure),
            "accepted": dict(self.accepted),
            "strategy": self.algorithm.strategy.state_dict(),
            "averaging": self.averaging.state_dict(),
        }

    def come_to(self, state: Mapping[str, Any]) -> Mapping[str, str] | None:
        """Bring the model to the structure of a `state_dict`, before its tensors are loaded.

        Returns:
            As `grow`.
        """
        return None if state["structure"] == self.structure else self._restructure(state["structure"], None)

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict` and its `tensors`; the model has its structure by then (`come_to`)."""
        owned = grouped(tensors)
        self.optimizer.load_state_dict(owned.get("optimizer", {}))
        self.objective.load_state_dict(owned.get("objective", {}))
        # In the order of the adaptation: a file has an order of its own, and sums depend on it.
        known = owned.get("state", {})
        self.restore({name: known[name] for name in self.algorithm.adaptation.state_names if name in known} | known)
        self.algorithm.strategy.load_state_dict(state["strategy"])
        self.algorithm.strategy.load_tensors(owned.get("strategy", {}), self.state)
        self.averaging.load_state_dict(state.get("averaging", {}))
        self.accepted = dict(state["accepted"])

    def _trainable_state(self) -> dict[str, Tensor]:
        trained = set(self.algorithm.adaptation.trainable_names)
        return {name: tensor for name, tensor in self.state.items() if name in trained}


def _with_tensors(update: Update, more: Mapping[str, Tensor]) -> Update:
    tensors = {**update.tensors, **more}
    return Update(update.client_id, tensors, update.samples, update.metrics, update.extra, update.structure)


def _finite(tensor: Tensor, before: Tensor | None) -> bool:
    return tensor is before or bool(torch.isfinite(tensor).all())
