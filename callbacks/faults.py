"""Clients that fail or lie on purpose, to see what a run does about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast, get_args

import torch
from torch import Tensor

from fedbe.errors import Facts, Problem
from fedbe.federation.callback import FederatedCallback, Phase
from fedbe.federation.view import RunView
from fedbe.messages import Failure, FailureKind, FitTask, Outcome, Update
from fedbe.seeding import generator

Corruption = Callable[[Update, Mapping[str, Tensor], float, torch.Generator], Update]


def _tensors(change: Callable[[Tensor, Tensor, float, torch.Generator], Tensor]) -> Corruption:
    """Return what changes every tensor of an update, given the one it was trained from."""

    def corrupt(update: Update, state: Mapping[str, Tensor], factor: float, chance: torch.Generator) -> Update:
        changed = {name: change(t, state.get(name, t), factor, chance) for name, t in update.tensors.items()}
        return replace(update, tensors=changed)

    return corrupt


def _noise(tensor: Tensor, before: Tensor, factor: float, chance: torch.Generator) -> Tensor:
    """Return noise as long as `factor` times the true change, around where it began."""
    noise = torch.randn(tensor.shape, generator=chance).to(tensor)
    length: Tensor = factor * (tensor - before).norm() / noise.norm()
    return before + noise * length


CORRUPTIONS: dict[str, Corruption] = {
    "nan": _tensors(lambda tensor, *_: torch.full_like(tensor, float("nan"))),
    "infinity": _tensors(lambda tensor, *_: torch.full_like(tensor, float("inf"))),
    "shape": _tensors(lambda tensor, *_: tensor.flatten()[:-1]),
    "dtype": _tensors(lambda tensor, *_: tensor.double()),
    "name": lambda update, *_: replace(update, tensors={f"{n}_": t for n, t in update.tensors.items()}),
    "zero_weight": lambda update, *_: replace(update, samples=0),
    "negative_weight": lambda update, *_: replace(update, samples=-update.samples),
    "sign_flip": _tensors(lambda tensor, before, factor, _: before - factor * (tensor - before)),
    "scaled": _tensors(lambda tensor, before, factor, _: before + factor * (tensor - before)),
    "random": _tensors(_noise),
}
"""What a client may send instead of its update, by name."""


_FAILURES = [kind for kind in get_args(FailureKind) if kind != "update"]


class FaultInjection(FederatedCallback):
    """Lets chosen clients fail, or send something else than they trained.

    It comes before all that measures: what it puts in an update's place is what has arrived.

    Args:
        kind: ``error``, ``timeout`` or ``memory``: nothing comes of the client. ``nan``, ``infinity``, ``shape``,
            ``dtype``, ``name``, ``zero_weight``, ``negative_weight``: what it sends is broken. ``sign_flip``,
            ``scaled``, ``random``: an attack, well-formed and wrong.
        clients: Names; ``None`` for all.
        rounds: Numbers, 1 for the first; ``None`` for all.
        probability: Chance of each client in each round, in (0, 1].
        factor: Length of an attack ÷ that of the true change.
    """

    phase = Phase.GUARD

    def __init__(
        self,
        kind: str,
        clients: Sequence[str] | None = None,
        rounds: Sequence[int] | None = None,
        probability: float = 1.0,
        factor: float = 1.0,
    ) -> None:
        self.kind = kind
        self.clients = clients
        self.rounds = rounds
        self.probability = probability
        self.factor = factor

    @property
    def state_key(self) -> str:
        """Its arguments: several may be in one run."""
        return f"{super().state_key} {vars(self)}"

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the arguments."""
        problems = []
        known = [*_FAILURES, *CORRUPTIONS]
        if self.kind not in known:
            problems.append(Problem(f"{key}.kind", self.kind, f"give one of {', '.join(known)}"))
        if not 0 < self.probability <= 1:
            problems.append(Problem(f"{key}.probability", self.probability, "give a chance above 0, and at most 1"))
        if not self.factor > 0:
            problems.append(Problem(f"{key}.factor", self.factor, "give a number above 0"))
        return problems

    def on_client_update(self, run: RunView, task: FitTask, update: Update) -> Outcome | None:
        """Put something else in the place of the update, if it is the client's turn."""
        number = task.round_index + 1
        if (self.clients is not None and task.client_id not in self.clients) or (
            self.rounds is not None and number not in self.rounds
        ):
            return None
        chance = generator(run.seed, "fault", self.kind, *task.purpose)
        if torch.rand((), generator=chance).item() >= self.probability:
            return None
        if self.kind in _FAILURES:
            return Failure(task.client_id, cast(FailureKind, self.kind), f"{self.kind}, injected")
        return CORRUPTIONS[self.kind](update, run.state, self.factor, chance)
