"""The learning-rate schedule of the clients' optimizers."""

import math
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fedbe.errors import Facts, Problem


@dataclass
class Schedule:
    """Learning-rate schedule of the clients' optimizers, stepped at each optimizer step.

    Attributes:
        name: Shape after the warm-up: ``constant``, or ``linear`` or ``cosine`` down to zero.
        warmup_steps: Steps below the full rate, rising linearly from the first, which is never zero. An expanded block
            starts with zeroed projections, so that most of its parameters get their first gradient at step 2: a few
            steps of warm-up keep Adam from jumping.
        span: ``round``: the schedule starts over with each client's run; ``run``: it goes on from round to round, over
            all rounds, whoever takes part.
    """

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    span: Literal["round", "run"] = "round"

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this schedule."""
        if self.warmup_steps < 0:
            return [Problem(f"{key}.warmup_steps", self.warmup_steps, "give 0 or more steps")]
        return []

    def factor(self, step: int, total_steps: int) -> float:
        """Return the factor on the learning rate at a 0-based step of `total_steps`, in (0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.name == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return max(0.0, 1 - progress) if self.name == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def build(self, optimizer: Optimizer, round_index: int, rounds: int, steps_per_round: int) -> LambdaLR:
        """Return a scheduler that begins where this round begins.

        Args:
            optimizer: A fresh optimizer.
            round_index: 0-based round.
            rounds: Number of rounds of the run.
            steps_per_round: Optimizer steps that this client takes in one round.
        """
        spans_run = self.span == "run"
        first = steps_per_round * round_index if spans_run else 0
        total = steps_per_round * (rounds if spans_run else 1)
        return LambdaLR(optimizer, lambda step: self.factor(first + step, total))
