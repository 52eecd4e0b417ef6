"""A round that makes the model worse is taken back."""

from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fedbe.errors import Facts, Problem, check_at_least
from fedbe.federation.callback import FederatedCallback, Phase
from fedbe.federation.rollback import Snapshot
from fedbe.federation.view import RunView


class RollbackGuard(FederatedCallback):
    """Puts the global tensors back to where a round began, if it went wrong.

    The moments of the server optimizer go back with them; what clients keep, scores and control variates do not. It
    comes before all that measures: the round's record holds the scores of the model that was kept, and under
    ``rolled_back`` the reason and the scores of the one that was discarded.

    Args:
        loss_rise: Most by which the downstream validation loss, in nats, may lie above the lowest so far; ``None`` for
            any. A loss that is no number is always too high. Looked at in rounds that are evaluated.
        norm_ratio: Most that the norm of the global change may be, over the median of the rounds before; ``None``
            for any. Looked at from the fourth round on.
        window: Of how many rounds before.
        patience: Rounds taken back in a row after which the run ends.

    Source: ours.
    """

    phase = Phase.GUARD

    def __init__(
        self,
        loss_rise: float | None = 0.5,
        norm_ratio: float | None = 10.0,
        window: int = 10,
        patience: int = 5,
    ) -> None:
        self.loss_rise = loss_rise
        self.norm_ratio = norm_ratio
        self.window = window
        self.patience = patience
        self.lowest: float | None = None
        self.norms: list[float] = []
        self.in_a_row = 0
        self._norm: float | None = None

    @property
    def state_key(self) -> str:
        """Its arguments: several may be in one run."""
        limits = (self.loss_rise, self.norm_ratio, self.window, self.patience)
        return f"{super().state_key} {limits}"

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the numbers."""
        return [
            *check_at_least(key, 0, loss_rise=self.loss_rise),
            *check_at_least(key, 1, norm_ratio=self.norm_ratio, window=self.window, patience=self.patience),
        ]

    def on_round_start(self, run: RunView) -> None:
        """Remember where the round begins."""
        self._start: Snapshot = run.snapshot()
        self._norm = None

    def on_aggregate(self, run: RunView, new_state: Mapping[str, Tensor]) -> None:
        """Measure how far the global tensors move."""
        changes = [new_state[name].float() - tensor.float() for name, tensor in run.state.items()]
        self._norm = torch.nn.utils.get_total_norm(changes).item()

    def on_round_end(self, run: RunView) -> None:
        """Take the round back if there is a reason to, else learn from it."""
        if self._norm is None:  # nothing was aggregated: the loop itself has taken the round back
            back = run.record.rolled_back
            reason = None if back is None else back["reason"]
        else:
            reason = self._judge(run, self._norm)
        self.in_a_row = 0 if reason is None else self.in_a_row + 1
        if self.in_a_row >= self.patience:
            run.stop(f"{self.patience} rounds in a row were taken back: {reason}")

    def _judge(self, run: RunView, norm: float) -> str | None:
        """Take the round back and return why, or learn what is usual."""
        loss = None if run.record.downstream is None else run.record.downstream["loss"]
        reason = self._reason(norm, loss)
        if reason is not None:
            run.roll_back(self._start, reason)
            return reason
        self.norms = [*self.norms, norm][-self.window :]
        self.lowest = loss if self.lowest is None or (loss is not None and loss < self.lowest) else self.lowest
        return None

    def _reason(self, norm: float, loss: float | None) -> str | None:
        usual = median(self.norms) if len(self.norms) >= 3 else None
        if self.norm_ratio is not None and usual and not norm <= self.norm_ratio * usual:
            return f"the global change is {norm:.3g} long, {norm / usual:.3g} times what is usual"
        if loss is not None and self.loss_rise is not None:
            if loss != loss:
                return "the validation loss is no number"
            if self.lowest is not None and loss > self.lowest + self.loss_rise:
                return f"the validation loss is {loss:.4g}, and was {self.lowest:.4g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what is usual, and how many rounds were taken back in a row."""
        return {"lowest": self.lowest, "norms": self.norms, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with what is usual."""
        self.lowest, self.norms, self.in_a_row = state["lowest"], list(state["norms"]), state["in_a_row"]
